"""Does Blender play the exported file? Imports it with bpy, checks the animation and the colours, renders frames.

Blender is no dependency of this package; run the script with a Python that has it:

    python -m venv venv-bpy && venv-bpy/bin/pip install bpy
    venv-bpy/bin/python benchmarks/blender_check.py OUT/mesh.glb --frames 21 --fps 10 --out blender [--reference FOLDER]

Reads .glb (morph targets or skin), .usdc and .usdz. With --reference, a folder of pictures frame_0000.png, ... at the
input camera on white (`benchmarks/export_fidelity.py --frames FOLDER` writes them), the renders are compared with
them. Exit code 0 when every check holds; each check prints a line.
"""

import argparse
import json
import math
import struct
import sys
from pathlib import Path

import bpy
import numpy as np

ALIKE = 24.0
"""PSNR in dB from which a render counts as the same picture (samplers, shading and edges differ a little)."""

failures: list[str] = []


def check(holds: bool, sentence: str) -> None:
    """Print one result and remember a failure."""
    print(("ok    " if holds else "FAIL  ") + sentence, flush=True)
    if not holds:
        failures.append(sentence)


def imported(path: Path, fps: float) -> bpy.types.Object:
    """The single mesh object of the file in an otherwise empty scene that runs at `fps`."""
    bpy.ops.wm.read_factory_settings(use_empty=True)
    # the importer turns seconds into frames of the scene, so the rate must be set before
    render = bpy.context.scene.render
    render.fps, render.fps_base = math.ceil(fps), math.ceil(fps) / fps
    if path.suffix == ".glb":
        bpy.ops.import_scene.gltf(filepath=str(path))
    else:
        bpy.ops.wm.usd_import(filepath=str(path), set_frame_range=False)
    # the glTF importer draws a skeleton's bones with a mesh of its own
    shapes = {bone.custom_shape for item in bpy.data.objects if item.pose for bone in item.pose.bones}
    meshes = [item for item in bpy.data.objects if item.type == "MESH" and item not in shapes]
    check(len(meshes) == 1, f"one mesh object ({len(meshes)})")
    return meshes[0]


def evaluated(item: bpy.types.Object, frame: int) -> np.ndarray:
    """Vertex positions [n, 3] in Blender's world at a frame."""
    bpy.context.scene.frame_set(frame)
    posed = item.evaluated_get(bpy.context.evaluated_depsgraph_get())
    mesh = posed.to_mesh()
    flat = np.empty(len(mesh.vertices) * 3, dtype=np.float32)
    mesh.vertices.foreach_get("co", flat)
    matrix = np.array(posed.matrix_world)
    return flat.reshape(-1, 3) @ matrix[:3, :3].T + matrix[:3, 3]


def check_animation(item: bpy.types.Object, frames: int) -> None:
    skeleton = next((m.object for m in item.modifiers if m.type == "ARMATURE"), None)
    cache = next((m for m in item.modifiers if m.type == "MESH_SEQUENCE_CACHE"), None)
    keys = item.data.shape_keys
    if cache is None:
        if skeleton is None:
            blocks = len(keys.key_blocks) if keys else 0
            check(blocks == frames, f"{frames} shape keys with the basis ({blocks})")
        else:
            groups = max(len([g for g in vertex.groups if g.weight > 0]) for vertex in item.data.vertices)
            check(groups <= 4, f"{len(skeleton.data.bones)} bones, at most 4 for a vertex ({groups})")
        animated = skeleton if skeleton is not None else keys
        action = animated.animation_data.action if animated and animated.animation_data else None
        check(action is not None, "an action drives it")
        if action is not None:
            first, last = action.frame_range
            check(abs(last - first - (frames - 1)) < 1e-3, f"the action spans all frames ({first:g} to {last:g})")
    motion = np.stack([evaluated(item, frame) for frame in range(frames)])
    steps = np.abs(np.diff(motion, axis=0)).max(axis=(1, 2))
    still = int((steps < 1e-6).sum())  # a held frame in the video is no fault
    check(still < len(steps) / 2, f"the surface moves (largest step {steps.max():.4f} m, {still} held frames)")


def check_colours(item: bpy.types.Object) -> None:
    used = {
        link.from_node
        for material in item.data.materials
        for link in material.node_tree.links
        if link.to_socket.name == "Base Color"
    }
    images = [node.image for node in used if node.bl_idname == "ShaderNodeTexImage"]
    if images:
        (image,) = images
        check(image.size[0] > 0, f"the base colour is an image ({image.size[0]}x{image.size[1]})")
        check(image.colorspace_settings.name == "sRGB", f"it is sRGB ({image.colorspace_settings.name})")
        check(len(item.data.uv_layers) == 1, "one UV map")
        values = np.array(image.pixels[:]).reshape(-1, image.channels)[:, :3]
    else:
        names = ", ".join(node.bl_idname for node in used)
        shown = {"ShaderNodeVertexColor", "ShaderNodeAttribute"} & {node.bl_idname for node in used}
        check(bool(shown), f"the material's base colour is the colour attribute ({names})")
        values = np.array([entry.color[:3] for entry in item.data.color_attributes[0].data])
    check(values.std(axis=0).max() > 0.01, "the colours are not all the same")
    names = [attribute.name for attribute in item.data.attributes]
    check(any("confidence" in name.lower() for name in names), f"the confidence is there ({', '.join(names)})")


def placement(path: Path) -> tuple[float, float]:
    """Scale and lift, metres, of a file's coordinates against the run's: from the extras of a .glb, or of the mesh.glb
    beside a USD file."""
    glb = path if path.suffix == ".glb" else path.with_name("mesh.glb")
    if not glb.is_file():
        return 1.0, 0.0
    data = glb.read_bytes()
    document = json.loads(data[20 : 20 + struct.unpack_from("<I", data, 12)[0]])
    found = document["asset"].get("extras", {}).get("sv4d", {}).get("placement", {})
    return found.get("scale", 1.0), found.get("lift", 0.0)


def render(frames: list[int], size: int, elevation: float, folder: Path, scale: float, lift_by: float) -> list[Path]:
    """Cycles pictures of the frames from the input camera (Blender's -y side), evenly lit, white surroundings."""
    scene = bpy.context.scene
    scene.render.engine, scene.cycles.samples, scene.cycles.device = "CYCLES", 16, "CPU"
    scene.cycles.max_bounces = 0
    scene.render.resolution_x = scene.render.resolution_y = size
    scene.view_settings.view_transform = "Standard"
    world = bpy.data.worlds.new("white")
    world.use_nodes = True
    world.node_tree.nodes["Background"].inputs["Color"].default_value = (1, 1, 1, 1)
    scene.world = world
    _show_base_colour()
    camera = bpy.data.objects.new("input", bpy.data.cameras.new("input"))
    camera.data.angle = math.radians(33.9)
    lift = math.radians(elevation)
    camera.location = (0, -2 * scale * math.cos(lift), 2 * scale * math.sin(lift) + lift_by)
    camera.rotation_euler = (math.pi / 2 - lift, 0, 0)
    scene.collection.objects.link(camera)
    scene.camera = camera
    paths = []
    for frame in frames:
        scene.frame_set(frame)
        path = folder / f"frame_{frame:04d}.png"
        scene.render.filepath = str(path)
        bpy.ops.render.render(write_still=True)
        paths.append(path)
    return paths


def _show_base_colour() -> None:
    """Let the materials emit what feeds their base colour: the light of the video is in it already."""
    for material in bpy.data.materials:
        if not material.node_tree:
            continue
        for link in list(material.node_tree.links):
            if link.to_socket.name == "Base Color":
                node = link.to_node
                material.node_tree.links.new(link.from_socket, node.inputs["Emission Color"])
                node.inputs["Emission Strength"].default_value = 1.0
                material.node_tree.links.remove(link)
                node.inputs["Base Color"].default_value = (0, 0, 0, 1)
                node.inputs["Specular IOR Level"].default_value = 0.0


def compare(paths: list[Path], reference: Path) -> None:
    """PSNR of the renders against the pictures of the same name."""
    for path in paths:
        pictures = []
        for file in (path, reference / path.name):
            image = bpy.data.images.load(str(file.absolute()))
            width, height = image.size
            pictures.append(np.array(image.pixels[:]).reshape(height, width, -1)[..., :3])
        if pictures[0].shape != pictures[1].shape:
            check(False, f"{path.name}: the reference is {pictures[1].shape[1]} pixels wide, use --size")
            continue
        psnr = -10 * math.log10(max(float(np.mean((pictures[0] - pictures[1]) ** 2)), 1e-10))
        check(psnr > ALIKE, f"{path.name} looks like our own picture of it ({psnr:.1f} dB)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--frames", type=int, required=True, help="frames the clip must have")
    parser.add_argument("--fps", type=float, required=True, help="frames per second the clip must have")
    parser.add_argument("--out", type=Path, required=True, help="folder for three rendered frames")
    parser.add_argument("--size", type=int, default=256, help="pixels along the side of a render")
    parser.add_argument("--elevation", type=float, default=0.0, help="of the input camera, degrees")
    parser.add_argument("--reference", type=Path, help="folder of pictures to compare the renders with")
    arguments = parser.parse_args()
    item = imported(arguments.file.absolute(), arguments.fps)
    check_animation(item, arguments.frames)
    check_colours(item)
    arguments.out.mkdir(parents=True, exist_ok=True)
    shown = sorted({0, arguments.frames // 2, arguments.frames - 1})
    where = placement(arguments.file.absolute())
    paths = render(shown, arguments.size, arguments.elevation, arguments.out.absolute(), *where)
    if arguments.reference:
        compare(paths, arguments.reference)
    for path in paths:
        print(path)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
