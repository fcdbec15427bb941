"""The CPU path: NumPy and SciPy."""
