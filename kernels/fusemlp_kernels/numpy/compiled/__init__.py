"""The kernels of the CPU, compiled with numba: importing any module of this package but ``tables`` imports numba.

A team of threads (``team``) does the tasks of a table of calls (``tables``, ``steps``): those of a program, step by
step, or one by itself. A task is blocks of rows of the batch (``layers``, ``losses``) or pieces of tensors
(``pieces``). Widths and places are numbers in the table, so one compilation, kept on disk, serves all networks with
these activations, loss and kind of optimizer; ``pruning`` cuts the code that they do not use. The ``products`` are
compiled once for all.

The loops over elements may contract products and sums into one rounding, and the sums may be taken in any order;
nothing else is relaxed: NaN and infinities go through as the contract wants it.
"""
