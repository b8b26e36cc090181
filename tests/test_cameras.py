"""Camera conventions as properties."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sv4d_ns.geometry.cameras import CAMERA_RADIUS, OBJECT_BOX, ViewPlan, framing_camera, look_at_cameras
from sv4d_ns.utils.errors import InputError

azimuths = st.floats(-720, 720)
elevations = st.floats(-89, 89)


def project(point: np.ndarray, c2w: np.ndarray, focal: float, size: int) -> np.ndarray:
    camera = c2w[:3, :3].T @ (point - c2w[:3, 3])
    return np.array([size / 2 + focal * camera[0] / -camera[2], size / 2 - focal * camera[1] / -camera[2]])


@given(azimuths, elevations, st.floats(1, 10))
def test_camera_stands_on_the_sphere_and_looks_at_the_origin(azimuth, elevation, radius):
    (c2w,) = look_at_cameras(np.array([azimuth]), np.array([elevation]), radius)
    rotation, position = c2w[:3, :3], c2w[:3, 3]
    a, e = np.deg2rad(azimuth), np.deg2rad(elevation)
    expected = radius * np.array([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)])
    np.testing.assert_allclose(position, expected, atol=1e-9 * radius)
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(3), atol=1e-12)
    assert np.linalg.det(rotation) == pytest.approx(1)
    np.testing.assert_allclose(rotation[:, 2], position / radius, atol=1e-9)  # looks along its own -z
    assert rotation[2, 0] == 0 and rotation[2, 1] > 0  # level horizon, head up
    np.testing.assert_array_equal(c2w[3], [0, 0, 0, 1])


def test_input_camera_matches_the_written_convention():
    c2w = ViewPlan.BUNDLED.c2w()[0]
    np.testing.assert_allclose(c2w[:3, 3], [CAMERA_RADIUS, 0, 0], atol=1e-12)
    focal = ViewPlan.BUNDLED.focal_px(256)
    u, v = project(np.array([0, 0.3, 0.2]), c2w, focal, 256)
    assert u > 128 and v < 128  # image-right is +y, image-up is +z
    assert focal == pytest.approx(420.0, abs=0.05)


def test_growing_azimuth_moves_the_camera_to_its_right():
    before, after = ViewPlan.ring((10.0,)).c2w()
    assert (after[:3, 3] - before[:3, 3]) @ before[:3, 0] > 0


def test_the_whole_object_sphere_is_seen_in_every_view():
    plan = ViewPlan((40.0, 200.0), (20.0, -35.0), input_elevation_deg=15.0)
    for c2w in plan.c2w():
        for axis in (c2w[:3, 0], c2w[:3, 1], -c2w[:3, 0]):
            pixel = project(0.566 * axis, c2w, plan.focal_px(256), 256)
            assert (pixel > 0).all() and (pixel < 256).all()


@given(st.lists(st.tuples(azimuths, st.floats(-60, 60)), min_size=1, max_size=6), st.floats(-29, 29))
def test_plan_survives_json(views, input_elevation):
    plan = ViewPlan(tuple(a for a, _ in views), tuple(e for _, e in views), input_elevation)
    assert ViewPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert plan.c2w().shape == (plan.num_views + 1, 4, 4)


@given(azimuths, st.floats(-60, 60), st.floats(20, 90), st.floats(0.4, 3), st.integers(0, 1000))
def test_a_framing_camera_shows_everything_as_large_as_it_can(azimuth, elevation, fov, aspect, seed):
    points = np.random.default_rng(seed).uniform((-1, -0.2, 0.1), (1, 0.4, 1.5), (40, 3))
    right, up, back = look_at_cameras(np.array([azimuth]), np.array([elevation]))[0, :3, :3].T

    def seen(some: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places in the picture, whose edges are at -1 and 1."""
        ahead = (position - some) @ back
        assert ahead.min() > 0
        slope = np.tan(np.deg2rad(fov) / 2)
        return (some - position) @ right / ahead / (slope * aspect), (some - position) @ up / ahead / slope

    position, target = framing_camera(points, points, azimuth, elevation, fov, aspect)
    np.testing.assert_allclose((position - target) / np.linalg.norm(position - target), back, atol=1e-9)
    x, y = seen(points)
    tighter = x if np.ptp(x) > np.ptp(y) else y
    np.testing.assert_allclose([tighter.min(), tighter.max()], [-1, 1], atol=1e-6)
    assert max(abs(x).max(), abs(y).max()) < 1 + 1e-6


def test_a_framing_camera_centres_some_points_where_the_others_leave_room():
    tall = np.array([[0.0, y, z] for y in (-0.4, 0.4) for z in (-0.5, 0.5)])
    wide = [framing_camera(tall, tall[:2], 0.0, 0.0, 40.0, aspect)[0] for aspect in (5.0, 1.0, 0.1)]
    assert wide[0][1] == pytest.approx(-0.4), "y is to the right of a camera on the x axis"
    assert -0.4 < wide[1][1] < 0, "as far as it goes"
    assert wide[2][1] == pytest.approx(0), "not at all"


def test_official_plans():
    assert ViewPlan.OFFICIAL_8.azimuths_deg == (30, 75, 120, 165, 210, 255, 300, 330)
    assert set(ViewPlan.OFFICIAL_8.elevations_deg) == {0.0}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"azimuths_deg": (), "elevations_deg": ()}, "no novel view"),
        ({"azimuths_deg": (1.0, 2.0), "elevations_deg": (0.0,)}, "2 azimuths but 1 elevations"),
        ({"azimuths_deg": (float("nan"),), "elevations_deg": (0.0,)}, "not finite"),
        ({"azimuths_deg": (0.0,), "elevations_deg": (float("inf"),)}, "not finite"),
        ({"azimuths_deg": (0.0,), "elevations_deg": (90.0,)}, "elevation 90"),
        ({"azimuths_deg": (0.0,), "elevations_deg": (-60.0,), "input_elevation_deg": -30.0}, "elevation -90"),
        ({"azimuths_deg": (0.0,), "elevations_deg": (0.0,), "radius": OBJECT_BOX}, "radius 0.57"),
        ({"azimuths_deg": (0.0,), "elevations_deg": (0.0,), "radius": -2.0}, "radius -2"),
        ({"azimuths_deg": (0.0,), "elevations_deg": (0.0,), "fov_deg": 180.0}, "field of view 180"),
        ({"azimuths_deg": ("a",), "elevations_deg": (0.0,)}, "not a number"),
        ({"azimuths_deg": (0.0,)}, "elevations_deg"),
        ({"azimuths_deg": (0.0,), "elevations_deg": (0.0,), "roll": 3.0}, "roll"),
    ],
)
def test_nonsense_is_refused_in_one_sentence(values, says):
    with pytest.raises(InputError, match=says) as caught:
        ViewPlan.from_dict(values)
    assert "\n" not in str(caught.value)
