"""What can be asked of a subject: one module an operation."""
