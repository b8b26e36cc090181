"""The rotation that fits best (Procrustes' problem)."""

import numpy as np
from jaxtyping import Float


def nearest_rotation(products: Float[np.ndarray, "*batch 3 3"]) -> Float[np.ndarray, "*batch 3 3"]:
    """Proper rotations R with the largest trace of R^T M (Kabsch 1976): for M the sum of after before^T over pairs of
    centred points, the R that carries `before` closest to `after`."""
    u, _, vt = np.linalg.svd(products)
    u[..., :, 2] *= np.where(np.linalg.det(u @ vt) < 0, -1.0, 1.0)[..., None]
    return u @ vt
