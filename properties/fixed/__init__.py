"""Fixed cases, one module an operation."""
