"""True volumes: boxes, overlapping and mirrored parts, sheets, rods, cavities; colours of the nearest surface."""

import numpy as np
import pytest
import trimesh
from glb_fixture import BOX_FACES, Glb, box, solid

from sv4d_ns.diffusion.bundled.frustum import Frustum
from sv4d_ns.geometry.cameras import look_at_cameras
from sv4d_ns.training_data.gltf_scene import load_scene, pose
from sv4d_ns.training_data.lighting import benchmark_lighting, light_field
from sv4d_ns.training_data.volume import FAR, NEAR, nearest_colours, occupancy

CAMERA = look_at_cameras(np.array([30.0]), np.array([20.0]))[0]
CENTRES = Frustum().world_points(64, CAMERA, np.ones((64,) * 3, bool)).reshape(64, 64, 64, 3)
DEPTH = np.einsum("dhwk,k->dhw", CENTRES - CAMERA[:3, 3], -CAMERA[:3, 2])
CELL = (2.57 - 1.43) / 64
SIZES = CELL * (2 * np.tan(np.deg2rad(33.9) / 2) / 64 * DEPTH) ** 2


def inside(path):
    return occupancy(pose(load_scene(path), None, 0.0), CAMERA)


def world(points):
    """World points of glTF's: (x, -z, y)."""
    return points[..., [0, 2, 1]] * [1, -1, 1]


def test_cells_are_where_the_camera_sees_them():
    assert pytest.approx((Frustum().near, Frustum().far)) == (NEAR, FAR), "the network's grid and the true one"
    assert DEPTH[0, 5, 9] == pytest.approx(1.43 + CELL / 2) and DEPTH[63, 0, 0] == pytest.approx(2.57 - CELL / 2)
    middle = CENTRES[:, 31:33, 31:33].mean(axis=(1, 2))
    np.testing.assert_allclose(np.cross(middle - CAMERA[:3, 3], CAMERA[:3, 2]), 0, atol=1e-9)
    right = CENTRES[30, 30, 40] - CENTRES[30, 30, 20]
    down = CENTRES[30, 40, 30] - CENTRES[30, 20, 30]
    assert right @ CAMERA[:3, 0] > 0 and down @ CAMERA[:3, 1] < 0


def test_a_box_and_a_ball_are_what_they_are(tmp_path):
    half = np.array([0.31, 0.2, 0.12])
    found = inside(solid(tmp_path / "box.glb", box(half)))
    exact = (np.abs(CENTRES) < half[[0, 2, 1]]).all(axis=-1)
    assert (found ^ exact).mean() < 3e-4 and found.sum() > 3000
    ball = trimesh.creation.icosphere(3, 0.4)
    found = inside(solid(tmp_path / "ball.glb", (ball.vertices, ball.faces)))
    assert (found * SIZES).sum() == pytest.approx(ball.volume, rel=0.03)
    turned = inside(solid(tmp_path / "inverted.glb", (ball.vertices, ball.faces[:, ::-1])))
    np.testing.assert_array_equal(found, turned)


def test_overlapping_and_mirrored_parts_are_one_solid(tmp_path):
    """A mirrored node turns its box inside out; the overlap with the other box must not cancel."""
    glb = Glb()
    mesh = glb.mesh(glb.primitive(*box((0.2, 0.2, 0.2))))
    glb.node(mesh=mesh, translation=[-0.1, 0, 0])
    glb.node(mesh=mesh, translation=[0.1, 0, 0], scale=[-1, 1, 1])
    found = inside(glb.save(tmp_path / "a.glb"))
    exact = (np.abs(CENTRES) < [0.3, 0.2, 0.2]).all(axis=-1)
    assert (found ^ exact).mean() < 3e-4


def test_a_sheet_is_one_layer_and_hides_nothing(tmp_path):
    sheet = np.array([[0.3, -0.3, -0.3], [0.3, 0.3, -0.3], [0.3, 0.3, 0.3], [0.3, -0.3, 0.3]])
    faces = np.array([[0, 1, 2], [0, 2, 3]])
    alone = inside(solid(tmp_path / "sheet.glb", (sheet, faces)))
    thickness = (alone * SIZES).sum() / 0.36
    assert 0.5 * CELL < thickness < 2.5 * CELL
    assert np.abs(CENTRES[alone][:, 0] - 0.3).max() < 1.5 * CELL
    with_box = inside(solid(tmp_path / "both.glb", (sheet, faces), box((0.15,) * 3)))
    only_box = inside(solid(tmp_path / "box.glb", box((0.15,) * 3)))
    np.testing.assert_array_equal(with_box, only_box | alone)


def test_many_sheets_do_not_fill_what_is_between_them(tmp_path):
    sheet = np.array([[0, -0.2, -0.2], [0, 0.2, -0.2], [0, 0.2, 0.2], [0, -0.2, 0.2]])
    leaves = [(sheet + np.array([x, 0, 0]), np.array([[0, 1, 2], [0, 2, 3]])) for x in np.linspace(-0.3, 0.3, 4)]
    found = inside(solid(tmp_path / "a.glb", *leaves))
    between = np.abs(CENTRES[..., 0][found][:, None] - np.linspace(-0.3, 0.3, 4)).min(axis=1)
    assert between.max() < 1.5 * CELL


def test_a_box_without_a_lid_is_solid(tmp_path):
    points, faces = box((0.25, 0.25, 0.25))
    found = inside(solid(tmp_path / "a.glb", (points, faces[2:])))
    exact = (np.abs(CENTRES) < 0.22).all(axis=-1)
    assert found[exact].mean() > 0.95
    assert not found[(np.abs(CENTRES) > 0.28).any(axis=-1)].any()


def test_a_cavity_is_filled(tmp_path):
    """A hollow ball: an outer wall and an inner one that looks inward."""
    points, faces = box((0.15,) * 3)
    outer = box((0.3,) * 3)[0]
    hollow = np.concatenate([outer, points]), np.concatenate([BOX_FACES, faces[:, ::-1] + 8])
    found = inside(solid(tmp_path / "a.glb", hollow))
    assert found[(np.abs(CENTRES) < 0.28).all(axis=-1)].all()


def test_thin_rods_are_whole_and_thin(tmp_path):
    axis = np.array([0.8, 0.5, 0.3]) / np.linalg.norm([0.8, 0.5, 0.3])
    rod = trimesh.creation.cylinder(0.4 * CELL, segment=[-0.5 * axis, 0.5 * axis], sections=8)
    found = inside(solid(tmp_path / "a.glb", (rod.vertices, rod.faces)))
    along = CENTRES[found] @ world(axis)
    assert np.histogram(along, bins=25, range=(-0.48, 0.48))[0].min() >= 1, "no gap"
    away = np.linalg.norm(CENTRES[found] - along[:, None] * world(axis), axis=1)
    assert away.max() < 1.5 * CELL


def test_glass_is_not_part_of_the_volume(tmp_path):
    clear = solid(tmp_path / "a.glb", box((0.2,) * 3), colour=(1, 1, 1, 0.2), alphaMode="BLEND")
    assert not inside(clear).any()


def test_colours_come_from_the_nearest_surface(tmp_path):
    glb = Glb()
    red, blue = glb.material((0.8, 0.0, 0.0, 1.0)), glb.material((0.0, 0.0, 0.8, 1.0))
    glb.node(mesh=glb.mesh(glb.primitive(*box((0.2, 0.2, 0.2), (-0.3, 0, 0)), red)))
    glb.node(mesh=glb.mesh(glb.primitive(*box((0.2, 0.2, 0.2), (0.3, 0, 0)), blue)))
    mesh = pose(load_scene(glb.save(tmp_path / "a.glb")), None, 0.0)
    light = light_field(mesh, benchmark_lighting())
    points = np.array([[-0.35, 0.0, 0.25], [0.35, -0.3, 0.0], [0.9, 0.9, 0.9], [-0.9, 0.0, 0.0]])
    colours = nearest_colours(mesh, light, points)
    assert colours.shape == (4, 3) and (colours >= 0).all() and (colours <= 1).all()
    assert (colours[[0, 3], 0] > 0.3).all() and (colours[[0, 3], 2] < 0.1).all()
    assert (colours[[1, 2], 2] > 0.3).all() and (colours[[1, 2], 0] < 0.1).all()


def test_hidden_surfaces_give_no_colour(tmp_path):
    """A black core inside a white wall: cells of the wall are nearer to the core in places, and stay white."""
    glb = Glb()
    white, black = glb.material((0.9, 0.9, 0.9, 1.0)), glb.material((0.0, 0.0, 0.0, 1.0))
    glb.node(mesh=glb.mesh(glb.primitive(*box((0.30, 0.30, 0.30)), white)))
    glb.node(mesh=glb.mesh(glb.primitive(*box((0.28, 0.28, 0.28)), black)))
    mesh = pose(load_scene(glb.save(tmp_path / "a.glb")), None, 0.0)
    points = np.array([[0.285, 0.0, 0.0], [0.0, 0.285, 0.1], [0.1, 0.1, 0.285]])
    colours = nearest_colours(mesh, light_field(mesh, benchmark_lighting()), points)
    assert colours.min() > 0.3
