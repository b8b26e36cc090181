"""The compiled renderer: coverage, textures, transparency, light that does not depend on the camera."""

import numpy as np
import pytest
from glb_fixture import Glb, box, solid

from sv4d_ns.geometry.cameras import FIELD_OF_VIEW_DEG, look_at_cameras
from sv4d_ns.training_data.gltf_scene import load_scene, pose
from sv4d_ns.training_data.lighting import Lighting, benchmark_lighting, draw_lighting, light_field
from sv4d_ns.training_data.rasterise import draw

FRONT = look_at_cameras(np.zeros(1), np.zeros(1))
EVEN = Lighting(np.ones(3), np.ones(3), np.zeros((0, 3)), np.zeros((0, 3)), np.ones(3))
"""White from everywhere: an open surface shows its own colour."""


def picture(path, c2w=FRONT, size=32, lighting=EVEN):
    mesh = pose(load_scene(path), None, 0.0)
    return draw(mesh, light_field(mesh, lighting), c2w, size)


def card(path, *, width=0.4, material=None, uvs=None, texture=None, colour=(1.0, 1.0, 1.0, 1.0), **attributes):
    """A square towards +x of the world (the input camera), 2 width on a side, at x = 0; +y of the world is right."""
    glb = Glb()
    # glTF (x, y, z) is the world's (x, -z, y)
    points = np.array([[0, -1, 1], [0, -1, -1], [0, 1, -1], [0, 1, 1]]) * width
    image = None if texture is None else glb.texture(texture)
    made = glb.material(colour, image, **(material or {}))
    uvs = np.array([[0, 1], [1, 1], [1, 0], [0, 0]]) if uvs is None else uvs
    normal = np.tile([1.0, 0.0, 0.0], (4, 1))
    glb.node(
        mesh=glb.mesh(glb.primitive(points, [0, 1, 2, 0, 2, 3], made, TEXCOORD_0=uvs, NORMAL=normal, **attributes))
    )
    return glb.save(path)


def srgb(linear):
    return 255 * np.where(
        np.asarray(linear) <= 0.0031308, 12.92 * np.asarray(linear), 1.055 * np.asarray(linear) ** (1 / 2.4) - 0.055
    )


def test_alpha_is_coverage_and_white_is_nothing(tmp_path):
    shown = picture(card(tmp_path / "a.glb", colour=(0.5, 0.1, 0.0, 1.0)))[0]
    side = 2 * 0.4 / (2 * 2.0 * np.tan(np.deg2rad(FIELD_OF_VIEW_DEG) / 2)) * 32
    assert shown[..., 3].sum() / 255 == pytest.approx(side**2, rel=0.02)
    assert (shown[0, 0] == (255, 255, 255, 0)).all()
    np.testing.assert_allclose(shown[16, 16, :3], srgb([0.5, 0.1, 0.0]), atol=6)
    assert shown[16, 16, 3] == 255
    edge = shown[16, :, 3]
    partly = (edge > 0) & (edge < 255)
    assert partly.sum() <= 2, "only pixels on the border are partly covered"
    (
        np.testing.assert_allclose(shown[16, partly, :3], np.tile(shown[16, 16, :3], (partly.sum(), 1)), atol=12),
        "straight",
    )


def test_textures_show_their_texels_the_right_way_round(tmp_path):
    red, green, blue, grey = (255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128)
    quarters = np.array([[red, green], [blue, grey]]).repeat(8, axis=0).repeat(8, axis=1)
    shown = picture(card(tmp_path / "a.glb", texture=quarters))[0].astype(int)
    for row, column, colour in ((11, 11, red), (11, 20, green), (20, 11, blue), (20, 20, grey)):
        np.testing.assert_allclose(shown[row, column, :3], colour, atol=8)


def test_a_fine_texture_becomes_its_mean(tmp_path):
    checker = np.indices((256, 256)).sum(axis=0) % 2 * 255
    shown = picture(card(tmp_path / "a.glb", texture=np.repeat(checker[..., None], 3, -1)))[0].astype(int)
    inner = shown[10:22, 10:22, :3]
    assert np.ptp(inner) < 30, "no stripes where texels are smaller than pixels"


def test_cut_outs_and_half_transparent_faces(tmp_path):
    holes = np.zeros((2, 2, 4))
    holes[:, 0] = (255, 255, 255, 255)
    cut = picture(card(tmp_path / "a.glb", texture=holes, material={"alphaMode": "MASK"}))[0]
    assert cut[16, 10, 3] == 255 and cut[16, 21, 3] == 0
    glass = picture(card(tmp_path / "b.glb", colour=(0, 0, 1, 0.5), material={"alphaMode": "BLEND"}))[0]
    assert abs(int(glass[16, 16, 3]) - 128) <= 16
    opaque = picture(card(tmp_path / "c.glb", colour=(0, 0, 1, 0.5)))[0]
    assert opaque[16, 16, 3] == 255, "alpha counts only where the material says so"


def test_vertex_colours_are_interpolated(tmp_path):
    colours = np.array([[1, 0, 0, 1], [0, 0, 1, 1], [0, 0, 1, 1], [1, 0, 0, 1.0]])
    shown = picture(card(tmp_path / "a.glb", COLOR_0=colours))[0].astype(int)
    assert shown[16, 9, 0] > 220 > 130 > shown[16, 9, 2] and shown[16, 22, 2] > 220 > 130 > shown[16, 22, 0]


def test_the_nearer_face_is_seen_and_both_sides_are_drawn(tmp_path):
    glb = Glb()
    red, blue = glb.material((1, 0, 0, 1)), glb.material((0, 0, 1, 1))
    near = np.array([[0.2, -1, 1], [0.2, -1, -1], [0.2, 1, 0]]) * [1, 0.3, 0.3]
    far = near * [-1, 2, 2]
    glb.node(mesh=glb.mesh(glb.primitive(near, [0, 1, 2], red), glb.primitive(far, [0, 1, 2], blue)))
    both = look_at_cameras(np.array([0.0, 180.0]), np.zeros(2))
    front, back = picture(glb.save(tmp_path / "a.glb"), both)
    assert front[16, 16, 0] > 200 > front[16, 16, 2]
    assert back[16, 16, 2] > 200 > back[16, 16, 0]


def test_light_does_not_depend_on_the_camera(tmp_path):
    """The same corner of a box has the same colour from two cameras, under every kind of light."""
    path = solid(tmp_path / "a.glb", box((0.3, 0.3, 0.3)), colour=(0.6, 0.6, 0.6, 1.0))
    for lighting in (benchmark_lighting(), draw_lighting(np.random.default_rng(4))):
        cameras = look_at_cameras(np.array([20.0, 70.0]), np.array([0.0, 0.0]))
        shown = picture(path, cameras, 64, lighting).astype(float)
        focal = 0.5 * 64 / np.tan(np.deg2rad(FIELD_OF_VIEW_DEG) / 2)
        seen = []
        for camera, image in zip(cameras, shown, strict=True):
            q = camera[:3, :3].T @ (np.array([0.3, 0.1, 0.05]) - camera[:3, 3])
            u, v = 32 + focal * q[0] / -q[2], 32 - focal * q[1] / -q[2]
            seen.append(image[int(v), int(u), :3])
        np.testing.assert_allclose(seen[0], seen[1], atol=5)


def test_the_ground_is_darker_than_the_sky_and_crevices_darker_still(tmp_path):
    path = solid(tmp_path / "a.glb", box((0.3, 0.3, 0.3)))
    above, below = picture(path, look_at_cameras(np.zeros(2), np.array([80.0, -80.0])), 32, benchmark_lighting())
    assert above[16, 16, :3].mean() > below[16, 16, :3].mean() + 15
    slot = solid(tmp_path / "b.glb", box((0.3, 0.05, 0.3), (0, -0.2, 0)), box((0.3, 0.25, 0.05), (0, 0.1, 0.25)),
                 box((0.3, 0.25, 0.05), (0, 0.1, -0.25)))  # fmt: skip
    top = picture(slot, look_at_cameras(np.zeros(1), np.array([85.0])), 64, EVEN)[0]
    assert top[32, 32, :3].mean() < top[32, 16, :3].mean() - 20, "the floor of a groove is in the shade of its walls"
