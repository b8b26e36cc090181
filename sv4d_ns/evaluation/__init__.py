"""Evaluation of views, videos and 4D geometry, with every protocol choice written down (docs/evaluation.md)."""
