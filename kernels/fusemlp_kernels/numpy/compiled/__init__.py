"""The training loop of the CPU, compiled with numba: importing a module of this package imports numba.

Nothing here is specialised on a network: widths, activations, loss and optimizer are numbers in tables (``tables``),
looked at between the loops, so that one compilation, kept on disk, serves every network of an element type.

The loops over elements may contract products and sums into one rounding, and the sums may be taken in any order;
nothing else is relaxed: NaN and infinities go through as the contract wants it.
"""
