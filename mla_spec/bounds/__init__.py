"""How far an honest computation may be from the exact result: derived from a declared profile."""
