"""How long a training step takes, here and in other libraries, side by side: ``python -m bench``.

A case (``cases``) is a network and its data. A peer (``peers``) is a library that trains it. Each peer lives in a
process of its own (``worker``); ``measure`` gives them their turns, ``report`` writes down what came out.
"""
