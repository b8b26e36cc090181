"""Sizes an export accepts, checked before anything heavy is imported."""

from sv4d_ns.utils.errors import InputError

LEAST_RESOLUTION = 16
"""Nodes of the marching-cubes grid along a side."""
LEAST_FACES = 100
"""Below it a body and its limbs cannot be told apart."""
TEXTURE_SIZES = (64, 8192)
"""Smallest and largest side of a texture, texels."""


def check_resolution(resolution: int) -> None:
    """Raises `InputError` for a grid too coarse."""
    if resolution < LEAST_RESOLUTION:
        raise InputError(
            f"--resolution {resolution} is too coarse for any shape: give {LEAST_RESOLUTION} or more (128 is usual)."
        )


def check_face_budget(max_faces: int | None) -> None:
    """Raises `InputError` for a budget too small; None is no budget."""
    if max_faces is not None and max_faces < LEAST_FACES:
        raise InputError(
            f"--max-faces {max_faces} is too small for any shape: give {LEAST_FACES} or more, or None for all faces."
        )


def check_texture_size(size: int) -> None:
    """Raises `InputError` for a size no texture can have."""
    low, high = TEXTURE_SIZES
    if not low <= size <= high:
        raise InputError(f"--texture-size {size} cannot be made: give {low} to {high} (1024 is usual).")
