"""Does Blender play the exported GLB? Imports it with bpy, checks the animation and the colours, renders frames.

Blender is no dependency of this package; run the script with a Python that has it:

    python -m venv venv-bpy && venv-bpy/bin/pip install bpy
    venv-bpy/bin/python benchmarks/blender_check.py OUT/mesh.glb --frames 21 --fps 10 --out blender

Exit code 0 when every check holds; each check prints a line.
"""

import argparse
import math
import sys
from pathlib import Path

import bpy
import numpy as np

failures: list[str] = []


def check(holds: bool, sentence: str) -> None:
    """Print one result and remember a failure."""
    print(("ok    " if holds else "FAIL  ") + sentence)
    if not holds:
        failures.append(sentence)


def imported(path: Path, fps: float) -> bpy.types.Object:
    """The single mesh object of the file in an otherwise empty scene that runs at `fps`."""
    bpy.ops.wm.read_factory_settings(use_empty=True)
    # the importer turns seconds into frames of the scene, so the rate must be set before
    render = bpy.context.scene.render
    render.fps, render.fps_base = math.ceil(fps), math.ceil(fps) / fps
    bpy.ops.import_scene.gltf(filepath=str(path))
    meshes = [item for item in bpy.data.objects if item.type == "MESH"]
    check(len(meshes) == 1, f"one mesh object ({len(meshes)})")
    return meshes[0]


def evaluated(item: bpy.types.Object, frame: int) -> np.ndarray:
    """Vertex positions [n, 3] in Blender's world at a frame."""
    bpy.context.scene.frame_set(frame)
    posed = item.evaluated_get(bpy.context.evaluated_depsgraph_get()).to_mesh()
    flat = np.empty(len(posed.vertices) * 3, dtype=np.float32)
    posed.vertices.foreach_get("co", flat)
    return flat.reshape(-1, 3)


def check_animation(item: bpy.types.Object, frames: int) -> None:
    keys = item.data.shape_keys
    blocks = len(keys.key_blocks) if keys else 0
    check(blocks == frames, f"{frames} shape keys with the basis ({blocks})")
    action = keys.animation_data.action if keys and keys.animation_data else None
    check(action is not None, "an action drives the shape keys")
    if action is not None:
        first, last = action.frame_range
        check(abs(last - first - (frames - 1)) < 1e-3, f"the action spans all frames ({first:g} to {last:g})")
    motion = np.stack([evaluated(item, frame) for frame in range(frames)])
    steps = np.abs(np.diff(motion, axis=0)).max(axis=(1, 2))
    still = int((steps < 1e-6).sum())  # a held frame in the video is no fault
    check(still < len(steps), f"the surface moves (largest step {steps.max():.4f} m, {still} held frames)")


def check_colours(item: bpy.types.Object) -> None:
    check(len(item.data.color_attributes) == 1, "a colour attribute")
    used = {
        link.from_node.bl_idname
        for material in item.data.materials
        for link in material.node_tree.links
        if link.to_socket.name == "Base Color"
    }
    check("ShaderNodeVertexColor" in used, f"the material's base colour is the colour attribute ({', '.join(used)})")
    attribute = item.data.color_attributes[0]
    values = np.array([entry.color[:3] for entry in attribute.data])
    check(values.std(axis=0).max() > 0.01, "the colours are not all the same")


def render(frames: list[int], size: int, folder: Path) -> list[Path]:
    """Cycles pictures of the frames from the side the input camera saw (Blender's -y), white surroundings."""
    scene = bpy.context.scene
    scene.render.engine, scene.cycles.samples, scene.cycles.device = "CYCLES", 8, "CPU"
    scene.render.resolution_x = scene.render.resolution_y = size
    scene.view_settings.view_transform = "Standard"
    world = bpy.data.worlds.new("white")
    world.use_nodes = True
    world.node_tree.nodes["Background"].inputs["Color"].default_value = (1, 1, 1, 1)
    scene.world = world
    camera = bpy.data.objects.new("input", bpy.data.cameras.new("input"))
    camera.data.angle = math.radians(33.9)
    camera.location, camera.rotation_euler = (0, -2, 0), (math.pi / 2, 0, 0)
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("glb", type=Path)
    parser.add_argument("--frames", type=int, required=True, help="frames the clip must have")
    parser.add_argument("--fps", type=float, required=True, help="frames per second the clip must have")
    parser.add_argument("--out", type=Path, required=True, help="folder for three rendered frames")
    parser.add_argument("--size", type=int, default=256, help="pixels along the side of a render")
    arguments = parser.parse_args()
    item = imported(arguments.glb.absolute(), arguments.fps)
    check_animation(item, arguments.frames)
    check_colours(item)
    arguments.out.mkdir(parents=True, exist_ok=True)
    shown = sorted({0, arguments.frames // 2, arguments.frames - 1})
    for path in render(shown, arguments.size, arguments.out.absolute()):
        print(path)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
