"""The animated mesh of an analytic field whose inverse deformation is known exactly."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import trimesh
from export_fixture import SwingingLimb

from sv4d_ns.errors import InputError
from sv4d_ns.export.mesh import (
    _vertex_graph,
    canonical_mesh,
    follow_vertices,
    opacity_grid,
    surface_colors,
    torn_off,
    vertex_normals,
)

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
    graph, reach = _vertex_graph(mesh.faces, len(mesh.vertices)), 0.04
    tip = mesh.vertices[:, 0] > 0.4
    moved = mesh.vertices + np.where(tip[:, None], [0, 0.3, 0.0], [0, 0, 0.1])
    np.testing.assert_array_equal(torn_off(mesh.vertices, moved, graph, reach), tip)
    stretched = mesh.vertices * [1.8, 1, 1]  # growing is no tear, however far the tip gets
    assert not torn_off(mesh.vertices, stretched, graph, reach).any()


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
    assert f"{100 * tracks.residuals.mean():.3f} %" in tracks.summary()


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


FRONT, BACK = np.array([[2.0, 0, 0]]), np.array([[-2.0, 0, 0]])


def test_colours_are_what_a_ray_sees_not_what_the_outermost_point_has(limb, mesh, grid):
    class Dirty(SwingingLimb):
        def canonical_color(self, x):
            outside = (self.distance(x) > -0.001)[:, None]  # no ray ever constrained what is just outside
            return torch.where(outside, torch.ones_like(x), super().canonical_color(x))

    clean = surface_colors(limb, mesh, grid, FRONT, np.ones(1))
    dirty = surface_colors(Dirty(), mesh, grid, FRONT, np.ones(1))
    blue = mesh.vertices[:, 0] > 0.3
    np.testing.assert_allclose(clean[blue], [[26, 64, 230]] * blue.sum(), atol=2)
    at_the_vertex = 255 * Dirty().canonical_color(torch.from_numpy(mesh.vertices)).numpy()
    error, error_at_the_vertex = np.abs(dirty.astype(int) - clean)[blue], np.abs(at_the_vertex - clean)[blue]
    assert error.mean() < error_at_the_vertex.mean() / 2
    assert clean.dtype == np.uint8


def test_a_camera_colours_what_it_sees_and_only_that(limb, mesh, grid):
    def calls(mark: float):
        class Painted(SwingingLimb):
            """Red where the point is nearer to the front camera than to the back camera, else `mark` grey."""

            def canonical_color(self, x):
                front = (x[:, :1] > 0).float()
                return front * torch.tensor([1.0, 0, 0]) + (1 - front) * mark

        return Painted()

    normals = vertex_normals(mesh.vertices, mesh.faces)
    back_facing = (normals[:, 0] < -0.5) & (mesh.vertices[:, 0] < -0.1)
    for eyes in (FRONT, BACK, np.concatenate([FRONT, BACK])):
        colors = surface_colors(calls(0.5), mesh, grid, eyes, np.ones(len(eyes)))
        np.testing.assert_allclose(colors[back_facing], 128, atol=1)
        np.testing.assert_allclose(colors[mesh.vertices[:, 0] > 0.2], [[255, 0, 0]] * (mesh.vertices[:, 0] > 0.2).sum())


def test_hidden_vertices_do_not_take_the_colour_of_what_hides_them(grid, mesh):
    class LimbInFront(SwingingLimb):
        """The limb is blue, the body behind it red: seen from the limb's tip, the body's middle is hidden."""

        def canonical_color(self, x):
            return torch.where(x[:, :1] > 0.24, torch.tensor([0.0, 0, 1]), torch.tensor([1.0, 0, 0]))

    colors = surface_colors(LimbInFront(), mesh, grid, np.array([[2.0, 0, 0.0]]), np.ones(1))
    body = (mesh.vertices[:, 0] < 0.19) & (mesh.vertices[:, 0] > 0)
    assert (colors[body, 2] < 60).mean() > 0.97


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: canonical_mesh(opacity_grid(SwingingLimb(density=4.0), 32)), "the field is empty"),
        (lambda: canonical_mesh(opacity_grid(SwingingLimb(), 32), max_faces=50), "--max-faces 50"),
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
