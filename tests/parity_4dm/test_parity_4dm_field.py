"""The space-time field, its rendering and the shared empty-space grid against recordings of 4Diffusion's reference."""

import sys
from pathlib import Path

import folder_4dm as folder
import pytest
import torch

from sv4d_ns.distillation import losses
from sv4d_ns.field.compositing import RaySamples, accumulate, composite

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from literal_occupancy import SharedOccupancyGrid

FEATURES, DENSITY, NORMALS = 1e-5, 1e-4, 1e-3
ON_NODES = 12
"""The first points lie on grid nodes, where the derivative is one-sided."""
FIELDS = folder.names("nerf_")
BACKENDS = ["numba", "torch"]


@pytest.mark.parametrize("name", FIELDS)
def test_levels(name):
    recorded, field = folder.tensors(f"nerf_{name}.safetensors"), folder.field(f"nerf_{name}.safetensors", "torch")
    for part, grid in (("xyz", field.space), ("xyzt", field.space_time)):
        for key in ("resolution", "entries", "offset", "scale", "dense"):
            ours = torch.from_numpy(getattr(grid.levels, key))
            folder.assert_within(ours.double(), recorded[f"level.{part}.{key}"].double(), 0.0)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values(name, backend):
    recorded, field = folder.tensors(f"nerf_{name}.safetensors"), folder.field(f"nerf_{name}.safetensors", backend)
    x = recorded["points"]
    for i, time in enumerate(recorded["times"]):
        t = time.expand(len(x), 1)
        density, rgb = field.density_and_color(x, t)
        place = field._unit(x)
        folder.assert_within(field.space(place), recorded[f"t{i}.features_xyz"], FEATURES)
        folder.assert_within(field.space_time(torch.cat([place, t], -1)), recorded[f"t{i}.features_xyzt"], FEATURES)
        folder.assert_within(field.features(x, t), recorded[f"t{i}.features"], FEATURES)
        folder.assert_within(density[:, None], recorded[f"t{i}.density"], DENSITY)
        folder.assert_within(rgb, recorded[f"t{i}.rgb"], FEATURES)
        normals = field.normals(x, t).detach()
        folder.assert_within(normals[ON_NODES:], recorded[f"t{i}.normal"][ON_NODES:], NORMALS)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(name, backend):
    recorded, field = folder.tensors(f"nerf_{name}.safetensors"), folder.field(f"nerf_{name}.safetensors", backend)
    x = recorded["points"]
    density, rgb = field.density_and_color(x, recorded["times"][1].expand(len(x), 1))
    loss = density.clamp(max=50).mean() + rgb.square().sum(-1).mean()
    loss.backward()
    folder.assert_within(loss.detach(), recorded["grad_loss"], 1e-5)
    for key, parameter in folder.field_parameters(field).items():
        reference = recorded[f"grad.{key}"]
        folder.assert_within(parameter.grad.view_as(reference), reference, 1e-6)


@pytest.mark.parametrize("name", FIELDS)
def test_rendering(name):
    recorded, field = folder.tensors(f"nerf_{name}.safetensors"), folder.field(f"nerf_{name}.safetensors", "numba")
    starts, ends = recorded["render.t_starts"], recorded["render.t_ends"]
    n, k = starts.shape
    rays, middle = torch.arange(n).repeat_interleave(k), ((starts + ends) / 2).flatten()
    directions = recorded["render.rays_d"][rays]
    x = recorded["render.rays_o"][rays] + middle[:, None] * directions
    t = recorded["times"][1].expand(len(x), 1)
    density, rgb = field.density_and_color(x, t)
    folder.assert_within(density.view(n, k), recorded["render.density"], DENSITY)
    folder.assert_within(rgb.view(n, k, 3), recorded["render.rgb_samples"], FEATURES)
    # intervals of any length: the density times the length, in steps of one
    samples = RaySamples(rays, middle, 1.0, n)
    weights = composite(density * (ends - starts).flatten(), samples)[0]
    opacity = accumulate(weights, torch.ones(n * k, 1), samples)
    picture = accumulate(weights, rgb, samples) + 1 - opacity
    folder.assert_within(weights.view(n, k), recorded["render.weights"], FEATURES)
    folder.assert_within(opacity, recorded["render.opacity"], FEATURES)
    folder.assert_within(picture, recorded["render.comp_rgb_white"], FEATURES)
    folder.assert_within(accumulate(weights, middle[:, None], samples), recorded["render.depth"], FEATURES)
    variance = losses.depth_variance(weights, middle, rays, n)
    folder.assert_within(variance[:, None], recorded["render.z_variance"], FEATURES)

    opacity = opacity[:, 0]
    orientation = losses.orientation(weights, field.normals(x, t), directions, opacity)
    folder.assert_within(orientation, recorded["loss.orient"], 1e-5)
    folder.assert_within(losses.sparsity(opacity), recorded["loss.sparsity"], 1e-5)
    folder.assert_within(losses.opaque(opacity), recorded["loss.opaque"], 1e-5)
    folder.assert_within(losses.z_variance(variance, opacity), recorded["loss.z_variance"], 1e-5)


OCCUPANCY = "occupancy.safetensors"


def grid_of(recorded: dict[str, torch.Tensor]) -> SharedOccupancyGrid:
    return SharedOccupancyGrid(recorded["u0.binaries_after"].shape[-1])


def set_opacity(grid: SharedOccupancyGrid, opacity: torch.Tensor) -> None:
    grid.density.copy_((opacity / grid.step_length).view_as(grid.density))


@folder.needs(OCCUPANCY)
def test_occupancy_updates():
    recorded = folder.tensors(OCCUPANCY)
    grid = grid_of(recorded)
    updates = sorted(name.partition(".")[0] for name in recorded if name.endswith(".occs_after"))
    assert updates
    for update in updates:
        set_opacity(grid, recorded[f"{update}.occs_before"])
        x = recorded.get(f"{update}.x")
        if x is not None:
            cell = ((x + grid.half_extent) / grid.cell_size).floor().long()
            cells = (cell[:, 0] * grid.resolution + cell[:, 1]) * grid.resolution + cell[:, 2]
            if int(recorded[f"{update}.step"]) < 256:
                assert torch.equal(cells, grid.cells_to_visit(int(recorded[f"{update}.step"])))
            grid.absorb(cells, recorded[f"{update}.density_8_times"])
        folder.assert_within(grid.opacity().flatten(), recorded[f"{update}.occs_after"], 1e-6)
        assert x is None or torch.equal(grid.occupied, recorded[f"{update}.binaries_after"])


@folder.needs(OCCUPANCY)
def test_marching():
    recorded = folder.tensors(OCCUPANCY)
    if "march.rays_o" not in recorded:
        pytest.skip("no march recorded")
    grid = grid_of(recorded)
    last = max(name.partition(".")[0] for name in recorded if name.endswith(".occs_after"))
    set_opacity(grid, recorded[f"{last}.occs_after"])
    grid.occupied.copy_(recorded[f"{last}.binaries_after"])
    assert grid.step_length == pytest.approx(float(recorded["march.step"]), rel=1e-6)
    assert grid.least_opacity() == pytest.approx(float(recorded["march.alpha_thre_effective"]), rel=1e-5)
    samples = grid.march(recorded["march.rays_o"], recorded["march.rays_d"], recorded["march.jitter01"])
    assert torch.equal(samples.ray_indices, recorded["march.ray_indices"])
    middle = (recorded["march.t_starts"] + recorded["march.t_ends"]) / 2
    folder.assert_within(samples.distances, middle, 1e-5)
    assert torch.equal(grid.visible(samples, recorded["march.sigmas"]), recorded["march.visible"])
