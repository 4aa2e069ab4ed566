"""Tables, the terminal, and files written whole."""
