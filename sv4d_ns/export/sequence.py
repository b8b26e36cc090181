"""An animated mesh as one file per frame, for programs without morph targets: same topology and order throughout."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float

from sv4d_ns.export.gltf import to_gltf_axes
from sv4d_ns.export.mesh import AnimatedMesh

SequenceFormat = Literal["obj", "ply"]


def write_sequence(
    mesh: AnimatedMesh, folder: Path, file_format: SequenceFormat, advance: Callable[[], None] | None = None
) -> list[Path]:
    """Write `folder`/frame_0000.obj (or .ply), ...: +Y up and metres like the GLB, with normals and sRGB colours.

    All frames appear at once: they are written beside `folder`, which is then replaced.

    Returns:
        The files, in frame order.
    """
    write = {"obj": _write_obj, "ply": _write_ply}[file_format]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        fresh = Path(scratch) / "frames"
        fresh.mkdir()
        for index, (positions, normals) in enumerate(zip(mesh.positions, mesh.normals, strict=True)):
            write(mesh, to_gltf_axes(positions), to_gltf_axes(normals), fresh / f"frame_{index:04d}.{file_format}")
            if advance is not None:
                advance()
        if folder.exists():
            folder.rename(Path(scratch) / "previous")  # removed with the scratch folder
        shutil.move(fresh, folder)
    return sorted(folder.glob(f"frame_*.{file_format}"))


def _write_obj(
    mesh: AnimatedMesh, positions: Float[np.ndarray, "n 3"], normals: Float[np.ndarray, "n 3"], path: Path
) -> None:
    """Wavefront OBJ; colours follow the coordinates ("v x y z r g b"), as MeshLab and Blender read them."""
    corners = mesh.faces + 1
    with path.open("w") as file:
        file.write(f"# sv4d_ns, +Y up, metres, {mesh.fps:g} frames per second\n")
        np.savetxt(file, np.hstack([positions, mesh.colors / 255]), fmt="v %.6f %.6f %.6f %.4f %.4f %.4f")
        np.savetxt(file, normals, fmt="vn %.4f %.4f %.4f")
        np.savetxt(file, np.repeat(corners, 2, axis=1), fmt="f %d//%d %d//%d %d//%d")


def _write_ply(
    mesh: AnimatedMesh, positions: Float[np.ndarray, "n 3"], normals: Float[np.ndarray, "n 3"], path: Path
) -> None:
    """Binary little-endian PLY with normals and uint8 colours."""
    vertex = np.zeros(len(positions), dtype=[("p", "<f4", 3), ("n", "<f4", 3), ("c", "u1", 3)])
    vertex["p"], vertex["n"], vertex["c"] = positions, normals, mesh.colors
    face = np.zeros(len(mesh.faces), dtype=[("count", "u1"), ("corners", "<i4", 3)])
    face["count"], face["corners"] = 3, mesh.faces
    floats = "".join(f"property float {name}\n" for name in ("x", "y", "z", "nx", "ny", "nz"))
    bytes_ = "".join(f"property uchar {name}\n" for name in ("red", "green", "blue"))
    header = (
        f"ply\nformat binary_little_endian 1.0\ncomment sv4d_ns, +Y up, metres, {mesh.fps:g} frames per second\n"
        f"element vertex {len(vertex)}\n{floats}{bytes_}"
        f"element face {len(face)}\nproperty list uchar int vertex_indices\nend_header\n"
    )
    path.write_bytes(header.encode() + vertex.tobytes() + face.tobytes())
