"""Gaussian splats on the surface of an animated mesh, one .ply per frame in the layout of 3D Gaussian splatting.

Kerbl et al. 2023: position, spherical-harmonic colour (here degree 0), opacity before the sigmoid, logarithms of the
three standard deviations, rotation quaternion (w first). Each Gaussian is a small disc that rides on its face, so it
is the same one in all frames.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.spatial.transform import Rotation

from sv4d_ns.export.colour.baking import Picture
from sv4d_ns.export.formats.asset import AnimatedMesh
from sv4d_ns.export.formats.gltf import to_gltf_axes
from sv4d_ns.export.formats.points import sample_points
from sv4d_ns.export.formats.sequence import whole_folder

SH_C0 = 0.28209479177387814
"""The constant spherical harmonic, 1 / (2 sqrt(pi))."""
OVERLAP = 0.8
"""Standard deviation of a disc as a share of the mean distance between discs: no gaps, little blur."""
THICKNESS = 0.1
"""Standard deviation along the normal as a share of that in the surface."""
OPACITY = 0.95
LEARNING_RATES = {"colors": 5e-3, "log_scales": 5e-3, "opacity_logits": 2e-2, "shifts": 1e-4}

Rasterise = Callable[..., tuple[Any, Any, Any]]
"""`gsplat.rasterization`: (means, quats, scales, opacities, colors, viewmats, Ks, width, height) to (colours [1, h, w,
3], alphas [1, h, w, 1], information)."""


@dataclass(frozen=True, eq=False)
class Splats:
    """k Gaussians over all frames, in world coordinates (z up)."""

    positions: Float[np.ndarray, "t k 3"]
    rotations: Float[np.ndarray, "t k 3 3"]
    """Columns: two directions in the surface, then its normal."""
    scales: Float[np.ndarray, "k 3"]
    """Standard deviations along those columns, world units."""
    opacities: Float[np.ndarray, " k"]
    colors: Float[np.ndarray, "k 3"]
    """sRGB in [0, 1]."""


def sample_splats(mesh: AnimatedMesh, count: int) -> Splats:
    """`count` discs spread evenly over the surface of the first frame."""
    points = sample_points(mesh, count)
    corners = mesh.faces[points.on.face]
    edges = mesh.positions[:, corners[:, 1]] - mesh.positions[:, corners[:, 0]]
    normals = points.normals
    first = edges - (edges * normals).sum(axis=-1, keepdims=True) * normals
    first = first / np.maximum(np.linalg.norm(first, axis=-1, keepdims=True), 1e-12)
    rotations = np.stack([first, np.cross(normals, first), normals], axis=-1)
    triangle = mesh.positions[0][mesh.faces]
    area = (
        0.5 * np.linalg.norm(np.cross(triangle[:, 1] - triangle[:, 0], triangle[:, 2] - triangle[:, 0]), axis=-1).sum()
    )
    deviation = OVERLAP * np.sqrt(area / count)
    return Splats(
        points.positions,
        rotations,
        np.tile(np.array([1.0, 1.0, THICKNESS]) * deviation, (count, 1)),
        np.full(count, OPACITY),
        points.colors / 255.0,
    )


def refine(
    splats: Splats,
    pictures: Sequence[Picture],
    steps: int,
    rasterise: Rasterise,
    device: str,
    seed: int = 0,
    advance: Callable[[], None] | None = None,
) -> Splats:
    """Fit colours, sizes, opacities and a small shift in each disc's own frame to pictures (Adam, L1 on white).

    All frames share these; the motion stays the mesh's.

    Args:
        rasterise: `gsplat.rasterization`.
    """
    import torch

    def tensor(values: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.float32, device=device)

    positions, rotations = tensor(splats.positions), tensor(splats.rotations)
    quaternions = tensor(np.stack([_wxyz(frame) for frame in splats.rotations]))
    opacity = np.log(splats.opacities / (1 - splats.opacities))
    values = {
        "colors": tensor(splats.colors),
        "log_scales": tensor(np.log(splats.scales)),
        "opacity_logits": tensor(opacity),
        "shifts": torch.zeros_like(positions[0]),
    }
    values = {name: value.requires_grad_() for name, value in values.items()}
    optimizer = torch.optim.Adam([{"params": [value], "lr": LEARNING_RATES[name]} for name, value in values.items()])
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        picture = pictures[int(rng.integers(len(pictures)))]
        size, frame = len(picture.rgba), picture.frame
        means = positions[frame] + torch.einsum("kij,kj->ki", rotations[frame], values["shifts"])
        made, alpha, _ = rasterise(
            means,
            quaternions[frame],
            values["log_scales"].exp(),
            values["opacity_logits"].sigmoid(),
            values["colors"],
            tensor(_world_to_camera(picture.c2w))[None],
            tensor(_intrinsics(picture.fov_focal * size, size))[None],
            size,
            size,
        )
        target = tensor(picture.rgba / 255.0)
        on_white = target[..., :3] * target[..., 3:] + 1 - target[..., 3:]
        error = (made[0] + 1 - alpha[0] - on_white).abs().mean() + (alpha[0] - target[..., 3:]).abs().mean()
        optimizer.zero_grad(set_to_none=True)
        (picture.trust * error).backward()
        optimizer.step()
        if advance is not None:
            advance()
    found = {name: value.detach().cpu().numpy().astype(np.float64) for name, value in values.items()}
    return replace(
        splats,
        positions=splats.positions + np.einsum("tkij,kj->tki", splats.rotations, found["shifts"]),
        scales=np.exp(found["log_scales"]),
        opacities=1 / (1 + np.exp(-found["opacity_logits"])),
        colors=np.clip(found["colors"], 0, 1),
    )


def _world_to_camera(c2w: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, "4 4"]:
    """OpenCV world-to-camera (x right, y down, z forward) of an OpenGL camera-to-world matrix."""
    return np.linalg.inv(c2w @ np.diag([1.0, -1.0, -1.0, 1.0]))


def _intrinsics(focal: float, size: int) -> Float[np.ndarray, "3 3"]:
    return np.array([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]])


def _wxyz(rotations: Float[np.ndarray, "k 3 3"]) -> Float[np.ndarray, "k 4"]:
    return Rotation.from_matrix(rotations).as_quat()[:, [3, 0, 1, 2]]


PROPERTIES = (
    *("x", "y", "z", "nx", "ny", "nz"),
    *(f"f_dc_{i}" for i in range(3)),
    "opacity",
    *(f"scale_{i}" for i in range(3)),
    *(f"rot_{i}" for i in range(4)),
)
"""The standard order of a splat's floats (no higher harmonics)."""


def write_splats(splats: Splats, folder: Path, fps: float, advance: Callable[[], None] | None = None) -> list[Path]:
    """Write `folder`/frame_0000.ply, ...: +Y up and metres; all files appear at once."""
    opacities = np.clip(splats.opacities, 1e-4, 1 - 1e-4)
    fixed = [(splats.colors - 0.5) / SH_C0, np.log(opacities / (1 - opacities))[:, None], np.log(splats.scales)]
    header = (
        f"ply\nformat binary_little_endian 1.0\ncomment sv4d_ns, +Y up, metres, {fps:g} frames per second\n"
        f"element vertex {len(splats.scales)}\n"
        + "".join(f"property float {name}\n" for name in PROPERTIES)
        + "end_header\n"
    )
    with whole_folder(folder) as fresh:
        for index, (positions, rotations) in enumerate(zip(splats.positions, splats.rotations, strict=True)):
            turned = np.moveaxis(to_gltf_axes(np.moveaxis(rotations, -1, -2)), -1, -2)
            rows = np.hstack([to_gltf_axes(positions), turned[..., 2], *fixed, _wxyz(turned)])
            (fresh / f"frame_{index:04d}.ply").write_bytes(header.encode() + rows.astype("<f4").tobytes())
            if advance is not None:
                advance()
    return sorted(folder.glob("frame_*.ply"))
