"""From a field's density to one moving surface."""
