"""How long a training step takes, here and in other libraries, side by side: ``python -m bench``.

A case (``cases``) is a network and its data. A contender (``peers``) is a library's way of training it. Each lives in a
process of its own (``worker``), and before it is timed its losses are compared (``verification``) with those of the
textbook in float64 (``oracle``). ``measure`` gives the contenders their turns, ``report`` writes down what came out,
``plots`` draws it, ``readme`` puts it into README.md, and ``compare`` finds what became slower between two runs.
"""
