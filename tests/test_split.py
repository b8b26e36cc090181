"""Rows split over threads: the values and the gradients are those of the whole."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from sv4d_ns.field import volume_rendering
from sv4d_ns.field.compositing import RaySamples
from sv4d_ns.field.deformable import DeformableField, DeformableFieldConfig
from sv4d_ns.field.occupancy import OccupancyGrid
from sv4d_ns.field.volume_rendering import RenderOutput, render_rays
from sv4d_ns.utils import threads
from sv4d_ns.utils.split import results_of, run_split


@pytest.fixture(params=(1, 3))
def count(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(threads, "workers", lambda: request.param)
    threads._pool.cache_clear()
    return int(request.param)


def two_layers() -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    return nn.Linear(3, 4), nn.Linear(4, 2)


def test_values_and_gradients_are_those_of_the_whole(count: int) -> None:
    first, second = two_layers()
    rows = torch.randn(9, 3)
    parameters = [*first.parameters(), *second.parameters()]

    def task(part: Tensor) -> tuple[Tensor, ...]:
        hidden = first(part).relu()
        return hidden, second(hidden), part[:, 0]

    split = run_split([partial(task, part) for part in rows.split(4)], parameters)
    whole = task(rows)
    for made, expected in zip(split, whole, strict=True):
        torch.testing.assert_close(made, expected)
    assert split[0].requires_grad and not split[2].requires_grad, "what depends on no parameter has no gradient"
    found = [torch.autograd.grad(out[0].square().sum() + out[1].sum(), parameters) for out in (split, whole)]
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_what_is_not_used_has_no_gradient(count: int) -> None:
    first, second = two_layers()
    frozen, idle = nn.Parameter(torch.ones(1), requires_grad=False), nn.Parameter(torch.ones(1))
    parts = [lambda: (first(torch.ones(2, 3)), second(torch.ones(2, 4)))] * 2
    seen, unused = run_split(parts, [*first.parameters(), *second.parameters(), frozen, idle])
    seen.sum().backward()
    assert unused.requires_grad
    assert first.weight.grad is not None and second.weight.grad is None and idle.grad is None and frozen.grad is None
    torch.testing.assert_close(first.weight.grad, torch.full((4, 3), 4.0))


def test_nothing_is_recorded_where_nobody_asks(count: int) -> None:
    first, _ = two_layers()
    with torch.no_grad():
        (made,) = run_split([lambda: (first(torch.ones(2, 3)),)] * 2, first.parameters())
        assert not made.requires_grad
        assert [value.requires_grad for value in results_of([lambda: first(torch.ones(3))] * 5)] == [False] * 5
    assert [value.requires_grad for value in results_of([lambda: first(torch.ones(3))] * 5)] == [True] * 5


def test_an_error_of_a_part_arrives(count: int) -> None:
    first, _ = two_layers()

    def bad() -> tuple[Tensor, ...]:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        run_split([lambda: (first(torch.ones(2, 3)),), bad], first.parameters())


def rendered(field: DeformableField, occupancy: OccupancyGrid) -> tuple[RenderOutput, list[Tensor | None]]:
    torch.manual_seed(1)
    origins = torch.randn(300, 3)
    origins = 2 * origins / origins.norm(dim=-1, keepdim=True)
    directions = nn.functional.normalize(-origins + 0.2 * torch.randn(300, 3), dim=-1)
    times = torch.tensor([0.0, 0.5, 1.0])[torch.randint(0, 3, (300, 1))]
    out = render_rays(field, occupancy, origins, directions, times, 64, moments=(0.0, 0.5, 1.0))
    loss = (out.rgb * torch.rand(300, 3)).sum() + out.alpha.square().sum() + (out.deformation * out.positions).sum()
    assert out.residual is not None
    grads = torch.autograd.grad(
        loss + out.residual.square().sum(), [p for p in field.parameters() if p.requires_grad], allow_unused=True
    )
    return out, list(grads)


def test_rays_in_parts_are_the_same_rays(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    field = DeformableField(DeformableFieldConfig(levels=2, log2_table_size=10, max_resolution=32, keyframes=3))
    field.init_frame_from_neighbour(1, 0, torch.zeros(3))
    field.open_residual()
    for parameter in field.parameters():
        nn.init.normal_(parameter, std=0.1)
    occupancy = OccupancyGrid(3, 16, field.config.half_extent)
    whole, grads = rendered(field, occupancy)
    monkeypatch.setattr(volume_rendering, "PART_SAMPLES", 100)
    monkeypatch.setattr(volume_rendering, "workers", lambda: 3)
    parts = volume_rendering._parts(whole.samples)
    assert len(parts) == 3 and sum(part.n_rays for part, _ in parts) == 300
    split, split_grads = rendered(field, occupancy)
    for name in ("rgb", "alpha", "depth", "weights", "deformation", "density", "residual"):
        torch.testing.assert_close(getattr(split, name), getattr(whole, name), atol=1e-5, rtol=1e-4)
    for mine, theirs in zip(split_grads, grads, strict=True):
        if theirs is None:
            assert mine is None
        else:
            assert mine is not None
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)


def test_no_part_is_empty_where_one_ray_has_most_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volume_rendering, "PART_SAMPLES", 10)
    monkeypatch.setattr(volume_rendering, "workers", lambda: 4)
    rays = torch.tensor([2] * 90 + [3] * 10)
    parts = volume_rendering._parts(RaySamples(rays, torch.rand(100), 0.1, 6))
    assert sum(part.n_rays for part, _ in parts) == 6 and all(len(part.distances) for part, _ in parts)
    assert sum(len(part.distances) for part, _ in parts) == 100
