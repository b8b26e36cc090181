"""How pictures are compared."""
