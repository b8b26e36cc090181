"""The multi-view video diffusion model of SV4D 2.0 as a diffusers pipeline, and grids of any size made with it."""
