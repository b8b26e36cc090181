"""Encoding kernel against its torch twin, and what the deformable field promises."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sv4d_ns.field import hash_grid
from sv4d_ns.field.deformable import DeformableField, DeformableFieldConfig
from sv4d_ns.field.hash_grid import HashEncoding
from sv4d_ns.utils import threads
from sv4d_ns.utils.errors import InputError


def encodings(**sizes: int) -> tuple[HashEncoding, HashEncoding]:
    fused, twin = HashEncoding(backend="numba", **sizes), HashEncoding(backend="torch", **sizes)
    with torch.no_grad():
        fused.table.normal_()
    twin.load_state_dict(fused.state_dict())
    return fused, twin


@pytest.mark.parametrize(
    "sizes",
    [
        {"levels": 6, "log2_table_size": 12, "base_resolution": 4, "max_resolution": 200},
        {"levels": 1, "log2_table_size": 10, "base_resolution": 5, "max_resolution": 5},
        {"levels": 3, "log2_table_size": 20, "base_resolution": 8, "max_resolution": 64},
    ],
)
def test_fused_encoding_equals_torch_in_values_and_gradients(sizes: dict[str, int]) -> None:
    torch.manual_seed(0)
    fused, twin = encodings(**sizes)
    # Beyond the cube, on its faces and corners, and more points than one thread's share.
    x = torch.cat([torch.rand(5000, 3) * 1.2 - 0.1, torch.eye(3), torch.zeros(1, 3), torch.ones(1, 3)])
    results = []
    for each in (fused, twin):
        points = x.clone().requires_grad_()
        out = each(points)
        cotangent = torch.sin(torch.arange(out.numel(), dtype=torch.float32)).reshape(out.shape)
        (out * cotangent).sum().backward()
        results.append((out, points.grad, each.table.grad))
    # Kinks: at cell borders either one-sided derivative is right, so compare gradients of x off the borders only.
    for a, b, tolerance in zip(results[0], results[1], (1e-5, 2e-2, 1e-4), strict=True):
        assert a is not None and b is not None
        torch.testing.assert_close(a[:5000], b[:5000], rtol=1e-3, atol=tolerance)
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-3, atol=1e-5)


def test_fused_gradient_matches_finite_differences() -> None:
    torch.manual_seed(1)
    fused, _ = encodings(levels=2, log2_table_size=14, base_resolution=4, max_resolution=7)
    # Mid-cell points: the interpolation is smooth there.
    x = ((torch.randint(0, 28, (50, 3)) + 0.5) / 28).requires_grad_()
    fused(x).sum().backward()
    h = 1e-3
    with torch.no_grad():
        for axis in range(3):
            step = h * torch.eye(3)[axis]
            numeric = (fused(x + step) - fused(x - step)).sum(-1) / (2 * h)
            torch.testing.assert_close(x.grad[:, axis], numeric, rtol=2e-2, atol=5e-2)


def test_encoding_is_safe_in_concurrent_threads_and_independent_of_their_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fused, _ = encodings(levels=4, log2_table_size=12, base_resolution=4, max_resolution=64)
    x = torch.rand(20000, 3)
    results = []
    for count in (1, 2, 3):
        for module in (threads, hash_grid):
            monkeypatch.setattr(module, "workers", lambda count=count: count)
        threads._pool.cache_clear()
        fused.table.grad = None
        fused(x).square().sum().backward()
        results.append(fused.table.grad.clone())
    for other in results[1:]:
        assert torch.equal(results[0], other)
    with ThreadPoolExecutor(3) as pool, torch.no_grad():
        outs = list(pool.map(lambda _: fused(x), range(6)))
    assert all(torch.equal(outs[0], o) for o in outs)


def test_gradient_of_positions_is_only_computed_when_asked() -> None:
    fused, _ = encodings(levels=2, log2_table_size=10, base_resolution=4, max_resolution=8)
    x = torch.rand(10, 3)
    fused(x).sum().backward()
    assert x.grad is None and fused.table.grad is not None


@pytest.mark.parametrize(
    "bad",
    [
        {"levels": 0},
        {"base_resolution": 32, "max_resolution": 16},
        {"backend": "cuda"},
        {"log2_table_size": 40},
    ],
)
def test_impossible_encodings_are_refused(bad: dict) -> None:
    with pytest.raises(InputError):
        HashEncoding(**bad)


def moving_field(canonical_time: float = 0.0) -> DeformableField:
    torch.manual_seed(0)
    config = DeformableFieldConfig(
        levels=4, log2_table_size=12, max_resolution=64, canonical_time=canonical_time, keyframes=11,
        motion_resolutions=(2, 5), appearance_resolutions=(3,), density_resolutions=(4,),
    )  # fmt: skip
    field = DeformableField(config)
    with torch.no_grad():
        field.encoding.table.normal_()
        for p in field.motion.parameters():
            if p.requires_grad:
                p.normal_(0, 0.05)
    return field


def test_new_field_is_static_fog() -> None:
    field = DeformableField()
    x, t = torch.rand(64, 3) - 0.5, torch.rand(64, 1)
    assert torch.equal(field.deformation(x, t), torch.zeros(64, 3))
    density, color = field.density_and_color(x, t)
    # Far above the occupancy threshold: an object that starts out as culled space would never appear.
    torch.testing.assert_close(density, torch.full_like(density, 200 / (1 + math.exp(6.5))), rtol=0.01, atol=0)
    assert ((color > 0) & (color < 1)).all()


@pytest.mark.parametrize("canonical_time", [0.0, 0.5])
def test_canonical_time_is_exactly_canonical(canonical_time: float) -> None:
    field = moving_field(canonical_time)
    x = torch.rand(64, 3) - 0.5
    at = torch.full((64, 1), canonical_time)
    assert torch.equal(field.deformation(x, at), torch.zeros(64, 3))
    assert torch.equal(field.density(x, at), field.canonical_density(x))
    away = field.deformation(x, at + 0.3)
    assert away.norm(dim=-1).min() > 1e-4
    # A batch of mixed times takes the other code path; the canonical rows must not notice.
    mixed = field.density(torch.cat([x, x]), torch.cat([at, at + 0.3]))
    torch.testing.assert_close(mixed[:64], field.canonical_density(x))


def test_density_is_canonical_density_at_the_deformed_point() -> None:
    field = moving_field()
    x, t = (torch.rand(256, 3) - 0.5) * 1.3, torch.rand(256, 1)
    sample = field.sample(x, t)
    inside = x.abs().amax(-1) <= 0.57
    assert not inside.all()
    torch.testing.assert_close(sample.density, field.canonical_density(x + field.deformation(x, t)) * inside)
    assert (sample.density[~inside] == 0).all()


def test_gradients_of_one_frame_reach_every_parameter_but_its_motion_and_light() -> None:
    field = moving_field(0.5)
    field.open_residual()
    density, color = field.density_and_color(torch.rand(4000, 3) - 0.5, torch.rand(4000, 1))
    (density.sum() + color.sum()).backward()
    groups = field.parameter_groups()
    assert sum(len(g) for g in groups.values()) == len(list(field.parameters()))
    fixed = [name for name, p in field.named_parameters() if not p.requires_grad]
    assert sorted(fixed) == [f"{grid}.keyframes.5" for grid in ("appearance", "motion")]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in field.parameters() if p.requires_grad)


def test_moments_may_differ_from_the_canonical_object_in_light_and_once_opened_in_shape() -> None:
    field = moving_field()
    with torch.no_grad():
        for grid in (field.motion, field.appearance, field.density_residual):
            for k, p in enumerate(grid.keyframes):
                p.fill_(0.0 if grid is field.motion or k == 0 else 3.0)
    x = torch.rand(64, 3) - 0.5
    still, later = torch.zeros(64, 1), torch.full((64, 1), 0.5)
    assert torch.equal(field.density(x, later), field.density(x, still))
    lit, unlit = field.density_and_color(x, later)[1], field.density_and_color(x, still)[1]
    torch.testing.assert_close(torch.logit(lit), torch.logit(unlit) + 3, atol=1e-3, rtol=0)
    field.open_residual()
    before, after = field.canonical_density(x) / 200, field.density(x, later)
    torch.testing.assert_close(torch.logit(after / 200), torch.logit(before) + 3, atol=1e-3, rtol=0)
    assert torch.equal(field.density(x, still), field.canonical_density(x))  # its share is zero here, but is its own:
    with torch.no_grad():
        field.density_residual.keyframes[0].fill_(3.0)
    assert torch.equal(field.density(x, still), after) and torch.equal(field.canonical_density(x) / 200, before)
    assert field.sample(x[:0], still[:0]).residual is None
    assert field.sample(x, later).residual is not None


def test_an_admitted_keyframe_starts_from_its_neighbour_and_a_trained_one_stays() -> None:
    field = moving_field(0.0)
    with torch.no_grad():
        for k, p in enumerate(field.motion.keyframes):
            p.fill_(0.1 * k if k < 3 else 0.0)
    shift = torch.tensor([0.1, 0.0, -0.05])
    assert field.init_frame_from_neighbour(3, 2, shift)
    x = torch.rand(50, 3) - 0.5
    at = lambda k: torch.full((50, 1), k / 10)  # noqa: E731
    # what is now at x was at x - shift, and both came from the same canonical point
    torch.testing.assert_close(
        x + field.deformation(x, at(3)), x - shift + field.deformation(x - shift, at(2)), atol=1e-5, rtol=0
    )
    assert field.appearance.keyframes[0].requires_grad, "from the second frame on"
    again = moving_field(0.0)
    again.load_state_dict(field.state_dict())
    assert again.appearance.keyframes[0].requires_grad and not again.motion.keyframes[0].requires_grad
    before = field.deformation(x, at(3))
    assert not field.init_frame_from_neighbour(3, 1, torch.zeros(3)) and not field.init_frame_from_neighbour(
        0, 1, shift
    )
    assert torch.equal(field.deformation(x, at(3)), before)


def test_normals_of_a_sphere_point_outward() -> None:
    field = DeformableField(DeformableFieldConfig(levels=4, log2_table_size=16, base_resolution=16, max_resolution=48))
    # A canonical logit that is the signed distance to a sphere: replace the grid's answer, keep the class's arithmetic.
    field._canonical = lambda p: (20 * (0.3 - p.norm(dim=-1)), torch.zeros(len(p), 15))  # type: ignore[method-assign]
    x = torch.nn.functional.normalize(torch.randn(100, 3), dim=-1)
    torch.testing.assert_close(field.canonical_normals(0.3 * x), x, atol=2.5e-2, rtol=0)
    torch.testing.assert_close(field.normals(0.3 * x, torch.rand(100, 1)), x, atol=2.5e-2, rtol=0)


def test_impossible_fields_are_refused() -> None:
    with pytest.raises(InputError):
        DeformableField(DeformableFieldConfig(canonical_time=1.5))
    with pytest.raises(InputError, match="between two of 21 keyframes"):
        DeformableField(DeformableFieldConfig(canonical_time=0.51))
    with pytest.raises(InputError):
        DeformableField(DeformableFieldConfig(motion_resolutions=()))


def test_confined_field_has_no_density_outside_its_bounds_at_any_time() -> None:
    field = moving_field()
    hull = torch.zeros(64, 64, 64, dtype=torch.bool)
    hull[20:40, 20:40, 20:40] = True
    before = field.canonical_density(torch.zeros(1, 3))
    field.confine(hull)
    x, t = torch.rand(2000, 3) * 1.14 - 0.57, torch.rand(2000, 1)
    canonical = x + field.deformation(x, t)
    edge = 0.57 * torch.tensor([20 / 32 - 1, 40 / 32 - 1])
    allowed = ((canonical >= edge[0]) & (canonical < edge[1])).all(-1)
    density = field.density(x, t)
    assert 10 < allowed.sum() < 1000
    assert (density[~allowed] == 0).all() and (density[allowed] > 0).all()
    assert torch.equal(field.canonical_density(torch.zeros(1, 3)), before)
    other = DeformableField(field.config)
    other.load_state_dict(field.state_dict())
    assert torch.equal(other.density(x, t), density)
    with pytest.raises(InputError):
        field.confine(torch.ones(32, 32, 32, dtype=torch.bool))
