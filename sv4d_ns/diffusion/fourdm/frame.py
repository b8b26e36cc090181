"""The frame 4DM's cameras stand in: distance 1.1, field of view 45 degrees, box of half side 1.

Source: aejion/4Diffusion @ 627d0cd, its random-camera data module.
"""

import math

from sv4d_ns.geometry.cameras import CAMERA_RADIUS, FIELD_OF_VIEW_DEG

DISTANCE = 1.1
FIELD_OF_VIEW = 45.0
"""Degrees, both ways."""
WORLD_SCALE = (
    CAMERA_RADIUS
    * math.tan(math.radians(FIELD_OF_VIEW_DEG) / 2)
    / (DISTANCE * math.tan(math.radians(FIELD_OF_VIEW) / 2))
)
"""Units of this package's world in one unit of the reference's: both cameras then see equally much of the plane
through the object's centre."""
