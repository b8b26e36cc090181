"""Where an observed point came from: one multi-resolution grid of offsets per frame, linear between frames.

No network: the offsets are the parameters themselves, so a new frame can start from its neighbour's motion, a step
touches only the frames it draws (its cost does not grow with the clip), and levels from 2 to 32 cells solve large
motions before small ones (multigrid). Our own design; SV4D (Xie et al. 2024, section 4) has an MLP over position and
annealed time frequencies, which fits 3.3 dB less in the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from sv4d_ns.field.hash_grid import cell_corners
from sv4d_ns.field.kernels import fused, njit
from sv4d_ns.utils.devices import upload
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.threads import run_in_threads

_Levels = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Cells a side, first entry and unit of each level."""
_POINTS_PER_TASK = 4096
Moments = Sequence[float] | None
"""All times a tensor of times may hold, where the caller knows them; None reads the tensor, which waits for a GPU."""


@njit(inline="always")
def _cell(x, i, r):  # type: ignore[no-untyped-def]
    """Entry of the cell's first corner within its level, and the shares of the far corners along each axis."""
    one, zero, scale = np.float32(1.0), np.float32(0.0), np.float32(r)
    sx = min(max(x[i, 0], zero), one) * scale
    sy = min(max(x[i, 1], zero), one) * scale
    sz = min(max(x[i, 2], zero), one) * scale
    ix, iy, iz = min(int(sx), r - 1), min(int(sy), r - 1), min(int(sz), r - 1)
    row = (iz * (r + 1) + iy) * (r + 1) + ix
    return row, sx - np.float32(ix), sy - np.float32(iy), sz - np.float32(iz)


@njit(inline="always")
def _edge(corner, row, r, share, fx, fy, fz):  # type: ignore[no-untyped-def]
    """One of a cell's four edges along x: its first entry, and the shares of its two ends."""
    one = np.float32(1.0)
    y, wy = (r + 1, fy) if corner & 1 else (0, one - fy)
    z, wz = ((r + 1) * (r + 1), fz) if corner & 2 else (0, one - fz)
    w = share * wy * wz
    return row + y + z, w * (one - fx), w * fx


# A vector's channels are summed in registers: one kernel for vectors of three numbers, one for single numbers.


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def _forward_3(x, slot, weight, table, resolutions, offsets, units, out, start, stop):  # type: ignore[no-untyped-def]
    for i in range(start, stop):
        a, b, c = np.float32(0.0), np.float32(0.0), np.float32(0.0)
        for end in range(slot.shape[1]):
            if weight[i, end] == np.float32(0.0):
                continue
            values = table[slot[i, end]]
            for level in range(resolutions.shape[0]):
                r = resolutions[level]
                row, fx, fy, fz = _cell(x, i, r)
                for corner in range(4):
                    entry, low, high = _edge(corner, offsets[level] + row, r, weight[i, end] * units[level], fx, fy, fz)
                    a += low * values[entry, 0] + high * values[entry + 1, 0]
                    b += low * values[entry, 1] + high * values[entry + 1, 1]
                    c += low * values[entry, 2] + high * values[entry + 1, 2]
        out[i, 0], out[i, 1], out[i, 2] = a, b, c


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def _forward_1(x, slot, weight, table, resolutions, offsets, units, out, start, stop):  # type: ignore[no-untyped-def]
    for channel in range(out.shape[1]):
        for i in range(start, stop):
            total = np.float32(0.0)
            for end in range(slot.shape[1]):
                if weight[i, end] == np.float32(0.0):
                    continue
                values = table[slot[i, end]]
                for level in range(resolutions.shape[0]):
                    r = resolutions[level]
                    row, fx, fy, fz = _cell(x, i, r)
                    for corner in range(4):
                        entry, low, high = _edge(
                            corner, offsets[level] + row, r, weight[i, end] * units[level], fx, fy, fz
                        )
                        total += low * values[entry, channel] + high * values[entry + 1, channel]
            out[i, channel] = total


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def _backward_3(x, slot, weight, resolutions, offsets, units, grad_out, grad_table, first, last):  # type: ignore[no-untyped-def]
    zero = np.float32(0.0)
    for i in range(x.shape[0]):
        a, b, c = grad_out[i, 0], grad_out[i, 1], grad_out[i, 2]
        if a == zero and b == zero and c == zero:
            continue
        for end in range(slot.shape[1]):
            if weight[i, end] == zero:
                continue
            values = grad_table[slot[i, end]]
            for level in range(first, last):
                r = resolutions[level]
                row, fx, fy, fz = _cell(x, i, r)
                for corner in range(4):
                    entry, low, high = _edge(corner, offsets[level] + row, r, weight[i, end] * units[level], fx, fy, fz)
                    values[entry, 0] += low * a
                    values[entry, 1] += low * b
                    values[entry, 2] += low * c
                    values[entry + 1, 0] += high * a
                    values[entry + 1, 1] += high * b
                    values[entry + 1, 2] += high * c


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def _backward_1(x, slot, weight, resolutions, offsets, units, grad_out, grad_table, first, last):  # type: ignore[no-untyped-def]
    zero = np.float32(0.0)
    for channel in range(grad_out.shape[1]):
        for i in range(x.shape[0]):
            grad = grad_out[i, channel]
            if grad == zero:
                continue
            for end in range(slot.shape[1]):
                if weight[i, end] == zero:
                    continue
                values = grad_table[slot[i, end]]
                for level in range(first, last):
                    r = resolutions[level]
                    row, fx, fy, fz = _cell(x, i, r)
                    for corner in range(4):
                        entry, low, high = _edge(
                            corner, offsets[level] + row, r, weight[i, end] * units[level], fx, fy, fz
                        )
                        values[entry, channel] += low * grad
                        values[entry + 1, channel] += high * grad


class _FusedKeyframes(torch.autograd.Function):
    """Derivatives in the table only: positions in observed space are data."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, x: Tensor, slot: Tensor, weight: Tensor, levels: _Levels) -> Tensor:
        ctx.save_for_backward(x, slot, weight)
        ctx.levels, ctx.shape = levels, table.shape
        out = torch.empty(x.shape[0], table.shape[2])
        arrays = (x.numpy(), slot.numpy(), weight.numpy(), table.detach().numpy(), *levels, out.numpy())
        kernel = _forward_3 if table.shape[2] == 3 else _forward_1

        def task(start: int):  # type: ignore[no-untyped-def]
            return lambda: kernel(*arrays, start, min(start + _POINTS_PER_TASK, x.shape[0]))  # type: ignore[call-arg]

        run_in_threads([task(start) for start in range(0, x.shape[0], _POINTS_PER_TASK)])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, slot, weight = ctx.saved_tensors
        grad_table = torch.zeros(ctx.shape)
        arrays = (x.numpy(), slot.numpy(), weight.numpy(), *ctx.levels, grad.contiguous().numpy())
        target, kernel = grad_table.numpy(), _backward_3 if ctx.shape[2] == 3 else _backward_1

        # Levels own disjoint entries, so threads that own levels never write the same one.
        def task(level: int):  # type: ignore[no-untyped-def]
            return lambda: kernel(*arrays, target, level, level + 1)  # type: ignore[call-arg]

        run_in_threads([task(level) for level in reversed(range(len(ctx.levels[0])))])
        return grad_table, None, None, None, None


def _keyframes_torch(table: Tensor, x: Tensor, slot: Tensor, weight: Tensor, levels: _Levels) -> Tensor:
    out, corners = x.new_zeros(len(x), table.shape[2]), cell_corners(3, x.device)
    for resolution, offset, unit in zip(*(numbers.tolist() for numbers in levels), strict=True):
        scaled = x.clamp(0, 1) * resolution
        low = scaled.detach().long().clamp(max=resolution - 1)
        fraction = scaled - low
        side = resolution + 1
        for step in corners:
            ix, iy, iz = (low + step).unbind(-1)
            share = torch.where(step.bool(), fraction, 1 - fraction).prod(-1) * unit
            entry = offset + (iz * side + iy) * side + ix
            for end in range(slot.shape[1]):
                out = out + (share * weight[:, end])[:, None] * table[slot[:, end], entry]
    return out


Places = tuple[Tensor, Tensor, list[int]]
"""The keyframes before and after each time (numbers within those in use), their weights, and the keyframes in use."""


class KeyframeGrid(nn.Module):
    """Vectors over the unit cube at each of `keyframes` moments, linear in time between them; zero when new.

    Every keyframe is a parameter of its own: a step that draws four frames leaves the others, and their optimiser
    state, untouched. Keyframe k stands for time k / (keyframes - 1). With `in_cells` a level's numbers are in its own
    cells, so one learning rate moves coarse levels far and fine ones little; results are in cubes either way.

    Raises:
        InputError: no keyframe, or a level without a cell.
    """

    def __init__(
        self,
        keyframes: int,
        resolutions: tuple[int, ...],
        channels: int = 3,
        in_cells: bool = False,
        backend: Literal["numba", "torch"] = "numba",
    ) -> None:
        super().__init__()
        if min(keyframes, channels, len(resolutions), *resolutions) < 1:
            raise InputError("a keyframe grid needs at least one keyframe and levels of at least one cell.")
        counts = [(r + 1) ** 3 for r in resolutions]
        offsets = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
        units = 1 / np.asarray(resolutions) if in_cells else np.ones(len(resolutions))
        self.levels: _Levels = (np.asarray(resolutions, np.int64), offsets, units.astype(np.float32))
        self.backend = backend
        self.keyframes = nn.ParameterList([nn.Parameter(torch.zeros(sum(counts), channels)) for _ in range(keyframes)])

    def forward(self, x: Float[Tensor, "n 3"], places: Places) -> Float[Tensor, "n c"]:
        """Vectors at points in [0, 1]^3 (clamped) and at the times that `places` was asked for."""
        slots, weight, used = places
        table = torch.stack([self.keyframes[k] for k in used])
        if fused(self.backend, x) and not x.requires_grad:
            return _FusedKeyframes.apply(table, x.contiguous().float(), slots, weight, self.levels)
        return _keyframes_torch(table, x, slots, weight, self.levels)

    def places(self, t: Float[Tensor, "n 1"], moments: Moments = None) -> Places:
        """Where times in [0, 1] (clamped) lie between the keyframes; the same for all grids with as many."""
        low, high, fraction = self._neighbours(t[:, 0])
        if moments is None:
            first, last = low, high
        else:  # of few numbers in this process's memory: the same arithmetic, and nobody waits
            first, last, _ = self._neighbours(torch.tensor(moments, dtype=torch.float32))
        used = torch.bincount(torch.cat([first, last]), minlength=len(self.keyframes)).nonzero()[:, 0].tolist()
        number = np.zeros(len(self.keyframes), np.int64)
        number[used] = np.arange(len(used))
        place = upload(number, t.device)
        if bool((first == last).all()):
            return place[low][:, None], torch.ones_like(fraction)[:, None], used
        return torch.stack([place[low], place[high]], -1), torch.stack([1 - fraction, fraction], -1), used

    def _neighbours(self, t: Float[Tensor, " n"]) -> tuple[Tensor, Tensor, Tensor]:
        """The keyframes before and after each time (the same one on a keyframe), and how far it is from the first."""
        position = t.detach().clamp(0, 1) * (len(self.keyframes) - 1)
        # Frame times come from a division; a hair beside a keyframe is that keyframe.
        nearest = position.round()
        position = torch.where((position - nearest).abs() < 1e-3, nearest, position)
        low = position.floor().long()
        fraction = position - low
        return low, torch.where(fraction > 0, low + 1, low), fraction

    @torch.no_grad()
    def start_from(self, new: int, known: int, shift: Float[Tensor, " 3"] | None = None) -> None:
        """Let keyframe `new` begin where `known` is, everything moved by `shift` (in cubes) in between."""
        if shift is None:
            self.keyframes[new].copy_(self.keyframes[known])
            return
        for resolution, offset, _ in zip(*(numbers.tolist() for numbers in self.levels), strict=True):
            side, count = resolution + 1, (resolution + 1) ** 3
            # entries are ordered (z, y, x), as grid_sample has it
            volume = self.keyframes[known][offset : offset + count].t().reshape(1, -1, side, side, side)
            axis = torch.linspace(0, 1, side, device=volume.device)
            nodes = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).flip(-1) - shift
            moved = functional.grid_sample(volume, 2 * nodes[None] - 1, padding_mode="border", align_corners=True)
            self.keyframes[new][offset : offset + count] = moved.reshape(-1, count).t()
