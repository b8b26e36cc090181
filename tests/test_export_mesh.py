"""The animated mesh of an analytic field whose inverse deformation is known exactly."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import trimesh
from export_fixture import SwingingLimb
from scipy.spatial import cKDTree

from sv4d_ns.export.surface.extraction import (
    _with_holes_closed,
    _without_pinches,
    canonical_mesh,
    find_tears,
    follow_vertices,
    frozen,
    is_watertight,
    opacity_grid,
    vertex_graph,
    vertex_normals,
)
from sv4d_ns.export.surface.registration import UNSOLVED_BOUND, FrameSurface, refitted
from sv4d_ns.utils.errors import InputError

DIAGONAL = 1.14 * np.sqrt(3)
TIMES = np.linspace(0, 1, 6)


@pytest.fixture(scope="module")
def limb():
    return SwingingLimb()


@pytest.fixture(scope="module")
def grid(limb):
    return opacity_grid(limb, 64)


@pytest.fixture(scope="module")
def mesh(grid):
    return canonical_mesh(grid, max_faces=4000)


def truth(limb, vertices, times):
    return np.stack([limb.moved(torch.from_numpy(vertices), float(t)).numpy() for t in times])


def half_opaque(limb, grid):
    """Orthographic silhouettes of the volume along x, y, z: pixels at least half opaque, on the grid's own nodes."""
    axis = torch.linspace(-0.57, 0.57, 64)
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    density = limb.canonical_density(points).reshape(64, 64, 64).numpy()
    return [1 - np.exp(-density.sum(axis=i) * 1.14 / 63) > 0.5 for i in range(3)]


@pytest.mark.parametrize(("density", "edge"), [(120.0, 0.004), (400.0, 0.001), (40.0, 0.02)])
def test_silhouettes_are_those_of_the_rendered_volume(density, edge):
    limb = SwingingLimb(density=density, edge=edge)
    grid = opacity_grid(limb, 64)
    mesh = canonical_mesh(grid)
    solid = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    inside = solid.voxelized(1.14 / 63).fill()
    for i, expected in enumerate(half_opaque(limb, grid)):
        area = inside.matrix.any(axis=i).sum()  # counts every pixel the surface touches, so it is larger by its rim
        rim = np.sqrt(expected.sum() * np.pi * 4)
        assert expected.sum() - 0.5 * rim < area < expected.sum() + rim


def test_mesh_is_closed_outward_and_within_budget(mesh):
    solid = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    assert solid.is_watertight
    assert solid.volume == pytest.approx(0.0508 + 0.01 * 0.9, rel=0.1)  # at distance 0, and 1 cm of visible softness
    assert 2000 < len(mesh.faces) <= 4000


def test_normals_point_out_and_agree_with_trimesh(mesh):
    normals = vertex_normals(mesh.vertices, mesh.faces)
    expected = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).vertex_normals
    np.testing.assert_allclose(np.linalg.norm(normals, axis=-1), 1, atol=1e-5)
    assert (np.einsum("ni,ni->n", normals, expected) > 0.9).mean() > 0.99


def test_floaters_and_cavities_are_removed():
    class Littered(SwingingLimb):
        def distance(self, x):
            hollow = torch.maximum(super().distance(x), 0.08 - torch.linalg.norm(x, dim=-1))
            floater = torch.linalg.norm(x - torch.tensor([-0.45, 0.45, 0.45]), dim=-1) - 0.02
            return torch.minimum(hollow, floater)

    clean, littered = canonical_mesh(opacity_grid(SwingingLimb(), 64)), canonical_mesh(opacity_grid(Littered(), 64))
    assert littered.dropped_parts == 1
    np.testing.assert_allclose(np.sort(littered.vertices, axis=0), np.sort(clean.vertices, axis=0), atol=1e-5)


def test_a_patch_on_a_second_solution_is_torn_off(mesh):
    graph, reach = vertex_graph(mesh.faces, len(mesh.vertices)), 0.04
    tip = mesh.vertices[:, 0] > 0.4
    moved = mesh.vertices + np.where(tip[:, None], [0, 0.3, 0.0], [0, 0, 0.1])
    np.testing.assert_array_equal(find_tears(mesh.vertices, moved, graph, reach), tip)
    stretched = mesh.vertices * [1.8, 1, 1]  # growing is no tear, however far the tip gets
    assert not find_tears(mesh.vertices, stretched, graph, reach).any()


def test_a_second_solution_does_not_draw_the_skin_out(limb, mesh):
    class Mirrored(SwingingLimb):
        """From the middle of the clip on, the limb's tip is found only at a place far from the limb."""

        def deformation(self, x, t):
            away = torch.tensor([0.0, 0.35, 0.0])
            late, far = t > 0.5, x[:, 1:2] > 0.2
            canonical = torch.where(late & far, x - away, x)
            canonical = torch.where(
                late & ~far, canonical * torch.clamp(0.4 / x.norm(dim=-1, keepdim=True), max=1), canonical
            )
            return canonical - x

    tracks = follow_vertices(Mirrored(), mesh, np.linspace(0, 1, 4))
    edges = mesh.faces[:, [0, 1]]
    length = np.linalg.norm(tracks.positions[:, edges[:, 0]] - tracks.positions[:, edges[:, 1]], axis=-1)
    assert length.max() < 0.1


def test_what_the_renderer_skips_is_not_in_the_mesh(limb, mesh):
    class Parked(SwingingLimb):
        """A large part stands where the renderer never looks."""

        def distance(self, x):
            return torch.minimum(super().distance(x), torch.linalg.norm(x + 0.35, dim=-1) - 0.15)

    seen = canonical_mesh(opacity_grid(Parked(), 64, possible=lambda x: limb.distance(x) < 0.05), max_faces=4000)
    np.testing.assert_allclose(seen.vertices, mesh.vertices, atol=1e-6)
    assert len(canonical_mesh(opacity_grid(Parked(), 64)).faces) > 1.2 * len(
        canonical_mesh(opacity_grid(limb, 64)).faces
    )


def test_vertices_follow_the_known_inverse(limb, mesh):
    tracks = follow_vertices(limb, mesh, TIMES)
    error = np.linalg.norm(tracks.positions - truth(limb, mesh.vertices, TIMES), axis=-1)
    assert error.max() < 1e-3 * DIAGONAL
    assert error.mean() < 1e-4 * DIAGONAL
    assert not tracks.guessed.any()
    assert np.ptp(tracks.positions, axis=0).max() > 0.2  # the limb's tip really moves


def test_reported_residual_is_the_equations(limb, mesh):
    tracks = follow_vertices(limb, mesh, TIMES)
    for x, time, reported in zip(tracks.positions, TIMES, tracks.residuals, strict=True):
        points = torch.from_numpy(x)
        back = points + limb.deformation(points, torch.full_like(points[:, :1], float(time)))
        residual = np.linalg.norm(back.numpy() - mesh.vertices, axis=-1) / DIAGONAL
        np.testing.assert_allclose(residual, reported, atol=1e-6)
    summary = tracks.summary()
    for value in (tracks.residuals.mean(), np.percentile(tracks.residuals, 95), tracks.residuals.max()):
        assert f"{100 * value:.3f} %" in summary


def test_fixed_point_would_diverge_but_the_solver_does_not(mesh):
    steep = SwingingLimb(swing=2.2)  # the turn changes by more than its argument: no contraction
    x = torch.from_numpy(mesh.vertices)
    fixed, t = x.clone(), torch.full_like(x[:, :1], 0.25)
    for _ in range(50):
        fixed = x - steep.deformation(fixed, t)
    assert torch.linalg.norm(fixed + steep.deformation(fixed, t) - x, dim=-1).max() > 0.1
    times = np.linspace(0, 0.25, 4)
    tracks = follow_vertices(steep, mesh, times)
    error = np.linalg.norm(tracks.positions - truth(steep, mesh.vertices, times), axis=-1)
    assert np.quantile(error, 0.99) < 2e-3 * DIAGONAL
    assert tracks.guessed.mean() < 0.01


def test_unreachable_vertices_follow_their_neighbours_and_are_counted(mesh):
    class Torn(SwingingLimb):
        """The canonical limb's tip is never mapped to, as after a fit whose deformation is not onto."""

        def deformation(self, x, t):
            canonical = x + super().deformation(x, t)
            return canonical * torch.clamp(0.40 / torch.linalg.norm(canonical, dim=-1, keepdim=True), max=1) - x

    tracks = follow_vertices(Torn(), mesh, TIMES)
    tip = np.linalg.norm(mesh.vertices, axis=-1) > 0.41
    np.testing.assert_array_equal(tracks.guessed[:, tip], True)
    inside = np.linalg.norm(mesh.vertices, axis=-1) < 0.38
    assert tracks.guessed[:, inside].mean() < 0.02
    # neighbours carry the tip along instead of leaving it behind: it moves with the limb
    expected = truth(SwingingLimb(), mesh.vertices, TIMES)
    error = np.linalg.norm(tracks.positions - expected, axis=-1)[:, tip].max()
    error_of_staying = np.linalg.norm(mesh.vertices - expected, axis=-1)[:, tip].max()
    assert error < error_of_staying / 3
    assert np.isfinite(tracks.positions).all()


class Thin(SwingingLimb):
    """The limb is so thin that simplification pinches it."""

    def distance(self, x):
        limb = torch.sqrt((x[:, 0] - x[:, 0].clamp(0, 0.5)) ** 2 + x[:, 1] ** 2 + x[:, 2] ** 2) - 0.022
        body = torch.linalg.norm(x, dim=-1) - 0.12
        return torch.minimum(body, limb)


def test_watertight_within_the_budget():
    grid = opacity_grid(Thin(density=400.0), 72)
    closed = canonical_mesh(grid, max_faces=600, watertight=True)
    solid = trimesh.Trimesh(closed.vertices, closed.faces, process=False)
    assert solid.is_watertight and solid.is_winding_consistent and len(closed.faces) <= 600
    full = trimesh.Trimesh(*(lambda m: (m.vertices, m.faces))(canonical_mesh(grid)), process=False)
    assert solid.volume == pytest.approx(full.volume, rel=0.05)


def test_holes_and_pinches_are_repaired():
    box = trimesh.creation.icosphere(2)
    faces = np.asarray(box.faces)
    assert is_watertight(faces)
    fin = np.array([[faces[0, 0], faces[0, 1], faces[50, 2]]])  # a third face on an edge
    broken = np.concatenate([faces[7:], fin])
    assert not is_watertight(broken)
    vertices, repaired = _with_holes_closed(np.asarray(box.vertices), _without_pinches(broken))
    assert is_watertight(repaired)
    solid = trimesh.Trimesh(vertices, repaired, process=False)
    assert solid.is_watertight and solid.volume == pytest.approx(box.volume, rel=0.1)


class Unsolvable(SwingingLimb):
    """At the last frame the limb stands elsewhere, and the deformation says nothing of how it got there."""

    def deformation(self, x, t):
        return torch.where(t > 0.9, 0.3 - x, super().deformation(x, t))

    def density(self, x, t):
        return torch.where(
            t[:, 0] > 0.9, self.canonical_density(x - torch.tensor([0.0, 0.0, 0.04])), super().density(x, t)
        )


def test_a_frame_without_an_inverse_is_fitted_to_its_own_surface(mesh):
    field, times = Unsolvable(swing=0.2), np.linspace(0, 1, 4)
    tracks = follow_vertices(field, mesh, times)
    assert tracks.guessed[-1].mean() > UNSOLVED_BOUND > tracks.guessed[:-1].mean(axis=1).max()

    cuts = [canonical_mesh(opacity_grid(frozen(field, float(time)), 64)) for time in times]
    better, lines = refitted(tracks, mesh, [FrameSurface.of(cut.vertices, cut.faces) for cut in cuts], DIAGONAL)
    (line,) = lines
    assert "frame 3" in line and "--mode sequence" in line
    np.testing.assert_array_equal(better.positions[:-1], tracks.positions[:-1])
    expected = mesh.vertices + np.array([0, 0, 0.04])  # the whole object stands 4 cm higher
    assert np.abs((better.positions[-1] - expected).mean(axis=0)).max() < 0.012
    samples = trimesh.sample.sample_surface(
        trimesh.Trimesh(cuts[3].vertices, cuts[3].faces, process=False), 20_000, seed=0
    )[0]
    assert cKDTree(samples).query(better.positions[-1])[0].mean() < 5e-3 * DIAGONAL


def test_what_cannot_hold_the_object_is_not_asked_of_the_field(grid):
    asked = []

    class Counting(SwingingLimb):
        def canonical_density(self, x):
            asked.append(len(x))
            return super().canonical_density(x)

    near = opacity_grid(Counting(), 64, possible=lambda x: x.norm(dim=-1) < 0.3)
    assert sum(asked) < 0.1 * 64**3
    inside = np.linalg.norm(np.stack(np.meshgrid(*[np.linspace(-0.57, 0.57, 64)] * 3, indexing="ij")), axis=0) < 0.29
    np.testing.assert_allclose(near.values[inside], grid.values[inside], atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: canonical_mesh(opacity_grid(SwingingLimb(density=4.0), 32)), "the field is empty"),
        (lambda: canonical_mesh(opacity_grid(SwingingLimb(), 32), max_faces=50), "--max-faces 50"),
        (lambda: canonical_mesh(opacity_grid(SwingingLimb(), 32), max_faces=0), "--max-faces 0"),
        (lambda: opacity_grid(SwingingLimb(), 4), "--resolution 4"),
    ],
)
def test_bad_input_is_one_sentence(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_mesh_values_are_frozen(mesh):
    with pytest.raises(AttributeError):
        mesh.vertices = mesh.vertices * 2
    assert replace(mesh, dropped_parts=3).dropped_parts == 3
