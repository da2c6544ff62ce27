"""Fitting: the epoch loop, validation, history, checkpoints, learning-rate finder."""
