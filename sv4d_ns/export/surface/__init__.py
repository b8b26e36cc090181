"""The surface of a field and its motion, as one mesh."""
