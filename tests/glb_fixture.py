"""Small GLBs for tests, put together accessor by accessor."""

import io

import numpy as np
import pygltflib
from PIL import Image

KINDS = {(): "SCALAR", (2,): "VEC2", (3,): "VEC3", (4,): "VEC4", (16,): "MAT4"}
TYPES = {"float32": 5126, "uint8": 5121, "uint16": 5123, "uint32": 5125}

BOX_FACES = np.array(
    [[0, 2, 1], [0, 3, 2], [4, 5, 6], [4, 6, 7], [0, 1, 5], [0, 5, 4], [1, 2, 6], [1, 6, 5], [2, 3, 7], [2, 7, 6],
     [3, 0, 4], [3, 4, 7]]
)  # fmt: skip


def box(half=(1.0, 1.0, 1.0), centre=(0.0, 0.0, 0.0)):
    """Corners and outward faces of a box."""
    signs = np.array(
        [[-1, -1, -1], [1, -1, -1], [1, 1, -1], [-1, 1, -1], [-1, -1, 1], [1, -1, 1], [1, 1, 1], [-1, 1, 1]]
    )
    return signs * np.array(half) + np.array(centre), BOX_FACES


class Glb:
    """A document that grows."""

    def __init__(self):
        self.document = pygltflib.GLTF2(scene=0, scenes=[pygltflib.Scene(nodes=[])], asset=pygltflib.Asset())
        self.data = bytearray()

    def raw(self, content):
        self.data.extend(b"\0" * (-len(self.data) % 4))
        view = pygltflib.BufferView(buffer=0, byteOffset=len(self.data), byteLength=len(content))
        self.document.bufferViews.append(view)
        self.data.extend(content)
        return len(self.document.bufferViews) - 1

    def array(self, values, dtype="float32", **more):
        values = np.ascontiguousarray(values, dtype=dtype)
        self.document.accessors.append(
            pygltflib.Accessor(
                bufferView=self.raw(values.tobytes()), componentType=TYPES[dtype], count=len(values),
                type=KINDS[values.shape[1:]], **more,
            )
        )  # fmt: skip
        return len(self.document.accessors) - 1

    def texture(self, pixels):
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(buffer, format="PNG")
        self.document.images.append(pygltflib.Image(bufferView=self.raw(buffer.getvalue()), mimeType="image/png"))
        self.document.textures.append(pygltflib.Texture(source=len(self.document.images) - 1))
        return len(self.document.textures) - 1

    def material(self, colour=(1.0, 1.0, 1.0, 1.0), texture=None, **more):
        info = None if texture is None else pygltflib.TextureInfo(index=texture)
        metallic = pygltflib.PbrMetallicRoughness(baseColorFactor=list(colour), baseColorTexture=info)
        self.document.materials.append(pygltflib.Material(pbrMetallicRoughness=metallic, **more))
        return len(self.document.materials) - 1

    def primitive(self, positions, faces, material=None, targets=(), mode=4, **attributes):
        kinds = {"JOINTS_0": "uint8"}
        names = {name: self.array(values, kinds.get(name, "float32")) for name, values in attributes.items()}
        return pygltflib.Primitive(
            attributes=pygltflib.Attributes(POSITION=self.array(positions), **names),
            indices=self.array(np.asarray(faces).reshape(-1), "uint32"), material=material, mode=mode,
            targets=[{"POSITION": self.array(target)} for target in targets],
        )  # fmt: skip

    def mesh(self, *primitives, weights=None):
        self.document.meshes.append(pygltflib.Mesh(primitives=list(primitives), weights=weights or []))
        return len(self.document.meshes) - 1

    def node(self, root=True, **values):
        self.document.nodes.append(pygltflib.Node(**values))
        if root:
            self.document.scenes[0].nodes.append(len(self.document.nodes) - 1)
        return len(self.document.nodes) - 1

    def clip(self, name, *channels):
        """Channels are (node, path, interpolation, key times, values [keys, ...] or [3 keys, ...])."""
        animation = pygltflib.Animation(name=name, channels=[], samplers=[])
        for node, path, interpolation, times, values in channels:
            sampler = pygltflib.AnimationSampler(
                input=self.array(np.asarray(times, float)), output=self.array(values), interpolation=interpolation
            )
            animation.samplers.append(sampler)
            target = pygltflib.AnimationChannelTarget(node=node, path=path)
            animation.channels.append(pygltflib.AnimationChannel(sampler=len(animation.samplers) - 1, target=target))
        self.document.animations.append(animation)

    def save(self, path):
        self.document.buffers = [pygltflib.Buffer(byteLength=len(self.data))]
        self.document.set_binary_blob(bytes(self.data))
        self.document.save_binary(str(path))
        return path


def solid(path, *bodies, colour=(1.0, 1.0, 1.0, 1.0), **more):
    """A still GLB of (positions, faces) bodies, one mesh each."""
    glb = Glb()
    material = glb.material(colour, **more)
    for positions, faces in bodies:
        glb.node(mesh=glb.mesh(glb.primitive(positions, faces, material)))
    return glb.save(path)


def waving(path, clips=("wave", "bow")):
    """Two boxes; one turns or moves in each clip."""
    glb = Glb()
    red, blue = glb.material((0.8, 0.1, 0.1, 1.0)), glb.material((0.1, 0.1, 0.8, 1.0))
    glb.node(mesh=glb.mesh(glb.primitive(*box((0.3, 0.8, 0.3)), red)))
    arm = glb.node(mesh=glb.mesh(glb.primitive(*box((0.5, 0.1, 0.1), (0.5, 0.0, 0.0)), blue)))
    half = np.sqrt(0.5)
    for number, name in enumerate(clips):
        turned = (
            [[0, 0, 0, 1], [0, 0, half, half], [0, 0, 0, 1]] if number % 2 == 0 else [[0, 0, 0, 1], [0, half, 0, half]]
        )
        glb.clip(name, (arm, "rotation", "LINEAR", np.linspace(0, 1, len(turned)), turned))
    return glb.save(path)
