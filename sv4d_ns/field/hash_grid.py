"""Multi-resolution hash grids: fused CPU kernels and the torch twin they are compared with.

Formulas: Mueller et al. 2022 (Instant-NGP) section 3 - multilinear interpolation of feature vectors stored at the
corners of nested grids, the spatial hash `x*1 ^ y*2654435761 ^ z*805459861`. Levels whose corners fit into the table
are indexed densely and take only the entries they need. What a trained table means is data (`GridLevels`) and is one of
two: `HashEncoding`, whose outermost corners lie on the unit cube's faces, and `HashGrid`, as tiny-cuda-nn has it.

Threads: the kernels release the GIL and run in `utils.threads` instead of numba's own threading layer, which spins
between calls and whose portable variant aborts the process when a viewer thread renders while the training thread
works.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from sv4d_ns.field.kernels import fused, njit
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.threads import run_in_threads, workers

PRIMES = (1, 2654435761, 805459861, 3674653429)
"""Of the spatial hash, one a coordinate; the fourth is tiny-cuda-nn's."""
FEATURES = 2
"""Features a level in the kernels."""
_POINTS_PER_TASK = 4096


class GridLevels(NamedTuple):
    """What a table means: where each level's corners lie and which entries are theirs. Arrays have one element a level.

    Kernels take this as it is, compiled for the types of the fields: the number of primes is that of the coordinates,
    and `wraps` is None rather than False because None is a type of its own.
    """

    scale: np.ndarray
    """float32: the unit interval in cells."""
    shift: np.float32
    """Place of coordinate 0, in cells."""
    resolution: np.ndarray
    """Corners a side."""
    entries: np.ndarray
    """How many; a power of two where they are hashed."""
    offset: np.ndarray
    """First entry, counted in entries."""
    dense: np.ndarray
    """Indexed directly rather than hashed."""
    primes: tuple[int, ...]
    wraps: Literal[True] | None
    """Whether coordinates are taken as they are, and dense levels begin anew at their far side; else coordinates are
    clamped to the unit interval."""

    @classmethod
    def of_cube(cls, resolutions: list[int], log2_table_size: int) -> GridLevels:
        """The levels of `HashEncoding`, from their cells a side."""
        corners = np.asarray(resolutions, np.int64) + 1
        return cls._make_levels(np.asarray(resolutions), 0.0, corners, corners**3, log2_table_size, PRIMES[:3], None)

    @classmethod
    def of_tinycudann(cls, dimensions: int, levels: int, log2_table_size: int, base: int, growth: float) -> GridLevels:
        """The levels of tiny-cuda-nn's HashGrid: corners lie half a cell off."""
        # float32 throughout: a rounding apart, a level would have another resolution
        exponent = np.arange(levels, dtype=np.float32) * np.log2(np.float32(growth))
        scale = np.exp2(exponent) * np.float32(base) - np.float32(1)
        corners = np.ceil(scale).astype(np.int64) + 1
        rounded = (corners**dimensions + 7) // 8 * 8
        return cls._make_levels(scale, 0.5, corners, rounded, log2_table_size, PRIMES[:dimensions], True)

    @classmethod
    def _make_levels(
        cls,
        scale: np.ndarray,
        shift: float,
        corners: np.ndarray,
        wanted: np.ndarray,
        log2_table_size: int,
        primes: tuple[int, ...],
        wraps: Literal[True] | None,
    ) -> GridLevels:
        entries = np.minimum(wanted, 1 << log2_table_size)
        offset = np.concatenate([[0], np.cumsum(entries)[:-1]]).astype(np.int64)
        dense = corners ** len(primes) <= entries
        return cls(scale.astype(np.float32), np.float32(shift), corners, entries, offset, dense, primes, wraps)


class _Level(NamedTuple):
    """One of `GridLevels`, as a kernel has it at hand."""

    scale: float
    shift: float
    side: int
    entries: int
    dense: bool
    wraps: Literal[True] | None


@njit(inline="always")
def _level(levels, number):  # type: ignore[no-untyped-def]
    return _Level(
        levels.scale[number],
        levels.shift,
        levels.resolution[number],
        levels.entries[number],
        levels.dense[number],
        levels.wraps,
    )


@njit(inline="always")
def _axis(value, stride, prime, level):  # type: ignore[no-untyped-def]
    """What the near and the far corner along an axis contribute to an entry's number (added when dense, xor-ed when
    hashed), and the far one's share."""
    if level.wraps is not None:
        position = np.float32(value * level.scale + level.shift)
        index = int(position)
        index -= position < np.float32(index)  # math.floor is a function call
    else:
        clamped = min(max(value, np.float32(0.0)), np.float32(1.0))
        position = np.float32(clamped * level.scale + level.shift)
        index = min(int(position), level.side - 2)
    factor = np.uint32(stride) if level.dense else np.uint32(prime)
    near = np.uint32(np.uint32(index) * factor)
    return near, np.uint32(near + factor), np.float32(position - np.float32(index))


@njit(inline="always")
def _cell(x, i, primes, level):  # type: ignore[no-untyped-def]
    """The cell of a point along each axis; of time, the whole of one instant where there is none."""
    side = level.side
    along_x = _axis(x[i, 0], 1, primes[0], level)
    along_y = _axis(x[i, 1], side, primes[1], level)
    along_z = _axis(x[i, 2], side * side, primes[2], level)
    if len(primes) == 4:
        along_t = _axis(x[i, 3], side * side * side, primes[-1], level)
    else:
        along_t = np.uint32(0), np.uint32(0), np.float32(0.0)
    return along_x, along_y, along_z, along_t


@njit(inline="always")
def _entry(x, y, z, t, level):  # type: ignore[no-untyped-def]
    if not level.dense:
        return np.int64(np.uint32(x ^ y ^ z ^ t) & np.uint32(level.entries - 1))
    number = np.int64(np.uint32(x + y + z + t))
    if level.wraps is not None and number >= level.entries:
        return number % level.entries
    return number


@njit(inline="always")
def _edge(corner, cell, level):  # type: ignore[no-untyped-def]
    """One of a cell's edges along x: the entries of its ends, and its share along each other axis with that share's
    slope in cells."""
    one = np.float32(1.0)
    (x0, x1, _), (y0, y1, fy), (z0, z1, fz), (t0, t1, ft) = cell
    y, wy, sy = (y1, fy, one) if corner & 1 else (y0, one - fy, -one)
    z, wz, sz = (z1, fz, one) if corner & 2 else (z0, one - fz, -one)
    t, wt, st = (t1, ft, one) if corner & 4 else (t0, one - ft, -one)
    return _entry(x0, y, z, t, level), _entry(x1, y, z, t, level), wy, wz, wt, sy, sz, st


@njit(inline="always")
def _follows(value, level):  # type: ignore[no-untyped-def]
    """Whether a point moves with this coordinate: not where it is clamped."""
    return level.wraps is not None or np.float32(0.0) <= value <= np.float32(1.0)


_JIT: Any = {"nogil": True, "cache": True, "fastmath": True, "error_model": "numpy"}


@njit(**_JIT)
def _forward(x, table, levels, out):  # type: ignore[no-untyped-def]
    one, zero, primes = np.float32(1.0), np.float32(0.0), levels.primes
    for number in range(len(levels.scale)):
        level = _level(levels, number)
        entries = table[levels.offset[number] :]
        for i in range(len(x)):
            cell = _cell(x, i, primes, level)
            fx = cell[0][2]
            a, b = zero, zero
            for corner in range(8 if len(primes) == 4 else 4):
                low, high, wy, wz, wt, _, _, _ = _edge(corner, cell, level)
                w = wy * wz * wt
                w_low, w_high = w * (one - fx), w * fx
                a += w_low * entries[low, 0] + w_high * entries[high, 0]
                b += w_low * entries[low, 1] + w_high * entries[high, 1]
            out[i, 2 * number] = a
            out[i, 2 * number + 1] = b


@njit(**_JIT)
def _backward(x, table, levels, grad, grad_x, grad_table, first, last):  # type: ignore[no-untyped-def]
    """grad_x += J(x)^T grad unless it is empty, grad_table += w_c grad unless it is None, of levels `first` to `last`.

    A known grad_x would let the compiler regroup the sums over corners, which then round otherwise than in older runs.
    """
    one, zero, primes, want_x = np.float32(1.0), np.float32(0.0), levels.primes, len(grad_x) > 0
    for number in range(first, last):
        level = _level(levels, number)
        entries = table[levels.offset[number] :]
        if grad_table is not None:
            entries_grad = grad_table[levels.offset[number] :]
        for i in range(len(x)):
            ga, gb = grad[i, 2 * number], grad[i, 2 * number + 1]
            if ga == zero and gb == zero:
                continue
            cell = _cell(x, i, primes, level)
            fx = cell[0][2]
            gx, gy, gz, gt = zero, zero, zero, zero
            for corner in range(8 if len(primes) == 4 else 4):
                low, high, wy, wz, wt, sy, sz, st = _edge(corner, cell, level)
                w = wy * wz * wt
                if grad_table is not None:
                    w_low, w_high = w * (one - fx), w * fx
                    entries_grad[low, 0] += w_low * ga
                    entries_grad[low, 1] += w_low * gb
                    entries_grad[high, 0] += w_high * ga
                    entries_grad[high, 1] += w_high * gb
                if want_x:
                    dot_low = ga * entries[low, 0] + gb * entries[low, 1]
                    dot_high = ga * entries[high, 0] + gb * entries[high, 1]
                    along_x = dot_low + fx * (dot_high - dot_low)
                    gx += w * (dot_high - dot_low)
                    gy += sy * wz * wt * along_x
                    gz += sz * wy * wt * along_x
                    gt += st * wy * wz * along_x
            if want_x:
                if _follows(x[i, 0], level):
                    grad_x[i, 0] += gx * level.scale
                if _follows(x[i, 1], level):
                    grad_x[i, 1] += gy * level.scale
                if _follows(x[i, 2], level):
                    grad_x[i, 2] += gz * level.scale
                if len(primes) == 4:
                    grad_x[i, 3] += gt * level.scale


@njit(**_JIT)
def _tangent(x, table, levels, grad, v, tangent, grad_table, first, last):  # type: ignore[no-untyped-def]
    """What a pull back (`_backward` for grad_x) passes on to its inputs where coordinates are not clamped: tangent =
    J(x) v, and grad_table += (dw_c . v) grad."""
    one, zero, primes = np.float32(1.0), np.float32(0.0), levels.primes
    for number in range(first, last):
        level = _level(levels, number)
        entries, entries_grad = table[levels.offset[number] :], grad_table[levels.offset[number] :]
        for i in range(len(x)):
            ga, gb = grad[i, 2 * number], grad[i, 2 * number + 1]
            cell = _cell(x, i, primes, level)
            fx = cell[0][2]
            vx, vy, vz = v[i, 0] * level.scale, v[i, 1] * level.scale, v[i, 2] * level.scale
            vt = v[i, 3] * level.scale if len(primes) == 4 else zero
            a, b = zero, zero
            for corner in range(8 if len(primes) == 4 else 4):
                low, high, wy, wz, wt, sy, sz, st = _edge(corner, cell, level)
                w = wy * wz * wt
                others = sy * wz * wt * vy + sz * wy * wt * vz + st * wy * wz * vt
                d_low, d_high = (one - fx) * others - w * vx, fx * others + w * vx
                a += d_low * entries[low, 0] + d_high * entries[high, 0]
                b += d_low * entries[low, 1] + d_high * entries[high, 1]
                entries_grad[low, 0] += d_low * ga
                entries_grad[low, 1] += d_low * gb
                entries_grad[high, 0] += d_high * ga
                entries_grad[high, 1] += d_high * gb
            tangent[i, 2 * number] = a
            tangent[i, 2 * number + 1] = b


def _numpy(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.detach().contiguous().numpy() for tensor in tensors]


def _by_points(count: int, run: Callable[[slice], None]) -> None:
    """In threads that own points."""

    def task(start: int) -> Callable[[], None]:
        return lambda: run(slice(start, start + _POINTS_PER_TASK))

    run_in_threads([task(start) for start in range(0, count, _POINTS_PER_TASK)])


def _by_levels(levels: int, run: Callable[[int, int], None]) -> None:
    """In threads that own levels, whose table entries are disjoint."""

    def task(level: int) -> Callable[[], None]:
        return lambda: run(level, level + 1)

    # the finest first: they take longest
    run_in_threads([task(level) for level in reversed(range(levels))])


def _pull_back(x: np.ndarray, table: np.ndarray, levels: GridLevels, grad: np.ndarray) -> Tensor:
    """J(x)^T grad."""
    grad_x = torch.zeros(x.shape)
    pulled = grad_x.numpy()
    _by_points(len(x), lambda s: _backward(x[s], table, levels, grad[s], pulled[s], None, 0, len(levels.scale)))
    return grad_x


def _scatter(x: np.ndarray, table: np.ndarray, levels: GridLevels, grad: np.ndarray) -> Tensor:
    """The first derivative in the table."""
    grad_table = torch.zeros(table.shape)
    scattered, no_x = grad_table.numpy(), np.empty((0, x.shape[1]), np.float32)
    _by_levels(len(levels.scale), lambda a, b: _backward(x, table, levels, grad, no_x, scattered, a, b))
    return grad_table


def _both(x: np.ndarray, table: np.ndarray, levels: GridLevels, grad: np.ndarray) -> tuple[Tensor, Tensor]:
    """`_pull_back` and `_scatter`, each level's cells found once."""
    count = workers()
    edges = [round(i * len(levels.scale) / count) for i in range(count + 1)]
    groups = [(a, b) for a, b in pairwise(edges) if a < b]
    grad_x, grad_table = torch.zeros(len(groups), *x.shape), torch.zeros(table.shape)
    pulled, scattered = grad_x.numpy(), grad_table.numpy()

    def task(group: int) -> Callable[[], None]:
        return lambda: _backward(x, table, levels, grad, pulled[group], scattered, *groups[group])

    run_in_threads([task(group) for group in range(len(groups))])
    return grad_x.sum(0), grad_table


class _Encode(torch.autograd.Function):
    """Features; differentiable once (see `_PullBack` for the derivative of the derivative). Cells are found again in
    the backward pass, which is cheaper than keeping them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, levels: GridLevels) -> Tensor:
        ctx.save_for_backward(x, table)
        ctx.levels = levels
        out = torch.empty(len(x), FEATURES * len(levels.scale))
        points, entries, result = *_numpy(x, table), out.numpy()
        _by_points(len(x), lambda s: _forward(points[s], entries, levels, result[s]))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, table = ctx.saved_tensors
        points, entries, grads = _numpy(x, table, grad)
        if all(ctx.needs_input_grad[:2]):
            return *_both(points, entries, ctx.levels, grads), None
        if ctx.needs_input_grad[0]:
            return _pull_back(points, entries, ctx.levels, grads), None, None
        return None, _scatter(points, entries, ctx.levels, grads), None


class _PullBack(torch.autograd.Function):
    """J(x)^T g, differentiable once in g and the table."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor, table: Tensor, levels: GridLevels) -> Tensor:
        ctx.save_for_backward(grad, x, table)
        ctx.levels = levels
        grads, points, entries = _numpy(grad, x, table)
        return _pull_back(points, entries, levels, grads)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None, Tensor, None]:
        grad, x, table = ctx.saved_tensors
        levels: GridLevels = ctx.levels
        tangent, grad_table = torch.empty_like(grad), torch.zeros_like(table)
        points, entries, grads, directions = _numpy(x, table, grad, v)
        out, scattered = tangent.numpy(), grad_table.numpy()
        _by_levels(
            len(levels.scale),
            lambda a, b: _tangent(points, entries, levels, grads, directions, out, scattered, a, b),
        )
        return tangent, None, grad_table, None


def cell_corners(dimensions: int, device: torch.device) -> Int[Tensor, "c d"]:
    """0 or 1 along each axis for the 2^d corners of a cell, the first axis fastest; made on the device itself."""
    number = torch.arange(2**dimensions, device=device)
    return (number[:, None] >> torch.arange(dimensions, device=device)) & 1


def _encode_torch(x: Tensor, table: Tensor, levels: GridLevels) -> Tensor:
    dimensions = x.shape[1]
    corners = cell_corners(dimensions, x.device)
    x = x.clamp(0, 1) if levels.wraps is None else x
    features = []
    for level, side in enumerate(levels.resolution.tolist()):
        position = x * float(levels.scale[level]) + float(levels.shift)
        low = position.detach().floor().long()
        low = low.clamp(max=side - 2) if levels.wraps is None else low
        fraction = (position - low)[:, None]
        corner = low[:, None] + corners
        weight = torch.where(corners.bool(), fraction, 1 - fraction).prod(-1)
        factors = [side**d for d in range(dimensions)] if levels.dense[level] else levels.primes
        number = corner[..., 0]
        for d in range(1, dimensions):
            along = corner[..., d] * factors[d]
            number = number + along if levels.dense[level] else number ^ along
        number = (number & 0xFFFFFFFF) % int(levels.entries[level]) + int(levels.offset[level])
        features.append((weight[..., None] * table[number]).sum(1))
    return torch.cat(features, -1)


class _Grid(nn.Module):
    """Trainable features, level by level, coarse to fine; entries start uniform in [-1e-4, 1e-4] (Instant-NGP
    section 4)."""

    def __init__(self, levels: GridLevels, backend: Literal["numba", "torch", "tinycudann"]) -> None:
        super().__init__()
        self.levels, self.backend, self.out_dim = levels, backend, FEATURES * len(levels.scale)
        self.table = nn.Parameter(torch.empty(int(levels.entries.sum()), FEATURES).uniform_(-1e-4, 1e-4))

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n f"]:
        """Features of points in [0, 1]^d."""
        if fused(self.backend, x):
            return _Encode.apply(x.contiguous().float(), self.table, self.levels)
        return _encode_torch(x, self.table, self.levels)


class HashEncoding(_Grid):
    """A grid over the unit cube whose level l has round(base * growth^l) cells a side, up to `max_resolution`.

    Coordinates outside [0, 1] are clamped. `backend="numba"` is the fused CPU kernel (values and first derivatives;
    tensors on another device take the torch path, because the kernel reads host memory); `backend="torch"` is the
    reference and also gives second derivatives.

    Raises:
        InputError: sizes that cannot describe a grid, or an unknown back end.
    """

    def __init__(
        self,
        levels: int = 8,
        log2_table_size: int = 16,
        base_resolution: int = 16,
        max_resolution: int = 256,
        backend: Literal["numba", "torch"] = "numba",
    ) -> None:
        if levels < 1 or not 1 <= base_resolution <= max_resolution:
            raise InputError(
                f"a hash grid of {levels} levels from {base_resolution} to {max_resolution} cells is not possible; "
                "use at least one level and base_resolution <= max_resolution."
            )
        if not 1 <= log2_table_size <= 24:
            raise InputError(f"log2_table_size={log2_table_size} is outside 1..24; use about 14 to 19.")
        if backend not in ("numba", "torch"):
            raise InputError(f"unknown encoding back end {backend!r}; use 'numba' or 'torch'.")
        growth = (max_resolution / base_resolution) ** (1 / max(levels - 1, 1))
        resolutions = [round(base_resolution * growth**level) for level in range(levels)]
        super().__init__(GridLevels.of_cube(resolutions, log2_table_size), backend)


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


class HashGrid(_Grid):
    """tiny-cuda-nn's grid of points in the unit cube (3) or of points and times (4); coordinates are not clamped.

    `backend="numba"` is the fused CPU kernel, tensors on another device take the torch path; `backend="torch"` is the
    reference; `backend="tinycudann"` gives points on a CUDA device to tiny-cuda-nn's own kernels (first derivatives)
    and others to the numba kernel, so that what was trained on a GPU opens anywhere: the table means the same to all
    three.

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
        if in_dim not in (3, 4):
            raise InputError(f"HashGrid encodes 3 or 4 coordinates, not in_dim={in_dim}.")
        if levels < 1 or base_resolution < 2 or growth < 1 or not 1 <= log2_table_size <= 24:
            raise InputError(
                f"a hash grid of {levels} levels, base_resolution={base_resolution}, growth={growth:g} and "
                f"log2_table_size={log2_table_size} is not possible: use 1+, 2+, 1+ and 1 to 24."
            )
        if backend not in ("numba", "torch", "tinycudann"):
            raise InputError(f"unknown encoding back end {backend!r}; use 'numba', 'torch' or 'tinycudann'.")
        super().__init__(GridLevels.of_tinycudann(in_dim, levels, log2_table_size, base_resolution, growth), backend)
        self.tcnn_config = {
            "otype": "HashGrid",
            "n_levels": levels,
            "n_features_per_level": FEATURES,
            "log2_hashmap_size": log2_table_size,
            "base_resolution": base_resolution,
            "per_level_scale": growth,
        }

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n f"]:
        """Features of points in [0, 1]^d."""
        if self.backend == "tinycudann" and x.device.type == "cuda":
            # its module holds no parameters of ours: the table is handed in, so checkpoints know one layout
            return functional_call(self._tcnn_encoding(), {"params": self.table.flatten()}, (x,))
        return super().forward(x)

    def vjp(self, x: Float[Tensor, "n d"], gradient: Float[Tensor, "n f"]) -> Float[Tensor, "n d"]:
        """d(features . gradient)/dx, differentiable in `gradient` and the table (x counts as a constant)."""
        x = x.detach()
        if fused(self.backend, x):
            return _PullBack.apply(gradient, x.contiguous().float(), self.table, self.levels)
        x.requires_grad_()
        with torch.enable_grad():
            features = _encode_torch(x, self.table, self.levels)
            (pulled,) = torch.autograd.grad((features * gradient).sum(), x, create_graph=True)
        return pulled

    def _tcnn_encoding(self) -> nn.Module:
        """tiny-cuda-nn's module for these levels, made once.

        Raises:
            InputError: tinycudann is not there, or lays its table out differently.
        """
        made = self.__dict__.get("_tcnn")
        if made is None:
            made = _make_tcnn_encoding(len(self.levels.primes), self.tcnn_config)
            if made.params.numel() != self.table.numel():
                raise InputError(
                    f"this tinycudann keeps {made.params.numel()} numbers for a grid of {self.table.numel()}: its "
                    "layout has changed; use the 'numba' back end."
                )
            self.__dict__["_tcnn"] = made  # past nn.Module: no submodule, no second copy in checkpoints
        return made
