"""Checks of the arrays that users give, on the host and on a device."""
