"""Frozen descriptions: network, losses, optimizers, schedules."""
