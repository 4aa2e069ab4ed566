"""Exact answers in rationals and in ball arithmetic, independent of the reference."""
