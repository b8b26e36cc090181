"""Render one asset. Runs inside Blender's own interpreter, which need not have this package: numpy and bpy only.

    PYTHON_WITH_BPY blender_worker.py JOB.json          or          blender -b --python blender_worker.py -- JOB.json

The job and the result are JSON files (`sv4d_ns.training_data.blender`). Whatever goes wrong is written to the result as
one sentence; a crash of Blender ends this process only.
"""

import json
import sys
from pathlib import Path

import bpy
import numpy as np
from mathutils import Matrix, Vector

sys.path.insert(0, str(Path(__file__).resolve().parent))
from framing import bounding_box, drift, fitting_distance, key_frame_step, rigid_share, size_change

FPS = 24
POINTS = 4000
"""Vertices that are followed through the motion."""
PREVIEW_SIZE, PREVIEW_SAMPLES = 64, 1
HIDDEN_COLLECTION = "glTF_not_exported"
"""Where Blender's glTF importer puts the shapes that stand for bones."""


class Unusable(Exception):
    """The asset cannot be rendered; the message says why."""


def open_asset(path):
    """Load the asset into an otherwise empty scene at `FPS` frames a second."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".blend":
            bpy.ops.wm.open_mainfile(filepath=str(path), load_ui=False)
        else:
            bpy.ops.wm.read_factory_settings(use_empty=True)
            bpy.context.scene.render.fps, bpy.context.scene.render.fps_base = FPS, 1.0
            importer = bpy.ops.import_scene.fbx if suffix == ".fbx" else bpy.ops.import_scene.gltf
            importer(filepath=str(path))
    except Exception as error:  # importers raise whatever they meet in a broken file
        lines = str(error).strip().splitlines()
        raise Unusable(f"Blender cannot read it ({lines[-1] if lines else type(error).__name__})") from error
    for item in list(bpy.data.objects):
        if item.type in {"CAMERA", "LIGHT", "LIGHT_PROBE", "SPEAKER"}:
            bpy.data.objects.remove(item)
    meshes = [item for item in bpy.context.scene.objects if item.type == "MESH" and is_shown(item)]
    if not meshes:
        raise Unusable("it has no visible mesh")
    return meshes


def is_shown(item):
    """Whether the object belongs to the asset's picture."""
    return not item.hide_render and all(part.name != HIDDEN_COLLECTION for part in item.users_collection)


def animation_range(meshes):
    """(first, last) frame of every action that moves the asset, or None where nothing is animated."""
    owners = list(bpy.context.scene.objects) + [m.data.shape_keys for m in meshes if m.data.shape_keys]
    spans = []
    for owner in owners:
        data = owner.animation_data
        if data is None:
            continue
        if data.action is not None:
            spans.append(tuple(data.action.frame_range))
        spans += [(strip.frame_start, strip.frame_end) for track in data.nla_tracks if not track.mute
                  for strip in track.strips]  # fmt: skip
    spans = [span for span in spans if span[1] > span[0]]
    return (min(s[0] for s in spans), max(s[1] for s in spans)) if spans else None


def go_to(moment):
    """Move the scene to a moment in frames, fractions included."""
    whole = int(np.floor(moment))
    bpy.context.scene.frame_set(whole, subframe=float(moment) - whole)


def world_points(meshes, chosen):
    """World positions of all vertices now; with `chosen`, of those vertices of each mesh."""
    graph = bpy.context.evaluated_depsgraph_get()
    parts = []
    for item, keep in zip(meshes, chosen, strict=True):
        posed = item.evaluated_get(graph)
        mesh = posed.to_mesh()
        flat = np.empty(len(mesh.vertices) * 3, dtype=np.float32)
        mesh.vertices.foreach_get("co", flat)
        local = flat.reshape(-1, 3).astype(np.float64)
        local = local[np.minimum(keep, len(local) - 1)] if len(local) else local
        matrix = np.array(posed.matrix_world)
        parts.append(local @ matrix[:3, :3].T + matrix[:3, 3])
        posed.to_mesh_clear()
    return np.concatenate(parts)


def choose_vertices(meshes, rng):
    """At most `POINTS` vertices over all meshes, each mesh by its share; the extreme ones of each are among them."""
    graph = bpy.context.evaluated_depsgraph_get()
    chosen = []
    counts = []
    for item in meshes:
        mesh = item.evaluated_get(graph).to_mesh()
        counts.append(len(mesh.vertices))
    total = max(sum(counts), 1)
    for item, count in zip(meshes, counts, strict=True):
        posed = item.evaluated_get(graph)
        mesh = posed.to_mesh()
        flat = np.empty(count * 3, dtype=np.float32)
        mesh.vertices.foreach_get("co", flat)
        local = flat.reshape(-1, 3)
        wanted = min(count, max(int(POINTS * count / total), 16))
        directions = rng.normal(size=(24, 3))
        extremes = np.argmax(local @ directions.T, axis=0) if count else np.zeros(0, dtype=int)
        spread = rng.choice(count, wanted, replace=False) if count else np.zeros(0, dtype=int)
        chosen.append(np.unique(np.concatenate([extremes, spread])).astype(int))
        posed.to_mesh_clear()
    return chosen


def set_up_camera(fov_deg):
    """The scene's only camera, with a square picture."""
    camera = bpy.data.objects.new("sv4d_camera", bpy.data.cameras.new("sv4d_camera"))
    camera.data.sensor_fit, camera.data.angle = "HORIZONTAL", float(np.deg2rad(fov_deg))
    camera.data.clip_start, camera.data.clip_end = 1e-3, 1e4
    bpy.context.scene.collection.objects.link(camera)
    bpy.context.scene.camera = camera
    return camera


def place(camera, unit_c2w, centre, distance):
    """Put the camera at its distance from the object's centre (world units)."""
    matrix = np.array(unit_c2w, dtype=np.float64)
    matrix[:3, 3] = centre + distance * matrix[:3, 3]
    camera.matrix_world = Matrix(matrix.tolist())


def set_up_light(environment, turn_deg):
    """A sky with ground, horizon and zenith colours, and lamps; or an environment picture."""
    scene = bpy.context.scene
    world = bpy.data.worlds.new("sv4d_world")
    scene.world = world
    world.use_nodes = True
    tree = world.node_tree
    tree.nodes.clear()
    output, background = tree.nodes.new("ShaderNodeOutputWorld"), tree.nodes.new("ShaderNodeBackground")
    tree.links.new(background.outputs[0], output.inputs[0])
    place_of = tree.nodes.new("ShaderNodeTexCoord")
    if "picture" in environment:
        turned = tree.nodes.new("ShaderNodeMapping")
        turned.inputs["Rotation"].default_value[2] = float(np.deg2rad(turn_deg))
        texture = tree.nodes.new("ShaderNodeTexEnvironment")
        texture.image = bpy.data.images.load(environment["picture"])
        tree.links.new(place_of.outputs["Generated"], turned.inputs[0])
        tree.links.new(turned.outputs[0], texture.inputs[0])
        tree.links.new(texture.outputs[0], background.inputs[0])
        return
    apart = tree.nodes.new("ShaderNodeSeparateXYZ")
    ramp = tree.nodes.new("ShaderNodeValToRGB")
    shift = tree.nodes.new("ShaderNodeMapRange")
    shift.inputs["From Min"].default_value = -1.0
    tree.links.new(place_of.outputs["Generated"], apart.inputs[0])
    tree.links.new(apart.outputs["Z"], shift.inputs["Value"])
    tree.links.new(shift.outputs[0], ramp.inputs[0])
    tree.links.new(ramp.outputs[0], background.inputs[0])
    middle = ramp.color_ramp.elements.new(0.5)
    for element, name in zip((ramp.color_ramp.elements[0], middle, ramp.color_ramp.elements[-1]),
                             ("ground", "horizon", "zenith"), strict=True):  # fmt: skip
        element.color = (*environment[name], 1.0)
    for index, lamp in enumerate(environment["lamps"]):
        data = bpy.data.lights.new(f"sv4d_lamp{index}", "SUN")
        data.energy, data.color, data.angle = lamp["strength"], lamp["colour"], float(np.deg2rad(lamp["softness_deg"]))
        sun = bpy.data.objects.new(data.name, data)
        azimuth, elevation = np.deg2rad(lamp["azimuth_deg"] + turn_deg), np.deg2rad(lamp["elevation_deg"])
        away = Vector((np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)))
        sun.rotation_mode, sun.rotation_quaternion = "QUATERNION", away.to_track_quat("Z", "Y")
        scene.collection.objects.link(sun)


def set_up_cycles(size, samples, device, seed):
    """Path tracing with few samples, transparent film, colours as stored in the asset."""
    scene = bpy.context.scene
    scene.render.engine = "CYCLES"
    scene.cycles.samples, scene.cycles.seed = samples, seed
    scene.cycles.use_denoising, scene.cycles.use_adaptive_sampling = False, False
    scene.cycles.max_bounces, scene.cycles.diffuse_bounces, scene.cycles.glossy_bounces = 4, 2, 2
    if device != "cpu":
        preferences = bpy.context.preferences.addons["cycles"].preferences
        preferences.compute_device_type = device.upper()
        preferences.get_devices()
        for entry in preferences.devices:
            entry.use = entry.type == device.upper()
        if not any(entry.use for entry in preferences.devices):
            raise Unusable(f"Blender finds no device of the kind '{device}': use --device cpu")
        scene.cycles.device = "GPU"
    scene.render.film_transparent = True
    scene.render.resolution_x = scene.render.resolution_y = size
    scene.render.resolution_percentage = 100
    scene.render.use_persistent_data = True
    scene.view_settings.view_transform, scene.view_settings.look = "Standard", "None"
    scene.view_settings.exposure, scene.view_settings.gamma = 0.0, 1.0
    settings = scene.render.image_settings
    settings.file_format, settings.color_mode, settings.color_depth = "PNG", "RGBA", "8"
    scene.use_nodes = False
    scene.render.use_compositing = scene.render.use_sequencer = False


def render_to(path):
    """Render the current view."""
    bpy.context.scene.render.filepath = str(path)
    bpy.ops.render.render(write_still=True)


def read_png(path):
    """RGBA in [0, 1], [h, w, 4], rows from the top."""
    image = bpy.data.images.load(str(path))
    image.colorspace_settings.name = "Non-Color"
    pixels = np.empty(image.size[0] * image.size[1] * 4, dtype=np.float32)
    image.pixels.foreach_get(pixels)
    shape = (image.size[1], image.size[0], 4)
    bpy.data.images.remove(image)
    return pixels.reshape(shape)[::-1]


def geometry_maps(camera, size, fov_deg):
    """Depth along the optical axis (world units, 0 where nothing is hit) and world normals, by casting rays."""
    scene, graph = bpy.context.scene, bpy.context.evaluated_depsgraph_get()
    matrix = np.array(camera.matrix_world)
    half = np.tan(np.deg2rad(fov_deg) / 2)
    offsets = ((np.arange(size) + 0.5) / size * 2 - 1) * half
    origin, backward = Vector(matrix[:3, 3]), matrix[:3, 2]
    depth, normals = np.zeros((size, size)), np.zeros((size, size, 3))
    for row in range(size):
        for column in range(size):
            ray = matrix[:3, :3] @ np.array([offsets[column], -offsets[row], -1.0])
            hit, point, normal = scene.ray_cast(graph, origin, Vector(ray))[:3]
            if hit:
                depth[row, column] = -float((np.array(point) - matrix[:3, 3]) @ backward)
                facing = np.array(normal)
                normals[row, column] = facing if facing @ ray < 0 else -facing
    return depth, normals


def run(job):
    """Render everything the job asks for; returns the result."""
    meshes = open_asset(Path(job["asset"]))
    span = animation_range(meshes)
    if job["frames"] > 1 and span is None:
        raise Unusable("it has no animation (render still assets with --frames 1)")
    rng = np.random.default_rng(job["seed"])
    folder, frames = Path(job["folder"]), job["frames"]
    first, last = span if span is not None and frames > 1 else (bpy.context.scene.frame_current,) * 2
    camera = set_up_camera(job["fov_deg"])
    set_up_light(job["environment"], job["environment_turn_deg"])
    go_to(first)
    chosen = choose_vertices(meshes, rng)

    probes = np.linspace(first, last, 33) if frames > 1 else np.array([first])
    try:
        rough_centre, rough_side = bounding_box(np.stack([points_at(meshes, chosen, moment) for moment in probes]))
    except ValueError as error:
        raise Unusable(str(error)) from error

    set_up_cycles(PREVIEW_SIZE, PREVIEW_SAMPLES, "cpu", job["seed"])
    place(camera, job["preview_camera"], rough_centre, 2.0 * rough_side)

    def preview(moment):
        go_to(moment)
        render_to(folder / "preview.png")
        return read_png(folder / "preview.png")

    step, motion = 0.0, 0.0
    if frames > 1:
        step, motion = key_frame_step(preview, first, last, frames, 1.0, job["enough_motion"])
    times = [float(first + step * index) for index in range(frames)]

    # the box of the chosen frames, not of the whole animation, decides the size
    points = np.stack([points_at(meshes, chosen, moment) for moment in times])
    centre, side = bounding_box(points)
    normalised = (points - centre) / side
    unit_cameras = np.array(job["unit_cameras"])
    distance = fitting_distance(normalised.reshape(-1, 3), unit_cameras.reshape(-1, 4, 4), job["fov_deg"])

    set_up_cycles(job["size"], job["samples"], job["device"], job["seed"])
    depth_range = 2.0 * distance
    for frame, moment in enumerate(times):
        go_to(moment)
        for orbit, cameras in zip(job["orbits"], unit_cameras, strict=True):
            for view, unit in enumerate(cameras):
                place(camera, unit, centre, distance * side)
                render_to(folder / f"{orbit}.rgba.{frame:02d}.{view:02d}.png")
                if job["maps"]:
                    bpy.context.view_layer.update()
                    depth, normals = geometry_maps(camera, job["size"], job["fov_deg"])
                    np.savez(folder / f"{orbit}.maps.{frame:02d}.{view:02d}.npz", depth=depth / side, normals=normals)
    return {
        "times": times,
        "distance": distance,
        "depth_range": depth_range,
        "measurements": {
            "motion": motion,
            "rigid_share": rigid_share(normalised),
            "drift": drift(normalised),
            "size_change": size_change(normalised),
            "meshes": float(len(meshes)),
            "flatness": float(np.ptp(normalised.reshape(-1, 3), axis=0).min()),
        },
    }


def points_at(meshes, chosen, moment):
    """World positions of the chosen vertices at a moment."""
    go_to(moment)
    return world_points(meshes, chosen)


def main():
    path = Path(sys.argv[-1])
    job = json.loads(path.read_text())
    try:
        result = run(job)
    except Unusable as error:
        result = {"error": str(error)}
    except Exception as error:
        result = {"error": f"Blender failed on it ({type(error).__name__}: {' '.join(str(error).split())})"}
    Path(job["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
