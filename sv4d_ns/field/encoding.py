"""Multi-resolution hash-grid encoding: a fused CPU kernel and the torch twin it is compared with.

Formulas: Mueller et al. 2022 (Instant-NGP) section 3 - trilinear interpolation of feature vectors stored at the corners
of nested grids, the spatial hash `x*1 ^ y*2654435761 ^ z*805459861`. Levels whose corners fit into the table are
indexed densely and take only the entries they need.

Threads: the kernels release the GIL and run in `utils.threads` instead of numba's own threading layer, which spins
between calls and whose portable variant aborts the process when a viewer thread renders while the training thread
works.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sv4d_ns.field.kernels import fused, njit
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.threads import run_in_threads, workers

_PRIME_Y = 2654435761
_PRIME_Z = 805459861
_POINTS_PER_TASK = 4096


@njit(inline="always")
def _cell(value, resolution):  # type: ignore[no-untyped-def]
    scaled = min(max(value, np.float32(0.0)), np.float32(1.0)) * np.float32(resolution)
    index = min(int(scaled), resolution - 1)
    return index, np.float32(scaled - np.float32(index))


@njit(inline="always")
def _corner_terms(ix, iy, iz, resolution, dense):  # type: ignore[no-untyped-def]
    """Per-axis contributions to the index of the low and high corner (summed when dense, xor-ed when hashed)."""
    if dense:
        side = np.uint32(resolution + 1)
        y, z = np.uint32(iy) * side, np.uint32(iz) * side * side
        return np.uint32(ix), np.uint32(ix + 1), y, np.uint32(y + side), z, np.uint32(z + side * side)
    py, pz = np.uint32(2654435761), np.uint32(805459861)
    y, z = np.uint32(np.uint32(iy) * py), np.uint32(np.uint32(iz) * pz)
    return np.uint32(ix), np.uint32(ix + 1), y, np.uint32(y + py), z, np.uint32(z + pz)


@njit(inline="always")
def _entry(x, y, z, dense, mask):  # type: ignore[no-untyped-def]
    return np.int64(np.uint32(x + y + z)) if dense else np.int64((x ^ y ^ z) & mask)


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def _forward_kernel(x, table, resolutions, dense, offsets, mask, out, start, stop):  # type: ignore[no-untyped-def]
    one = np.float32(1.0)
    mask = np.uint32(mask)
    for level in range(resolutions.shape[0]):
        resolution, is_dense = resolutions[level], dense[level]
        level_table = table[offsets[level] :]
        column = level * 2
        for i in range(start, stop):
            ix, fx = _cell(x[i, 0], resolution)
            iy, fy = _cell(x[i, 1], resolution)
            iz, fz = _cell(x[i, 2], resolution)
            x0, x1, y0, y1, z0, z1 = _corner_terms(ix, iy, iz, resolution, is_dense)
            a, b = np.float32(0.0), np.float32(0.0)
            for corner in range(4):
                y, wy = (y1, fy) if corner & 1 else (y0, one - fy)
                z, wz = (z1, fz) if corner & 2 else (z0, one - fz)
                low = _entry(x0, y, z, is_dense, mask)
                high = _entry(x1, y, z, is_dense, mask)
                w = wy * wz
                w_low, w_high = w * (one - fx), w * fx
                a += w_low * level_table[low, 0] + w_high * level_table[high, 0]
                b += w_low * level_table[low, 1] + w_high * level_table[high, 1]
            out[i, column] = a
            out[i, column + 1] = b


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def _backward_kernel(  # type: ignore[no-untyped-def]
    x, table, resolutions, dense, offsets, mask, grad_out, grad_table, grad_x, want_x, first_level, last_level
):
    one = np.float32(1.0)
    zero = np.float32(0.0)
    mask = np.uint32(mask)
    for level in range(first_level, last_level):
        resolution, is_dense = resolutions[level], dense[level]
        level_table, level_grad = table[offsets[level] :], grad_table[offsets[level] :]
        scale = np.float32(resolution)
        column = level * 2
        for i in range(x.shape[0]):
            ga, gb = grad_out[i, column], grad_out[i, column + 1]
            if ga == zero and gb == zero:
                continue
            ix, fx = _cell(x[i, 0], resolution)
            iy, fy = _cell(x[i, 1], resolution)
            iz, fz = _cell(x[i, 2], resolution)
            x0, x1, y0, y1, z0, z1 = _corner_terms(ix, iy, iz, resolution, is_dense)
            gx, gy, gz = zero, zero, zero
            for corner in range(4):
                y, wy, sy = (y1, fy, one) if corner & 1 else (y0, one - fy, -one)
                z, wz, sz = (z1, fz, one) if corner & 2 else (z0, one - fz, -one)
                low = _entry(x0, y, z, is_dense, mask)
                high = _entry(x1, y, z, is_dense, mask)
                w = wy * wz
                w_low, w_high = w * (one - fx), w * fx
                level_grad[low, 0] += w_low * ga
                level_grad[low, 1] += w_low * gb
                level_grad[high, 0] += w_high * ga
                level_grad[high, 1] += w_high * gb
                if want_x:
                    dot_low = ga * level_table[low, 0] + gb * level_table[low, 1]
                    dot_high = ga * level_table[high, 0] + gb * level_table[high, 1]
                    along_x = dot_low + fx * (dot_high - dot_low)
                    gx += w * (dot_high - dot_low)
                    gy += sy * wz * along_x
                    gz += sz * wy * along_x
            if want_x:
                # Outside the unit cube the coordinate is clamped, so its derivative is zero there.
                if zero <= x[i, 0] <= one:
                    grad_x[i, 0] += gx * scale
                if zero <= x[i, 1] <= one:
                    grad_x[i, 1] += gy * scale
                if zero <= x[i, 2] <= one:
                    grad_x[i, 2] += gz * scale


class _FusedEncode(torch.autograd.Function):
    """First derivatives only; corners are recomputed in the backward pass, which is cheaper than keeping them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, layout: _Layout) -> Tensor:
        ctx.save_for_backward(x, table)
        ctx.layout = layout
        out = torch.empty(x.shape[0], layout.n_levels * table.shape[1])
        points, entries, result = x.detach().numpy(), table.detach().numpy(), out.numpy()

        def task(start: int) -> Callable[[], Any]:
            stop = min(start + _POINTS_PER_TASK, x.shape[0])
            return lambda: _forward_kernel(points, entries, *layout.arrays, result, start, stop)

        run_in_threads([task(start) for start in range(0, x.shape[0], _POINTS_PER_TASK)])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x, table = ctx.saved_tensors
        layout: _Layout = ctx.layout
        want_x = ctx.needs_input_grad[0]
        points, entries, grads = x.detach().numpy(), table.detach().numpy(), grad.contiguous().numpy()
        grad_table = torch.zeros_like(table)
        entries_grad = grad_table.numpy()
        # Levels own disjoint parts of the table, so threads that own levels never write the same entry.
        groups = layout.level_groups(workers())
        grad_x = torch.zeros(len(groups), x.shape[0] if want_x else 0, 3)

        def task(group: int) -> Callable[[], Any]:
            first, last = groups[group]
            target = grad_x[group].numpy()
            return lambda: _backward_kernel(
                points, entries, *layout.arrays, grads, entries_grad, target, want_x, first, last
            )

        run_in_threads([task(group) for group in range(len(groups))])
        return (grad_x.sum(0) if want_x else None), grad_table, None


class _Layout:
    """Where each level's entries lie in the one table (plain numbers, shared by both back ends)."""

    def __init__(self, resolutions: list[int], log2_table_size: int) -> None:
        size = 1 << log2_table_size
        counts = [min((r + 1) ** 3, size) for r in resolutions]
        self.resolutions = np.asarray(resolutions, np.int64)
        self.dense = np.asarray([(r + 1) ** 3 <= size for r in resolutions])
        self.offsets = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
        self.mask = size - 1
        self.n_entries = int(sum(counts))
        self.n_levels = len(resolutions)

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        return self.resolutions, self.dense, self.offsets, self.mask

    def level_groups(self, n: int) -> list[tuple[int, int]]:
        n = min(n, self.n_levels)
        edges = [round(i * self.n_levels / n) for i in range(n + 1)]
        return [(a, b) for a, b in pairwise(edges) if a < b]


def cell_corners(dimensions: int, device: torch.device) -> Int[Tensor, "c d"]:
    """0 or 1 along each axis for the 2^d corners of a cell, the first axis fastest; made on the device itself."""
    number = torch.arange(2**dimensions, device=device)
    return (number[:, None] >> torch.arange(dimensions, device=device)) & 1


def _encode_torch(x: Tensor, table: Tensor, layout: _Layout) -> Tensor:
    features, corners = [], cell_corners(3, x.device)
    for level in range(layout.n_levels):
        resolution, offset = int(layout.resolutions[level]), int(layout.offsets[level])
        scaled = x.clamp(0, 1) * resolution
        low = scaled.detach().floor().long().clamp(max=resolution - 1)
        fraction = scaled - low
        value = torch.zeros(x.shape[0], table.shape[1], device=x.device, dtype=table.dtype)
        for step in corners:
            ix, iy, iz = (low + step).unbind(-1)
            if layout.dense[level]:
                side = resolution + 1
                entry = offset + (iz * side + iy) * side + ix
            else:
                entry = offset + ((ix ^ (iy * _PRIME_Y) ^ (iz * _PRIME_Z)) & layout.mask)
            weight = torch.where(step.bool(), fraction, 1 - fraction).prod(-1, keepdim=True)
            value = value + weight * table[entry]
        features.append(value)
    return torch.cat(features, -1)


class HashEncoding(nn.Module):
    """Trainable features on nested grids over the unit cube.

    Level l has round(base * growth^l) cells a side, up to `max_resolution`. Coordinates outside [0, 1] are clamped.
    `backend="numba"` is the fused CPU kernel (values and first derivatives; tensors on another device take the torch
    path, because the kernel reads host memory); `backend="torch"` is the reference and also gives second derivatives.
    Table entries start uniform in [-1e-4, 1e-4] (Instant-NGP section 4).

    Raises:
        InputError: sizes that cannot describe a grid, or an unknown back end.
    """

    def __init__(
        self,
        in_dim: int = 3,
        levels: int = 8,
        features_per_level: int = 2,
        log2_table_size: int = 16,
        base_resolution: int = 16,
        max_resolution: int = 256,
        backend: Literal["numba", "torch"] = "numba",
    ) -> None:
        super().__init__()
        if in_dim != 3:
            raise InputError(f"HashEncoding encodes 3 coordinates, not in_dim={in_dim}; use in_dim=3.")
        if levels < 1 or features_per_level < 1 or not 1 <= base_resolution <= max_resolution:
            raise InputError(
                f"a hash grid of {levels} levels from {base_resolution} to {max_resolution} cells is not possible; "
                "use at least one level and base_resolution <= max_resolution."
            )
        if not 1 <= log2_table_size <= 24:
            raise InputError(f"log2_table_size={log2_table_size} is outside 1..24; use about 14 to 19.")
        if backend not in ("numba", "torch"):
            raise InputError(f"unknown encoding back end {backend!r}; use 'numba' or 'torch'.")
        if backend == "numba" and features_per_level != 2:
            raise InputError(
                f"the numba kernel is written for 2 features per level, not {features_per_level}; use backend='torch'."
            )
        growth = (max_resolution / base_resolution) ** (1 / max(levels - 1, 1))
        self.resolutions = [round(base_resolution * growth**level) for level in range(levels)]
        self.layout = _Layout(self.resolutions, log2_table_size)
        self.backend = backend
        self.out_dim = levels * features_per_level
        self.table = nn.Parameter(torch.empty(self.layout.n_entries, features_per_level).uniform_(-1e-4, 1e-4))

    def forward(self, x: Float[Tensor, "n 3"]) -> Float[Tensor, "n f"]:
        """Features of points in [0, 1]^3, level by level, coarse to fine."""
        if fused(self.backend, x):
            return _FusedEncode.apply(x.contiguous().float(), self.table, self.layout)
        return _encode_torch(x, self.table, self.layout)
