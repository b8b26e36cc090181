"""An animated mesh as one binary glTF 2.0 file: one primitive, one morph target per further frame, one clip.

Axes: the world is z up with the input camera on +x; glTF is +Y up and viewers look at +Z. The cyclic exchange
(x, y, z)_world -> (y, z, x)_gltf is a proper rotation that turns the side the input camera saw towards +Z and keeps
its right-hand side on +X. Lengths are metres. Colours: `COLOR_0` is linear by the specification, so sRGB is decoded
into normalised uint16 (uint8 would band in the dark).
"""

from pathlib import Path
from typing import Any

import numpy as np
import pygltflib
from jaxtyping import Float, Int

from sv4d_ns import __version__
from sv4d_ns.export.mesh import AnimatedMesh
from sv4d_ns.files import atomic_path


def to_gltf_axes(points: Float[np.ndarray, "*batch 3"]) -> Float[np.ndarray, "*batch 3"]:
    """World (z up, front +x) to glTF (y up, front +z): (x, y, z) -> (y, z, x)."""
    return np.ascontiguousarray(points[..., [1, 2, 0]])


def from_gltf_axes(points: Float[np.ndarray, "*batch 3"]) -> Float[np.ndarray, "*batch 3"]:
    """The inverse of `to_gltf_axes`."""
    return np.ascontiguousarray(points[..., [2, 0, 1]])


def linear_from_srgb(colors: Int[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
    """uint8 sRGB to linear light in [0, 1] (IEC 61966-2-1)."""
    value = colors.astype(np.float64) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


class _Buffer:
    """Collects arrays into one binary chunk with a bufferView and an accessor each."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.views: list[pygltflib.BufferView] = []
        self.accessors: list[pygltflib.Accessor] = []

    def add(
        self, array: np.ndarray, kind: str, target: int | None = None, bounds: bool = False, normalized: bool = False
    ) -> int:
        """Append an array [n] or [n, components]; returns the accessor's index."""
        component = {
            np.dtype(np.float32): pygltflib.FLOAT,
            np.dtype(np.uint32): pygltflib.UNSIGNED_INT,
            np.dtype(np.uint16): pygltflib.UNSIGNED_SHORT,
        }[array.dtype]
        self.data.extend(b"\0" * (-len(self.data) % 4))
        raw = np.ascontiguousarray(array).tobytes()
        self.views.append(pygltflib.BufferView(buffer=0, byteOffset=len(self.data), byteLength=len(raw), target=target))
        self.data.extend(raw)
        rows = array.reshape(len(array), -1)
        self.accessors.append(
            pygltflib.Accessor(
                bufferView=len(self.views) - 1,
                componentType=component,
                count=len(array),
                type=kind,
                normalized=normalized or None,
                min=rows.min(axis=0).tolist() if bounds else None,
                max=rows.max(axis=0).tolist() if bounds else None,
            )
        )
        return len(self.accessors) - 1


def write_animated_glb(mesh: AnimatedMesh, path: Path, name: str, extras: dict[str, Any]) -> None:
    """Write `mesh` to `path` (.glb), whole or not at all.

    Frame 0 is the mesh itself, so a viewer without morph targets shows the first frame; frame i > 0 is morph target
    i - 1 (POSITION and NORMAL differences). The clip `name` sets the weights to frame i at i / fps seconds and
    interpolates linearly, so playback is smooth at any display rate.

    Args:
        name: of the node, the mesh and the clip.
        extras: licence and provenance, stored as `asset.extras` (JSON values); its "copyright", where given, is
            also stored as `asset.copyright`.
    """
    with atomic_path(path) as temporary:
        _gltf(mesh, name, extras).save_binary(str(temporary))


def _gltf(mesh: AnimatedMesh, name: str, extras: dict[str, Any]) -> pygltflib.GLTF2:
    buffer = _Buffer()
    primitive = _primitive(buffer, mesh)
    frames = len(mesh.positions)
    targets = [f"frame_{i:04d}" for i in range(1, frames)]
    gltf = pygltflib.GLTF2(
        asset=pygltflib.Asset(
            version="2.0", generator=f"sv4d_ns {__version__}", copyright=extras.get("copyright"), extras=extras
        ),
        scene=0,
        scenes=[pygltflib.Scene(name=name, nodes=[0])],
        nodes=[pygltflib.Node(name=name, mesh=0)],
        meshes=[
            pygltflib.Mesh(
                name=name,
                primitives=[primitive],
                weights=[0.0] * len(targets) or None,
                extras={"targetNames": targets} if targets else {},
            )
        ],
        materials=[_material(name)],
        animations=[_clip(buffer, frames, mesh.fps, name)] if targets else [],
    )
    gltf.bufferViews, gltf.accessors = buffer.views, buffer.accessors
    gltf.buffers = [pygltflib.Buffer(byteLength=len(buffer.data))]
    gltf.set_binary_blob(bytes(buffer.data))
    return gltf


def _primitive(buffer: _Buffer, mesh: AnimatedMesh) -> pygltflib.Primitive:
    positions = to_gltf_axes(mesh.positions).astype(np.float32)
    normals = to_gltf_axes(mesh.normals).astype(np.float32)
    colors = np.ones((len(mesh.colors), 4))
    colors[:, :3] = linear_from_srgb(mesh.colors)
    index_type = np.uint16 if positions.shape[1] < 65535 else np.uint32
    vertices = pygltflib.ARRAY_BUFFER
    return pygltflib.Primitive(
        attributes=pygltflib.Attributes(
            POSITION=buffer.add(positions[0], pygltflib.VEC3, vertices, bounds=True),
            NORMAL=buffer.add(normals[0], pygltflib.VEC3, vertices),
            COLOR_0=buffer.add(np.round(colors * 65535).astype(np.uint16), pygltflib.VEC4, vertices, normalized=True),
        ),
        indices=buffer.add(mesh.faces.astype(index_type).ravel(), pygltflib.SCALAR, pygltflib.ELEMENT_ARRAY_BUFFER),
        material=0,
        targets=[
            pygltflib.Attributes(
                POSITION=buffer.add(positions[i] - positions[0], pygltflib.VEC3, vertices, bounds=True),
                NORMAL=buffer.add(normals[i] - normals[0], pygltflib.VEC3, vertices),
            )
            for i in range(1, len(positions))
        ],
    )


def _material(name: str) -> pygltflib.Material:
    """White and rough, so that what is seen is COLOR_0; Blender drops vertex colours of meshes without a material."""
    return pygltflib.Material(
        name=name,
        doubleSided=True,
        pbrMetallicRoughness=pygltflib.PbrMetallicRoughness(
            baseColorFactor=[1.0, 1.0, 1.0, 1.0], metallicFactor=0.0, roughnessFactor=1.0
        ),
    )


def _clip(buffer: _Buffer, frames: int, fps: float, name: str) -> pygltflib.Animation:
    """Weights over time: at i / fps seconds target i - 1 is fully on and all others are off."""
    seconds = (np.arange(frames) / fps).astype(np.float32)
    weights = np.eye(frames, dtype=np.float32)[:, 1:].ravel()
    sampler = pygltflib.AnimationSampler(
        input=buffer.add(seconds, pygltflib.SCALAR, bounds=True),
        output=buffer.add(weights, pygltflib.SCALAR),
        interpolation="LINEAR",
    )
    channel = pygltflib.AnimationChannel(sampler=0, target=pygltflib.AnimationChannelTarget(node=0, path="weights"))
    return pygltflib.Animation(name=name, samplers=[sampler], channels=[channel])
