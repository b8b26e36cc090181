"""Training of the bundled model: a denoiser of multi-view video whose prediction is the render of a volume."""
