"""The small multi-view video diffusion model shipped with the package."""
