"""The training loop of the CPU, compiled with numba: importing a module of this package imports numba.

The loop (``steps``) walks a table of the program's calls (``tables``). Widths and places are numbers in it, so one
compilation, kept on disk, serves all networks with these activations, loss and kind of optimizer; ``pruning`` cuts the
code that they do not use.

The loops over elements may contract products and sums into one rounding, and the sums may be taken in any order;
nothing else is relaxed: NaN and infinities go through as the contract wants it.
"""
