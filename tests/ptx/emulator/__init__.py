"""An emulator of the PTX that Triton emits for NVIDIA cards, written from NVIDIA's "PTX ISA"."""
