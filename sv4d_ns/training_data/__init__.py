"""Training data: assets rendered as view-by-frame matrices, sorted out, and read back (docs/data.md)."""
