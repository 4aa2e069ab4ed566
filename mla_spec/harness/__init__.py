"""How a subject is driven and judged."""
