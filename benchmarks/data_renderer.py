"""The compiled renderer of training data: how fast it is, and how its pictures compare with Blender's.

    python benchmarks/data_renderer.py speed ASSETS [--count 60]
    python benchmarks/data_renderer.py volume ASSETS [--count 60]
    python benchmarks/data_renderer.py blender ASSETS OUT --python PYTHON_WITH_BPY [--count 20] [--size 128]

`speed` prints CPU milliseconds of every part of a training sample on one core (the compilers' work left out). `volume`
looks at the volume at 64^3 from six cameras and prints the IoU with the pictures' silhouettes. `blender`
renders the first clip of animated assets at its start, middle and end with both, writes OUT/sheet.png (Blender above,
ours below) and prints the silhouettes' IoU (alpha >= 0.5).
"""

import argparse
import json
import subprocess
import time
from pathlib import Path

import numpy as np
from PIL import Image

from sv4d_ns.diffusion.bundled.frustum import Frustum
from sv4d_ns.geometry.cameras import FIELD_OF_VIEW_DEG, look_at_cameras
from sv4d_ns.training_data import rasterise, volume
from sv4d_ns.training_data.blender import WORKER
from sv4d_ns.training_data.gltf_scene import load_scene, pose, yaw_rotation
from sv4d_ns.training_data.library import AssetLibrary, fit
from sv4d_ns.training_data.lighting import benchmark_lighting, light_field

VIEWS = look_at_cameras(np.array([0.0, 60.0, 120.0, 180.0, 240.0, 300.0]), np.array([0.0, 10.0, 0.0, 0.0, 30.0, 0.0]))


def speed(arguments: argparse.Namespace) -> None:
    library = AssetLibrary(arguments.assets, cache=arguments.cache)
    rng = np.random.default_rng(0)
    names = [str(name) for name in rng.permutation(library.train)[: arguments.count]]
    for name in names[:2]:
        measure(library, rng, name)
    for name in names:
        library.scene(name)
    table = {part: [] for part in measure(library, rng, names[0])}
    for name in names:
        for part, seconds in measure(library, rng, name).items():
            table[part].append(seconds * 1000)
    print(f"| part, CPU ms on one core, {len(names)} assets | mean | median | 95 % |\n|---|---|---|---|")
    for part, values in table.items():
        print(f"| {part} | {np.mean(values):.2f} | {np.median(values):.2f} | {np.percentile(values, 95):.2f} |")
    picture = np.array(table["picture at 64 px"])
    with_light = picture + (np.array(table["pose"]) + np.array(table["light"])) / len(VIEWS)
    print(f"\nPictures a second at 64 px: {1000 / picture.mean():.0f} drawn, {1000 / with_light.mean():.0f} with a")
    print("sixth of a pose and its light each.")


def measure(library: AssetLibrary, rng: np.random.Generator, name: str) -> dict[str, float]:
    """CPU seconds of each part of one sample: a moment, six pictures, the volume, the colours of its shell."""
    marks = [time.process_time()]
    sample = library.sample(rng, names=[name])
    marks.append(time.process_time())
    sample.mesh(0)
    marks.append(time.process_time())
    sample.light(0)
    marks.append(time.process_time())
    sample.draw(VIEWS, 64)
    marks.append(time.process_time())
    inside = sample.occupancy(0, VIEWS[0])
    marks.append(time.process_time())
    coarse = inside.reshape(32, 2, 32, 2, 32, 2).any(axis=(1, 3, 5))
    points = Frustum().world_points(32, VIEWS[0], coarse)
    marks.append(time.process_time())
    sample.nearest_colours(0, points)
    marks.append(time.process_time())
    taken = np.diff(marks)
    parts = {
        "choose a moment, fit": taken[0], "pose": taken[1], "light": taken[2],
        "picture at 64 px": taken[3] / len(VIEWS), "volume at 64^3": taken[4], "colours of its cells at 32^3": taken[6],
    }  # fmt: skip
    return {**parts, "all, with six pictures": float(taken.sum() - taken[5])}


def silhouettes(arguments: argparse.Namespace) -> None:
    """How well the true volumes, seen from every side, agree with the pictures."""
    library = AssetLibrary(arguments.assets, cache=arguments.cache)
    rng = np.random.default_rng(5)
    scores = {}
    for name in map(str, rng.permutation(library.train)[: arguments.count]):
        sample = library.sample(rng, names=[name])
        alpha = sample.draw(VIEWS, 64)[0, ..., 3] >= 128
        seen = np.stack([project(sample.occupancy(0, VIEWS[0]), camera) for camera in VIEWS])
        scores[name] = (alpha & seen).sum(axis=(1, 2)) / np.maximum((alpha | seen).sum(axis=(1, 2)), 1)
    values = np.array(list(scores.values()))
    print(f"{len(values)} assets: mean {values.mean():.3f} (input view {values[:, 0].mean():.3f}), "
          f"median of assets {np.median(values.mean(axis=1)):.3f} ({np.median(values[:, 0]):.3f})")  # fmt: skip
    for name, score in sorted(scores.items(), key=lambda entry: entry[1].mean())[:8]:
        print(f"{score.mean():.3f} {name}")


def project(inside: np.ndarray, c2w: np.ndarray, steps: int = 128) -> np.ndarray:
    """Silhouette [64, 64] of a volume in the input camera's frustum, by samples along the rays of another camera."""
    size, resolution = 64, len(inside)
    tangent = np.tan(np.deg2rad(FIELD_OF_VIEW_DEG) / 2)
    across = ((np.arange(size) + 0.5) / size * 2 - 1) * tangent
    x, y = np.meshgrid(across, -across)
    rays = np.stack([x, y, -np.ones_like(x)], axis=-1) @ c2w[:3, :3].T
    places = c2w[:3, 3] + rays[..., None, :] * np.linspace(volume.NEAR, volume.FAR, steps)[:, None]
    seen = (places - VIEWS[0][:3, 3]) @ VIEWS[0][:3, :3]
    depth, half = -seen[..., 2], resolution / 2
    cells = np.stack(
        [
            (depth - volume.NEAR) / (volume.FAR - volume.NEAR) * resolution,
            half - seen[..., 1] / depth / tangent * half,
            half + seen[..., 0] / depth / tangent * half,
        ]
    )
    within = ((cells >= 0) & (cells < resolution)).all(axis=0)
    d, r, c = np.clip(cells.astype(int), 0, resolution - 1)
    return (inside[d, r, c] & within).any(axis=-1)


def compare(arguments: argparse.Namespace) -> None:
    library = AssetLibrary(arguments.assets, cache=arguments.cache)
    names = [name for name in (*library.train, *library.held_out) if name.startswith("animated")]
    names = sorted(str(name) for name in np.random.default_rng(7).permutation(names)[: arguments.count])
    arguments.out.mkdir(parents=True, exist_ok=True)
    lighting = benchmark_lighting()
    pictures, ours = [], {}
    for name in names:
        path = arguments.assets / f"{name}.glb"
        scene = load_scene(path)
        first, last = scene.clip_spans[0]
        times = (first, (first + last) / 2, last)
        points = np.concatenate([pose(scene, 0, float(moment)).positions for moment in np.linspace(first, last, 21)])
        rotation = yaw_rotation(90.0 + 25.0)
        camera = look_at_cameras(np.zeros(1), np.array([10.0]))
        placement = fit(points, rotation, camera[0])
        there = camera[0].copy()
        there[:3, :3] = rotation.T @ camera[0, :3, :3]
        there[:3, 3] = rotation.T @ (camera[0, :3, 3] / placement.scale + placement.centre)
        for index, moment in enumerate(times):
            mesh = pose(scene, 0, float(moment), placement)
            light = light_field(mesh, lighting)
            target = arguments.out / f"{path.stem}_{index}.png"
            ours[target] = rasterise.draw(mesh, light, camera, arguments.size)[0]
            pictures.append(
                {
                    "asset": str(path.resolve()),
                    "time_s": float(moment),
                    "c2w": there.tolist(),
                    "path": str(target.resolve()),
                }
            )
    job = {
        "worker": str(WORKER), "size": arguments.size, "samples": arguments.samples,
        "fov_deg": FIELD_OF_VIEW_DEG, "environment": environment(lighting), "pictures": pictures,
    }  # fmt: skip
    (arguments.out / "job.json").write_text(json.dumps(job))
    missing = [picture for picture in pictures if not Path(picture["path"]).is_file()]
    if missing:
        script = Path(__file__).with_name("blender_pictures.py")
        command = [str(arguments.python), str(script), str(arguments.out / "job.json")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    report(arguments, ours)


def environment(lighting) -> dict:
    """The light as the Blender worker's sky and suns."""
    middle = (lighting.sky + lighting.ground) / 2
    lamps = []
    for toward, strength in zip(lighting.directions, lighting.strengths, strict=True):
        azimuth, elevation = np.rad2deg(np.arctan2(toward[1], toward[0])), np.rad2deg(np.arcsin(toward[2]))
        lamps.append(
            {"azimuth_deg": azimuth, "elevation_deg": elevation, "strength": float(np.pi * strength.mean()),
             "colour": [1.0, 1.0, 1.0], "softness_deg": 20.0}
        )  # fmt: skip
    return {
        "ground": lighting.ground.tolist(),
        "horizon": middle.tolist(),
        "zenith": lighting.sky.tolist(),
        "lamps": lamps,
    }


def report(arguments: argparse.Namespace, ours: dict[Path, np.ndarray]) -> None:
    rows, scores, differences = [], {}, []
    for path, mine in ours.items():
        with Image.open(path) as opened:
            theirs = np.asarray(opened.convert("RGBA"))
        a, b = mine[..., 3] >= 128, theirs[..., 3] >= 128
        scores[path.stem] = float((a & b).sum() / max((a | b).sum(), 1))
        both = a & b
        differences.append(np.abs(mine[both][:, :3].astype(float) - theirs[both][:, :3]).mean() / 255)
        rows.append((on_white(theirs), on_white(mine)))
    for name, score in sorted(scores.items(), key=lambda entry: entry[1])[:12]:
        print(f"{score:.4f} {name}")
    values = np.array(list(scores.values()))
    print(f"silhouette IoU over {len(values)} pictures: mean {values.mean():.4f}, median {np.median(values):.4f}, "
          f"smallest {values.min():.4f}; mean colour difference {np.mean(differences):.4f}")  # fmt: skip
    across = 12
    lines = []
    for start in range(0, len(rows), across):
        part = rows[start : start + across]
        part += [(np.full_like(rows[0][0], 255),) * 2] * (across - len(part))
        lines += [np.concatenate([pair[side] for pair in part], axis=1) for side in (0, 1)]
    Image.fromarray(np.concatenate(lines)).save(arguments.out / "sheet.png")


def on_white(picture: np.ndarray) -> np.ndarray:
    alpha = picture[..., 3:] / 255.0
    return (picture[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    fast = modes.add_parser("speed")
    solid = modes.add_parser("volume")
    other = modes.add_parser("blender")
    for mode in (fast, solid, other):
        mode.add_argument("assets", type=Path)
        mode.add_argument("--cache", type=Path)
    for mode in (fast, solid):
        mode.add_argument("--count", type=int, default=60)
    other.add_argument("out", type=Path)
    other.add_argument("--python", required=True)
    other.add_argument("--count", type=int, default=20)
    other.add_argument("--size", type=int, default=128)
    other.add_argument("--samples", type=int, default=8)
    arguments = parser.parse_args()
    {"speed": speed, "volume": silhouettes, "blender": compare}[arguments.mode](arguments)


if __name__ == "__main__":
    main()
