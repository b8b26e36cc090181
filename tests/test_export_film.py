"""Colours from the film: what the camera saw, robust over frames, never on the far side, without seams."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
from test_export_surface import PLAN, ball, filmed

from sv4d_ns.export import make
from sv4d_ns.export.colour.baking import Picture, vertices_as_points
from sv4d_ns.export.colour.film import film_colors, levelled, mirrored
from sv4d_ns.export.surface.extraction import vertex_normals

FRAMES = 5


def painted():
    vertices, faces = ball(subdivisions=5)
    colors = 0.5 + 0.3 * np.sin(12 * vertices)
    positions = np.stack([vertices] * FRAMES)
    normals = np.stack([vertex_normals(vertices, faces)] * FRAMES)
    return vertices, faces, colors, positions, normals


def of_film(film, faces, positions, normals):
    corners = vertices_as_points(faces, positions.shape[1])
    return film_colors(film, positions, normals, faces, corners).at(corners)


def test_the_films_colours_are_the_surfaces_and_stay_on_the_side_it_saw():
    vertices, faces, colors, positions, normals = painted()
    film = [filmed(vertices, faces, frame, colors) for frame in range(FRAMES)]
    found, weight = of_film(film, faces, positions, normals)
    toward = PLAN.c2w()[0][:3, 3]
    facing = vertices @ toward / np.linalg.norm(toward) / 0.3
    assert np.abs(found - colors)[facing > 0.5].max() < 0.03
    assert not weight[facing < 0].any()


def test_a_frame_that_contradicts_the_others_has_no_say():
    vertices, faces, colors, positions, normals = painted()
    film = [filmed(vertices, faces, frame, colors) for frame in range(FRAMES)]
    rgba = film[2].rgba.copy()
    rgba[40:80, 40:80, :3] = [255, 0, 255]
    film[2] = Picture(rgba, film[2].c2w, film[2].fov_focal, 2)
    found, weight = of_film(film, faces, positions, normals)
    assert np.abs(found - colors)[weight > 0.5].max() < 0.04


def test_exposure_differences_between_frames_are_removed():
    vertices, faces, colors, positions, normals = painted()
    exposures = [1.0, 0.8, 1.1, 1.0, 0.9]
    film = []
    for frame, exposure in enumerate(exposures):
        picture = filmed(vertices, faces, frame, colors)
        rgba = picture.rgba.astype(float)
        rgba[..., :3] = (rgba[..., :3] * exposure).clip(0, 255)
        film.append(Picture(np.round(rgba).astype(np.uint8), picture.c2w, picture.fov_focal, frame))
    corners = vertices_as_points(faces, len(vertices))
    colors_of = film_colors(film, positions, normals, faces, corners)
    levels = np.array(exposures) * colors_of.gains.mean(axis=1)
    assert np.ptp(levels) < 0.03  # every frame is brought to one level
    found, weight = colors_of.at(corners)
    ratio = (found / colors)[weight > 0.5]
    assert ratio.std() < 0.03


def test_the_pictures_of_a_long_clip_are_of_all_frames_around_their_moments(monkeypatch):
    reaches = []
    film = SimpleNamespace(
        looks=lambda points: None, agreed=lambda looks: (np.zeros((1, 3)), np.zeros(1)),
        moments=lambda looks, centres, reach: reaches.append(reach) or iter([]),
    )  # fmt: skip
    layers = make.Layers(None, None, np.zeros((0, 3), np.int32), film, np.zeros((1, 3)))
    monkeypatch.setattr(make.Layers, "_over", lambda self, points, correction, color, weight: color)
    for centres in ([0.0, 1.0, 2.0], [0.0, 6.0, 12.0], [4.0]):
        assert list(layers.moments(None, centres)) == []
    assert reaches == [0.5, 3.0, 0.5]


def test_a_moment_has_the_colours_and_the_light_of_its_own_frame():
    vertices, faces, colors, positions, normals = painted()
    film = [filmed(vertices, faces, frame, colors * (0.6 + 0.1 * frame)) for frame in range(FRAMES)]
    corners = vertices_as_points(faces, len(vertices))
    colors_of = film_colors(film, positions, normals, faces, corners)
    made = colors_of.moments(colors_of.looks(corners), [0.0, 4.0], 0.5)
    for (found, weight), share in zip(made, (0.6, 1.0), strict=True):
        assert np.abs(found - share * colors)[weight > 0.5 * weight.max()].max() < 0.03


def test_a_moment_shows_the_film_up_to_its_outline():
    """The dark far side of a light object was a line around it."""
    vertices, faces, _, positions, normals = painted()
    film = [
        replace(filmed(vertices, faces, frame, np.full_like(vertices, 0.8)), silhouette=make.FILM_SILHOUETTE)
        for frame in range(FRAMES)
    ]
    corners, dark = vertices_as_points(faces, len(vertices)), np.full((len(vertices), 3), 0.1)
    colors_of = film_colors(film, positions, normals, faces, corners)

    def under(points):
        return dark[: len(points.face)], np.ones(len(points.face))

    layers = make.Layers(under, dark, faces, colors_of, np.zeros_like(dark))
    shown = next(layers.moments(corners, [0.0]))
    toward = PLAN.c2w()[0][:3, 3]
    away = toward - vertices
    facing = (normals[0] * away).sum(axis=-1) / np.linalg.norm(away, axis=-1)
    assert shown[facing > 0.33].min() > 0.7
    assert shown[facing < 0].max() < 0.2


def test_what_no_near_frame_shows_keeps_next_to_no_weight_in_a_moment():
    vertices, faces, colors, positions, normals = painted()
    film = [filmed(vertices, faces, frame, colors) for frame in range(FRAMES)]
    away = np.array([[-1.0, 0, 0], [0, -1, 0], [0, 0, 1]], np.float32)
    positions[3:], normals[3:] = positions[3:] @ away, normals[3:] @ away  # it turns its other side to the camera
    corners = vertices_as_points(faces, len(vertices))
    colors_of = film_colors(film, positions, normals, faces, corners)
    (_, first), (_, last) = colors_of.moments(colors_of.looks(corners), [0.0, 4.0], 0.5)
    assert last[first > 0.5].max() < 1e-3 and (last > 0.5).any()


def test_the_other_layer_meets_the_film_without_a_step_and_keeps_its_own_colour_far_away():
    vertices, faces, _, _, _ = painted()
    under, film = np.full((len(vertices), 3), 0.3), np.full((len(vertices), 3), 0.6)
    weight = np.where(vertices[:, 0] > 0, 1.0, 0.0)
    shown = under + levelled(film, weight, under, faces)
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    assert np.abs(shown[edges[:, 0]] - shown[edges[:, 1]]).max() < 0.12  # a step would be 0.3
    np.testing.assert_allclose(shown[vertices[:, 0] < -0.28], 0.3, atol=0.01)


def test_unseen_places_of_a_symmetric_shape_take_their_mirror_images_colour():
    vertices, _ = ball((0.2, 0.4, 0.3), 5)
    colors = np.stack([0.5 + vertices[:, 0], 0.5 + vertices[:, 2], np.full(len(vertices), 0.5)], axis=-1)
    seen = vertices[:, 1] > -0.1
    known = seen & (np.abs(vertices[:, 0]) < 1)
    found, now = mirrored(vertices, np.where(known[:, None], colors, 0.0), known)
    assert now.mean() > known.mean() + 0.2
    assert np.abs(found - colors)[now].max() < 0.45  # either upright plane is a mirror of this shape
    lopsided = vertices + np.where(vertices[:, :1] * vertices[:, 1:2] > 0, [[0.15, 0.1, 0.0]], 0.0)
    _, now = mirrored(lopsided, colors, known)
    np.testing.assert_array_equal(now, known)
