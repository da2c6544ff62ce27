"""Steps of several models at once without a compiler: their arrays behind one another, one NumPy call for all.

A call of NumPy's takes about a microsecond before it computes anything, and on a small network most of a step is that.
Here what is element-wise goes over the batches of a *crew* of models in one call, by the very functions of the single
calls; products, and sums whose order depends on the shape, are made model by model by the very calls of BLAS. So a
model's bits are those of its steps alone.
"""
