"""An animated mesh as one binary glTF 2.0 file: one primitive, morph targets or a skin, one clip.

Axes: the world is z up with the input camera on +x; glTF is +Y up and viewers look at +Z. The cyclic exchange
(x, y, z)_world -> (y, z, x)_gltf is a proper rotation that turns the side the input camera saw towards +Z and keeps
its right-hand side on +X. Lengths are metres. Colours: `COLOR_0` is linear by the specification, so sRGB is decoded
into normalised uint16 (uint8 would band in the dark); the base colour image is sRGB as it is.
"""

import io
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pygltflib
from jaxtyping import Float, Int, UInt8
from PIL import Image
from scipy.spatial.transform import Rotation

from sv4d_ns import __version__
from sv4d_ns.export.formats.asset import AnimatedMesh, Texture
from sv4d_ns.export.rig import Skeleton, Skin, skeleton
from sv4d_ns.utils.files import atomic_path

JPEG_QUALITY = 95
"""Of the base colour image: a third of a PNG's size, differences below two levels."""

TRANSFORM = "/materials/0/pbrMetallicRoughness/baseColorTexture/extensions/KHR_texture_transform"
"""What moves an animated texture, as a JSON pointer."""

COMPONENTS = {
    np.dtype(np.float32): pygltflib.FLOAT,
    np.dtype(np.uint32): pygltflib.UNSIGNED_INT,
    np.dtype(np.uint16): pygltflib.UNSIGNED_SHORT,
    np.dtype(np.uint8): pygltflib.UNSIGNED_BYTE,
}


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


def encoded_image(image: UInt8[np.ndarray, "s s 3"]) -> bytes:
    """The base colour image as every format stores it: JPEG without colour subsampling."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


@dataclass(frozen=True, eq=False)
class Sheet:
    """A texture as the one image of a file."""

    image: UInt8[np.ndarray, "s s 3"]
    uv: Float[np.ndarray, "n 2"]
    """Where nothing moves the texture."""
    offsets: Float[np.ndarray, "t 2"] | None
    """Of an animated texture: each frame is at offsets + uv / 2."""


def _sheet(texture: Texture) -> Sheet:
    """The image of the whole clip in the upper left corner, those of moments in cells of half its side around it.

    A viewer that knows nothing of moving textures so shows the whole clip's, as fine as without the others.
    """
    if texture.moments is None:
        return Sheet(texture.image, texture.uv.astype(np.float32), None)
    images, half = texture.moments.images, texture.moments.images.shape[1]
    side = math.ceil(math.sqrt(len(images) + 4))
    cells = [(row, column) for row in range(side) for column in range(side) if row > 1 or column > 1]
    sheet = np.full((side * half, side * half, 3), 255, np.uint8)
    sheet[: 2 * half, : 2 * half] = texture.image[: 2 * half, : 2 * half]
    for (row, column), image in zip(cells, images, strict=False):
        sheet[row * half : (row + 1) * half, column * half : (column + 1) * half] = image
    offsets = np.array([cells[number][::-1] for number in texture.moments.shown], np.float32) / side
    return Sheet(sheet, (texture.uv * (2 / side)).astype(np.float32), offsets)


@dataclass
class _Document:
    """A glTF document being put together around one binary chunk."""

    data: bytearray = field(default_factory=bytearray)
    views: list[pygltflib.BufferView] = field(default_factory=list)
    accessors: list[pygltflib.Accessor] = field(default_factory=list)
    nodes: list[pygltflib.Node] = field(default_factory=list)
    roots: list[int] = field(default_factory=list)
    """Nodes of the scene."""
    samplers: list[pygltflib.AnimationSampler] = field(default_factory=list)
    channels: list[pygltflib.AnimationChannel] = field(default_factory=list)

    def chunk(self, raw: bytes, target: int | None = None) -> int:
        """Append bytes; returns the bufferView's index."""
        self.data.extend(b"\0" * (-len(self.data) % 4))
        self.views.append(pygltflib.BufferView(buffer=0, byteOffset=len(self.data), byteLength=len(raw), target=target))
        self.data.extend(raw)
        return len(self.views) - 1

    def array(
        self, array: np.ndarray, kind: str, target: int | None = None, bounds: bool = False, normalized: bool = False
    ) -> int:
        """Append an array [n] or [n, components]; returns the accessor's index."""
        rows = array.reshape(len(array), -1)
        self.accessors.append(
            pygltflib.Accessor(
                bufferView=self.chunk(np.ascontiguousarray(array).tobytes(), target),
                componentType=COMPONENTS[array.dtype],
                count=len(array),
                type=kind,
                normalized=normalized or None,
                min=rows.min(axis=0).tolist() if bounds else None,
                max=rows.max(axis=0).tolist() if bounds else None,
            )
        )
        return len(self.accessors) - 1

    def node(self, root: bool = True, **values: Any) -> int:
        """Append a node; returns its index."""
        self.nodes.append(pygltflib.Node(**values))
        if root:
            self.roots.append(len(self.nodes) - 1)
        return len(self.nodes) - 1

    def animate(self, node: int, path: str, seconds: int, values: np.ndarray, kind: str) -> None:
        """Add a channel with linear interpolation between the key times of accessor `seconds`."""
        self._channel(pygltflib.AnimationChannelTarget(node=node, path=path), seconds, values, kind, "LINEAR")

    def exchange(self, pointer: str, seconds: int, values: np.ndarray, kind: str) -> None:
        """Add a channel that sets a property of the document (`KHR_animation_pointer`) at the key times."""
        extensions = {"KHR_animation_pointer": {"pointer": pointer}}
        target = pygltflib.AnimationChannelTarget(path="pointer", extensions=extensions)
        self._channel(target, seconds, values, kind, "STEP")

    def _channel(
        self, target: pygltflib.AnimationChannelTarget, seconds: int, values: np.ndarray, kind: str, between: str
    ) -> None:
        output = self.array(values.astype(np.float32), kind)
        self.samplers.append(pygltflib.AnimationSampler(input=seconds, output=output, interpolation=between))
        self.channels.append(pygltflib.AnimationChannel(sampler=len(self.samplers) - 1, target=target))


def write_animated_glb(
    mesh: AnimatedMesh, path: Path, name: str, extras: dict[str, Any], skin: Skin | None = None
) -> None:
    """Write `mesh` to `path` (.glb), whole or not at all.

    Frame 0 is the mesh itself, so a viewer without animation shows the first frame. With morph targets, frame i > 0 is
    target i - 1 (POSITION and NORMAL differences) and the clip `name` sets the weights to frame i at i / fps seconds;
    with a skin the clip turns and moves the joints. Between keys all is linear, so playback is smooth at any rate.
    Root motion, where the mesh has any, moves the node (of the mesh, or of the skeleton).

    Args:
        name: of the nodes, the mesh and the clip.
        extras: licence and provenance, stored as `asset.extras` (JSON values); its "copyright", where given, is
            also stored as `asset.copyright`.
        skin: of the same vertices, in world coordinates; None writes morph targets.
    """
    with atomic_path(path) as temporary:
        _gltf(mesh, name, extras, skin).save_binary(str(temporary))


def _gltf(mesh: AnimatedMesh, name: str, extras: dict[str, Any], skin: Skin | None) -> pygltflib.GLTF2:
    document = _Document()
    sheet = None if mesh.texture is None else _sheet(mesh.texture)
    primitive = _primitive(document, mesh, sheet)
    moving = mesh.num_frames > 1
    seconds = document.array(mesh.seconds.astype(np.float32), pygltflib.SCALAR, bounds=True) if moving else 0
    shape = pygltflib.Mesh(name=name, primitives=[primitive])
    skins = []
    if skin is not None and moving:
        skins, root = [_skinned(document, mesh, primitive, name, skin, seconds)], 0
    else:
        root = document.node(name=name, mesh=0)
        if moving:
            _morphed(document, mesh, primitive, shape, root, seconds)
    if mesh.root is not None and moving:
        document.animate(root, "translation", seconds, to_gltf_axes(mesh.root.translation), pygltflib.VEC3)
    flips = sheet is not None and sheet.offsets is not None
    if sheet is not None and sheet.offsets is not None:
        document.exchange(f"{TRANSFORM}/offset", seconds, sheet.offsets, pygltflib.VEC2)
        document.exchange(f"{TRANSFORM}/scale", seconds, np.full_like(sheet.offsets, 0.5), pygltflib.VEC2)
    gltf = pygltflib.GLTF2(
        extensionsUsed=["KHR_texture_transform", "KHR_animation_pointer"] if flips else [],
        asset=pygltflib.Asset(
            version="2.0", generator=f"sv4d_ns {__version__}", copyright=extras.get("copyright"), extras=extras
        ),
        scene=0,
        scenes=[pygltflib.Scene(name=name, nodes=document.roots)],
        nodes=document.nodes,
        meshes=[shape],
        skins=skins,
        materials=[_material(name, sheet is not None, flips)],
        animations=[pygltflib.Animation(name=name, samplers=document.samplers, channels=document.channels)]
        if moving
        else [],
    )
    if sheet is not None:
        image = document.chunk(encoded_image(sheet.image))
        gltf.images = [pygltflib.Image(name=f"{name}_base_color", mimeType="image/jpeg", bufferView=image)]
        gltf.samplers = [
            pygltflib.Sampler(
                magFilter=pygltflib.LINEAR,
                minFilter=pygltflib.LINEAR_MIPMAP_LINEAR,
                wrapS=pygltflib.CLAMP_TO_EDGE,
                wrapT=pygltflib.CLAMP_TO_EDGE,
            )
        ]
        gltf.textures = [pygltflib.Texture(sampler=0, source=0)]
    gltf.bufferViews, gltf.accessors = document.views, document.accessors
    gltf.buffers = [pygltflib.Buffer(byteLength=len(document.data))]
    gltf.set_binary_blob(bytes(document.data))
    return gltf


def _primitive(document: _Document, mesh: AnimatedMesh, sheet: Sheet | None) -> pygltflib.Primitive:
    """Frame 0 with its texture coordinates or colours."""
    vertices = pygltflib.ARRAY_BUFFER
    positions = to_gltf_axes(mesh.positions[0]).astype(np.float32)
    index_type = np.uint16 if len(positions) < 65535 else np.uint32
    attributes = pygltflib.Attributes(
        POSITION=document.array(positions, pygltflib.VEC3, vertices, bounds=True),
        NORMAL=document.array(to_gltf_axes(mesh.normals[0]).astype(np.float32), pygltflib.VEC3, vertices),
        _CONFIDENCE=document.array(mesh.confidence.astype(np.float32), pygltflib.SCALAR, vertices),
    )
    if sheet is None:
        colors = np.ones((len(mesh.colors), 4))
        colors[:, :3] = linear_from_srgb(mesh.colors)
        values = np.round(colors * 65535).astype(np.uint16)
        attributes.COLOR_0 = document.array(values, pygltflib.VEC4, vertices, normalized=True)
    else:
        attributes.TEXCOORD_0 = document.array(sheet.uv, pygltflib.VEC2, vertices)
    indices = mesh.faces.astype(index_type).ravel()
    return pygltflib.Primitive(
        attributes=attributes,
        indices=document.array(indices, pygltflib.SCALAR, pygltflib.ELEMENT_ARRAY_BUFFER),
        material=0,
    )


def _morphed(
    document: _Document,
    mesh: AnimatedMesh,
    primitive: pygltflib.Primitive,
    shape: pygltflib.Mesh,
    node: int,
    seconds: int,
) -> None:
    """Frames after the first as morph targets; at its time a frame's target is fully on and all others are off."""
    vertices, frames = pygltflib.ARRAY_BUFFER, mesh.num_frames
    positions, normals = (to_gltf_axes(values).astype(np.float32) for values in (mesh.positions, mesh.normals))
    primitive.targets = [
        pygltflib.Attributes(
            POSITION=document.array(positions[i] - positions[0], pygltflib.VEC3, vertices, bounds=True),
            NORMAL=document.array(normals[i] - normals[0], pygltflib.VEC3, vertices),
        )
        for i in range(1, frames)
    ]
    shape.weights = [0.0] * (frames - 1)
    shape.extras = {"targetNames": [f"frame_{i:04d}" for i in range(1, frames)]}
    document.animate(node, "weights", seconds, np.eye(frames)[:, 1:].ravel(), pygltflib.SCALAR)


def _skinned(
    document: _Document, mesh: AnimatedMesh, primitive: pygltflib.Primitive, name: str, skin: Skin, seconds: int
) -> pygltflib.Skin:
    """A tree of joints under one root node (node 0), each resting where its bone turns against its parent."""
    joints, weights = skin.joints.astype(np.uint8), skin.weights.astype(np.float32)
    primitive.attributes.JOINTS_0 = document.array(joints, pygltflib.VEC4, pygltflib.ARRAY_BUFFER)
    primitive.attributes.WEIGHTS_0 = document.array(weights, pygltflib.VEC4, pygltflib.ARRAY_BUFFER)
    tree = skeleton(skin, mesh.positions[0].astype(np.float64))
    armature = document.node(name=f"{name}_skeleton", children=[])
    document.node(name=name, mesh=0, skin=0)
    nodes = {-1: armature}
    for bone in tree.order:
        parent = int(tree.parents[bone])
        at = to_gltf_axes(tree.places[bone] - (tree.places[parent] if parent >= 0 else 0)).tolist()
        name_of = "root" if parent < 0 else f"bone_{bone:02d}"
        nodes[bone] = document.node(root=False, name=name_of, translation=at, rotation=[0.0, 0.0, 0.0, 1.0])
        above = document.nodes[nodes[parent]]
        above.children = [*(above.children or []), nodes[bone]]
        moved, turned = _against_parent(skin, tree, bone)
        document.animate(nodes[bone], "translation", seconds, to_gltf_axes(moved), pygltflib.VEC3)
        document.animate(nodes[bone], "rotation", seconds, _quaternions(turned), pygltflib.VEC4)
    inverse = np.tile(np.eye(4, dtype=np.float32), (skin.num_bones, 1, 1))
    inverse[:, 3, :3] = -to_gltf_axes(tree.places)  # stored column by column
    matrices = document.array(inverse.reshape(-1, 16), pygltflib.MAT4)
    bones = [nodes[bone] for bone in range(skin.num_bones)]
    return pygltflib.Skin(name=name, inverseBindMatrices=matrices, skeleton=armature, joints=bones)


def _against_parent(
    skin: Skin, tree: Skeleton, bone: int
) -> tuple[Float[np.ndarray, "t 3"], Float[np.ndarray, "t 3 3"]]:
    """A joint's place and turn at each frame in its parent's frame."""

    def placed(which: int) -> tuple[np.ndarray, np.ndarray]:
        turn = skin.rotations[:, which]
        return np.einsum("tij,j->ti", turn, tree.places[which]) + skin.offsets[:, which], turn

    place, turn = placed(bone)
    parent = int(tree.parents[bone])
    if parent < 0:
        return place, turn
    above, turned = placed(parent)
    return np.einsum("tji,tj->ti", turned, place - above), np.einsum("tji,tjk->tik", turned, turn)


def _quaternions(rotations: Float[np.ndarray, "t 3 3"]) -> Float[np.ndarray, "t 4"]:
    """(x, y, z, w) in glTF axes, each on the same side as the one before, so that they interpolate the short way."""
    axes = [1, 2, 0]
    quaternions = Rotation.from_matrix(rotations[:, axes][:, :, axes]).as_quat()
    for i in range(1, len(quaternions)):
        if quaternions[i] @ quaternions[i - 1] < 0:
            quaternions[i] *= -1
    return quaternions


def _material(name: str, textured: bool, flips: bool) -> pygltflib.Material:
    """Rough and white, so that what is seen is the texture or COLOR_0; Blender drops vertex colours of meshes without
    a material."""
    moved = {"KHR_texture_transform": {"offset": [0.0, 0.0], "scale": [1.0, 1.0]}} if flips else {}
    return pygltflib.Material(
        name=name,
        doubleSided=True,
        pbrMetallicRoughness=pygltflib.PbrMetallicRoughness(
            baseColorFactor=[1.0, 1.0, 1.0, 1.0],
            baseColorTexture=pygltflib.TextureInfo(index=0, extensions=moved) if textured else None,
            metallicFactor=0.0,
            roughnessFactor=1.0,
        ),
    )
