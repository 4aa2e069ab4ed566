"""How a law is run on a subject, and what comes of it."""
