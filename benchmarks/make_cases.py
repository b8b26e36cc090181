"""4D cases (docs/evaluation.md, "Truth") from animated GLBs, by the compiled renderer.

    python benchmarks/make_cases.py ASSETS OUT --names animated/NAME[:CLIP[:YAW[:ELEVATION]]] ... [--spin animated/NAME]

CLIP is a number or a name (default 0), YAW and ELEVATION are degrees (default 40 and 0). `--spin` plays no clip but
turns the rest pose once around (rotation in place). Each case has 21 frames of 256 pixels: the input view, 13 others,
`cameras.json`, `geometry.npz` and `input.mp4`; `manifest.json` lists them. A case that is there already is kept.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from sv4d_ns.export.colour.raster import rasterise
from sv4d_ns.geometry.cameras import CAMERA_RADIUS, FIELD_OF_VIEW_DEG, look_at_cameras
from sv4d_ns.movies.movies import Movie, write_movie
from sv4d_ns.training_data.gltf_scene import PosedMesh, Scene, load_scene, pose, yaw_rotation
from sv4d_ns.training_data.library import fit, is_held_out, placed
from sv4d_ns.training_data.lighting import benchmark_lighting, light_field
from sv4d_ns.training_data.rasterise import draw
from sv4d_ns.utils.files import atomic_folder

FRAMES, SIZE = 21, 256
KEYS = (0, 5, 10, 15, 20)
"""Frames whose geometry is kept."""
POINTS, TRACKS = 4096, 1024
LIGHT_GRID, LIGHT_DIRECTIONS = 56, 56
NV4, NV8 = (60, 120, 180, 240), (30, 75, 120, 165, 210, 255, 300, 330)


def views(elevation: int) -> list[dict]:
    """Input, ring and elevated views with their roles."""
    listed = [(0, elevation, ["input"])]
    for azimuth in sorted({*NV4, *NV8}):
        listed.append((azimuth, elevation, [role for role, ring in (("nv4", NV4), ("nv8", NV8)) if azimuth in ring]))
    listed += [(45, 30, ["elev"]), (225, 30, ["elev"])]
    entries = []
    for azimuth, height, roles in listed:
        name = f"az{azimuth:03d}_el{height:+03d}"
        folder = "input" if roles == ["input"] else f"views/{name}"
        entries.append(
            {
                "id": name, "roles": roles, "azimuth_deg": azimuth, "elevation_deg": height,
                "c2w": look_at_cameras(np.array([float(azimuth)]), np.array([float(height)]))[0].tolist(),
                "frames": [f"{folder}/{frame:03d}.webp" for frame in range(FRAMES)],
            }
        )  # fmt: skip
    return entries


def meshes(scene: Scene, clip: int | None, yaw: float, elevation: float) -> tuple[list[PosedMesh], dict]:
    """The posed meshes of all frames in the world, and what was done to place them."""
    if clip is None:
        times = np.zeros(FRAMES)
        turns = [yaw_rotation(360.0 * frame / FRAMES) for frame in range(FRAMES)]
    else:
        first, last = scene.clip_spans[clip]
        times = first + (last - first) * np.arange(FRAMES) / FRAMES  # most clips loop: the last frame is the first
        turns = [np.eye(3)] * FRAMES
    posed = [pose(scene, clip, float(moment)) for moment in times]
    used = np.unique(scene.faces)
    still = posed[0].positions[used].mean(axis=0) if clip is None else np.zeros(3)
    points = np.concatenate([(mesh.positions[used] - still) @ turn.T for mesh, turn in zip(posed, turns, strict=True)])
    camera = look_at_cameras(np.zeros(1), np.array([elevation]))[0]
    placement = fit(points, yaw_rotation(90.0 + yaw), camera)
    turned = [
        PosedMesh(scene, (mesh.positions - still) @ turn.T, mesh.normals @ turn.T, mesh.face_signs)
        for mesh, turn in zip(posed, turns, strict=True)
    ]
    return [placed(mesh, placement) for mesh in turned], {"centre": placement.centre.tolist(), "scale": placement.scale}


def geometry(frames: list[PosedMesh], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Tracks, meshes and visible surface points of the kept frames."""
    faces = frames[0].scene.faces
    tested = [visible_samples(frames[key], faces, rng) for key in KEYS]
    seen = tested[0][2]
    tracks = rng.choice(seen, min(TRACKS, len(seen)), replace=False)
    grain = 32768.0
    return {
        "frame_indices": np.array(KEYS),
        "times": np.array(KEYS) / (FRAMES - 1),
        "tracks": np.stack([np.round(frames[key].positions[tracks] * grain) / grain for key in KEYS]).astype(
            np.float32
        ),
        "vertices": np.stack([np.round(frames[key].positions * grain) / grain for key in KEYS]).astype(np.float32),
        "faces": faces.astype(np.uint16 if len(frames[0].positions) < 65536 else np.uint32),
        "points": np.stack([points for points, _, _ in tested]).astype(np.float32),
        "normals": np.stack([np.round(normals * 127) for _, normals, _ in tested]).astype(np.int8),
    }


VIEWPOINTS = 96
DEPTH_SIZE = 256


def visible_samples(
    mesh: PosedMesh, faces: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(points, normals on the visible side, vertices) of the surface that a ray to infinity leaves freely.

    Visibility is read from depth pictures of 96 directions (parallel rays), with a tolerance of a pixel and a half.
    """
    corners = mesh.positions[faces]
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    area = np.linalg.norm(normal, axis=1)
    normal /= np.maximum(area, 1e-30)[:, None]
    chosen = rng.choice(len(faces), 8 * POINTS, p=area / area.sum())
    u, v = rng.random((2, len(chosen)))
    flip = u + v > 1
    u, v = np.where(flip, 1 - u, u), np.where(flip, 1 - v, v)
    a, b, c = corners[chosen].transpose(1, 0, 2)
    points = a + u[:, None] * (b - a) + v[:, None] * (c - a)
    side, sides = np.zeros(len(points)), normal[chosen]
    used = np.unique(faces)
    seen_vertices = np.zeros(len(mesh.positions), bool)
    for toward in sphere(VIEWPOINTS):
        depth, project = depth_picture(mesh.positions, faces, toward)
        visible = free(depth, *project(points))
        facing = sides @ toward
        side = np.where((side == 0) & visible & (np.abs(facing) > 1e-3), np.sign(facing), side)
        seen_vertices[used] |= free(depth, *project(mesh.positions[used]))
    kept = np.flatnonzero(side)[:POINTS]
    kept = np.resize(kept, POINTS)
    return points[kept], sides[kept] * side[kept, None], np.flatnonzero(seen_vertices)


def sphere(count: int) -> np.ndarray:
    index = np.arange(count) + 0.5
    z, turn = 1 - 2 * index / count, np.pi * (1 + 5**0.5) * index
    ring = np.sqrt(1 - z * z)
    return np.stack([ring * np.cos(turn), ring * np.sin(turn), z], axis=1)


def depth_picture(positions: np.ndarray, faces: np.ndarray, toward: np.ndarray):
    """Nearness towards a far eye at every pixel of a parallel projection, and the projection."""
    across = np.cross(toward, [0.0, 0.0, 1.0] if abs(toward[2]) < 0.9 else [1.0, 0.0, 0.0])
    across /= np.linalg.norm(across)
    up = np.cross(toward, across)
    scale = DEPTH_SIZE / 1.16

    def project(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pixels = np.stack([points @ across, points @ up], axis=1) * scale + DEPTH_SIZE / 2
        return pixels, 1000.0 - points @ toward  # so far away that perspective is none

    pixels, depth = project(positions)
    return rasterise(pixels, depth, faces, DEPTH_SIZE).depth, project


def free(nearest: np.ndarray, pixels: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Whether nothing is clearly in front of points."""
    column, row = np.clip(pixels.astype(int), 0, DEPTH_SIZE - 1).T
    return depth <= nearest[row, column] + 1.5 * 1.16 / DEPTH_SIZE


def make(assets: Path, out: Path, wanted: str, spin: bool) -> dict:
    name, clip_text, yaw, elevation = (wanted.split(":") + ["0", "40", "0"][wanted.count(":") :])[:4]
    path = assets / f"{name}.glb"
    scene = load_scene(path)
    clip = None if spin else scene.clip(int(clip_text) if clip_text.isdigit() else clip_text)
    title = f"{path.stem}_spin" if spin else f"{path.stem}_{clip:02d}"
    frames, normalisation = meshes(scene, clip, float(yaw), float(elevation))
    source = json.loads(path.with_suffix(".json").read_text()) if path.with_suffix(".json").is_file() else {}
    entry = {
        "name": title, "split": "own", "asset": name, "licence": source.get("license", source.get("licence")),
        "author": source.get("author"), "clip": "rotation in place" if spin else str(scene.clip_names[clip]),
        "trained_on": not is_held_out(name, 0.1), "frames": FRAMES, "input_elevation_deg": float(elevation),
        "yaw_deg": float(yaw), "normalisation": normalisation,
    }  # fmt: skip
    if (out / title / "cameras.json").is_file():
        return entry
    entries = views(int(elevation))
    with atomic_folder(out / title, "cameras.json", "a case") as folder:
        lighting = benchmark_lighting()
        cameras = np.array([view["c2w"] for view in entries])
        film = []
        for index, mesh in enumerate(frames):
            light = light_field(mesh, lighting, LIGHT_GRID, LIGHT_DIRECTIONS)
            for view, picture in zip(entries, draw(mesh, light, cameras, SIZE), strict=True):
                target = folder / view["frames"][index]
                target.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(target, lossless=True, method=0, exact=True)
                if view["roles"] == ["input"]:
                    alpha = picture[..., 3:] / 255.0
                    film.append((picture[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8))
        movie = Movie(lambda: iter(film), FRAMES, 10.0)
        write_movie(folder / "input.mp4", movie, title, lambda count: None)
        np.savez_compressed(folder / "geometry.npz", **geometry(frames, np.random.default_rng(0)))
        focal = 0.5 * SIZE / np.tan(np.deg2rad(FIELD_OF_VIEW_DEG) / 2)
        description = {
            "camera_model": "PINHOLE", "w": SIZE, "h": SIZE, "fl_x": focal, "fl_y": focal, "cx": SIZE / 2,
            "cy": SIZE / 2, "fov_x_deg": FIELD_OF_VIEW_DEG, "fov_y_deg": FIELD_OF_VIEW_DEG, "radius": CAMERA_RADIUS,
            "input_elevation_deg": int(elevation), "n_frames": FRAMES,
            "times": [round(frame / (FRAMES - 1), 6) for frame in range(FRAMES)], "views": entries,
        }  # fmt: skip
        (folder / "cameras.json").write_text(json.dumps(description))
    return entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--names", nargs="*", default=[])
    parser.add_argument("--spin", nargs="*", default=[])
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    entries = []
    for wanted, spin in [(name, False) for name in arguments.names] + [(name, True) for name in arguments.spin]:
        entries.append(make(arguments.assets, arguments.out, wanted, spin))
        print(f"{entries[-1]['name']}: {entries[-1]['clip']}", flush=True)
        (arguments.out / "manifest.json").write_text(json.dumps({"split": "own", "cases": entries}, indent=1))


if __name__ == "__main__":
    main()
