"""Time a training step of fusemlp and of other libraries, side by side: ``python -m bench``.

A case (``cases``) is a network and its data. A contender (``peers``) is a library's way of training it. Each contender
runs in its own process (``worker``). Before it is timed, its losses are compared (``verification``) with a float64
oracle (``oracle``). ``measure`` times the contenders in turn, ``report`` writes and tabulates the figures, ``plots``
draws them, ``readme`` puts the tables into the pages, and ``compare`` finds regressions between two runs.
"""
