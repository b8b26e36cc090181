"""The hash grid of tiny-cuda-nn in three or four dimensions: a fused CPU kernel and its torch twin.

Instant-NGP (Mueller et al. 2022) as tiny-cuda-nn lays it out, which differs from `encoding.HashEncoding` in what a
trained table means: corners lie half a cell off, resolutions come from a fixed growth factor, dense levels wrap at the
far side, and a fourth coordinate (time) has a hash prime of its own. It also gives its own derivative as a
differentiable operation (`vjp`), which analytic normals need.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from sv4d_ns.field.encoding import cell_corners
from sv4d_ns.field.kernels import fused, njit
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.threads import run_in_threads

PRIMES = (1, 2654435761, 805459861, 3674653429)
FEATURES = 2
"""Features a level, fixed in the kernels."""
_POINTS_PER_TASK = 4096


@dataclass(frozen=True)
class GridLevels:
    """Where each level's entries lie in the one table, and how fine it is; one array element per level."""

    scale: np.ndarray
    """float32: the unit interval in cells."""
    resolution: np.ndarray
    """Corners a side (the far ones wrap)."""
    entries: np.ndarray
    offset: np.ndarray
    """First entry, counted in entries."""
    dense: np.ndarray
    """Indexed directly rather than hashed."""

    @classmethod
    def make(cls, dimensions: int, levels: int, log2_table_size: int, base: int, growth: float) -> GridLevels:
        """The levels of tiny-cuda-nn's HashGrid."""
        # float32 throughout: a rounding apart, a level would have another resolution
        exponent = np.arange(levels, dtype=np.float32) * np.log2(np.float32(growth))
        scale = (np.exp2(exponent) * np.float32(base) - np.float32(1)).astype(np.float32)
        resolution = np.ceil(scale).astype(np.int64) + 1
        corners = resolution**dimensions
        entries = np.minimum((corners + 7) // 8 * 8, 1 << log2_table_size)
        offset = np.concatenate([[0], np.cumsum(entries)[:-1]]).astype(np.int64)
        return cls(scale, resolution, entries, offset, corners <= entries)

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """As the kernels take them."""
        return self.scale, self.resolution, self.entries, self.offset, self.dense

    def __len__(self) -> int:
        return len(self.scale)


@njit(inline="always")
def _place(value, scale):  # type: ignore[no-untyped-def]
    position = np.float32(value * scale + np.float32(0.5))
    index = math.floor(position)
    return np.uint32(index), np.float32(position - np.float32(index))


@njit(inline="always")
def _terms(index, stride, prime, dense):  # type: ignore[no-untyped-def]
    """What the low and the high corner contribute to the entry's number (added when dense, xor-ed when hashed)."""
    factor = np.uint32(stride) if dense else np.uint32(prime)
    low = np.uint32(index * factor)
    return low, np.uint32(low + factor)


@njit(inline="always")
def _entry(x, y, z, w, dense, entries):  # type: ignore[no-untyped-def]
    # a hashed level has a power of two of entries
    if not dense:
        return np.int64(np.uint32(x ^ y ^ z ^ w) & np.uint32(entries - 1))
    number = np.int64(np.uint32(x + y + z + w))
    return number if number < entries else number % entries


_JIT: Any = {
    "nogil": True,
    "cache": True,
    "fastmath": {"nnan", "ninf", "nsz", "arcp", "contract"},
    "error_model": "numpy",
}


@njit(**_JIT)
def _forward(x, table, scales, resolutions, counts, offsets, dense, out, start, stop):  # type: ignore[no-untyped-def]
    one, zero = np.float32(1.0), np.float32(0.0)
    has_time = x.shape[1] == 4
    corners = 8 if has_time else 4
    for level in range(scales.shape[0]):
        scale, side, is_dense, count = scales[level], resolutions[level], dense[level], counts[level]
        entries = table[offsets[level] :]
        for i in range(start, stop):
            ix, fx = _place(x[i, 0], scale)
            iy, fy = _place(x[i, 1], scale)
            iz, fz = _place(x[i, 2], scale)
            it, ft = _place(x[i, 3], scale) if has_time else (np.uint32(0), zero)
            x0, x1 = _terms(ix, 1, 1, is_dense)
            y0, y1 = _terms(iy, side, 2654435761, is_dense)
            z0, z1 = _terms(iz, side * side, 805459861, is_dense)
            t0, t1 = _terms(it, side * side * side, 3674653429, is_dense)
            a, b = zero, zero
            for corner in range(corners):
                y, wy = (y1, fy) if corner & 1 else (y0, one - fy)
                z, wz = (z1, fz) if corner & 2 else (z0, one - fz)
                t, wt = (t1, ft) if corner & 4 else (t0, one - ft)
                low = _entry(x0, y, z, t, is_dense, count)
                high = _entry(x1, y, z, t, is_dense, count)
                w = wy * wz * wt
                w_low, w_high = w * (one - fx), w * fx
                a += w_low * entries[low, 0] + w_high * entries[high, 0]
                b += w_low * entries[low, 1] + w_high * entries[high, 1]
            out[i, 2 * level] = a
            out[i, 2 * level + 1] = b


@njit(**_JIT)
def _scatter(x, scales, resolutions, counts, offsets, dense, grad, grad_table, first, last):  # type: ignore[no-untyped-def]
    """grad_table += w_c grad: the first derivative in the table."""
    one, zero = np.float32(1.0), np.float32(0.0)
    has_time = x.shape[1] == 4
    corners = 8 if has_time else 4
    for level in range(first, last):
        scale, side, is_dense, count = scales[level], resolutions[level], dense[level], counts[level]
        entries = grad_table[offsets[level] :]
        for i in range(x.shape[0]):
            ga, gb = grad[i, 2 * level], grad[i, 2 * level + 1]
            if ga == zero and gb == zero:
                continue
            ix, fx = _place(x[i, 0], scale)
            iy, fy = _place(x[i, 1], scale)
            iz, fz = _place(x[i, 2], scale)
            it, ft = _place(x[i, 3], scale) if has_time else (np.uint32(0), zero)
            x0, x1 = _terms(ix, 1, 1, is_dense)
            y0, y1 = _terms(iy, side, 2654435761, is_dense)
            z0, z1 = _terms(iz, side * side, 805459861, is_dense)
            t0, t1 = _terms(it, side * side * side, 3674653429, is_dense)
            for corner in range(corners):
                y, wy = (y1, fy) if corner & 1 else (y0, one - fy)
                z, wz = (z1, fz) if corner & 2 else (z0, one - fz)
                t, wt = (t1, ft) if corner & 4 else (t0, one - ft)
                low = _entry(x0, y, z, t, is_dense, count)
                high = _entry(x1, y, z, t, is_dense, count)
                w = wy * wz * wt
                w_low, w_high = w * (one - fx), w * fx
                entries[low, 0] += w_low * ga
                entries[low, 1] += w_low * gb
                entries[high, 0] += w_high * ga
                entries[high, 1] += w_high * gb


@njit(**_JIT)
def _pull(x, table, scales, resolutions, counts, offsets, dense, grad, grad_x, start, stop):  # type: ignore[no-untyped-def]
    """grad_x = J(x)^T grad."""
    one, zero = np.float32(1.0), np.float32(0.0)
    has_time = x.shape[1] == 4
    corners = 8 if has_time else 4
    for level in range(scales.shape[0]):
        scale, side, is_dense, count = scales[level], resolutions[level], dense[level], counts[level]
        entries = table[offsets[level] :]
        for i in range(start, stop):
            ga, gb = grad[i, 2 * level], grad[i, 2 * level + 1]
            if ga == zero and gb == zero:
                continue
            ix, fx = _place(x[i, 0], scale)
            iy, fy = _place(x[i, 1], scale)
            iz, fz = _place(x[i, 2], scale)
            it, ft = _place(x[i, 3], scale) if has_time else (np.uint32(0), zero)
            x0, x1 = _terms(ix, 1, 1, is_dense)
            y0, y1 = _terms(iy, side, 2654435761, is_dense)
            z0, z1 = _terms(iz, side * side, 805459861, is_dense)
            t0, t1 = _terms(it, side * side * side, 3674653429, is_dense)
            gx, gy, gz, gt = zero, zero, zero, zero
            for corner in range(corners):
                y, wy, sy = (y1, fy, one) if corner & 1 else (y0, one - fy, -one)
                z, wz, sz = (z1, fz, one) if corner & 2 else (z0, one - fz, -one)
                t, wt, st = (t1, ft, one) if corner & 4 else (t0, one - ft, -one)
                low = _entry(x0, y, z, t, is_dense, count)
                high = _entry(x1, y, z, t, is_dense, count)
                dot_low = ga * entries[low, 0] + gb * entries[low, 1]
                dot_high = ga * entries[high, 0] + gb * entries[high, 1]
                along_x = dot_low + fx * (dot_high - dot_low)
                gx += wy * wz * wt * (dot_high - dot_low)
                gy += sy * wz * wt * along_x
                gz += wy * sz * wt * along_x
                gt += wy * wz * st * along_x
            grad_x[i, 0] += gx * scale
            grad_x[i, 1] += gy * scale
            grad_x[i, 2] += gz * scale
            if has_time:
                grad_x[i, 3] += gt * scale


@njit(**_JIT)
def _tangent(  # type: ignore[no-untyped-def]
    x, table, scales, resolutions, counts, offsets, dense, grad, v, tangent, grad_table, first, last
):
    """What `_pull` passes on to its inputs: tangent = J(x) v, and grad_table += (dw_c . v) grad."""
    one, zero = np.float32(1.0), np.float32(0.0)
    has_time = x.shape[1] == 4
    corners = 8 if has_time else 4
    for level in range(first, last):
        scale, side, is_dense, count = scales[level], resolutions[level], dense[level], counts[level]
        entries, entries_grad = table[offsets[level] :], grad_table[offsets[level] :]
        for i in range(x.shape[0]):
            ga, gb = grad[i, 2 * level], grad[i, 2 * level + 1]
            ix, fx = _place(x[i, 0], scale)
            iy, fy = _place(x[i, 1], scale)
            iz, fz = _place(x[i, 2], scale)
            it, ft = _place(x[i, 3], scale) if has_time else (np.uint32(0), zero)
            vx, vy, vz = v[i, 0] * scale, v[i, 1] * scale, v[i, 2] * scale
            vt = v[i, 3] * scale if has_time else zero
            x0, x1 = _terms(ix, 1, 1, is_dense)
            y0, y1 = _terms(iy, side, 2654435761, is_dense)
            z0, z1 = _terms(iz, side * side, 805459861, is_dense)
            t0, t1 = _terms(it, side * side * side, 3674653429, is_dense)
            a, b = zero, zero
            for corner in range(corners):
                y, wy, sy = (y1, fy, one) if corner & 1 else (y0, one - fy, -one)
                z, wz, sz = (z1, fz, one) if corner & 2 else (z0, one - fz, -one)
                t, wt, st = (t1, ft, one) if corner & 4 else (t0, one - ft, -one)
                low = _entry(x0, y, z, t, is_dense, count)
                high = _entry(x1, y, z, t, is_dense, count)
                rest = wy * wz * wt
                others = sy * wz * wt * vy + wy * sz * wt * vz + wy * wz * st * vt
                d_low = (one - fx) * others - rest * vx
                d_high = fx * others + rest * vx
                a += d_low * entries[low, 0] + d_high * entries[high, 0]
                b += d_low * entries[low, 1] + d_high * entries[high, 1]
                entries_grad[low, 0] += d_low * ga
                entries_grad[low, 1] += d_low * gb
                entries_grad[high, 0] += d_high * ga
                entries_grad[high, 1] += d_high * gb
            tangent[i, 2 * level] = a
            tangent[i, 2 * level + 1] = b


def _numpy(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.detach().contiguous().numpy() for tensor in tensors]


def _by_points(count: int, run: Callable[[int, int], None]) -> None:
    """In threads that own points."""

    def task(start: int) -> Callable[[], None]:
        return lambda: run(start, min(start + _POINTS_PER_TASK, count))

    run_in_threads([task(start) for start in range(0, count, _POINTS_PER_TASK)])


def _by_levels(levels: int, run: Callable[[int, int], None]) -> None:
    """In threads that own levels, whose table entries are disjoint."""

    def task(level: int) -> Callable[[], None]:
        return lambda: run(level, level + 1)

    # the finest first: they take longest
    run_in_threads([task(level) for level in reversed(range(levels))])


class _Encode(torch.autograd.Function):
    """Features; differentiable once (see `_PullBack` for the derivative of the derivative)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, levels: GridLevels) -> Tensor:
        ctx.save_for_backward(x, table)
        ctx.levels = levels
        out = torch.empty(len(x), FEATURES * len(levels))
        points, entries, result = *_numpy(x, table), out.numpy()
        _by_points(len(x), lambda a, b: _forward(points, entries, *levels.arrays, result, a, b))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, table = ctx.saved_tensors
        levels: GridLevels = ctx.levels
        points, entries, grads = _numpy(x, table, grad)
        grad_x = grad_table = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.zeros_like(x)
            pulled = grad_x.numpy()
            _by_points(len(x), lambda a, b: _pull(points, entries, *levels.arrays, grads, pulled, a, b))
        if ctx.needs_input_grad[1]:
            grad_table = torch.zeros_like(table)
            scattered = grad_table.numpy()
            _by_levels(len(levels), lambda a, b: _scatter(points, *levels.arrays, grads, scattered, a, b))
        return grad_x, grad_table, None


class _PullBack(torch.autograd.Function):
    """J(x)^T g, differentiable once in g and the table."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor, table: Tensor, levels: GridLevels) -> Tensor:
        ctx.save_for_backward(grad, x, table)
        ctx.levels = levels
        out = torch.zeros_like(x)
        grads, points, entries, result = *_numpy(grad, x, table), out.numpy()
        _by_points(len(x), lambda a, b: _pull(points, entries, *levels.arrays, grads, result, a, b))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None, Tensor, None]:
        grad, x, table = ctx.saved_tensors
        levels: GridLevels = ctx.levels
        tangent, grad_table = torch.empty_like(grad), torch.zeros_like(table)
        points, entries, grads, directions = _numpy(x, table, grad, v)
        out, scattered = tangent.numpy(), grad_table.numpy()
        _by_levels(
            len(levels),
            lambda a, b: _tangent(points, entries, *levels.arrays, grads, directions, out, scattered, a, b),
        )
        return tangent, None, grad_table, None


def _encode_torch(x: Tensor, table: Tensor, levels: GridLevels) -> Tensor:
    dimensions = x.shape[1]
    corners = cell_corners(dimensions, x.device)
    features = []
    for level in range(len(levels)):
        position = x * float(levels.scale[level]) + 0.5
        low = position.detach().floor().long()
        fraction = (position - low)[:, None]
        corner = low[:, None] + corners
        weight = torch.where(corners.bool(), fraction, 1 - fraction).prod(-1)
        entries, side = int(levels.entries[level]), int(levels.resolution[level])
        if levels.dense[level]:
            number = sum(corner[..., d] * side**d for d in range(dimensions))
        else:
            number = corner[..., 0]
            for d in range(1, dimensions):
                number = number ^ (corner[..., d] * PRIMES[d])
        number = (torch.as_tensor(number) & 0xFFFFFFFF) % entries + int(levels.offset[level])
        features.append((weight[..., None] * table[number]).sum(1))
    return torch.cat(features, -1)


def tinycudann_works() -> bool:
    """Whether tiny-cuda-nn's Python package can be imported (it needs a CUDA device even for that)."""
    try:
        importlib.import_module("tinycudann")
    except (ImportError, OSError, RuntimeError):
        return False
    return True


def _make_tcnn_encoding(in_dim: int, config: dict[str, Any]) -> Any:
    if not tinycudann_works():
        raise InputError(
            "the encoding back end 'tinycudann' needs tiny-cuda-nn, which cannot be imported: install it "
            "(https://github.com/NVlabs/tiny-cuda-nn#pytorch-extension) or use the 'numba' back end."
        )
    return importlib.import_module("tinycudann").Encoding(in_dim, config, dtype=torch.float32)


class HashGrid(nn.Module):
    """Trainable features of points in the unit cube (3) or of points and times (4), level by level.

    `backend="numba"` is the fused CPU kernel, tensors on another device take the torch path; `backend="torch"` is the
    reference; `backend="tinycudann"` gives points on a CUDA device to tiny-cuda-nn's own kernels (first derivatives)
    and others to the numba kernel, so that what was trained on a GPU opens anywhere: the table means the same to all
    three. Entries start uniform in [-1e-4, 1e-4].

    Raises:
        InputError: sizes that cannot describe a grid, or an unknown back end.
    """

    def __init__(
        self,
        in_dim: int = 3,
        levels: int = 16,
        log2_table_size: int = 19,
        base_resolution: int = 16,
        growth: float = 1.447269237440378,
        backend: Literal["numba", "torch", "tinycudann"] = "numba",
    ) -> None:
        super().__init__()
        if in_dim not in (3, 4):
            raise InputError(f"HashGrid encodes 3 or 4 coordinates, not in_dim={in_dim}.")
        if levels < 1 or base_resolution < 2 or growth < 1 or not 1 <= log2_table_size <= 24:
            raise InputError(
                f"a hash grid of {levels} levels, base_resolution={base_resolution}, growth={growth:g} and "
                f"log2_table_size={log2_table_size} is not possible: use 1+, 2+, 1+ and 1 to 24."
            )
        if backend not in ("numba", "torch", "tinycudann"):
            raise InputError(f"unknown encoding back end {backend!r}; use 'numba', 'torch' or 'tinycudann'.")
        self.tcnn_config = {
            "otype": "HashGrid",
            "n_levels": levels,
            "n_features_per_level": FEATURES,
            "log2_hashmap_size": log2_table_size,
            "base_resolution": base_resolution,
            "per_level_scale": growth,
        }
        self.levels = GridLevels.make(in_dim, levels, log2_table_size, base_resolution, growth)
        self.in_dim, self.backend, self.out_dim = in_dim, backend, FEATURES * levels
        self.table = nn.Parameter(torch.empty(int(self.levels.entries.sum()), FEATURES).uniform_(-1e-4, 1e-4))

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n f"]:
        """Features of points in [0, 1]^d; coordinates are not clamped."""
        if self._fused(x):
            return _Encode.apply(x.contiguous().float(), self.table, self.levels)
        if self.backend == "tinycudann" and x.device.type == "cuda":
            # its module holds no parameters of ours: the table is handed in, so checkpoints know one layout
            return functional_call(self._tcnn_encoding(), {"params": self.table.flatten()}, (x,))
        return _encode_torch(x, self.table, self.levels)

    def vjp(self, x: Float[Tensor, "n d"], gradient: Float[Tensor, "n f"]) -> Float[Tensor, "n d"]:
        """d(features . gradient)/dx, differentiable in `gradient` and the table (x counts as a constant)."""
        x = x.detach()
        if self._fused(x):
            return _PullBack.apply(gradient, x.contiguous().float(), self.table, self.levels)
        x.requires_grad_()
        with torch.enable_grad():
            features = _encode_torch(x, self.table, self.levels)
            (pulled,) = torch.autograd.grad((features * gradient).sum(), x, create_graph=True)
        return pulled

    def _fused(self, x: Tensor) -> bool:
        return fused("torch" if self.backend == "torch" else "numba", x)

    def _tcnn_encoding(self) -> nn.Module:
        """tiny-cuda-nn's module for these levels, made once.

        Raises:
            InputError: tinycudann is not there, or lays its table out differently.
        """
        made = self.__dict__.get("_tcnn")
        if made is None:
            made = _make_tcnn_encoding(self.in_dim, self.tcnn_config)
            if made.params.numel() != self.table.numel():
                raise InputError(
                    f"this tinycudann keeps {made.params.numel()} numbers for a grid of {self.table.numel()}: its "
                    "layout has changed; use the 'numba' back end."
                )
            self.__dict__["_tcnn"] = made  # past nn.Module: no submodule, no second copy in checkpoints
        return made
