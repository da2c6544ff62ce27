"""Fused Triton kernels for training multi-layer perceptrons."""
