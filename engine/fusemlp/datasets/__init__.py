"""Data sets by name or file, and their preprocessing."""
