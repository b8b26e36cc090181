"""Colours from pictures and the texture atlas: what is baked is what the cameras saw, and nothing else."""

import numpy as np
import pytest
import torch
from export_fixture import SwingingLimb, exported, pictures

from sv4d_ns.export.colour.baking import Picture, confidence, filled, gather, vertices_as_points
from sv4d_ns.export.colour.raster import rasterise
from sv4d_ns.export.colour.texture import bake, nearest_covered, texels, unwrap
from sv4d_ns.export.formats.asset import Texture, with_texture
from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.geometry.rays import project_array
from sv4d_ns.utils.errors import InputError

TIMES = np.array([0.0, 0.4])
PLAN = ViewPlan.ring((90.0, 180.0, 270.0))


@pytest.fixture(scope="module")
def field():
    return SwingingLimb(density=400.0, edge=0.0015)


@pytest.fixture(scope="module")
def mesh(field):
    return exported(field, TIMES, 8.0, resolution=64, max_faces=3000)


@pytest.fixture(scope="module")
def shown(field):
    return pictures(field, PLAN, [0, 1, 2, 3], TIMES, 96)


def seen(mesh, pictures):
    points = vertices_as_points(mesh.faces, len(mesh.colors))
    return gather(pictures, points, mesh.positions, mesh.normals, mesh.faces)


def test_rasteriser_interpolates_with_perspective_and_keeps_the_nearest():
    near = np.array([[-1.0, -1, -2], [1, -1, -2], [-1, 1, -2]])
    far = np.array([[-9.0, -9, -8], [9, -9, -8], [0, 9, -4]])
    points, faces = np.concatenate([near, far]), np.array([[0, 1, 2], [3, 4, 5]])
    pixels, depth = project_array(points, np.eye(4), 16.0, 32)
    seen = rasterise(pixels, depth, faces, 32)
    for row, column in np.argwhere(seen.face >= 0)[::37]:
        corner = points[faces[seen.face[row, column]]]
        point = seen.barycentric[row, column] @ corner
        again, z = project_array(point[None], np.eye(4), 16.0, 32)
        np.testing.assert_allclose(again[0], [column + 0.5, row + 0.5], atol=1e-3)
        np.testing.assert_allclose(z[0], seen.depth[row, column], rtol=1e-5)
    # the near triangle covers x 8 to 24 and y 8 to 24 below its diagonal, and hides the far one there
    assert (seen.face[11:24, 9] == 0).all() and seen.face[12, 20] == 1


def test_vertices_take_the_colours_that_cameras_saw(field, mesh, shown):
    color, weight = seen(mesh, shown)
    truth = mesh.colors / 255.0
    sure = weight > 0.3
    assert sure.mean() > 0.6
    error = np.abs(color[sure] - truth[sure]).max(axis=1)
    assert np.quantile(error, 0.9) < 0.03  # the rest lies on the borders between colours


def test_hidden_and_turned_away_vertices_have_no_weight(mesh, shown):
    _, weight = seen(mesh, [picture for picture in shown if picture.frame == 0][:1])
    first = mesh.normals[0][:, 0]
    assert not weight[first < 0].any()
    x, radius = mesh.positions[0][:, 0], np.linalg.norm(mesh.positions[0][:, 1:] * [1, 1], axis=1)
    behind_the_limb = (x < 0.2) & (x > 0) & (radius < 0.04)
    assert not weight[behind_the_limb].any()


def test_a_later_frame_shows_what_moved_into_view(field, mesh):
    sideways = ViewPlan.ring((0.0,), 0.0)
    one = seen(mesh, pictures(field, sideways, [0], TIMES[:1], 96))[1]
    both = seen(mesh, pictures(field, sideways, [0], TIMES, 96))[1]
    assert ((both > 0) & (one == 0)).sum() > 20
    assert (both >= one - 1e-9).all()


def test_confidence_and_trust_count(mesh, shown):
    picture = shown[0]
    red = picture.rgba.copy()
    red[..., :3] = [255, 0, 0]
    blue = picture.rgba.copy()
    blue[..., :3] = [0, 0, 255]
    both = [
        Picture(red, picture.c2w, picture.fov_focal, 0, trust=3.0),
        Picture(blue, picture.c2w, picture.fov_focal, 0, confidence=np.full(blue.shape[:2], 51, np.uint8)),
    ]
    color, weight = seen(mesh, both)
    np.testing.assert_allclose(color[weight > 0.1], [[3 / 3.2, 0, 0.2 / 3.2]] * (weight > 0.1).sum(), atol=1e-4)


def test_background_does_not_bleed_in(mesh, shown):
    painted = []
    for picture in shown:
        rgba = picture.rgba.copy()
        rgba[rgba[..., 3] < 250, :3] = [0, 255, 0]
        painted.append(Picture(rgba, picture.c2w, picture.fov_focal, picture.frame))
    clean, _ = seen(mesh, shown)
    dirty, weight = seen(mesh, painted)
    assert np.abs(clean - dirty)[weight > 0.05].max() < 0.02


def test_classes_of_confidence():
    values = confidence(np.array([1.0, 0, 0, 2]), np.array([0.0, 1, 0, 1]))
    np.testing.assert_array_equal(values, [1, 0.5, 0, 1])


def test_unseen_vertices_continue_their_neighbours(mesh):
    color, weight = np.zeros((len(mesh.colors), 3)), np.zeros(len(mesh.colors))
    right = mesh.positions[0][:, 1] > 0
    color[right], weight[right] = [0.2, 0.6, 0.4], 1
    np.testing.assert_allclose(filled(color, weight, mesh.faces), np.tile([0.2, 0.6, 0.4], (len(color), 1)), atol=1e-3)


@pytest.fixture(scope="module")
def atlas(mesh):
    return unwrap(mesh.positions[0], mesh.faces, 256)


def test_charts_cover_every_face_without_overlap(mesh, atlas):
    np.testing.assert_array_equal(atlas.vertex[atlas.faces], mesh.faces)
    assert atlas.uv.min() * 256 >= 1.99 and atlas.uv.max() * 256 <= 254.01, "pictures of moments lie side by side"
    a, b, c = (atlas.uv[atlas.faces[:, i]] * 256 for i in range(3))
    area = np.abs((b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0]) / 2
    covered, _ = texels(atlas)
    assert covered.sum() == pytest.approx(area.sum(), rel=0.02)  # overlap would cover less than the faces' sum
    assert len(atlas.vertex) < 1.35 * len(mesh.colors)


def test_texels_stand_for_their_surface_points(mesh, atlas):
    covered, points = texels(atlas)
    row, column = np.nonzero(covered)
    uv = points.at(atlas.uv, atlas.faces) * 256
    np.testing.assert_allclose(uv, np.stack([column, row], axis=1) + 0.5, atol=1e-2)


def test_seams_are_padded():
    image, covered = np.zeros((32, 32, 3)), np.zeros((32, 32), dtype=bool)
    covered[4:9, 4:9], covered[20:28, 20:28] = True, True
    image[4:9, 4:9], image[20:28, 20:28] = [1, 0, 0], [0, 0, 1]
    full = image[nearest_covered(covered)]
    np.testing.assert_array_equal(full[covered], image[covered])
    np.testing.assert_array_equal(full[3, 6], [1, 0, 0])
    np.testing.assert_array_equal(full[30, 30], [0, 0, 1])
    assert (full.sum(axis=-1) == 1).all()


def test_the_baked_texture_shows_the_object(field, mesh, atlas, shown):
    colors = filled(*seen(mesh, shown), mesh.faces)

    def shade(points):
        color, weight = gather(shown, points, mesh.positions, mesh.normals, mesh.faces)
        return np.where(weight[:, None] > 0.05, color, points.at(colors, mesh.faces))

    image = bake(atlas, shade)
    covered, points = texels(atlas)
    rest = points.at(mesh.positions[0], mesh.faces)
    # at time 0 the limb is turned: ask the field for the colour where the point is in the canonical shape
    x = torch.from_numpy(rest).float()
    truth = field.density_and_color(x, torch.zeros(len(x), 1))[1].numpy()
    error = np.abs(image[covered] / 255.0 - truth).max(axis=1)
    assert np.quantile(error, 0.85) < 0.05
    cut = with_texture(mesh, atlas, Texture(atlas.uv, image))
    assert cut.positions.shape == (len(TIMES), len(atlas.vertex), 3)
    np.testing.assert_array_equal(cut.normals[:, :], mesh.normals[:, atlas.vertex])


@pytest.mark.parametrize("size", [8, 100_000])
def test_impossible_sizes_are_refused(mesh, size):
    with pytest.raises(InputError, match=f"--texture-size {size}"):
        unwrap(mesh.positions[0], mesh.faces, size)
