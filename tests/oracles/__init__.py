"""Slow, obvious loops in float64, one file a family."""
