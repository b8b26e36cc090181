"""From a grid of views to a field: one optimisation step and what it is made of, in plain torch."""
