"""sv4d_ns: one short video of an object becomes an animated, textured 3D model (SV4D 2.0 on nerfstudio)."""

from sv4d_ns.utils.moved import accept_moved_names

__version__ = "0.1.0"

accept_moved_names()
