"""How a subject is found, declared and called."""
