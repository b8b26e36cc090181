"""Smooth-skinning decomposition: known bones are found, and the .glb's skeleton carries the vertices as stated."""

from types import SimpleNamespace

import numpy as np
import pytest
from export_fixture import SwingingLimb, exported
from export_reader import read_glb
from scipy.spatial.transform import Rotation

from sv4d_ns.export.files import lowest_point
from sv4d_ns.export.formats.gltf import from_gltf_axes, write_animated_glb
from sv4d_ns.export.rig import decompose, skeleton

DIAGONAL = 1.14 * np.sqrt(3)


@pytest.fixture(scope="module")
def arm():
    """Two rigid halves of a bar with a soft joint between them; the second half bends about y."""
    x = np.stack(np.meshgrid(np.linspace(-1, 1, 41), [-0.1, 0, 0.1], [-0.1, 0, 0.1], indexing="ij"), -1).reshape(-1, 3)
    share = np.clip((x[:, 0] + 0.1) / 0.2, 0, 1)[:, None]
    bent = [Rotation.from_euler("y", angle).apply(x) for angle in np.linspace(0, 1, 6)]
    return np.stack([(1 - share) * x + share * other + [0, 0, 0.1 * i] for i, other in enumerate(bent)])


def test_two_bones_explain_a_bending_bar(arm):
    skin = decompose(arm, bound=1e-3, max_bones=4)
    assert skin.rmse < 2e-3
    error = np.sqrt(((skin.posed(arm[0]) - arm) ** 2).sum(-1).mean())
    assert error == pytest.approx(skin.rmse, rel=1e-6)


def test_a_skin_moves_with_its_mesh_and_tells_its_lowest_point(arm):
    skin, by = decompose(arm, bound=1e-3, max_bones=4), np.array([0.3, -0.2, 0.5])
    np.testing.assert_allclose(skin.moved(by).posed(arm[0] + by), skin.posed(arm[0]) + by, atol=1e-9)
    mesh = SimpleNamespace(positions=arm, num_frames=len(arm), root=None)
    assert lowest_point(skin, mesh) == pytest.approx(skin.posed(arm[0])[..., 2].min())


def test_joints_sit_where_parts_turn_and_form_one_tree(arm):
    skin = decompose(arm, bound=1e-4, max_bones=2)
    tree = skeleton(skin, arm[0])
    assert sorted(tree.parents) == [-1, tree.order[0]]
    np.testing.assert_allclose(tree.places[tree.order[1]][[0, 2]], 0, atol=0.02)  # the bar bends about y through 0
    many = skeleton(decompose(arm, bound=1e-6, max_bones=8), arm[0])
    assert (many.parents == -1).sum() == 1
    for place, bone in enumerate(many.order):
        assert many.parents[bone] in [-1, *many.order[:place]]


def test_weights_are_convex_and_few(arm):
    skin = decompose(arm, bound=1e-5, max_bones=8)
    assert skin.weights.shape[1] == 4 and (skin.weights >= 0).all()
    np.testing.assert_allclose(skin.weights.sum(axis=1), 1, atol=1e-9)
    assert skin.joints.max() < skin.num_bones <= 8
    np.testing.assert_allclose(np.linalg.det(skin.rotations), 1, atol=1e-6)


@pytest.fixture(scope="module")
def mesh():
    return exported(SwingingLimb(), np.linspace(0, 1, 6), 12.0, resolution=40, max_faces=1500)


def test_bones_are_added_until_the_bound_or_the_budget(mesh):
    few = decompose(mesh.positions, bound=0.0, max_bones=4)
    loose = decompose(mesh.positions, bound=5e-3 * DIAGONAL, max_bones=64)
    assert few.num_bones <= 4
    assert loose.rmse <= 5e-3 * DIAGONAL and loose.num_bones < 64
    tight = decompose(mesh.positions, bound=1e-3 * DIAGONAL, max_bones=64)
    assert tight.num_bones > few.num_bones and tight.rmse < few.rmse


def test_the_skinned_file_moves_as_reported(mesh, tmp_path):
    skin = decompose(mesh.positions, bound=2e-3 * DIAGONAL, max_bones=32)
    write_animated_glb(mesh, tmp_path / "limb.glb", "limb", {}, skin)
    read = read_glb(tmp_path / "limb.glb")
    seconds, positions = read.skinned()
    np.testing.assert_allclose(seconds, np.arange(6) / 12.0, atol=1e-6)
    np.testing.assert_allclose(from_gltf_axes(positions), skin.posed(mesh.positions[0]), atol=1e-5)
    rmse = np.sqrt(((from_gltf_axes(positions) - mesh.positions) ** 2).sum(-1).mean())
    assert rmse == pytest.approx(skin.rmse, abs=1e-5)
    farthest = np.linalg.norm(from_gltf_axes(positions) - mesh.positions, axis=-1).max()
    assert skin.largest_error(mesh.positions) == pytest.approx(farthest, abs=1e-5) and farthest > rmse
    joints = read.json["skins"][0]["joints"]
    assert len(joints) == skin.num_bones
    names = [read.json["nodes"][joint]["name"] for joint in joints]
    assert names.count("root") == 1 and len(set(names)) == len(names)
    children = [child for joint in joints for child in read.json["nodes"][joint].get("children", [])]
    assert len(children) == len(joints) - 1  # all but the root hang on another joint
    assert not read.primitive.get("targets")


def test_a_skin_of_doubled_vertices_moves_them_alike(mesh):
    skin = decompose(mesh.positions, bound=5e-3 * DIAGONAL, max_bones=8)
    twice = np.tile(np.arange(mesh.positions.shape[1]), 2)
    posed = skin.taken(twice).posed(mesh.positions[0][twice])
    np.testing.assert_array_equal(*np.split(posed, 2, axis=1))
