"""The compiled passes over packed samples against their torch twins."""

from dataclasses import replace

import pytest
import torch

from sv4d_ns.field.compositing import RaySamples, composite, spread


def packed(counts: list[int]) -> RaySamples:
    torch.manual_seed(5)
    rays = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    distances = torch.cat([2 + torch.rand(count).sort().values for count in counts])
    return RaySamples(rays, distances, 0.02, len(counts))


@pytest.mark.parametrize("counts", [[3, 0, 1, 40, 0, 7], [0, 0], [1]])
@pytest.mark.parametrize("largest", [0.0, 1e-5, 5.0, 400.0])
def test_weights_and_sums(counts: list[int], largest: float) -> None:
    samples = packed(counts)
    density = (torch.rand(sum(counts)) * largest).requires_grad_()
    ours, theirs = composite(density, samples), composite(density, samples, "torch")
    assert ours[0].grad_fn is not None and "_Composite" in type(ours[0].grad_fn).__name__
    for value, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("asked", [(0,), (1,), (0, 1)])
def test_gradients_of_weights_and_sums(asked: tuple[int, ...]) -> None:
    samples = packed([3, 0, 1, 40, 0, 7])
    density = (torch.rand(51) * 40).requires_grad_()
    found = []
    for backend in ("numba", "torch"):
        values = composite(density, samples, backend)
        torch.manual_seed(6)
        loss = torch.stack([(values[number] * torch.randn_like(values[number])).sum() for number in asked]).sum()
        found.append(torch.autograd.grad(loss, density)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("counts", [[3, 0, 1, 40, 0, 7], [0, 0], [1]])
@pytest.mark.parametrize("largest", [0.0, 1e-6, 0.05])
def test_spread_with_its_gradient(counts: list[int], largest: float) -> None:
    samples = packed(counts)
    weights = (torch.rand(sum(counts)) * largest).requires_grad_()
    ours, theirs = spread(weights, samples), spread(weights, samples, "torch")
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-9)
    grads = [torch.autograd.grad(3 * value, weights)[0] for value in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-7)


def test_other_precisions_take_the_twin() -> None:
    samples = packed([2, 3])
    samples = replace(samples, distances=samples.distances.double())
    density = torch.rand(5, dtype=torch.float64)
    assert composite(density, samples)[0].dtype == spread(density, samples).dtype == torch.float64
