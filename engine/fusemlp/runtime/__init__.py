"""Programs bound to memory on a backend, and the plans that run them."""
