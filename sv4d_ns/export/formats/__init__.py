"""File formats of exported assets."""
