"""Training of multi-view video diffusion models, from procedural creatures or rendered assets (docs/training.md)."""
