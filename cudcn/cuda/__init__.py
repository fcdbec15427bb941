"""The CUDA path: allocations, template choice and launches, the same for CuPy and for the emulator."""
