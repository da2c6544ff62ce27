"""The CPU backend: preallocated buffers, compiled loops, a team of threads."""
