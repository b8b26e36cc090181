"""One file per frame, for programs without animated meshes: .obj and .ply meshes, .ply point clouds.

All are +Y up and in metres like the GLB, with normals and sRGB colours. Colours at vertices are shown by Blender and
MeshLab; a textured .obj also names its image.
"""

import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, Int, UInt8

from sv4d_ns.export.formats.asset import AnimatedMesh, Texture
from sv4d_ns.export.formats.gltf import encoded_image, to_gltf_axes
from sv4d_ns.export.formats.points import MovingPoints
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.files import replaced_folder

SequenceFormat = Literal["obj", "ply"]

TEXTURE_NAME = "base_color.jpg"
MATERIAL_NAME = "material.mtl"
OURS = re.compile(rf"frame_\d{{4,}}\.(obj|ply)|{re.escape(TEXTURE_NAME)}|{re.escape(MATERIAL_NAME)}")
"""Names of the files in a folder of frames."""


@dataclass(frozen=True, eq=False)
class Still:
    """A mesh at one moment, in world coordinates (z up)."""

    positions: Float[np.ndarray, "n 3"]
    faces: Int[np.ndarray, "f 3"]
    normals: Float[np.ndarray, "n 3"]
    colors: UInt8[np.ndarray, "n 3"]
    """sRGB."""
    confidence: Float[np.ndarray, " n"]
    texture: Texture | None = None


def stills(mesh: AnimatedMesh) -> Iterator[Still]:
    """The frames of an animated mesh: same topology and vertex order throughout."""
    for positions, normals in zip(mesh.placed(), mesh.normals, strict=True):
        yield Still(positions, mesh.faces, normals, mesh.colors, mesh.confidence, mesh.texture)


def write_sequence(
    frames: Iterable[Still],
    folder: Path,
    file_format: SequenceFormat,
    fps: float,
    advance: Callable[[], None] | None = None,
) -> list[Path]:
    """Write `folder`/frame_0000.obj (or .ply), ...; all frames appear at once.

    Returns:
        The mesh files, in frame order.
    """
    write = {"obj": _write_obj, "ply": _write_ply}[file_format]
    with whole_folder(folder) as fresh:
        for index, frame in enumerate(frames):
            if index == 0 and file_format == "obj" and frame.texture is not None:
                _write_material(fresh, frame.texture)
            write(frame, fresh / f"frame_{index:04d}.{file_format}", fps)
            if advance is not None:
                advance()
    return sorted(folder.glob(f"frame_*.{file_format}"))


def write_point_clouds(
    points: MovingPoints, folder: Path, fps: float, advance: Callable[[], None] | None = None
) -> list[Path]:
    """Write `folder`/frame_0000.ply, ...: positions, normals, colours and confidence of the same points."""
    with whole_folder(folder) as fresh:
        for index, (positions, normals) in enumerate(zip(points.positions, points.normals, strict=True)):
            vertex = _ply_vertices(positions, normals, points.colors, points.confidence)
            header = _ply_header(len(vertex), fps)
            (fresh / f"frame_{index:04d}.ply").write_bytes((header + "end_header\n").encode() + vertex.tobytes())
            if advance is not None:
                advance()
    return sorted(folder.glob("frame_*.ply"))


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder whose files take the place of those of an earlier export, all at once, when the block ends without
    an exception; whatever else lies there stays.

    Raises:
        InputError: there is a file at the place.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: move it away, or give another --output-dir.")
    with replaced_folder(folder) as fresh:
        yield fresh
        for other in folder.iterdir() if folder.is_dir() else ():
            if not OURS.fullmatch(other.name):
                if other.is_dir():
                    shutil.copytree(other, fresh / other.name, symlinks=True)
                else:
                    shutil.copy2(other, fresh / other.name, follow_symlinks=False)


def _write_material(folder: Path, texture: Texture) -> None:
    (folder / TEXTURE_NAME).write_bytes(encoded_image(texture.image))
    (folder / MATERIAL_NAME).write_text(f"newmtl object\nKd 1 1 1\nKs 0 0 0\nmap_Kd {TEXTURE_NAME}\n")


def _write_obj(frame: Still, path: Path, fps: float) -> None:
    """Wavefront OBJ; colours follow the coordinates ("v x y z r g b"), as MeshLab and Blender read them."""
    corners = frame.faces + 1
    places = np.hstack([to_gltf_axes(frame.positions), frame.colors / 255])
    with path.open("w") as file:
        file.write(f"# sv4d_ns, +Y up, metres, {fps:g} frames per second\n")
        if frame.texture is not None:
            file.write(f"mtllib {MATERIAL_NAME}\nusemtl object\n")
        np.savetxt(file, places, fmt="v %.6f %.6f %.6f %.4f %.4f %.4f")
        np.savetxt(file, to_gltf_axes(frame.normals), fmt="vn %.4f %.4f %.4f")
        if frame.texture is None:
            np.savetxt(file, np.repeat(corners, 2, axis=1), fmt="f %d//%d %d//%d %d//%d")
        else:
            np.savetxt(file, frame.texture.uv * [1, -1] + [0, 1], fmt="vt %.6f %.6f")
            np.savetxt(file, np.repeat(corners, 3, axis=1), fmt="f %d/%d/%d %d/%d/%d %d/%d/%d")


def _write_ply(frame: Still, path: Path, fps: float) -> None:
    """Binary little-endian PLY."""
    vertex = _ply_vertices(frame.positions, frame.normals, frame.colors, frame.confidence)
    face = np.zeros(len(frame.faces), dtype=[("count", "u1"), ("corners", "<i4", 3)])
    face["count"], face["corners"] = 3, frame.faces
    header = (
        _ply_header(len(vertex), fps)
        + f"element face {len(face)}\nproperty list uchar int vertex_indices\nend_header\n"
    )
    path.write_bytes(header.encode() + vertex.tobytes() + face.tobytes())


def _ply_vertices(
    positions: Float[np.ndarray, "n 3"],
    normals: Float[np.ndarray, "n 3"],
    colors: UInt8[np.ndarray, "n 3"],
    confidence: Float[np.ndarray, " n"],
) -> np.ndarray:
    vertex = np.zeros(len(positions), dtype=[("p", "<f4", 3), ("n", "<f4", 3), ("c", "u1", 3), ("s", "<f4")])
    vertex["p"], vertex["n"] = to_gltf_axes(positions), to_gltf_axes(normals)
    vertex["c"], vertex["s"] = colors, confidence
    return vertex


def _ply_header(vertices: int, fps: float) -> str:
    floats = "".join(f"property float {name}\n" for name in ("x", "y", "z", "nx", "ny", "nz"))
    bytes_ = "".join(f"property uchar {name}\n" for name in ("red", "green", "blue"))
    return (
        f"ply\nformat binary_little_endian 1.0\ncomment sv4d_ns, +Y up, metres, {fps:g} frames per second\n"
        f"element vertex {vertices}\n{floats}{bytes_}property float confidence\n"
    )
