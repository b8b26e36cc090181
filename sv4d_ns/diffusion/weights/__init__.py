"""Weights of released models: found, checked, read as a stream, renamed and converted."""
