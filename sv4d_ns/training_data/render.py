"""`sv4d data render SOURCE OUT`: view-by-frame matrices of assets, with cameras, lighting and measurements."""

import json
import shutil
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from jaxtyping import Float

from sv4d_ns.geometry.cameras import FIELD_OF_VIEW_DEG, look_at_cameras
from sv4d_ns.runs.cluster import open_cluster, run_all
from sv4d_ns.training_data.blender import AssetError, find_blender, run_job
from sv4d_ns.training_data.clips import lighting_of, list_clips, prepare_clip
from sv4d_ns.training_data.dataset import (
    DATASET_FILE,
    FORMAT,
    FORMAT_VERSION,
    SKIPPED_FILE,
    ObjectRecord,
    disk_errors,
    finished_names,
    picture_name,
    png,
    write_object,
    write_shard,
)
from sv4d_ns.training_data.environments import choose_environment
from sv4d_ns.training_data.framing import (
    bounding_box,
    drift,
    fitting_distance,
    key_frame_step,
    rigid_share,
    size_change,
)
from sv4d_ns.training_data.orbits import Orbit, OrbitCameras, draw_orbit
from sv4d_ns.training_data.procedural import Creature, creature, render
from sv4d_ns.training_data.procedural.renderer import draw_geometry
from sv4d_ns.training_data.sources import PROCEDURAL, Asset, check_names, list_assets
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.files import TEMPORARY, atomic_path, content_hash, sha256, sole_use
from sv4d_ns.utils.limits import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, SHARE, check_numbers
from sv4d_ns.utils.progress import bar

LOCK_FILE = ".render.lock"
PREVIEW_SIZE = 32
SMALLEST_STEP = 1 / 40
"""Of a creature's time, which runs from 0 to 1: half the step of a 21-frame video."""
DEPTH_LEVELS = 65535


@dataclass(frozen=True)
class RenderConfig:
    """Render assets for training; the same command continues an interrupted render."""

    source: Annotated[str, tyro.conf.Positional]
    """A folder of animated assets (GLB, GLTF, FBX, BLEND), objaverse:FILE_OR_IDS, or procedural:SEED:COUNT."""
    output: Annotated[Path, tyro.conf.Positional]
    """Folder of the rendered data."""
    frames: int = 21
    """T, frames of the animation; 1 renders still objects (the 3D stage)."""
    views: int = 21
    """V, cameras of an orbit."""
    size: int = 576
    """Pixels per side."""
    renderer: Literal["auto", "compiled", "blender"] = "auto"
    """What draws assets. Auto: the compiled one for GLB, Blender for other formats and with --environments."""
    clips: int | Literal["all"] = "all"
    """How many clips of a GLB become objects, the first ones (compiled renderer; Blender plays the first)."""
    orbits: Annotated[tuple[Orbit, ...], tyro.conf.EnumChoicesFromValues] = (Orbit.STATIC, Orbit.DYNAMIC)
    """Static: one random elevation. Dynamic: elevation and azimuth wander."""
    samples: int = 32
    """Rays per pixel of Blender's path tracer; the compiled renderer always has sixteen."""
    device: Literal["cpu", "cuda", "optix", "hip", "metal"] = "cpu"
    """What Blender renders with."""
    maps: bool = False
    """Also write depth and normals (slow: rays are cast one by one)."""
    random_background: float = 0.5
    """Probability of a random plain background instead of white behind an object, for models without alpha."""
    environments: Path | None = None
    """Folder of environment pictures (HDR, EXR); built-in skies and lamps by default. Assets only."""
    enough_motion: float = 0.03
    """Mean difference of neighbouring key frames on the object, in [0, 1]: the frame step grows until it is reached."""
    format: Literal["folder", "shards"] = "folder"
    """One folder per object, or WebDataset tars."""
    shard_objects: int = 64
    """Objects in a shard."""
    licence: str | None = None
    """Licence of all assets of a folder that state none themselves (in NAME.json beside the asset)."""
    blender_python: Path | None = None
    """A Python that has bpy, or Blender itself; found by itself where possible."""
    timeout_s: float = 3600.0
    """Longest time for one asset."""
    workers: int = 1
    """Assets rendered at the same time, in threads of this process."""
    cluster: str | None = None
    """Where to render instead: local:N (processes of this machine), tcp://HOST:PORT (a Dask scheduler), or a YAML file
    of dask-jobqueue settings."""
    seed: int = 0
    """Of cameras, lighting and backgrounds."""
    include_test_objects: bool = False
    """Also render the test objects of ObjaverseDy and Consistent4D, which are left out by default."""

    def settings(self) -> dict[str, object]:
        """What decides the pictures, as JSON values."""
        names = ("frames", "views", "size", "samples", "maps", "random_background", "enough_motion", "seed")
        values = {name: getattr(self, name) for name in names}
        if not self.source.startswith(PROCEDURAL):
            values |= {"renderer": self.renderer, "clips": self.clips}
        environments = None if self.environments is None else str(self.environments)
        return {**values, "orbits": [orbit.value for orbit in self.orbits], "environments": environments}


@dataclass(frozen=True)
class Summary:
    """How a render went: names of the objects rendered now, rendered before, and skipped (with reasons)."""

    rendered: list[str]
    already: list[str]
    skipped: dict[str, str]


def render_dataset(config: RenderConfig) -> Summary:
    """Render everything the source holds and the output does not.

    Raises:
        InputError: for unusable settings or an unusable source or output.
    """
    _check(config)
    assets, held_out = list_assets(config.source, config.licence, config.include_test_objects)
    check_names(assets)
    _check_output(config.output)
    taken = f"Another 'sv4d data render' works on {config.output}: wait for it, or give another folder."
    with disk_errors(config.output), sole_use(config.output, LOCK_FILE, taken):
        _start(config)
        return _render_what_is_missing(config, assets, held_out)


def _render_what_is_missing(config: RenderConfig, assets: list[Asset], held_out: list[str]) -> Summary:
    for left in (config.output / "objects").glob(f"{TEMPORARY}*"):
        shutil.rmtree(left)  # half an object of a killed process
    done = finished_names(config.output)
    skipped = dict.fromkeys(held_out, "it is a test object of a published evaluation")
    assets, unusable = _every_clip(assets, config)
    check_names(assets)
    skipped |= unusable
    waiting = [asset for asset in assets if asset.name not in done]
    if any(needs_blender(asset, config) for asset in waiting) and config.cluster is None:
        find_blender(config.blender_python)  # before anything is rendered
    rendered: list[str] = []
    finished: set[int] = set()

    with bar("Rendering") as show:
        show(0, len(waiting))

        def on_result(number: int, reason: object) -> None:
            if isinstance(reason, InputError):
                raise reason  # a full disk is full for all
            name = waiting[number].name
            if reason is None:
                rendered.append(name)
            else:
                failed = isinstance(reason, BaseException)
                skipped[name] = f"its worker failed ({' '.join(str(reason).split())})" if failed else str(reason)
            _list_skipped(config.output, skipped)
            if config.format == "shards":
                pack_shards(config.output, config.shard_objects)
            finished.add(number)
            show(len(finished), len(waiting))

        _run(config, waiting, on_result)
    _list_skipped(config.output, skipped)
    if config.format == "shards":
        pack_shards(config.output, config.shard_objects, rest=True)
    if not rendered and not done:
        first = next(iter(skipped.items()))
        raise InputError(
            f"Nothing of {config.source} could be rendered ({len(skipped)} left out); the first reason: {first[0]}: "
            f"{first[1]}. All are in {config.output / SKIPPED_FILE}."
        )
    return Summary(rendered, sorted(done), skipped)


def _run(config: RenderConfig, assets: list[Asset], on_result: Callable[[int, object], None]) -> None:
    """Render assets in threads of this process or by a cluster's workers; hand over what `try_asset` returned, or what
    a worker ended with, by the asset's number."""
    if config.cluster is not None:
        if assets:
            there = replace(config, output=config.output.absolute())  # workers may be in other folders
            tasks = [(replace(asset, path=asset.path and asset.path.absolute()), there) for asset in assets]
            with open_cluster(config.cluster) as client:
                run_all(client, try_asset, tasks, on_result)
        return
    stop = threading.Event()

    def one(asset: Asset) -> str | None:
        return None if stop.is_set() else try_asset(asset, config)

    with ThreadPoolExecutor(config.workers) as pool:
        futures = {pool.submit(one, asset): number for number, asset in enumerate(assets)}
        try:
            for future in as_completed(futures):
                on_result(futures[future], future.result())
        finally:
            stop.set()


def try_asset(asset: Asset, config: RenderConfig) -> str | None:
    """Render one asset, here or on a worker; why it cannot be, or None.

    Raises:
        InputError: the disk is full, or there is no Blender where one is needed.
    """
    try:
        render_asset(asset, config, find_blender(config.blender_python) if needs_blender(asset, config) else [])
    except AssetError as error:
        return str(error)
    return None


def needs_blender(asset: Asset, config: RenderConfig) -> bool:
    """Whether Blender renders the asset, and not a renderer of our own."""
    if asset.path is None or config.renderer == "compiled":
        return False
    return config.renderer == "blender" or config.environments is not None or asset.path.suffix.lower() != ".glb"


def _every_clip(assets: list[Asset], config: RenderConfig) -> tuple[list[Asset], dict[str, str]]:
    """The assets with an entry per clip where the compiled renderer draws them; those it cannot, with reasons."""
    listed: list[Asset] = []
    skipped: dict[str, str] = {}
    for asset in assets:
        if asset.path is None or needs_blender(asset, config):
            listed.append(asset)
            continue
        if asset.path.suffix.lower() not in (".glb", ".gltf"):
            skipped[asset.name] = f"a {asset.path.suffix} needs Blender (--renderer auto)"
            continue
        clips, reasons = list_clips([asset], config.clips, config.frames > 1)
        listed += clips
        skipped |= reasons
    return listed, skipped


def _check(config: RenderConfig) -> None:
    check_numbers(config, AT_LEAST_ONE, "frames", "views", "size", "samples", "shard_objects", "workers")
    check_numbers(config, SHARE, "random_background", "enough_motion")
    check_numbers(config, POSITIVE, "timeout_s")
    check_numbers(config, NOT_NEGATIVE, "seed")
    if max(config.frames, config.views) > 99:
        raise InputError("--frames and --views can be 99 at most: file names have two digits.")
    if config.cluster is not None and config.workers != 1:
        raise InputError("--workers is for this process: leave it out with --cluster (local:N is N processes).")
    if config.clips != "all" and config.clips < 1:
        raise InputError("--clips must be at least 1, or all.")
    if config.renderer == "compiled" and config.environments is not None:
        raise InputError("The compiled renderer reads no environment pictures: leave out --environments or --renderer.")
    if not config.orbits:
        raise InputError("--orbits must name at least one of static and dynamic.")
    if config.environments is not None and not config.environments.is_dir():
        raise InputError(f"--environments {config.environments} is not a folder: give one with HDR or EXR pictures.")


def _check_output(output: Path) -> None:
    """Raise InputError where the output is a folder of something else."""
    others = [path for path in output.iterdir() if path.name != LOCK_FILE] if output.exists() else []
    if others and not (output / DATASET_FILE).is_file():
        raise InputError(f"{output} is not empty and holds no rendered data: give a new folder.")


def _start(config: RenderConfig) -> None:
    """Describe the folder, or see that what is in it was made with the same settings."""
    path = config.output / DATASET_FILE
    described = {"format": FORMAT, "version": FORMAT_VERSION, "settings": config.settings()}
    if path.is_file():
        try:
            earlier = json.loads(path.read_text())["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged ({error}): use another output folder.") from error
        changed = [name for name, value in config.settings().items() if earlier.get(name) != value]
        if changed and finished_names(config.output):
            listed = ", ".join(f"{name} {earlier.get(name)} -> {config.settings()[name]}" for name in changed)
            raise InputError(f"{config.output} was rendered with other settings ({listed}): use another output folder.")
        if not changed:
            return
    with disk_errors(path), atomic_path(path) as temporary:
        temporary.write_text(json.dumps(described, indent=1))


def _list_skipped(output: Path, skipped: dict[str, str]) -> None:
    if skipped:
        with disk_errors(output / SKIPPED_FILE), atomic_path(output / SKIPPED_FILE) as temporary:
            lines = [json.dumps({"name": name, "reason": reason}) for name, reason in sorted(skipped.items())]
            temporary.write_text("\n".join(lines) + "\n")


def pack_shards(output: Path, objects: int, rest: bool = False) -> None:
    """Move finished objects into shards of `objects`; with `rest`, also the last, smaller one."""
    folders = sorted(path for path in (output / "objects").glob("[!.]*") if path.is_dir())
    packed = {path.name for path in folders} & _sharded_names(output)
    for folder in (folder for folder in folders if folder.name in packed):
        shutil.rmtree(folder)  # killed between writing a shard and removing what it holds
    folders = [folder for folder in folders if folder.name not in packed]
    while len(folders) >= objects or (rest and folders):
        taken, folders = folders[:objects], folders[objects:]
        number = len(list((output / "shards").glob("[!.]*.tar")))
        write_shard(output / "shards" / f"{number:06d}.tar", taken)
        for folder in taken:
            shutil.rmtree(folder)


def _sharded_names(output: Path) -> set[str]:
    loose = {path.name for path in (output / "objects").glob("[!.]*")}
    names: set[str] = set()
    for shard in (output / "shards").glob("[!.]*.tar"):
        with tarfile.open(shard) as tar:
            names |= {info.name.partition(".")[0] for info in tar}
    return names & loose


def render_asset(asset: Asset, config: RenderConfig, blender: list[str]) -> None:
    """Render one asset into OUT/objects/NAME.

    Raises:
        AssetError: when it cannot be rendered.
    """
    rng = np.random.default_rng([config.seed, int(content_hash(asset.name)[:12], 16)])
    cameras = {orbit: draw_orbit(rng, orbit, config.views) for orbit in config.orbits}
    white = rng.random() >= config.random_background
    colour = rng.integers(0, 256, 3).tolist()
    background = [255, 255, 255] if white else colour
    folder = config.output / "objects" / asset.name
    if asset.seed is not None:
        _render_creature(asset, config, cameras, background, folder)
    elif not needs_blender(asset, config):
        _render_clip(asset, config, cameras, background, folder, rng)
    else:
        _render_file(asset, config, cameras, background, folder, blender, rng)


def unit_cameras(cameras: dict[Orbit, OrbitCameras]) -> Float[np.ndarray, "o v 4 4"]:
    """Cameras at distance 1 that look at the origin, for every orbit."""
    return np.stack([look_at_cameras(c.azimuths_deg, c.elevations_deg, 1.0) for c in cameras.values()])


def _record(
    asset: Asset,
    config: RenderConfig,
    cameras: dict[Orbit, OrbitCameras],
    background: list[int],
    environment: str,
    rest: dict[str, object],
    source: dict[str, object],
) -> ObjectRecord:
    orbits = {
        orbit.value: {"azimuths_deg": c.azimuths_deg.tolist(), "elevations_deg": c.elevations_deg.tolist()}
        for orbit, c in cameras.items()
    }
    return ObjectRecord(
        name=asset.name,
        source=source,
        licence=asset.licence,
        frames=config.frames,
        size=config.size,
        orbits=orbits,
        fov_deg=FIELD_OF_VIEW_DEG,
        background=background,
        environment=environment,
        **rest,  # type: ignore[arg-type]
    )


def _render_creature(
    asset: Asset, config: RenderConfig, cameras: dict[Orbit, OrbitCameras], background: list[int], folder: Path
) -> None:
    assert asset.seed is not None
    subject = creature(asset.seed)
    preview = look_at_cameras(np.zeros(1), np.zeros(1))
    step, motion = 0.0, 0.0
    if config.frames > 1:
        step, motion = key_frame_step(
            lambda moment: render(subject, np.array([moment]), preview, PREVIEW_SIZE)[0, 0] / 255.0,
            0.0, 1.0, config.frames, SMALLEST_STEP, config.enough_motion,
        )  # fmt: skip
    times = step * np.arange(config.frames)
    surface = subject.surface_points(times)
    centre, side = bounding_box(surface)
    units = unit_cameras(cameras)
    distance = fitting_distance((surface.reshape(-1, 3) - centre) / side, units.reshape(-1, 4, 4), FIELD_OF_VIEW_DEG)
    placed = units.copy()
    placed[..., :3, 3] = centre + distance * side * units[..., :3, 3]
    points = (material_points(subject, times) - centre) / side
    rest = {
        "times": times.tolist(),
        "distance": distance,
        "depth_range": 2.0 * distance,
        "measurements": {
            "motion": motion,
            "rigid_share": rigid_share(points),
            "drift": drift(points),
            "size_change": size_change(surface),
            "flatness": float(np.ptp(surface.reshape(-1, 3), axis=0).min() / side),
        },
    }

    def pictures() -> Iterator[tuple[str, bytes]]:
        for orbit, rig in zip(cameras, placed, strict=True):
            matrix = render(subject, times, rig, config.size)
            for t, v in np.ndindex(config.frames, config.views):
                yield picture_name(orbit, t, v), png(matrix[t, v])
                if config.maps:
                    yield from _maps(
                        orbit, t, v, *_creature_maps(subject, float(times[t]), rig[v], config.size), side, rest
                    )

    record = _record(asset, config, cameras, background, "creature", rest, asset.source)
    write_object(folder, record, pictures())


def material_points(subject: Creature, times: Float[np.ndarray, " t"]) -> Float[np.ndarray, "t n 3"]:
    """The same points of a creature's parts at all times: ends of every part's axes."""
    rotations, positions = subject.poses(times)
    half = subject.surface["dims"][:, :3]
    ends = np.einsum("tpij,pj->tpji", rotations, half) + positions[:, :, None]
    return np.concatenate([positions, ends.reshape(len(times), -1, 3)], axis=1)


def _creature_maps(subject: Creature, time: float, c2w: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    rotations, positions = subject.poses(np.array([time]))
    return draw_geometry(c2w, FIELD_OF_VIEW_DEG, size, rotations[0], positions[0], subject.surface)


def _maps(
    orbit: Orbit, t: int, v: int, depth: np.ndarray, normals: np.ndarray, side: float, rest: dict[str, object]
) -> Iterator[tuple[str, bytes]]:
    """Depth (world units, 0 where nothing is) and world normals as PNG files."""
    far = float(rest["depth_range"])  # type: ignore[arg-type]
    levels = np.clip(depth / side / far * DEPTH_LEVELS, 0, DEPTH_LEVELS).round().astype(np.uint16)
    yield picture_name(orbit, t, v, "depth"), png(levels)
    colours = np.where((depth > 0)[..., None], normals * 0.5 + 0.5, 0.0)
    yield picture_name(orbit, t, v, "normal"), png((colours * 255).round().astype(np.uint8))


def _render_file(
    asset: Asset,
    config: RenderConfig,
    cameras: dict[Orbit, OrbitCameras],
    background: list[int],
    folder: Path,
    blender: list[str],
    rng: np.random.Generator,
) -> None:
    assert asset.path is not None
    environment, description, turn, _ = choose_environment(rng, config.environments)
    if not asset.path.is_file() or asset.path.stat().st_size == 0:
        raise AssetError("the file is missing or empty")
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=folder.parent))
    try:
        job = {
            "asset": str(asset.path.resolve()),
            "frames": config.frames,
            "size": config.size,
            "samples": config.samples,
            "device": config.device,
            "maps": config.maps,
            "fov_deg": FIELD_OF_VIEW_DEG,
            "enough_motion": config.enough_motion,
            "orbits": [orbit.value for orbit in cameras],
            "unit_cameras": unit_cameras(cameras).tolist(),
            "preview_camera": look_at_cameras(np.array([30.0]), np.array([10.0]), 1.0)[0].tolist(),
            "environment": description,
            "environment_turn_deg": turn,
            "seed": int(rng.integers(2**31)),
        }
        rest = run_job(blender, job, scratch, config.timeout_s)
        source = {**asset.source, "sha256": sha256(asset.path)}
        record = _record(asset, config, cameras, background, environment, rest, source)
        write_object(folder, record, _rendered_files(scratch, cameras, config, rest))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _render_clip(
    asset: Asset,
    config: RenderConfig,
    cameras: dict[Orbit, OrbitCameras],
    background: list[int],
    folder: Path,
    rng: np.random.Generator,
) -> None:
    assert asset.path is not None
    environment, description, turn, _ = choose_environment(rng, None)
    units = unit_cameras(cameras)
    clip = prepare_clip(asset, config.frames, config.enough_motion, units, lighting_of(description, turn))
    depth_range = 2.0 * clip.distance
    rest: dict[str, object] = {
        "times": clip.times.tolist(),
        "distance": clip.distance,
        "depth_range": depth_range,
        "measurements": clip.measurements,
    }
    placed = clip.cameras(units)

    def pictures() -> Iterator[tuple[str, bytes]]:
        for t, moment in enumerate(clip.pictures(units, config.size)):
            for o, orbit in enumerate(cameras):
                for v in range(config.views):
                    yield picture_name(orbit, t, v), png(moment[o, v])
                    if config.maps:
                        yield from _maps(orbit, t, v, *clip.maps(t, placed[o, v], config.size), 1.0, rest)

    source = {**asset.source, "sha256": sha256(asset.path)}
    write_object(folder, _record(asset, config, cameras, background, environment, rest, source), pictures())


def _rendered_files(
    scratch: Path, cameras: dict[Orbit, OrbitCameras], config: RenderConfig, rest: dict[str, object]
) -> Iterator[tuple[str, bytes]]:
    """What Blender left, as the files of the object."""
    for orbit in cameras:
        for t, v in np.ndindex(config.frames, config.views):
            name = picture_name(orbit, t, v)
            if not (scratch / name).is_file():
                raise AssetError(f"Blender did not write {name}")
            yield name, (scratch / name).read_bytes()
            if config.maps:
                with np.load(scratch / f"{orbit.value}.maps.{t:02d}.{v:02d}.npz") as maps:
                    yield from _maps(orbit, t, v, maps["depth"], maps["normals"], 1.0, rest)


def command(config: RenderConfig, say: Callable[[str], None] = print) -> None:
    """Render and say how it went."""
    summary = render_dataset(config)
    say(
        f"{config.output}: {len(summary.rendered)} objects rendered, {len(summary.already)} were there, "
        f"{len(summary.skipped)} skipped."
    )
    for name, reason in sorted(summary.skipped.items()):
        say(f"  skipped {name}: {reason}.")
