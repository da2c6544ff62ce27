"""Tables: one recipe for a model, and one way to train it."""
