"""Colours of a moving surface."""
