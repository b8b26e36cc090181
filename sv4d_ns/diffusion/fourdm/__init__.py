"""4DM: ImageDream with motion modules (4Diffusion, NeurIPS 2024)."""
