"""Movies of a fitted field."""
