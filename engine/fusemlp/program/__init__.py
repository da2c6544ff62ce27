"""A training step as data: lowering, layout, verification."""
