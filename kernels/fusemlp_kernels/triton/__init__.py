"""Fused Triton kernels for training multi-layer perceptrons; ``functional`` has them as functions of tensors."""
