"""What the film makes of the surface: outlines, what is drawn inside them, mended skin, filled tails."""

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import trimesh
from scipy import ndimage
from scipy.spatial import cKDTree

from sv4d_ns.export import make
from sv4d_ns.export.colour.baking import Picture
from sv4d_ns.export.colour.raster import rasterise
from sv4d_ns.export.formats.asset import animated_mesh, grounded, moved_to, placement_of, torn_open
from sv4d_ns.export.formats.sequence import Still
from sv4d_ns.export.make import without
from sv4d_ns.export.surface.covering import covered
from sv4d_ns.export.surface.extraction import (
    CanonicalMesh,
    OpacityGrid,
    Tracks,
    surface_of,
    vertex_graph,
    vertex_normals,
)
from sv4d_ns.export.surface.folds import SLIVER, Folds, unfolded, unturned
from sv4d_ns.export.surface.limbs import _turned_to, turned
from sv4d_ns.export.surface.mending import mended, strays
from sv4d_ns.export.surface.outlines import fitted_to_film, fitted_to_outlines
from sv4d_ns.export.surface.registration import FrameSurface, settled
from sv4d_ns.export.surface.silhouettes import completed, silhouettes
from sv4d_ns.export.surface.webs import drawn_in, hidden_webs
from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.geometry.rays import project_array
from sv4d_ns.utils.errors import InputError

PLAN = ViewPlan.ring((90.0,), 0.0)
SIZE = 128
DIAGONAL = 2.0
"""Of the field's box."""
NOTHING = FrameSurface.of(np.zeros((0, 3)), np.zeros((0, 3), np.int64))


def ball(scale=(0.3, 0.3, 0.3), subdivisions=4):
    mesh = trimesh.creation.icosphere(subdivisions)
    return np.asarray(mesh.vertices) * scale, np.asarray(mesh.faces)


def filmed(vertices, faces, frame=0, colors=None):
    """A picture of a mesh at the input camera, coverage by 4 x 4 samples in each pixel."""
    camera, fine = PLAN.c2w()[0], 4 * SIZE
    seen = rasterise(*project_array(vertices, camera, PLAN.focal_px(fine), fine), faces, fine)
    rgba = np.zeros((fine, fine, 4))
    covered = seen.face >= 0
    rgba[covered, 3] = 1
    rgba[covered, :3] = 0.5
    if colors is not None:
        rgba[covered, :3] = np.einsum("kj,kjc->kc", seen.barycentric[covered], colors[faces[seen.face[covered]]])
    rgba = rgba.reshape(SIZE, 4, SIZE, 4, 4).mean(axis=(1, 3))
    rgba[..., :3] /= np.maximum(rgba[..., 3:], 1e-6)
    return Picture(np.round(rgba * 255).astype(np.uint8), camera, PLAN.focal_px(1), frame)


def overlap(vertices, faces, picture):
    inside = filmed(vertices, faces).rgba[..., 3] > 127
    expected = picture.rgba[..., 3] > 127
    return (inside & expected).sum() / (inside | expected).sum()


def test_the_outline_becomes_the_films_and_depth_stays():
    vertices, faces = ball()
    target = vertices * [1.0, 1.2, 0.85] + [0.0, 0.02, -0.01]
    picture = filmed(target, faces)
    assert overlap(vertices, faces, picture) < 0.8
    fitted = fitted_to_outlines(vertices[None], faces, [picture])[0]
    assert overlap(fitted, faces, picture) > 0.985
    assert np.abs(fitted[:, 0] - vertices[:, 0]).max() < 1e-9  # the camera looks along x


def test_an_object_that_the_picture_cuts_off_is_not_drawn_to_the_pictures_edge():
    vertices, faces = ball((0.3, 0.3, 0.9))
    fitted = fitted_to_outlines(vertices[None], faces, [filmed(vertices, faces)])[0]
    assert np.abs(fitted - vertices).max() < 0.01


def test_what_is_drawn_on_the_surface_is_registered_too():
    vertices, faces = ball(subdivisions=5)
    spots = 0.5 + 0.4 * np.sin(30 * vertices[:, 1]) * np.sin(30 * vertices[:, 2])
    colors = np.repeat(spots[:, None], 3, axis=1)
    # the film shows the same ball, its skin turned a little about the line of sight's upright
    angle = 0.05
    turned = vertices @ np.array([[np.cos(angle), np.sin(angle), 0], [-np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    film = filmed(turned, faces, colors=colors)
    fitted = fitted_to_film(vertices[None], faces, [film], colors)[0]
    front = vertices[:, 0] > 0.22
    before, after = (np.abs(x[front, 1] - turned[front, 1]).mean() for x in (vertices, fitted))
    assert after < 0.35 * before
    assert overlap(fitted, faces, film) > 0.98


def rod():
    mesh = trimesh.creation.box((0.1, 0.8, 0.1))
    for _ in range(5):
        mesh = mesh.subdivide()
    return np.asarray(mesh.vertices), np.asarray(mesh.faces)


def surfaces_of(faces, *shapes):
    """What the field is at the frames."""
    return [FrameSurface.of(vertices, faces) for vertices in shapes]


def nothing_guessed(vertices):
    return np.zeros((2, len(vertices)), bool)


def test_skin_thrown_off_the_fields_surface_keeps_its_shape_and_follows_its_neighbours():
    vertices, faces = rod()
    moved = np.add(vertices, [0.0, 0.0, 0.1])
    torn = moved.copy()
    torn[vertices[:, 1] > 0.3] += [0.0, -0.1, 0.35]  # the end is sent where the object is not
    own = surfaces_of(faces, vertices, moved)
    result, changed = mended(np.stack([vertices, torn]), nothing_guessed(vertices), vertices, faces, own, 0, DIAGONAL)
    assert not changed[0].any() and changed[1][vertices[:, 1] > 0.3].all()
    assert np.abs(result[1] - moved).max() < 0.02
    edges = trimesh.Trimesh(vertices, faces, process=False).edges_unique
    rest, length = (np.linalg.norm(x[edges[:, 0]] - x[edges[:, 1]], axis=-1) for x in (vertices, result[1]))
    assert (length / rest).max() < 4


def test_a_limb_of_unknown_motion_is_drawn_to_where_the_field_has_it():
    vertices, faces = rod()
    limb, tip = vertices[:, 1] > 0.0, vertices[:, 1] > 0.35
    turned, angle = vertices.copy(), 0.12 * np.clip(vertices[:, 1] / 0.1, 0, 1)  # its upper half turns about its middle
    turned[:, 1], turned[:, 2] = np.cos(angle) * vertices[:, 1], vertices[:, 2] + np.sin(angle) * vertices[:, 1]
    guessed = nothing_guessed(vertices)
    guessed[1, limb] = True
    positions = np.stack([vertices, np.where(limb[:, None], vertices, turned)])
    own = surfaces_of(faces, vertices, turned)
    assert own[1].distance(positions[1])[tip].mean() > 0.01 and cKDTree(positions[1]).query(turned)[0].max() > 0.045
    result, changed = mended(positions, guessed, vertices, faces, own, 0, DIAGONAL)
    assert changed[1][limb].all()
    assert own[1].distance(result[1])[tip].mean() < 0.003
    assert cKDTree(result[1]).query(turned)[0].max() < 0.031  # no place of it is without skin


def limbed(angle, arms=1):
    """A trunk with arms of 0.3 that are turned about their shoulders, one to each side."""
    parts = [trimesh.creation.box((0.2, 0.2, 0.4))]
    for side in (1, -1)[:arms]:
        arm = trimesh.creation.box((0.08, 0.4, 0.08), trimesh.transformations.translation_matrix((0, 0.1 * side, 0)))
        place = trimesh.transformations.translation_matrix((0, 0.1 * side, 0.1))
        arm.apply_transform(place @ trimesh.transformations.rotation_matrix(side * angle, (1, 0, 0)))
        parts.append(arm)
    nodes = np.linspace(-0.5, 0.5, 81)
    grid = np.stack(np.meshgrid(nodes, nodes, nodes, indexing="ij"), axis=-1).reshape(-1, 3)
    solid = np.any([part.contains(grid) for part in parts], axis=0).reshape(81, 81, 81)
    opacity = ndimage.gaussian_filter(solid.astype(np.float64), 0.7)
    surface = surface_of(opacity, 0.5, OpacityGrid(opacity, np.full(3, -0.5), np.full(3, 0.5), 0.01))
    return surface.vertices, surface.faces


@pytest.mark.parametrize("arms", [1, 2])
def test_a_lost_limb_is_turned_about_its_root_to_where_the_field_has_it(arms):
    """By closest points alone it would fold: its new place is farther away than they reach."""
    vertices, faces = limbed(0.6, arms)
    frame = FrameSurface.of(*limbed(-0.7, arms))
    guessed = nothing_guessed(vertices)
    guessed[1] = np.abs(vertices[:, 1]) > 0.13
    own = [FrameSurface.of(vertices, faces), frame]
    result, _ = mended(np.stack([vertices, vertices]), guessed, vertices, faces, own, 0, DIAGONAL)
    assert cKDTree(result[1]).query(frame.vertices)[0].max() < 0.03
    tips = np.abs(vertices[:, 1]) > 0.3
    assert frame.distance(result[1])[tips].max() < 0.012
    edges = trimesh.Trimesh(vertices, faces, process=False).edges_unique
    rest, length = (np.linalg.norm(x[edges[:, 0]] - x[edges[:, 1]], axis=-1) for x in (vertices, result[1]))
    assert np.percentile(length / rest, 99) < 2


def test_a_limb_is_turned_to_no_part_that_is_not_like_it_or_hangs_elsewhere():
    vertices, faces = limbed(0.6)
    lost, graph = vertices[:, 1] > 0.13, vertex_graph(faces, len(vertices))

    def turned_to(*shape, at):
        box = trimesh.creation.box(shape, trimesh.transformations.translation_matrix(at)).subdivide_to_size(0.02)
        surface = FrameSurface.of(np.asarray(box.vertices), np.asarray(box.faces))
        bare = np.arange(len(surface.vertices))
        return turned(graph, vertices, lost, surface, bare, DIAGONAL)

    arm, moved = turned_to(0.08, 0.3, 0.08, at=(0, 0.25, 0.1))
    assert moved.any() and not moved[~lost].any()
    np.testing.assert_array_equal(arm[~moved], vertices[~moved])
    assert arm[moved, 2].max() < 0.17 < vertices[lost, 2].max()
    for shape, at in (((0.08, 0.3, 0.08), (0, -0.25, 0.1)), ((0.04, 0.04, 0.04), (0, 0.15, 0.1))):
        assert not turned_to(*shape, at=at)[1].any()


def test_a_lost_part_that_hangs_on_both_its_ends_is_no_fault():
    vertices, faces = ball()
    lost = np.abs(vertices[:, 1]) < 0.1  # its root is its middle, to the last digit or nearly
    lost_vertices = vertices[lost]
    surface = FrameSurface.of(np.add(vertices, [0.02, 0, 0]), faces)
    result, moved = turned(vertex_graph(faces, len(vertices)), vertices, lost, surface, np.flatnonzero(lost), DIAGONAL)
    np.testing.assert_array_equal(result[~lost], vertices[~lost])
    assert np.isfinite(result).all() and not moved[~lost].any()
    stays = _turned_to(lost_vertices, lost_vertices.mean(axis=0), lost_vertices)
    np.testing.assert_allclose(stays, lost_vertices, atol=1e-9)


def test_a_moment_without_a_surface_is_left_as_the_motion_has_it():
    vertices, faces = rod()
    guessed = nothing_guessed(vertices)
    guessed[1, :50] = True
    moved = np.add(vertices, [0.0, 0.0, 0.1])
    own = [*surfaces_of(faces, vertices), FrameSurface.of(np.zeros((0, 3)), np.zeros((0, 3), int))]
    positions = np.stack([vertices, moved])
    result, changed = mended(positions, guessed, vertices, faces, own, 0, DIAGONAL)
    np.testing.assert_array_equal(result, positions)
    assert not changed.any()
    np.testing.assert_array_equal(settled(positions, faces, own, DIAGONAL)[1], moved)


def test_a_followed_mesh_settles_on_the_fields_surface_and_no_farther_than_it_may():
    vertices, faces = ball()
    larger = FrameSurface.of(vertices * 1.04, faces)
    x = settled(vertices[None], faces, [larger], DIAGONAL)[0]
    assert np.abs(np.linalg.norm(x, axis=-1) - 0.312).max() < 2e-3
    much_larger = FrameSurface.of(vertices * 1.3, faces)
    np.testing.assert_allclose(settled(vertices[None], faces, [much_larger], DIAGONAL)[0], vertices, atol=1e-9)


def two_pieces():
    """A rod, and a ball before it."""
    (vertices, faces), (more, other) = rod(), ball((0.05, 0.05, 0.05), subdivisions=2)
    small = np.arange(len(vertices) + len(more)) >= len(vertices)
    together = np.concatenate([vertices, np.add(more, [0.2, 0.0, 0.0])])
    return together, np.concatenate([faces, other + len(vertices)]), small


def test_a_piece_that_leaves_the_surface_stays_where_it_was():
    vertices, faces, small = two_pieces()
    away = vertices + np.where(small[:, None], [0.0, 0.1, 0.4], 0.0)
    own = surfaces_of(faces, vertices, vertices)
    result, changed = mended(np.stack([vertices, away]), nothing_guessed(vertices), vertices, faces, own, 0, DIAGONAL)
    assert changed[1][small].all() and not changed[1][~small].any()
    assert np.abs(result[1] - vertices).max() < 1e-3


def test_a_frame_in_which_the_film_shows_nothing_drops_nothing():
    vertices, faces, _ = two_pieces()
    film = [filmed(vertices, faces, frame) for frame in range(2)]
    blank = replace(film[1], rgba=np.zeros_like(film[1].rgba))
    full = replace(film[1], rgba=np.full_like(film[1].rgba, 255))
    for other in (blank, full):
        assert not strays(np.stack([vertices, vertices]), faces, silhouettes([film[0], other])).any()


def crumpled(vertices, where):
    """Every second vertex of a part of a ball pushed in and out."""
    moved, rng = vertices.copy(), np.random.default_rng(0)
    moved[where] *= 1 + rng.choice([-0.12, 0.12], where.sum())[:, None]
    return moved


def test_folds_are_smoothed_and_the_objects_own_edges_are_none():
    vertices, faces = ball(subdivisions=4)
    where = vertices[:, 1] > 0.6 * vertices[:, 1].max()
    folds, bent = Folds.of(vertices, faces), crumpled(vertices, where)
    assert (
        not folds.at(vertices).any()
        and folds.at(bent)[where].mean() > 0.6
        and not folds.at(bent)[vertices[:, 1] < 0].any()
    )
    smooth = unfolded(np.stack([vertices, bent]), vertices, faces)
    np.testing.assert_array_equal(smooth[0], vertices)
    assert folds.at(smooth[1]).mean() < 0.3 * folds.at(bent).mean()
    assert np.abs(smooth[1] - vertices).max() < 0.06
    assert not Folds.of(bent, faces).at(bent).any(), "what the canonical shape has is no fold"


def test_a_sliver_that_is_turned_over_is_turned_back_where_it_lies() -> None:
    vertices, faces = ball(subdivisions=6)
    radius = np.linalg.norm(vertices[0])
    crossed = vertices.copy()
    one, other = faces[100, 0], faces[100, 1]
    crossed[one] += 1.5 * (vertices[other] - vertices[one])  # past its neighbour, along the surface
    crossed[one] *= radius / np.linalg.norm(crossed[one])

    def away(x: np.ndarray) -> int:
        corner = x[faces]
        normal = np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0])
        return int((np.einsum("fi,fki->fk", normal, vertex_normals(x, faces)[faces]) < 0).any(axis=1).sum())

    assert away(vertices) == 0 < away(crossed)
    still, mended = unturned(np.stack([vertices, crossed]), faces)
    np.testing.assert_array_equal(still, vertices)
    assert away(mended) == 0
    assert np.linalg.norm(mended - crossed, axis=-1).max() <= SLIVER + 1e-6
    assert np.abs(np.linalg.norm(mended, axis=-1) / radius - 1).max() < 1e-3


def test_crumpled_skin_is_drawn_to_the_surface_anew():
    vertices, faces = ball(subdivisions=4)
    bent = crumpled(vertices, vertices[:, 1] > 0.6 * vertices[:, 1].max())
    own = surfaces_of(faces, vertices, vertices)
    result, _ = mended(np.stack([vertices, bent]), nothing_guessed(vertices), vertices, faces, own, 0, DIAGONAL)
    folds = Folds.of(vertices, faces)
    assert folds.at(bent).any() and not folds.at(result[1]).any()
    assert np.linalg.norm(result[1] - vertices, axis=1).max() < 0.01


def test_a_piece_astray_in_the_end_is_dropped():
    vertices, faces, small = two_pieces()
    film = silhouettes([filmed(vertices, faces, 0), filmed(vertices, faces, 1)])
    away = vertices + np.where(small[:, None], [0.0, 0.1, 0.4], 0.0)
    assert not strays(np.stack([vertices, vertices]), faces, film).any()
    stray = strays(np.stack([vertices, away]), faces, film)
    np.testing.assert_array_equal(stray, small)
    mesh = CanonicalMesh(vertices.astype(np.float32), faces.astype(np.int32), 0)
    still = np.stack([vertices, away]).astype(np.float32)
    left, tracks = without(mesh, Tracks(still, still[..., 0], still[..., 0] > 9), stray)
    assert len(left.vertices) == tracks.positions.shape[1] == (~small).sum() and left.dropped_parts == 1
    np.testing.assert_array_equal(left.vertices[left.faces], vertices[~small].astype(np.float32)[rod()[1]])


def test_a_guess_is_carried_by_the_skin_around_it():
    vertices, faces = rod()
    moved = np.add(vertices, [0.0, 0.0, 0.1])
    guessed = nothing_guessed(vertices)
    guessed[1, vertices[:, 1] > 0.3] = True
    shifted = moved + np.where(guessed[1][:, None], [0.0, 0.0, 0.02], 0.0)
    own = surfaces_of(faces, vertices, moved)
    result, changed = mended(np.stack([vertices, shifted]), guessed, vertices, faces, own, 0, DIAGONAL)
    assert changed[1][guessed[1]].all()
    assert np.abs(result[1] - moved).max() < 1e-3


def test_a_motion_without_faults_is_left_alone():
    vertices, faces = rod()
    positions = np.stack([vertices, np.add(vertices, [0.0, 0.05, 0.1])])
    own = surfaces_of(faces, *positions)
    result, changed = mended(positions, nothing_guessed(vertices), vertices, faces, own, 0, DIAGONAL)
    assert not changed.any()
    np.testing.assert_array_equal(result, positions)


def grid_of(inside, resolution=64):
    """An opacity grid over [-0.57, 0.57]^3 that is full where `inside` holds."""
    axis = np.linspace(-0.57, 0.57, resolution)
    x, y, z = np.meshgrid(axis, axis, axis, indexing="ij")
    low = np.full(3, -0.57)
    return OpacityGrid(np.where(inside(x, y, z), 0.9, 0.0), low, -low, 0.03)


def test_a_tail_of_fog_is_filled_where_the_film_shows_it():
    def body(x, y, z):
        return (np.abs(x) < 0.15) & (np.abs(y) < 0.15) & (np.abs(z) < 0.2)

    def tail(x, y, z):
        return (np.abs(x - 0.05) < 0.03) & (np.abs(z) < 0.03) & (y >= 0.15) & (y < 0.4)

    grid = grid_of(body)
    axis = np.linspace(-0.57, 0.57, 64)
    x, y, z = np.meshgrid(axis, axis, axis, indexing="ij")
    fog = np.where(tail(x, y, z), 0.1, grid.values)
    parts = (
        trimesh.creation.box((0.3, 0.3, 0.4)),
        trimesh.creation.box((0.06, 0.3, 0.06), trimesh.transformations.translation_matrix((0.05, 0.25, 0))),
    )
    merged = trimesh.util.concatenate(parts)
    film = filmed(np.asarray(merged.vertices), np.asarray(merged.faces))
    result = completed(grid, fog, 0.5, film)
    inner = (np.abs(x - 0.05) < 0.02) & (np.abs(z) < 0.02) & (y > 0.17) & (y < 0.37)
    assert (result[inner] > 0.5).mean() > 0.75
    pieces, count = ndimage.label(result > 0.5)
    assert count == 1 and pieces[inner].any()  # it hangs on the body
    far = (result > 0.5) & (y > 0.2)
    assert np.abs(x[far] - 0.05).max() < 0.07 and np.abs(z[far]).max() < 0.06
    np.testing.assert_array_equal(completed(grid, grid.values, 0.5, filmed(*ball((0.1, 0.1, 0.1)))), grid.values)


def test_a_tail_whose_fog_lies_at_other_depths_from_ray_to_ray_is_filled_in_one_piece():
    grid = grid_of(lambda x, y, z: (np.abs(x) < 0.15) & (np.abs(y) < 0.15) & (np.abs(z) < 0.2))
    axis = np.linspace(-0.57, 0.57, 64)
    x, y, z = np.meshgrid(axis, axis, axis, indexing="ij")
    deep = np.where(np.floor((y - 0.15) / 0.08) % 2 == 0, 0.13, -0.13)
    fog = np.where((np.abs(x - deep) < 0.03) & (np.abs(z) < 0.02) & (y >= 0.15) & (y < 0.45), 0.1, grid.values)
    parts = (
        trimesh.creation.box((0.3, 0.3, 0.4)),
        trimesh.creation.box((0.04, 0.35, 0.04), trimesh.transformations.translation_matrix((0, 0.275, 0))),
    )
    merged = trimesh.util.concatenate(parts)
    filled = completed(grid, fog, 0.5, filmed(np.asarray(merged.vertices), np.asarray(merged.faces))) > 0.5
    _, count = ndimage.label(filled)
    assert count == 1 and y[filled].max() > 0.42


def frames_with(monkeypatch, grids, film):
    """A run whose field is one grid a frame, filmed in these pictures."""
    monkeypatch.setattr(make, "frozen", lambda field, time: time)
    monkeypatch.setattr(make, "opacity_grid", lambda time, resolution, possible: grids[time])
    monkeypatch.setattr(make, "input_pictures", lambda views: film)
    return SimpleNamespace(
        field=None, views=SimpleNamespace(num_frames=len(grids)), time=int, possible=lambda time: None
    )


def test_a_frames_own_surface_has_the_tail_that_its_film_shows(monkeypatch):
    def body(x, y, z):
        return (np.abs(x) < 0.15) & (np.abs(y) < 0.15) & (np.abs(z) < 0.2)

    trunk = trimesh.creation.box((0.3, 0.3, 0.4))
    tail = trimesh.creation.box((0.06, 0.3, 0.06), trimesh.transformations.translation_matrix((0.05, 0.25, 0)))
    both = trimesh.util.concatenate([trunk, tail])
    film = [filmed(np.asarray(mesh.vertices), np.asarray(mesh.faces)) for mesh in (trunk, both)]
    run = frames_with(monkeypatch, [grid_of(body)] * 2, film)
    without_tail, with_tail = (make.surface_at(run, frame, 64)[0] for frame in (0, 1))
    assert without_tail[:, 1].max() < 0.18
    assert with_tail[:, 1].max() == pytest.approx(0.4, abs=0.03)


def test_a_frame_at_which_the_field_shows_nothing_is_said_and_draws_nothing(monkeypatch):
    box = trimesh.creation.box((0.3, 0.3, 0.4))
    film = [filmed(np.asarray(box.vertices), np.asarray(box.faces))] * 2
    grids = [grid_of(lambda x, y, z: x**2 + y**2 + z**2 < 0.04), grid_of(lambda x, y, z: x > 1)]
    said = []
    terminal = SimpleNamespace(say=said.append, bar=lambda *_: contextlib.nullcontext(lambda: None))
    full, empty = make._own_surfaces(frames_with(monkeypatch, grids, film), 64, terminal)
    assert len(full.vertices) and not len(empty.vertices)
    assert len(said) == 1 and "nothing at frame 1:" in said[0]


def test_a_mesh_of_its_own_for_a_frame_at_which_the_field_shows_nothing_is_an_empty_one(monkeypatch):
    box = trimesh.creation.box((0.3, 0.3, 0.4))
    film = [filmed(np.asarray(box.vertices), np.asarray(box.faces))] * 2
    grids = [grid_of(lambda x, y, z: x**2 + y**2 + z**2 < 0.04), grid_of(lambda x, y, z: x > 1)]
    said = []
    terminal = SimpleNamespace(say=said.append, bar=lambda *_: contextlib.nullcontext(lambda: None))

    def grey(run, frame, vertices, faces, from_views):
        return Still(vertices, faces, vertices, np.zeros(vertices.shape, np.uint8), np.zeros(len(vertices)))

    monkeypatch.setattr(make, "_colored_still", grey)
    full, empty = make.make_frames(frames_with(monkeypatch, grids, film), make.Options(), terminal)
    assert len(full.faces) and not len(empty.positions) and not len(empty.faces)
    assert "nothing at frame 1: it has no mesh there" in said[0]
    nothing = frames_with(monkeypatch, [grids[1]] * 2, film)
    for made in (
        lambda: make.make_frames(nothing, make.Options(), terminal),
        lambda: make._own_surfaces(nothing, 64, terminal),
    ):
        with pytest.raises(InputError, match="nothing at any frame"):
            made()


@pytest.mark.parametrize("height", [None, 1.8])
def test_the_lowest_point_of_the_clip_is_the_ground(height):
    vertices, faces = ball((0.1, 0.1, 0.3))
    positions = np.stack([np.add(vertices, [0, 0, z]) for z in (0.2, 0.1, 0.15)]).astype(np.float32)
    mesh = animated_mesh(positions, faces, np.zeros((len(vertices), 3), np.uint8), np.zeros(len(vertices)), 10)
    placement = grounded(mesh, height)
    placed = moved_to(mesh, placement)
    assert placed.positions[..., 2].min() == pytest.approx(0, abs=1e-6)
    assert np.ptp(placed.positions[..., 2], axis=1).max() == pytest.approx(height or 0.6, rel=1e-5)
    back = (placed.positions - np.array([0, 0, placement.lift])) / placement.scale
    np.testing.assert_allclose(back, positions, atol=1e-5)
    kept = grounded(mesh, height, ground=False)
    assert kept.scale == placement.scale and kept.lift == 0
    of_frames = placement_of([*positions[..., 2], np.zeros(0)], height, ground=True)
    assert of_frames == placement, "a frame without a mesh says nothing"


def blocks(bridge: bool) -> tuple[OpacityGrid, np.ndarray]:
    """Two blocks side by side, and where they touch."""
    nodes = np.linspace(-0.4, 0.4, 65)
    x, y, z = np.meshgrid(nodes, nodes, nodes, indexing="ij")
    solid = (np.abs(x) < 0.1) & (np.abs(z) < 0.2) & (np.abs(y) < 0.25) & (np.abs(y) > 0.04)
    if bridge:
        solid |= (np.abs(x) < 0.05) & (np.abs(z) < 0.06) & (np.abs(y) < 0.05)
    opacity = ndimage.gaussian_filter(solid.astype(np.float64), 0.7)
    return OpacityGrid(opacity, np.full(3, -0.4), np.full(3, 0.4), 0.01), opacity


def parted(vertices):
    """Both frames: as they are, and with the right block drawn away to the side."""
    share = np.clip((vertices[:, 1:2] + 0.05) / 0.1, 0, 1)
    return np.stack([vertices, vertices + share * [0.0, 0.12, 0.0]])


def test_drawn_out_skin_that_the_film_shows_is_no_web():
    grid, solid = blocks(bridge=True)
    surface = surface_of(solid, 0.5, grid)
    positions = parted(surface.vertices)
    film = [filmed(x, surface.faces, frame) for frame, x in enumerate(positions)]
    assert not hidden_webs(surface, positions, silhouettes(film), [NOTHING] * 2, DIAGONAL).any()


def test_a_web_is_hidden_in_the_frames_whose_background_it_would_cover():
    grid, solid = blocks(bridge=True)
    surface = surface_of(solid, 0.5, grid)
    apart = surface_of(blocks(bridge=False)[1], 0.5, grid)
    film = [filmed(surface.vertices, surface.faces, 0), filmed(parted(apart.vertices)[1], apart.faces, 1)]
    positions = parted(surface.vertices)
    hidden = hidden_webs(surface, positions, silhouettes(film), [NOTHING] * 2, DIAGONAL)
    middle = surface.vertices[surface.faces].mean(axis=1)
    assert not hidden[0].any() and hidden[1].sum() > 20
    assert np.abs(middle[hidden[1], 1]).max() < 0.06
    before = overlap(positions[1], surface.faces, film[1])
    assert overlap(positions[1], surface.faces[~hidden[1]], film[1]) > before + 0.003
    shown = drawn_in(surface, positions, silhouettes(film), hidden)
    shape = silhouettes(film)[1]
    moved = np.flatnonzero((shown[1] != positions[1]).any(axis=1))
    np.testing.assert_array_equal(moved, np.intersect1d(moved, surface.faces[hidden[1]]))
    after = shape.at(shown[1][moved])
    assert len(moved) > 5 and after.max() <= 0 and after.min() > -1.5 / SIZE, "on the outline's inner pixels"
    np.testing.assert_array_equal(shown[0], positions[0])
    np.testing.assert_allclose(shown[1][moved, 0], positions[1][moved, 0], atol=1e-9)  # the camera looks along x


def test_a_web_along_the_line_of_sight_is_hidden_where_the_field_has_nothing():
    grid, solid = blocks(bridge=True)
    surface = surface_of(solid, 0.5, grid)
    apart = surface_of(blocks(bridge=False)[1], 0.5, grid)

    def behind(x):
        return x - np.clip((x[:, 1:2] + 0.05) / 0.1, 0, 1) * [0.25, 0.0, 0.0]

    positions, film = behind(surface.vertices)[None], [filmed(behind(surface.vertices), surface.faces)]
    own = FrameSurface.of(behind(apart.vertices), apart.faces)
    assert not hidden_webs(surface, positions, silhouettes(film), [NOTHING], DIAGONAL).any(), (
        "the film shows no background there"
    )
    hidden = hidden_webs(surface, positions, silhouettes(film), [own], DIAGONAL)[0]
    assert hidden.sum() > 10
    assert own.distance(positions[0][surface.faces[hidden]].mean(axis=1)).mean() > 0.02
    camera, size = PLAN.c2w()[0], 512
    seen = rasterise(*project_array(positions[0], camera, PLAN.focal_px(size), size), surface.faces, size).face
    assert not np.isin(np.flatnonzero(hidden), seen).any(), "what the film shows has its picture on it"


def test_faces_are_torn_open_in_the_frames_that_hide_them_and_whole_in_all_others():
    vertices, faces = ball(subdivisions=2)
    positions = np.stack([vertices, vertices + np.array([0.1, 0.0, 0.0]), 1.5 * vertices])
    hidden = np.zeros((3, len(faces)), dtype=bool)
    top, side = (vertices[faces].mean(axis=1)[:, axis] > 0.2 for axis in (2, 1))
    hidden[1, top], hidden[2, side] = True, True
    whole = animated_mesh(positions, faces, np.zeros((len(vertices), 3), np.uint8), np.arange(len(vertices)), 10.0)
    torn = torn_open(whole, hidden)
    for frame in range(3):
        corner = torn.positions[frame][torn.faces]
        area = np.linalg.norm(np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0]), axis=1)
        before = positions[frame][faces]
        normal = np.cross(before[:, 1] - before[:, 0], before[:, 2] - before[:, 0])
        np.testing.assert_allclose(area[hidden[frame]], 1e-4 * np.linalg.norm(normal[hidden[frame]], axis=1), rtol=1e-4)
        np.testing.assert_array_equal(corner[~hidden[frame]], positions[frame][faces[~hidden[frame]]])
        shown = positions[frame][np.unique(faces[~hidden[frame]])]
        gone = corner[hidden[frame]].reshape(-1, 3)
        assert not len(gone) or cKDTree(shown).query(gone)[0].max() < 0.01, "a closed face lies on the skin around"
        assert not len(gone) or np.ptp(gone, axis=0).max() < 0.01, "a sheet closes onto one place"
    np.testing.assert_array_equal(torn.confidence[torn.faces], faces)
    np.testing.assert_array_equal(np.unique(torn.faces), np.arange(len(torn.confidence)))
    assert len(torn.confidence) < len(vertices) + 3 * hidden.any(axis=0).sum() / 2, "neighbours share their vertices"
    assert torn_open(whole, np.zeros_like(hidden)) is whole


def test_skin_is_drawn_over_a_part_of_the_fields_surface_that_it_leaves_bare():
    nodes = np.linspace(-0.5, 0.5, 81)
    x, y, z = np.meshgrid(nodes, nodes, nodes, indexing="ij")
    body = x**2 + y**2 + z**2 < 0.2**2
    limb = (x**2 + z**2 < 0.06**2) & (y > 0) & (y < 0.42)
    grid = OpacityGrid(np.zeros_like(x), np.full(3, -0.5), np.full(3, 0.5), 0.0125)
    skin, whole = (
        surface_of(ndimage.gaussian_filter(solid.astype(np.float64), 0.7), 0.5, grid) for solid in (body, body | limb)
    )
    own = [FrameSurface.of(skin.vertices, skin.faces), FrameSurface.of(whole.vertices, whole.faces), NOTHING]
    positions = np.stack([skin.vertices] * 3)
    before = own[1].uncovered(skin.vertices)
    after = covered(positions, skin.faces, own, DIAGONAL)
    np.testing.assert_array_equal(after[[0, 2]], positions[[0, 2]])
    left = own[1].uncovered(after[1])
    assert before.max() > 0.2 and left.max() < 0.07 and (left > 0.05).mean() < 0.1 * (before > 0.05).mean()
    assert own[1].distance(after[1]).mean() < 0.01
    far = skin.vertices[:, 1] < -0.05
    np.testing.assert_array_equal(after[1][far], skin.vertices[far])


def test_each_step_of_the_moving_surface_goes_on_from_the_one_before(monkeypatch):
    vertices, faces = ball(subdivisions=1)
    surface = CanonicalMesh(vertices, faces, 0)
    steps = []

    def tracks_of(x):
        return Tracks(np.float32(x), np.zeros((2, len(vertices))), np.zeros((2, len(vertices)), bool))

    def moved(name):
        def step(positions, *rest):
            steps.append(name)
            return positions + np.float32(0.01)

        return step

    monkeypatch.setattr(make, "input_pictures", lambda views: [filmed(vertices, faces, i) for i in range(2)])
    monkeypatch.setattr(make, "_solid", lambda *_: (None, None, None))
    monkeypatch.setattr(make, "_own_surfaces", lambda *_: [])
    monkeypatch.setattr(make, "_surface", lambda *_: surface)
    monkeypatch.setattr(make, "_followed", lambda *_: tracks_of([vertices, vertices]))
    monkeypatch.setattr(make, "_mended", lambda run, surface, tracks, *_: tracks_of(moved("mended")(tracks.positions)))
    monkeypatch.setattr(make, "fitted_to_outlines", moved("outlines"))
    monkeypatch.setattr(make, "fitted_to_film", moved("film"))
    terminal = SimpleNamespace(say=lambda _: None, bar=lambda *_: contextlib.nullcontext(lambda: None))
    run = SimpleNamespace(views=None, canonical_frame=0)
    found, tracks, _ = make.moving_surface(run, make.Options(), terminal)
    assert steps == ["mended", "outlines", "film"]
    np.testing.assert_allclose(tracks.positions, [vertices + 0.01 * len(steps)] * 2, atol=1e-5)
    assert found is surface
