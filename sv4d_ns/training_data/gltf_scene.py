"""glTF 2.0 binaries as plain arrays, and their meshes posed at a moment of a clip: no Blender, no graphics library.

Every vertex is moved by bones, a bone being a node's matrix times an inverse bind matrix; a mesh without a skin hangs
on one bone, its node. So skins, rigid nodes and morph targets are one piece of arithmetic (glTF 2.0, section 3.7).
"""

import io
import struct
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pygltflib
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image, UnidentifiedImageError

from sv4d_ns.training_data.blender import AssetError
from sv4d_ns.utils.compiled import njit

LARGEST_FACES = 400_000
LARGEST_SKIN = 512
"""Joints. Our limits: beyond them an asset is a scan or a crowd, and a picture takes longer than all others."""
LARGEST_TEXTURE = 512
"""Pixels of a side; larger ones are halved until they fit: training pictures are smaller."""
MIP_LEVELS = 10
INFLUENCES = 4
"""Bones a vertex keeps, the strongest ones."""

COMPONENTS = {5120: np.int8, 5121: np.uint8, 5122: np.int16, 5123: np.uint16, 5125: np.uint32, 5126: np.float32}
WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT2": 4, "MAT3": 9, "MAT4": 16}
PATHS = {"translation": 0, "rotation": 1, "scale": 2, "weights": 3}
INTERPOLATIONS = {"STEP": 0, "LINEAR": 1, "CUBICSPLINE": 2}
CONVERTERS = {
    "KHR_draco_mesh_compression": "its meshes are Draco-compressed: unpack it with gltf-transform or Blender first",
    "EXT_meshopt_compression": "its meshes are meshopt-compressed: unpack it with gltf-transform or Blender first",
    "KHR_meshopt_compression": "its meshes are meshopt-compressed: unpack it with gltf-transform or Blender first",
}
KTX2 = "its textures are KTX2: turn them into PNG with 'gltf-transform ktxdecompress' first"
OPAQUE, MASK, BLEND = 0, 1, 2

Y_UP_TO_Z_UP = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
"""What Blender's importer does: glTF's front +z becomes -y."""


@dataclass(frozen=True)
class Scene:
    """A GLB as arrays: n vertices, f triangles, b bones, j nodes, m materials, x textures, k morph entries, s morph
    weights, a animation channels. Colours are linear light. Faces turn outward wherever a component shows which way
    that is."""

    positions: Float[np.ndarray, "n 3"]
    normals: Float[np.ndarray, "n 3"]
    uvs: Float[np.ndarray, "n 2"]
    colours: Float[np.ndarray, "n 4"]
    bones: Int[np.ndarray, "n 4"]
    weights: Float[np.ndarray, "n 4"]
    faces: Int[np.ndarray, "f 3"]
    face_materials: Int[np.ndarray, " f"]
    face_closed: Bool[np.ndarray, " f"]
    """Whether the face is of a component without holes."""
    face_components: Int[np.ndarray, " f"]
    """Number of the connected component."""
    material_factors: Float[np.ndarray, "m 4"]
    material_textures: Int[np.ndarray, " m"]
    """-1 without a texture."""
    material_modes: Int[np.ndarray, " m"]
    """OPAQUE, MASK or BLEND."""
    material_cutoffs: Float[np.ndarray, " m"]
    texels: UInt8[np.ndarray, " bytes"]
    """All levels of all textures, RGBA, sRGB."""
    texture_levels: Int[np.ndarray, "x levels 3"]
    """Offset into `texels`, height, width; levels beyond the last repeat it."""
    texture_clamps: Bool[np.ndarray, "x 2"]
    """Whether u and v are clamped instead of repeated."""
    bone_nodes: Int[np.ndarray, " b"]
    bone_binds: Float[np.ndarray, "b 4 4"]
    node_parents: Int[np.ndarray, " j"]
    """-1 for roots; parents come before their children in `node_order`."""
    node_order: Int[np.ndarray, " j"]
    node_fixed: Bool[np.ndarray, " j"]
    """Nodes that have a matrix and no translation, rotation, scale."""
    node_matrices: Float[np.ndarray, "j 4 4"]
    node_translations: Float[np.ndarray, "j 3"]
    node_rotations: Float[np.ndarray, "j 4"]
    node_scales: Float[np.ndarray, "j 3"]
    node_slots: Int[np.ndarray, "j 2"]
    """First morph weight of a node, and how many it has."""
    morph_weights: Float[np.ndarray, " s"]
    """As they are without animation."""
    morph_slots: Int[np.ndarray, " k"]
    morph_vertices: Int[np.ndarray, " k"]
    morph_positions: Float[np.ndarray, "k 3"]
    morph_normals: Float[np.ndarray, "k 3"]
    clip_names: np.ndarray
    clip_spans: Float[np.ndarray, "clips 2"]
    """First and last key time, seconds."""
    clip_channels: Int[np.ndarray, "clips 2"]
    """First channel and how many."""
    channels: Int[np.ndarray, "a 6"]
    """Node, path, interpolation, offset into `key_times`, number of keys, offset into `key_values`."""
    key_times: Float[np.ndarray, " keys"]
    key_values: Float[np.ndarray, " values"]

    @property
    def num_clips(self) -> int:
        return len(self.clip_names)

    @property
    def num_bytes(self) -> int:
        """Memory of the arrays."""
        return sum(getattr(self, field.name).nbytes for field in fields(self))

    def clip(self, wanted: int | str) -> int:
        """Number of a clip given by number or name.

        Raises:
            AssetError: there is none of that name or number.
        """
        names = [str(name) for name in self.clip_names]
        if isinstance(wanted, str) and wanted in names:
            return names.index(wanted)
        if not isinstance(wanted, str) and 0 <= wanted < len(names):
            return wanted
        raise AssetError(f"it has no clip {wanted!r} (it has {', '.join(names) or 'none'})")

    def save(self, path: Path) -> None:
        """Write the arrays as one .npz."""
        np.savez(path, **{field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def open(cls, path: Path) -> "Scene":
        """Read what `save` wrote.

        Raises:
            OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile: it is damaged.
        """
        with np.load(path, allow_pickle=False) as arrays:
            return cls(**{field.name: arrays[field.name] for field in fields(cls)})


def load_scene(path: Path) -> Scene:
    """Read a self-contained GLB.

    Raises:
        AssetError: it is damaged, empty, too large, or needs a decoder that is not here; the message says which.
    """
    try:
        document = pygltflib.GLTF2.load_binary(str(path))
    except struct.error as error:
        raise AssetError("it is no GLB, or is cut off") from error
    except Exception as error:  # the reader raises whatever a broken file leads it to
        raise AssetError(f"it cannot be read as a GLB ({type(error).__name__}: {error})") from error
    if document is None:
        raise AssetError("it cannot be read as a GLB")
    try:
        return _Reader(document).scene()
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise AssetError(f"it is damaged ({type(error).__name__}: {error})") from error


class _Reader:
    """Decodes one document."""

    def __init__(self, document: pygltflib.GLTF2):
        self.document = document
        for name in document.extensionsRequired or []:
            if name in CONVERTERS:
                raise AssetError(CONVERTERS[name])
        self.buffers = [self._buffer(index) for index in range(len(document.buffers))]

    def _buffer(self, index: int) -> bytes:
        uri = self.document.buffers[index].uri
        if uri is None:
            return self.document.binary_blob() or b""
        if not uri.startswith("data:"):
            raise AssetError(f"it is not self-contained: it needs the file {uri[:80]}")
        return bytes(self.document.get_data_from_buffer_uri(uri))

    def scene(self) -> Scene:
        nodes = self._nodes()
        instances = self._instances(nodes["shown"])
        self._check_size(instances)
        textures = self._textures()
        geometry = self._geometry(instances, nodes)
        clips = self._clips(geometry["node_slots"])
        del nodes["shown"]
        arrays = {**nodes, **geometry, **self._materials(textures), **textures, **clips}
        return Scene(**arrays)

    # ---- accessors

    def view(self, index: int, offset: int, count: int, dtype: np.dtype, width: int) -> np.ndarray:
        """Rows [count, width] of a buffer view."""
        view = self.document.bufferViews[index]
        start = (view.byteOffset or 0) + offset
        row = dtype.itemsize * width
        stride = view.byteStride or row
        data = self.buffers[view.buffer]
        if count and (start < 0 or start + stride * (count - 1) + row > len(data)):
            raise AssetError("it is damaged (an accessor reaches beyond its buffer)")
        return np.ndarray((count, width), dtype, data, start, (stride, dtype.itemsize)).copy()

    def accessor(self, index: int, as_float: bool = True) -> np.ndarray:
        """Values [count, width]; integers that are normalised become floats in [-1, 1]."""
        accessor = self.document.accessors[index]
        dtype, width = np.dtype(COMPONENTS[accessor.componentType]), WIDTHS[accessor.type]
        if accessor.bufferView is None:
            values = np.zeros((accessor.count, width), dtype)
        else:
            values = self.view(accessor.bufferView, accessor.byteOffset or 0, accessor.count, dtype, width)
        if accessor.sparse is not None:
            places, changes = accessor.sparse.indices, accessor.sparse.values
            rows = self.view(
                places.bufferView, places.byteOffset or 0, accessor.sparse.count,
                np.dtype(COMPONENTS[places.componentType]), 1,
            )[:, 0]  # fmt: skip
            values[rows] = self.view(changes.bufferView, changes.byteOffset or 0, accessor.sparse.count, dtype, width)
        if not as_float:
            return values
        floats = values.astype(np.float32)
        if accessor.normalized and dtype.kind in "iu":
            floats = np.maximum(floats / np.float32(np.iinfo(dtype.name).max), -1.0)
        if not np.isfinite(floats).all():
            raise AssetError("it has numbers that are not finite")
        return floats

    # ---- nodes

    def _nodes(self) -> dict[str, np.ndarray]:
        document = self.document
        count = len(document.nodes)
        if not count:
            raise AssetError("it has no nodes")
        parents = np.full(count, -1, np.int32)
        for index, node in enumerate(document.nodes):
            for child in node.children or []:
                parents[child] = index
        order = _parents_first(parents)
        roots = document.scenes[document.scene or 0].nodes if document.scenes else np.flatnonzero(parents < 0)
        shown = np.zeros(count, bool)
        shown[list(roots)] = True
        for index in order:
            shown[index] |= parents[index] >= 0 and shown[parents[index]]
        matrices = np.tile(np.eye(4), (count, 1, 1))
        translations, rotations, scales = np.zeros((count, 3)), np.zeros((count, 4)), np.ones((count, 3))
        rotations[:, 3] = 1.0
        fixed = np.zeros(count, bool)
        for index, node in enumerate(document.nodes):
            if node.matrix is not None:
                fixed[index] = True
                matrices[index] = np.array(node.matrix, dtype=np.float64).reshape(4, 4).T
            for target, value in ((translations, node.translation), (rotations, node.rotation), (scales, node.scale)):
                if value is not None:
                    target[index] = value
        for array in (matrices, translations, rotations, scales):
            if not np.isfinite(array).all():
                raise AssetError("it has numbers that are not finite")
        return {
            "shown": shown, "node_parents": parents, "node_order": order, "node_fixed": fixed,
            "node_matrices": matrices, "node_translations": translations, "node_rotations": rotations,
            "node_scales": scales,
        }  # fmt: skip

    def _instances(self, shown: np.ndarray) -> list[tuple[int, pygltflib.Mesh]]:
        nodes = self.document.nodes
        return [
            (index, self.document.meshes[node.mesh])
            for index, node in enumerate(nodes)
            if shown[index] and node.mesh is not None
        ]

    def _check_size(self, instances: list[tuple[int, pygltflib.Mesh]]) -> None:
        faces = 0
        for _, mesh in instances:
            for primitive in mesh.primitives:
                for name in primitive.extensions or {}:
                    if name in CONVERTERS:
                        raise AssetError(CONVERTERS[name])
                index = primitive.indices if primitive.indices is not None else primitive.attributes.POSITION
                if index is not None and (primitive.mode is None or primitive.mode >= 4):
                    corners = self.document.accessors[index].count
                    faces += corners // 3 if primitive.mode in (None, 4) else max(corners - 2, 0)
        if not faces:
            raise AssetError("it has no faces")
        if faces > LARGEST_FACES:
            raise AssetError(f"it has {faces} faces, more than {LARGEST_FACES}: simplify it first")
        for skin in self.document.skins or []:
            if len(skin.joints) > LARGEST_SKIN:
                raise AssetError(f"a skin of it has {len(skin.joints)} joints, more than {LARGEST_SKIN}")

    # ---- geometry

    def _geometry(self, instances: list[tuple[int, pygltflib.Mesh]], nodes: dict[str, np.ndarray]) -> dict[str, Any]:
        parts: list[dict[str, np.ndarray]] = []
        bone_nodes: list[int] = []
        bone_binds: list[np.ndarray] = []
        skins: dict[int, int] = {}
        slots = np.zeros((len(self.document.nodes), 2), np.int32)
        morph_weights: list[float] = []
        morphs: list[dict[str, np.ndarray]] = []
        vertices = 0
        for number, (node_index, mesh) in enumerate(instances):
            node = self.document.nodes[node_index]
            if node.skin is None:
                first_bone = len(bone_nodes)
                bone_nodes.append(node_index)
                bone_binds.append(np.eye(4))
            else:
                if node.skin not in skins:
                    skins[node.skin] = len(bone_nodes)
                    joints, binds = self._skin(node.skin)
                    bone_nodes += joints
                    bone_binds += list(binds)
                first_bone = skins[node.skin]
            targets = max((len(primitive.targets or []) for primitive in mesh.primitives), default=0)
            slots[node_index] = len(morph_weights), targets
            start = list(_get(node, "weights") or mesh.weights or [])[:targets]
            morph_weights += [float(value) for value in start] + [0.0] * (targets - len(start))
            for primitive in mesh.primitives:
                part = self._primitive(primitive)
                if part is None:
                    continue
                part["bones"] += first_bone
                if node.skin is None:
                    part["bones"][:], part["weights"][:] = first_bone, (1.0, 0.0, 0.0, 0.0)
                part["faces"] = part["faces"] + vertices
                part["instance"] = np.full(len(part["faces"]), number)
                for target, entry in enumerate(part.pop("morphs")):
                    entry["vertices"] = entry["vertices"] + vertices
                    entry["slots"] = np.full(len(entry["vertices"]), slots[node_index, 0] + target)
                    morphs.append(entry)
                vertices += len(part["positions"])
                parts.append(part)
        if not parts:
            raise AssetError("it has no faces")
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        if len(bone_nodes) and (joined["bones"].min() < 0 or joined["bones"].max() >= len(bone_nodes)):
            raise AssetError("it is damaged (a vertex names a joint that its skin does not have)")
        empty = {"vertices": np.zeros(0, int), "slots": np.zeros(0, int)}
        empty |= {"positions": np.zeros((0, 3)), "normals": np.zeros((0, 3))}
        joined_morphs = {name: np.concatenate([entry[name] for entry in [empty, *morphs]]) for name in empty}
        faces, closed, component = _components(joined["positions"], joined["faces"], joined.pop("instance"))
        return {
            "positions": joined["positions"].astype(np.float32),
            "normals": joined["normals"].astype(np.float32),
            "uvs": joined["uvs"].astype(np.float32),
            "colours": joined["colours"].astype(np.float32),
            "bones": joined["bones"].astype(np.int32),
            "weights": joined["weights"].astype(np.float32),
            "faces": faces.astype(np.int32),
            "face_materials": joined["materials"].astype(np.int32),
            "face_closed": closed,
            "face_components": component.astype(np.int32),
            "bone_nodes": np.array(bone_nodes, np.int32),
            "bone_binds": np.array(bone_binds, np.float64).reshape(-1, 4, 4),
            "node_slots": slots,
            "morph_weights": np.array(morph_weights, np.float64),
            "morph_slots": joined_morphs["slots"].astype(np.int32),
            "morph_vertices": joined_morphs["vertices"].astype(np.int32),
            "morph_positions": joined_morphs["positions"].astype(np.float32),
            "morph_normals": joined_morphs["normals"].astype(np.float32),
        }

    def _skin(self, index: int) -> tuple[list[int], np.ndarray]:
        skin = self.document.skins[index]
        count = len(skin.joints)
        if skin.inverseBindMatrices is None:
            return list(skin.joints), np.tile(np.eye(4), (count, 1, 1))
        binds = self.accessor(skin.inverseBindMatrices).reshape(-1, 4, 4).transpose(0, 2, 1)
        if len(binds) < count:
            raise AssetError("it is damaged (a skin has fewer inverse bind matrices than joints)")
        return list(skin.joints), binds[:count].astype(np.float64)

    def _primitive(self, primitive: pygltflib.Primitive) -> dict[str, Any] | None:
        attributes = primitive.attributes
        mode = 4 if primitive.mode is None else primitive.mode
        if attributes.POSITION is None or mode < 4:
            return None
        positions = self.accessor(attributes.POSITION)
        count = len(positions)
        if primitive.indices is None:
            corners = np.arange(count)
        else:
            corners = self.accessor(primitive.indices, as_float=False)[:, 0].astype(np.int64)
        if len(corners) and corners.max() >= count:
            raise AssetError("it is damaged (a face names a vertex that is not there)")
        faces = _triangles(corners, mode)
        if not len(faces):
            return None
        material = self.document.materials[primitive.material] if primitive.material is not None else None
        part: dict[str, Any] = {
            "positions": positions,
            "uvs": self._uvs(attributes, material, count),
            "colours": self._vertex_colours(attributes, count),
            "faces": faces,
            "materials": np.full(len(faces), 0 if primitive.material is None else primitive.material + 1),
            "morphs": [self._morph(target, count) for target in primitive.targets or []],
        }
        part["bones"], part["weights"] = self._influences(attributes, count)
        if attributes.NORMAL is not None:
            part["normals"] = self.accessor(attributes.NORMAL)
            return part
        return _flat(part)

    def _uvs(self, attributes: Any, material: Any, count: int) -> np.ndarray:
        info = _base_texture(material)
        number = _get(info, "texCoord") or 0
        transform = (_get(info, "extensions") or {}).get("KHR_texture_transform", {})
        number = transform.get("texCoord", number)
        index = getattr(attributes, f"TEXCOORD_{number}", None)
        if info is None or index is None:
            return np.zeros((count, 2), np.float32)
        uvs = self.accessor(index)
        if transform:
            turn = transform.get("rotation", 0.0)
            scaled = uvs * np.array(transform.get("scale", (1.0, 1.0)))
            turned = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
            uvs = scaled @ turned.T + np.array(transform.get("offset", (0.0, 0.0)))
        return uvs

    def _vertex_colours(self, attributes: Any, count: int) -> np.ndarray:
        colours = np.ones((count, 4), np.float32)
        if getattr(attributes, "COLOR_0", None) is not None:
            given = np.clip(self.accessor(attributes.COLOR_0), 0.0, 1.0)
            colours[:, : given.shape[1]] = given
        return colours

    def _influences(self, attributes: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
        joints, weights = [], []
        for number in range(4):
            joint, weight = (getattr(attributes, f"{name}_{number}", None) for name in ("JOINTS", "WEIGHTS"))
            if joint is None or weight is None:
                break
            joints.append(self.accessor(joint, as_float=False).astype(np.int64))
            weights.append(self.accessor(weight))
        if not joints:
            return np.zeros((count, INFLUENCES), np.int64), np.tile([1.0, 0.0, 0.0, 0.0], (count, 1))
        bones, shares = np.concatenate(joints, axis=1), np.maximum(np.concatenate(weights, axis=1), 0.0)
        strongest = np.argsort(-shares, axis=1, kind="stable")[:, :INFLUENCES]
        bones, shares = np.take_along_axis(bones, strongest, 1), np.take_along_axis(shares, strongest, 1)
        total = shares.sum(axis=1, keepdims=True)
        shares = np.where(total > 0, shares / np.maximum(total, 1e-12), [1.0, 0.0, 0.0, 0.0])
        return np.where(shares > 0, bones, bones[:, :1]), shares

    def _morph(self, target: Any, count: int) -> dict[str, np.ndarray]:
        moved = np.zeros((count, 3), np.float32)
        turned = np.zeros((count, 3), np.float32)
        if _get(target, "POSITION") is not None:
            moved = self.accessor(_get(target, "POSITION"))
        if _get(target, "NORMAL") is not None:
            turned = self.accessor(_get(target, "NORMAL"))
        kept = np.flatnonzero((moved != 0).any(axis=1) | (turned != 0).any(axis=1))
        return {"vertices": kept, "positions": moved[kept], "normals": turned[kept]}

    # ---- materials and textures; row 0 is glTF's default material

    def _materials(self, textures: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        materials = self.document.materials or []
        factors = np.ones((len(materials) + 1, 4))
        used = np.full(len(materials) + 1, -1, np.int32)
        modes = np.zeros(len(materials) + 1, np.int32)
        cutoffs = np.full(len(materials) + 1, 0.5)
        for index, material in enumerate(materials, start=1):
            glossy = (material.extensions or {}).get("KHR_materials_pbrSpecularGlossiness")
            metallic = material.pbrMetallicRoughness
            if glossy is not None:
                factors[index] = glossy.get("diffuseFactor", (1.0, 1.0, 1.0, 1.0))
            elif metallic is not None and metallic.baseColorFactor is not None:
                factors[index] = metallic.baseColorFactor
            info = _base_texture(material)
            if info is not None:
                used[index] = self._texture_row(_get(info, "index"))
            modes[index] = {"MASK": MASK, "BLEND": BLEND}.get(material.alphaMode or "OPAQUE", OPAQUE)
            if material.alphaCutoff is not None:
                cutoffs[index] = material.alphaCutoff
        if not (np.isfinite(factors).all() and np.isfinite(cutoffs).all()):
            raise AssetError("it has numbers that are not finite")
        return {
            "material_factors": np.clip(factors, 0.0, 1.0), "material_textures": used, "material_modes": modes,
            "material_cutoffs": cutoffs,
        }  # fmt: skip

    def _wanted_textures(self) -> list[int]:
        infos = [_base_texture(material) for material in self.document.materials or []]
        return sorted({_get(info, "index") for info in infos if info is not None})

    def _texture_row(self, index: int) -> int:
        return self._wanted_textures().index(index)

    def _textures(self) -> dict[str, np.ndarray]:
        rows, clamps, blocks, offset = [], [], [], 0
        for index in self._wanted_textures():
            texture = self.document.textures[index]
            levels = _mipmaps(self._image(texture))
            row = []
            for level in levels:
                row.append((offset, *level.shape[:2]))
                blocks.append(level.reshape(-1))
                offset += level.size
            rows.append(row + [row[-1]] * (MIP_LEVELS - len(row)))
            sampler = self.document.samplers[texture.sampler] if texture.sampler is not None else None
            clamps.append([getattr(sampler, name, None) == 33071 for name in ("wrapS", "wrapT")])
        return {
            "texels": np.concatenate(blocks) if blocks else np.zeros(4, np.uint8),
            "texture_levels": np.array(rows, np.int64).reshape(-1, MIP_LEVELS, 3),
            "texture_clamps": np.array(clamps, bool).reshape(-1, 2),
        }

    def _image(self, texture: pygltflib.Texture) -> Image.Image:
        source = texture.source
        extensions = texture.extensions or {}
        if source is None and "EXT_texture_webp" in extensions:
            source = extensions["EXT_texture_webp"]["source"]
        if source is None:
            raise AssetError(KTX2 if "KHR_texture_basisu" in extensions else "a texture of it has no picture")
        image = self.document.images[source]
        if image.mimeType == "image/ktx2":
            raise AssetError(KTX2)
        if image.bufferView is not None:
            view = self.document.bufferViews[image.bufferView]
            start = view.byteOffset or 0
            data = self.buffers[view.buffer][start : start + view.byteLength]
        elif image.uri is not None and image.uri.startswith("data:"):
            data = bytes(self.document.get_data_from_buffer_uri(image.uri))
        else:
            raise AssetError(f"it is not self-contained: it needs the file {(image.uri or '')[:80]}")
        try:
            with Image.open(io.BytesIO(data)) as opened:
                return opened.convert("RGBA")
        except UnidentifiedImageError as error:
            raise AssetError("a picture of it is damaged, or cut off with the end of the file") from error
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise AssetError(f"a picture of it cannot be read ({error})") from error

    # ---- clips

    def _clips(self, slots: np.ndarray) -> dict[str, np.ndarray]:
        names: list[str] = []
        spans: list[tuple[float, float]] = []
        ranges: list[tuple[int, int]] = []
        channels: list[tuple[int, ...]] = []
        times: list[np.ndarray] = []
        values: list[np.ndarray] = []
        keys, numbers = 0, 0
        for number, animation in enumerate(self.document.animations or []):
            first, low, high = len(channels), np.inf, -np.inf
            for channel in animation.channels:
                node, path = channel.target.node, channel.target.path
                width = {"translation": 3, "rotation": 4, "scale": 3}.get(path)
                if node is not None and path == "weights":
                    width = int(slots[node, 1])
                if node is None or not width:
                    continue
                sampler = animation.samplers[channel.sampler]
                moments, data = self.accessor(sampler.input)[:, 0], self.accessor(sampler.output).reshape(-1)
                kind = INTERPOLATIONS[sampler.interpolation or "LINEAR"]
                if not len(moments) or len(data) != width * len(moments) * (3 if kind == 2 else 1):
                    raise AssetError("it is damaged (an animation has another number of values than of key times)")
                channels.append((node, PATHS[path], kind, keys, len(moments), numbers))
                times.append(np.maximum.accumulate(moments))
                values.append(data)
                keys, numbers = keys + len(moments), numbers + len(data)
                low, high = min(low, float(moments.min())), max(high, float(moments.max()))
            if len(channels) > first:
                names.append(animation.name or f"clip{number}")
                spans.append((low, high))
                ranges.append((first, len(channels) - first))
        return {
            "clip_names": np.array(names, dtype=str) if names else np.zeros(0, "<U1"),
            "clip_spans": np.array(spans, np.float64).reshape(-1, 2),
            "clip_channels": np.array(ranges, np.int32).reshape(-1, 2),
            "channels": np.array(channels, np.int64).reshape(-1, 6),
            "key_times": np.concatenate([np.zeros(0), *times]),
            "key_values": np.concatenate([np.zeros(0), *values]).astype(np.float32),
        }


def _get(entry: Any, name: str) -> Any:
    """A field of what pygltflib left as an object or as a dictionary."""
    if entry is None:
        return None
    return entry.get(name) if isinstance(entry, dict) else getattr(entry, name, None)


def _base_texture(material: Any) -> Any:
    """The texture reference of a material's base colour, or None."""
    if material is None:
        return None
    glossy = (material.extensions or {}).get("KHR_materials_pbrSpecularGlossiness")
    if glossy is not None:
        return glossy.get("diffuseTexture")
    return None if material.pbrMetallicRoughness is None else material.pbrMetallicRoughness.baseColorTexture


def _parents_first(parents: np.ndarray) -> np.ndarray:
    """Nodes in an order in which every parent comes before its children."""
    depth = np.zeros(len(parents), np.int32)
    for index in range(len(parents)):
        at, steps = index, 0
        while parents[at] >= 0:
            at, steps = parents[at], steps + 1
            if steps > len(parents):
                raise AssetError("it is damaged (a node is its own ancestor)")
        depth[index] = steps
    return np.argsort(depth, kind="stable").astype(np.int32)


def _triangles(corners: np.ndarray, mode: int) -> np.ndarray:
    """Corner indices of a triangle list (4), strip (5) or fan (6) as triangles without doubled corners."""
    if mode == 4:
        faces = corners[: len(corners) // 3 * 3].reshape(-1, 3)
    elif len(corners) < 3:
        faces = np.zeros((0, 3), np.int64)
    elif mode == 5:
        faces = np.stack([corners[:-2], corners[1:-1], corners[2:]], axis=1)
        faces[1::2] = faces[1::2, [1, 0, 2]]
    else:
        faces = np.stack([np.full(len(corners) - 2, corners[0]), corners[1:-1], corners[2:]], axis=1)
    doubled = (faces[:, 0] == faces[:, 1]) | (faces[:, 1] == faces[:, 2]) | (faces[:, 2] == faces[:, 0])
    return faces[~doubled]


def _flat(part: dict[str, Any]) -> dict[str, Any]:
    """A part without normals: every face gets its own corners and its own normal, as glTF asks."""
    corners = part["faces"].reshape(-1)
    for name in ("positions", "uvs", "colours", "bones", "weights"):
        part[name] = part[name][corners]
    for entry in part["morphs"]:
        rows = np.full(corners.max() + 1, -1)
        kept = entry["vertices"] < len(rows)
        rows[entry["vertices"][kept]] = np.flatnonzero(kept)
        found = rows[corners]
        entry["vertices"] = np.flatnonzero(found >= 0)
        found = found[found >= 0]
        entry["positions"], entry["normals"] = entry["positions"][found], entry["normals"][found]
    part["faces"] = np.arange(len(corners)).reshape(-1, 3)
    a, b, c = (part["positions"][k::3] for k in range(3))
    part["normals"] = np.repeat(np.cross(b - a, c - a), 3, axis=0)
    return part


def _mipmaps(image: Image.Image) -> list[np.ndarray]:
    """The picture and its halvings, RGBA uint8; colour is weighted by alpha so that cut-outs do not bleed."""
    while max(image.size) > LARGEST_TEXTURE:
        image = image.resize((max(image.width // 2, 1), max(image.height // 2, 1)), Image.Resampling.BOX)
    levels = [np.asarray(image)]
    while max(levels[-1].shape[:2]) > 1 and len(levels) < MIP_LEVELS:
        height, width = (max(side // 2, 1) for side in levels[-1].shape[:2])
        levels.append(np.asarray(Image.fromarray(levels[-1]).resize((width, height), Image.Resampling.BOX)))
    return levels


INVERTED = 0.01
"""Volume over area to the power 3/2 (a ball has 0.094) from which an open component counts as inside out."""


def _components(
    positions: np.ndarray, faces: np.ndarray, instance: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(faces turned outward, whether closed, number of component), by connected component of welded corners.

    A component is closed where every edge is used as often one way as the other, so that winding numbers are whole.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    # corners of different instances stay apart: they move apart
    owner = np.zeros(len(positions), np.int64)
    owner[faces] = instance[:, None]
    grain = max(float(np.ptp(positions, axis=0).max()), 1e-9) * 1e-6
    keys = np.concatenate([np.round(positions / grain).astype(np.int64), owner[:, None]], axis=1)
    _, welded = np.unique(keys, axis=0, return_inverse=True)
    corners = welded.reshape(-1)[faces]
    count = int(corners.max()) + 1
    edges = np.concatenate([corners[:, [0, 1]], corners[:, [1, 2]], corners[:, [2, 0]]])
    graph = coo_matrix((np.ones(len(edges), np.int8), (edges[:, 0], edges[:, 1])), shape=(count, count))
    number, labels = connected_components(graph, directed=False)
    component = labels[corners[:, 0]]
    low, high = edges.min(axis=1), edges.max(axis=1)
    _, edge = np.unique(low * np.int64(count) + high, return_inverse=True)
    balance = np.bincount(edge.reshape(-1), np.where(edges[:, 0] == low, 1.0, -1.0))
    holes = np.bincount(np.tile(component, 3), np.abs(balance[edge.reshape(-1)]), number)
    a, b, c = (positions[faces[:, k]].astype(np.float64) for k in range(3))
    centres = np.stack([np.bincount(component, a[:, k], number) for k in range(3)], axis=1)
    centres = (centres / np.maximum(np.bincount(component, minlength=number), 1)[:, None])[component]
    normal = np.cross(b - a, c - a)
    volumes = np.bincount(component, np.einsum("fk,fk->f", a - centres, normal) / 6.0, number)
    areas = np.bincount(component, np.linalg.norm(normal, axis=1) / 2.0, number)
    closed = holes == 0
    # a sheet has no volume to speak of and keeps its side
    inverted = np.where(closed, volumes < 0, volumes < -INVERTED * areas**1.5)
    faces = np.where(inverted[component][:, None], faces[:, [0, 2, 1]], faces)
    return faces, closed[component], component


@dataclass(frozen=True)
class PosedMesh:
    """A scene's mesh at a moment, z up, normalised: the object is inside the unit of the cameras' page."""

    scene: Scene
    positions: Float[np.ndarray, "n 3"]
    normals: Float[np.ndarray, "n 3"]
    """Unit length."""
    face_signs: Float[np.ndarray, " f"]
    """-1 where a mirrored bone turns the face inside out."""


@dataclass(frozen=True)
class Placement:
    """x -> scale * (rotation x - centre), from the asset's z-up space into the world of the cameras."""

    rotation: Float[np.ndarray, "3 3"]
    """May stretch as well; normals are then turned with it like points, and are off by some degrees."""
    centre: Float[np.ndarray, "3"]
    scale: float


def yaw_rotation(yaw_deg: float) -> Float[np.ndarray, "3 3"]:
    """Turn about z, counter-clockwise seen from above."""
    c, s = np.cos(np.deg2rad(yaw_deg)), np.sin(np.deg2rad(yaw_deg))
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def bone_matrices(scene: Scene, clip: int | None, time: float) -> tuple[np.ndarray, np.ndarray]:
    """(bones [b, 4, 4], morph weights [s]) at a time (seconds) of a clip; the rest pose where `clip` is None."""
    first, count = (0, 0) if clip is None else scene.clip_channels[clip]
    return _bones(
        scene.node_parents, scene.node_order, scene.node_fixed, scene.node_matrices, scene.node_translations,
        scene.node_rotations, scene.node_scales, scene.node_slots, scene.morph_weights, scene.bone_nodes,
        scene.bone_binds, scene.channels[first : first + count], scene.key_times, scene.key_values, float(time),
    )  # fmt: skip


def pose(scene: Scene, clip: int | None, time: float, placement: Placement | None = None) -> PosedMesh:
    """The mesh at a time (seconds) of a clip, in the asset's own z-up units or placed in the world.

    Raises:
        AssetError: a vertex is nowhere (NaN or infinite).
    """
    bones, weights = bone_matrices(scene, clip, time)
    turn = Y_UP_TO_Z_UP if placement is None else placement.rotation @ Y_UP_TO_Z_UP
    scale = 1.0 if placement is None else placement.scale
    shift = np.zeros(3) if placement is None else -scale * placement.centre
    world = np.eye(4)
    world[:3, :3], world[:3, 3] = scale * turn, shift
    moved = np.ascontiguousarray(world @ bones)
    positions, normals = _skinned(
        scene.positions, scene.normals, scene.bones, scene.weights, moved, weights, scene.morph_slots,
        scene.morph_vertices, scene.morph_positions, scene.morph_normals,
    )  # fmt: skip
    if not np.isfinite(positions).all():
        raise AssetError("a vertex of it is at no finite place")
    signs = np.sign(np.linalg.det(moved[:, :3, :3]))
    signs[signs == 0] = 1.0
    return PosedMesh(scene, positions, normals, signs[scene.bones[scene.faces[:, 0], 0]])


@njit(cache=True, nogil=True)
def _sample(kind, times, values, moment, width, out):  # type: ignore[no-untyped-def]
    """Interpolate a channel at a moment into out[:width]: steps, lines or cubic splines (glTF 2.0, appendix C)."""
    count = times.shape[0]
    after = np.searchsorted(times, moment, side="right")
    cubic = 3 if kind == 2 else 1
    middle = width if kind == 2 else 0
    if after == 0 or after == count or kind == 0:
        row = min(max(after - 1, 0), count - 1)
        for k in range(width):
            out[k] = values[row * width * cubic + middle + k]
        return
    span = times[after] - times[after - 1]
    t = (moment - times[after - 1]) / span if span > 0.0 else 0.0
    left, right = (after - 1) * width * cubic, after * width * cubic
    if kind == 2:
        t2, t3 = t * t, t * t * t
        for k in range(width):
            out[k] = (
                (2.0 * t3 - 3.0 * t2 + 1.0) * values[left + width + k]
                + span * (t3 - 2.0 * t2 + t) * values[left + 2 * width + k]
                + (-2.0 * t3 + 3.0 * t2) * values[right + width + k]
                + span * (t3 - t2) * values[right + k]
            )
        return
    for k in range(width):
        out[k] = values[left + k] + t * (values[right + k] - values[left + k])


@njit(cache=True, nogil=True)
def _slerp(times, values, moment, out):  # type: ignore[no-untyped-def]
    """Spherical interpolation of quaternions (glTF 2.0, appendix C.4)."""
    count = times.shape[0]
    after = np.searchsorted(times, moment, side="right")
    if after == 0 or after == count:
        row = min(max(after - 1, 0), count - 1)
        for k in range(4):
            out[k] = values[row * 4 + k]
        return
    span = times[after] - times[after - 1]
    t = (moment - times[after - 1]) / span if span > 0.0 else 0.0
    left, right = (after - 1) * 4, after * 4
    dot = 0.0
    for k in range(4):
        dot += values[left + k] * values[right + k]
    sign = 1.0 if dot >= 0.0 else -1.0
    angle = np.arccos(min(abs(dot), 1.0))
    if angle < 1e-4:
        a, b = 1.0 - t, t * sign
    else:
        a, b = np.sin((1.0 - t) * angle) / np.sin(angle), sign * np.sin(t * angle) / np.sin(angle)
    for k in range(4):
        out[k] = a * values[left + k] + b * values[right + k]


@njit(cache=True, nogil=True)
def _bones(  # type: ignore[no-untyped-def]
    parents, order, fixed, matrices, translations, rotations, scales, slots, rest_weights, bone_nodes, binds, channels,
    key_times, key_values, moment,
):  # fmt: skip
    translations, rotations, scales = translations.copy(), rotations.copy(), scales.copy()
    weights = rest_weights.copy()
    moving = fixed.copy()
    moving[:] = False
    for row in range(channels.shape[0]):
        node, path, kind, first, count, offset = channels[row]
        times, values = key_times[first : first + count], key_values[offset:]
        moving[node] = True
        if path == 0:
            _sample(kind, times, values, moment, 3, translations[node])
        elif path == 1 and kind == 1:
            _slerp(times, values, moment, rotations[node])
        elif path == 1:
            _sample(kind, times, values, moment, 4, rotations[node])
        elif path == 2:
            _sample(kind, times, values, moment, 3, scales[node])
        elif slots[node, 1] > 0:
            _sample(kind, times, values, moment, slots[node, 1], weights[slots[node, 0] :])
    world = np.zeros((parents.shape[0], 4, 4))
    local = np.zeros((4, 4))
    for node in order:
        if fixed[node] and not moving[node]:
            local[:] = matrices[node]
        else:
            x, y, z, w = rotations[node]
            length = np.sqrt(x * x + y * y + z * z + w * w)
            if length > 1e-12:
                x, y, z, w = x / length, y / length, z / length, w / length
            else:
                x, y, z, w = 0.0, 0.0, 0.0, 1.0
            local[:] = 0.0
            local[0, 0], local[0, 1], local[0, 2] = 1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)
            local[1, 0], local[1, 1], local[1, 2] = 2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)
            local[2, 0], local[2, 1], local[2, 2] = 2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)
            for i in range(3):
                for k in range(3):
                    local[i, k] *= scales[node, k]
                local[i, 3] = translations[node, i]
            local[3, 3] = 1.0
        if parents[node] < 0:
            world[node] = local
        else:
            for i in range(4):
                for k in range(4):
                    value = 0.0
                    for j in range(4):
                        value += world[parents[node], i, j] * local[j, k]
                    world[node, i, k] = value
    bones = np.zeros((bone_nodes.shape[0], 4, 4))
    for bone in range(bone_nodes.shape[0]):
        for i in range(4):
            for k in range(4):
                value = 0.0
                for j in range(4):
                    value += world[bone_nodes[bone], i, j] * binds[bone, j, k]
                bones[bone, i, k] = value
    return bones, weights


@njit(cache=True, nogil=True, fastmath={"contract", "arcp", "nsz"})
def _skinned(  # type: ignore[no-untyped-def]
    rest, rest_normals, bones, shares, matrices, weights, morph_slots, morph_vertices, morph_positions, morph_normals
):
    count = rest.shape[0]
    local, local_normals = rest.astype(np.float64), rest_normals.astype(np.float64)
    for entry in range(morph_slots.shape[0]):
        weight = weights[morph_slots[entry]]
        if weight != 0.0:
            vertex = morph_vertices[entry]
            for k in range(3):
                local[vertex, k] += weight * morph_positions[entry, k]
                local_normals[vertex, k] += weight * morph_normals[entry, k]
    positions, normals = np.empty((count, 3)), np.empty((count, 3))
    m = np.empty((3, 4))
    for vertex in range(count):
        m[:] = 0.0
        for influence in range(bones.shape[1]):
            share = shares[vertex, influence]
            if share > 0.0:
                bone = bones[vertex, influence]
                for i in range(3):
                    for k in range(4):
                        m[i, k] += share * matrices[bone, i, k]
        x, y, z = local[vertex]
        for i in range(3):
            positions[vertex, i] = m[i, 0] * x + m[i, 1] * y + m[i, 2] * z + m[i, 3]
        # cofactors turn normals as the surface turns, also under uneven scales
        x, y, z = local_normals[vertex]
        c00, c01 = m[1, 1] * m[2, 2] - m[1, 2] * m[2, 1], m[1, 2] * m[2, 0] - m[1, 0] * m[2, 2]
        c02 = m[1, 0] * m[2, 1] - m[1, 1] * m[2, 0]
        sign = 1.0 if m[0, 0] * c00 + m[0, 1] * c01 + m[0, 2] * c02 >= 0.0 else -1.0
        nx = c00 * x + c01 * y + c02 * z
        ny = (
            (m[0, 2] * m[2, 1] - m[0, 1] * m[2, 2]) * x
            + (m[0, 0] * m[2, 2] - m[0, 2] * m[2, 0]) * y
            + (m[0, 1] * m[2, 0] - m[0, 0] * m[2, 1]) * z
        )
        nz = (
            (m[0, 1] * m[1, 2] - m[0, 2] * m[1, 1]) * x
            + (m[0, 2] * m[1, 0] - m[0, 0] * m[1, 2]) * y
            + (m[0, 0] * m[1, 1] - m[0, 1] * m[1, 0]) * z
        )
        length = np.sqrt(nx * nx + ny * ny + nz * nz)
        scale = sign / length if length > 1e-30 else 0.0
        normals[vertex, 0], normals[vertex, 1], normals[vertex, 2] = nx * scale, ny * scale, nz * scale
    return positions, normals
