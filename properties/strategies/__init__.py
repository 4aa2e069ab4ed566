"""Hypothesis strategies of cases, a file an operation."""
