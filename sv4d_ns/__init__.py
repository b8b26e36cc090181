"""sv4d_ns: one short video of an object becomes an animated, textured 3D model (SV4D 2.0 on nerfstudio)."""

__version__ = "0.1.0"
