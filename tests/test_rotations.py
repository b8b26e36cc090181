"""The best rotation is found, and is never a reflection."""

import numpy as np
from scipy.spatial.transform import Rotation

from sv4d_ns.geometry.rotations import nearest_rotation


def test_a_rotation_is_found_again_from_moved_points() -> None:
    rng = np.random.default_rng(0)
    turns = Rotation.random(5, rng=rng).as_matrix()
    before = rng.normal(size=(5, 20, 3))
    products = np.einsum("kij,knj,knl->kil", turns, before, before)
    np.testing.assert_allclose(nearest_rotation(products), turns, atol=1e-10)


def test_a_reflection_becomes_the_nearest_rotation() -> None:
    found = nearest_rotation(np.diag([3.0, 2.0, -1.0]))
    np.testing.assert_allclose(found, np.eye(3), atol=1e-12)


def test_flat_points_have_a_rotation() -> None:
    found = nearest_rotation(np.diag([1.0, 1.0, 0.0]))
    np.testing.assert_allclose(found @ found.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(found) > 0
