"""The motion: the keyframe kernel against its torch twin and interpolation in time."""

import pytest
import torch

from sv4d_ns.field.motion import KeyframeGrid
from sv4d_ns.utils.errors import InputError


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("in_cells", [False, True])
def test_fused_keyframes_equal_torch_in_values_and_gradients(channels: int, in_cells: bool) -> None:
    torch.manual_seed(0)
    fused = KeyframeGrid(5, (2, 7), channels, in_cells)
    twin = KeyframeGrid(5, (2, 7), channels, in_cells, backend="torch")
    with torch.no_grad():
        for p in fused.keyframes:
            p.normal_()
    twin.load_state_dict(fused.state_dict())
    x = torch.cat([torch.rand(5000, 3) * 1.2 - 0.1, torch.zeros(1, 3), torch.ones(1, 3)])
    # On keyframes, between them and at both ends; the last keyframe is never touched.
    t = torch.cat([torch.full((2000, 1), 0.25), torch.rand(3000, 1) * 0.74, torch.zeros(2, 1)])
    values = []
    for grid in (fused, twin):
        out = grid(x, grid.places(t))
        (out * torch.sin(torch.arange(out.numel(), dtype=torch.float32)).reshape(out.shape)).sum().backward()
        values.append(out)
    torch.testing.assert_close(values[0], values[1], atol=1e-5, rtol=1e-4)
    for a, b in zip(fused.keyframes[:4], twin.keyframes[:4], strict=True):
        assert a.grad.abs().sum() > 0
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-3)
    assert fused.keyframes[4].grad is None and twin.keyframes[4].grad is None


def test_positions_that_need_gradients_get_them() -> None:
    grid = KeyframeGrid(2, (3,), in_cells=True)
    with torch.no_grad():
        grid.keyframes[1].normal_()
    x = torch.full((4, 3), 0.2, requires_grad=True)
    grid(x, grid.places(torch.ones(4, 1))).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_keyframes_interpolate_linearly_in_space_and_time() -> None:
    grid = KeyframeGrid(3, (4,))
    corner = torch.stack(torch.meshgrid(*[torch.arange(5) / 4] * 3, indexing="ij"), -1).reshape(-1, 3).flip(-1)
    with torch.no_grad():
        grid.keyframes[1].copy_(corner)  # the identity at t = 1/2, zero at 0 and 1
    x = torch.rand(50, 3)
    for time, share in ((0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (0.8, 0.4), (1.0, 0.0)):
        torch.testing.assert_close(grid(x, grid.places(torch.full((50, 1), time))), share * x, atol=1e-6, rtol=0)


def test_a_single_keyframe_holds_for_all_time() -> None:
    grid = KeyframeGrid(1, (2,))
    with torch.no_grad():
        grid.keyframes[0].fill_(0.5)
    torch.testing.assert_close(grid(torch.rand(3, 3), grid.places(torch.rand(3, 1))), torch.full((3, 3), 0.5))


@pytest.mark.parametrize("bad", [(0, (2,)), (3, ()), (3, (0,))])
def test_impossible_grids_are_refused(bad: tuple) -> None:
    with pytest.raises(InputError):
        KeyframeGrid(*bad)
