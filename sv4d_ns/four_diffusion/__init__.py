"""4Diffusion as a nerfstudio method: a space-time field optimised by 4D-aware score distillation and an anchor."""
