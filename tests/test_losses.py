"""Each loss against a value worked out another way, and the gradient it is there for."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from sv4d_ns.field.compositing import RaySamples, spread
from sv4d_ns.field.deformable import DeformableField, DeformableFieldConfig
from sv4d_ns.fitting import losses


def test_photometric_is_a_weighted_mean_square() -> None:
    rendered, target = torch.tensor([[0.5, 0.5, 0.5], [1.0, 0.0, 0.0]]), torch.zeros(2, 3)
    value = losses.photometric(rendered, target, torch.tensor([1.0, 3.0]))
    assert value == pytest.approx((0.25 + 3 / 3) / 4)
    assert losses.photometric(rendered, target, torch.tensor([2.0, 6.0])) == pytest.approx(value.item())
    assert losses.photometric(rendered, target, torch.zeros(2)) == 0


def test_mask_loss() -> None:
    value = losses.mask(torch.tensor([1.0, 0.5]), torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0]))
    assert value == pytest.approx(0.125)


def test_dssim_agrees_with_skimage() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 16, 16, 3), dtype=np.float32)
    b = 0.5 * (a + b)
    expected = structural_similarity(
        a, b, win_size=5, channel_axis=2, data_range=1.0, use_sample_covariance=False, full=True
    )[1][2:-2, 2:-2].mean()
    value = losses.dssim(torch.from_numpy(a)[None], torch.from_numpy(b)[None], torch.ones(1))
    assert value == pytest.approx((1 - expected) / 2, abs=1e-5)
    assert losses.dssim(torch.from_numpy(a)[None], torch.from_numpy(a)[None], torch.ones(1)) == pytest.approx(
        0, abs=1e-6
    )


def test_sparsity_is_the_length_of_matter_in_the_open_and_spares_what_lies_behind_it() -> None:
    density = torch.tensor([100.0, 200.0, 200.0], requires_grad=True)
    opened = torch.tensor([1.0, 0.5, 0.0], requires_grad=True)
    loss = losses.sparsity(density, opened, 0.1, 2, 200.0)
    assert loss.item() == pytest.approx(0.1 * (0.5 + 0.5) / 2)
    loss.backward()
    assert density.grad is not None and density.grad[0] > density.grad[1] > density.grad[2] == 0
    assert opened.grad is None  # else a surface would thicken to shield what lies behind it


def test_scene_flow_is_quadratic_near_and_linear_far() -> None:
    here = torch.zeros(1, 3)
    near, far, farther = (losses.scene_flow(torch.tensor([[d, 0.0, 0.0]]), here, 0.1) for d in (0.01, 10.0, 20.0))
    torch.testing.assert_close(near, torch.tensor(0.005), rtol=0.01, atol=0)
    torch.testing.assert_close(farther - far, torch.tensor(100.0), rtol=0.01, atol=0)


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_distortion_equals_the_double_sum(backend: str) -> None:
    torch.manual_seed(0)
    counts = torch.tensor([4, 0, 1, 7])
    rays = torch.repeat_interleave(torch.arange(4), counts)
    distances = torch.cat([torch.rand(int(c)).sort().values for c in counts])
    weights = (torch.rand(len(rays)) / 8).requires_grad_()
    samples = RaySamples(rays, distances, 0.03, 4)
    expected, total = torch.zeros(()), 0.0
    for ray in (0, 2, 3):
        alpha = weights[rays == ray].sum()
        w, s = weights[rays == ray] / alpha, distances[rays == ray]
        wide = (w[:, None] * w * (s[:, None] - s).abs()).sum() + 0.03 / 3 * w.square().sum()
        expected, total = expected + alpha.detach() * wide, total + alpha.item()
    value = spread(weights, samples, backend)
    assert value.item() == pytest.approx(expected.item() / total, rel=1e-5)
    ours = torch.autograd.grad(value, weights)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(expected / total, weights)[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_distortion_does_not_ask_for_transparency(backend: str) -> None:
    weights = torch.tensor([0.1, 0.2, 0.3], requires_grad=True)
    samples = RaySamples(torch.zeros(3, dtype=torch.long), torch.tensor([1.0, 1.1, 1.3]), 0.1, 1)
    gradient = torch.autograd.grad(spread(weights, samples, backend), weights)[0]
    assert (gradient * weights).sum().item() == pytest.approx(0, abs=1e-7)  # scaling all weights changes nothing
    assert gradient.abs().max() > 1e-3


def test_normal_smoothness_separates_planes_from_bumps() -> None:
    torch.manual_seed(0)
    field = DeformableField(DeformableFieldConfig(levels=2, log2_table_size=10, max_resolution=32))
    x, offset = torch.rand(64, 3) - 0.5, 0.01 * torch.randn(64, 3)
    plane = lambda p: (p[:, 2], torch.zeros(len(p), 15))  # noqa: E731
    bumps = lambda p: (p[:, 2] + 0.02 * torch.sin(100 * p[:, 0]), torch.zeros(len(p), 15))  # noqa: E731
    field._canonical = plane  # type: ignore[method-assign]
    assert losses.normal_smoothness(field, x, offset) < 1e-8
    field._canonical = bumps  # type: ignore[method-assign]
    assert losses.normal_smoothness(field, x, offset) > 0.01


def test_rigidity_is_zero_for_rotations_and_not_for_stretching() -> None:
    torch.manual_seed(0)
    a = 0.7
    rotation = torch.tensor([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0], [0, 0, 1.0]])
    x, offset = torch.rand(32, 3), 0.05 * torch.randn(32, 3)
    shift = torch.tensor([0.1, 0.2, 0.3])
    rigid = lambda p: p @ rotation.t() + shift - p  # noqa: E731
    assert losses.deformation_rigidity(rigid(x), rigid(x + offset), offset) < 1e-9
    stretched = lambda p: 0.5 * p  # noqa: E731
    value = losses.deformation_rigidity(stretched(x), stretched(x + offset), offset)
    assert value.item() == pytest.approx(0.25 / 1.25, rel=1e-3)


def test_deformation_magnitude_counts_visible_samples_and_leaves_weights_alone() -> None:
    deformation = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]], requires_grad=True)
    weights = torch.tensor([1.0, 0.0], requires_grad=True)
    value = losses.deformation_magnitude(deformation, weights)
    assert value == 1
    value.backward()
    assert weights.grad is None and deformation.grad[1].abs().sum() == 0


def test_registration_pulls_points_outside_onto_the_hull_and_leaves_what_fits() -> None:
    distance = torch.tensor([0.0, 0.0, 0.0])
    landed = torch.tensor([0.01, 0.05, -0.05], requires_grad=True)
    value = losses.registration(landed, distance, 0.02, 0.1)
    assert value.item() == pytest.approx(2 * 1.5**2 / 3)
    gradient = torch.autograd.grad(value, landed)[0]
    assert gradient[0] == 0 and gradient[1] > 0 and gradient[2] < 0
    # beyond its reach a point has no say
    far = torch.tensor([0.5], requires_grad=True)
    assert torch.autograd.grad(losses.registration(far, torch.zeros(1), 0.02, 0.1), far)[0] == 0


def test_density_residual_is_its_mean_square() -> None:
    assert losses.density_residual(torch.tensor([1.0, -3.0])) == 5


def test_perceptual_distance_is_a_weighted_mean_over_patches() -> None:
    network = lambda a, b: (a - b).abs().mean((1, 2, 3))  # noqa: E731
    made = torch.stack([torch.full((4, 4, 3), 0.2), torch.full((4, 4, 3), 0.6)])
    value = losses.perceptual(network, made, torch.zeros_like(made), torch.tensor([3.0, 1.0]))
    assert value.item() == pytest.approx((3 * 0.2 + 0.6) / 4)


def test_normal_loss_counts_only_estimated_normals() -> None:
    up, side = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 0.0])
    rendered, estimated = torch.stack([up, up, up]), torch.stack([up, side, torch.zeros(3)])
    value = losses.normal(rendered, estimated, torch.tensor([1.0, 3.0, 100.0]))
    assert value.item() == pytest.approx(0.75)


def test_bilateral_smoothness_lets_normals_turn_at_edges_of_the_picture() -> None:
    angle = torch.linspace(0, 1, 8)
    normals = torch.stack([torch.sin(angle), torch.zeros(8), torch.cos(angle)], -1).expand(1, 8, 8, 3)
    plain, edge = torch.full((1, 8, 8, 3), 0.5), torch.zeros(1, 8, 8, 3)
    edge[:, :, ::2] = 1.0
    edge[:, :, 1::4] = 1.0
    seen = torch.ones(1, 8, 8, dtype=torch.bool)
    flat = normals[:, :, :1].expand(1, 8, 8, 3)
    assert losses.bilateral_normal(flat, plain, seen).item() == pytest.approx(0, abs=1e-6)
    turned = losses.bilateral_normal(normals, plain, seen)
    # Sobel's central difference of a circle: |n(a + h) - n(a - h)| / 2 = sin h
    assert turned.item() == pytest.approx(math.sqrt(1 + math.sin(1 / 7)) - 1, rel=1e-3)
    assert losses.bilateral_normal(normals, edge, seen) < 0.7 * turned
    assert losses.bilateral_normal(normals, plain, torch.zeros_like(seen)) == 0
