"""The animated mesh of an analytic field whose inverse deformation is known exactly."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import trimesh
from export_fixture import SwingingLimb

from sv4d_ns.errors import InputError
from sv4d_ns.export.mesh import canonical_mesh, follow_vertices, surface_colors, vertex_normals

DIAGONAL = 1.14 * np.sqrt(3)
TIMES = np.linspace(0, 1, 6)


@pytest.fixture(scope="module")
def limb():
    return SwingingLimb()


@pytest.fixture(scope="module")
def mesh(limb):
    return canonical_mesh(limb, resolution=64, max_faces=4000)


def truth(limb, vertices, times):
    return np.stack([limb.moved(torch.from_numpy(vertices), float(t)).numpy() for t in times])


def test_surface_is_where_a_step_is_half_opaque(limb, mesh):
    density = limb.canonical_density(torch.from_numpy(mesh.vertices)).numpy()
    opacity = 1 - np.exp(-density * 1.14 / 64)
    # one voxel is 0.018 and the density falls from full to nothing within it, so compare positions instead
    distance = limb.distance(torch.from_numpy(mesh.vertices)).numpy()
    assert np.abs(distance).mean() < 0.005
    assert 0.2 < opacity.mean() < 0.8


def test_mesh_is_closed_outward_and_within_budget(mesh):
    solid = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    assert solid.is_watertight
    assert solid.volume == pytest.approx(0.0508, rel=0.05)  # ellipsoid and limb, measured once on a 256 grid
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
            floater = torch.linalg.norm(x - torch.tensor([-0.45, 0.45, 0.45]), dim=-1) - 0.03
            return torch.minimum(hollow, floater)

    clean, littered = canonical_mesh(SwingingLimb(), 64), canonical_mesh(Littered(), 64)
    assert littered.dropped_parts == 1
    np.testing.assert_allclose(np.sort(littered.vertices, axis=0), np.sort(clean.vertices, axis=0), atol=1e-5)


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


def test_colours_are_what_a_ray_sees_below_the_skin(limb, mesh):
    class Dirty(SwingingLimb):
        def canonical_color(self, x):
            outside = (self.distance(x) > -0.001)[:, None]  # no ray ever constrained what is just outside
            return torch.where(outside, torch.ones_like(x), super().canonical_color(x))

    clean, dirty = surface_colors(limb, mesh), surface_colors(Dirty(), mesh)
    blue = mesh.vertices[:, 0] > 0.3
    np.testing.assert_allclose(clean[blue], [[26, 64, 230]] * blue.sum(), atol=2)
    at_the_vertex = 255 * Dirty().canonical_color(torch.from_numpy(mesh.vertices)).numpy()
    error, error_at_the_vertex = np.abs(dirty.astype(int) - clean)[blue], np.abs(at_the_vertex - clean)[blue]
    assert error.mean() < error_at_the_vertex.mean() / 2
    assert clean.dtype == np.uint8


@pytest.mark.parametrize(
    ("field", "arguments", "message"),
    [
        (SwingingLimb(density=5.0), {}, "the field is empty"),
        (SwingingLimb(), {"max_faces": 50}, "--max-faces 50"),
        (SwingingLimb(), {"resolution": 4}, "--resolution 4"),
    ],
)
def test_bad_input_is_one_sentence(field, arguments, message):
    with pytest.raises(InputError, match=message):
        canonical_mesh(field, **{"resolution": 32} | arguments)


def test_mesh_values_are_frozen(mesh):
    with pytest.raises(AttributeError):
        mesh.vertices = mesh.vertices * 2
    assert replace(mesh, dropped_parts=3).dropped_parts == 3
