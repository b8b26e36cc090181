"""Colours of the moving surface, from pictures of it."""
