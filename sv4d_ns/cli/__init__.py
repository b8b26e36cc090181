"""The `sv4d` command."""
