"""Training samples straight from a folder of GLBs: pictures, volumes and surface colours of a random asset and motion.

Loaded assets stay in memory up to a limit, so a training step pays for posing and drawing only.
"""

import hashlib
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, UInt8

from sv4d_ns.geometry.cameras import CAMERA_RADIUS, FIELD_OF_VIEW_DEG, look_at_cameras
from sv4d_ns.training_data import rasterise, volume
from sv4d_ns.training_data.blender import AssetError
from sv4d_ns.training_data.exclusions import is_test_object
from sv4d_ns.training_data.gltf_scene import Placement, PosedMesh, Scene, load_scene, pose, yaw_rotation
from sv4d_ns.training_data.lighting import LightField, Lighting, draw_lighting, light_field
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.files import atomic_path, content_hash

LARGEST_RADIUS = 0.566
"""Of the sphere around the origin that holds the object in all frames: inside 0.97 of the frustum's cone."""
MOST_CLOSER = 1.25
"""Largest factor by which a crop around the object may enlarge it: beyond, most of what is long and seen from in front
lies outside of the cameras' sight."""
LARGEST_SHARE = 0.9
"""Of the input picture's side that the object's box may take (both as in the 4D benchmark)."""
MOST_DRIFT = 0.6
"""Largest way of the centre in a window of a clip, relative to the object's diagonal, as the assets' curation asks."""
SHORTEST_WINDOW_S, LONGEST_WINDOW_S = 0.35, 2.2
WINDOW_TRIES = 4
TRIES = 20
"""Draws for each asset there is, before none is said to be usable."""
PROBES = 5
"""Moments of a window that decide the size where fewer frames are asked for."""


@dataclass
class AssetSample:
    """An asset's motion in the world of the cameras: T moments under one light. Made by `AssetLibrary.sample`.

    Posed meshes and light are kept once made, so the calls below share them.
    """

    name: str
    scene: Scene
    clip: int | None
    """None: the rest pose."""
    times: Float[np.ndarray, " t"]
    """Seconds of the clip."""
    placement: Placement
    lighting: Lighting
    _meshes: dict[int, PosedMesh] = field(default_factory=dict, repr=False)
    _lights: dict[int, LightField] = field(default_factory=dict, repr=False)

    @property
    def num_frames(self) -> int:
        return len(self.times)

    def mesh(self, frame: int) -> PosedMesh:
        """The posed mesh of a frame."""
        frame = 0 if self.clip is None else frame
        if frame not in self._meshes:
            self._meshes[frame] = pose(self.scene, self.clip, float(self.times[frame]), self.placement)
        return self._meshes[frame]

    def light(self, frame: int) -> LightField:
        """The light around the posed mesh of a frame."""
        frame = 0 if self.clip is None else frame
        if frame not in self._lights:
            self._lights[frame] = light_field(self.mesh(frame), self.lighting)
        return self._lights[frame]

    def draw(
        self,
        c2w: Float[np.ndarray, "v 4 4"],
        size: int,
        frames: Sequence[int] | None = None,
        fov_deg: float = FIELD_OF_VIEW_DEG,
    ) -> UInt8[np.ndarray, "t v h w 4"]:
        """RGBA pictures (straight alpha, white where nothing is) of some frames (default all) from all cameras."""
        chosen = range(self.num_frames) if frames is None else frames
        if self.clip is None:  # one moment, however often it is asked for
            return np.repeat(rasterise.draw(self.mesh(0), self.light(0), c2w, size, fov_deg)[None], len(chosen), axis=0)
        return np.stack([rasterise.draw(self.mesh(t), self.light(t), c2w, size, fov_deg) for t in chosen])

    def occupancy(
        self, frame: int, input_c2w: Float[np.ndarray, "4 4"], resolution: int = volume.RESOLUTION
    ) -> Bool[np.ndarray, "d h w"]:
        """The true volume of a frame in the input camera's frustum grid (`volume.occupancy`)."""
        return volume.occupancy(self.mesh(frame), input_c2w, resolution)

    def nearest_colours(self, frame: int, points: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
        """sRGB in [0, 1], lit as drawn, of the surface nearest to world points (`volume.nearest_colours`)."""
        return volume.nearest_colours(self.mesh(frame), self.light(frame), points)


def fit(
    points: Float[np.ndarray, "n 3"], rotation: Float[np.ndarray, "3 3"], input_c2w: Float[np.ndarray, "4 4"]
) -> Placement:
    """Centre and scale of an object as in the 4D benchmark: box centred, in sight of every camera on the sphere.

    Args:
        points: of all frames, in the asset's z-up space.
        rotation: applied to them first.
        input_c2w: the input camera.

    Raises:
        AssetError: the points have no extent.
    """
    turned = points @ rotation.T
    low, high = turned.min(axis=0), turned.max(axis=0)
    centre = (low + high) / 2
    radius = float(np.linalg.norm(turned - centre, axis=1).max())
    if not np.isfinite(radius) or radius <= 1e-9:
        raise AssetError("its geometry has no extent")
    scale = LARGEST_RADIUS / radius
    # few points decide the box: those that are extreme before perspective, and more than enough of them
    seen = (turned - centre) @ input_c2w[:3, :3]
    tangent = np.tan(np.deg2rad(FIELD_OF_VIEW_DEG) / 2)
    for _ in range(8):
        depth = CAMERA_RADIUS - scale * seen[:, 2]
        box = np.ptp(scale * seen[:, :2] / depth[:, None], axis=0).max() / (2 * tangent)
        if box <= LARGEST_SHARE:
            break
        scale *= LARGEST_SHARE / box * 0.999
    return Placement(rotation, centre, scale)


def as_cropped(
    placement: Placement, points: Float[np.ndarray, "n 3"], input_c2w: Float[np.ndarray, "4 4"]
) -> Placement:
    """The placement in which a film cropped around its object shows it: the box in the picture is in the middle.

    Where a camera looks at the object's middle in space, the place of its box in the picture tells which way it faces.
    A model that saw nothing else is misled by a crop, which most films are.
    """
    turned = points @ placement.rotation.T
    tangent = np.tan(np.deg2rad(FIELD_OF_VIEW_DEG) / 2)
    centre, scale = placement.centre, placement.scale
    for _ in range(3):
        seen = scale * (turned - centre) @ input_c2w[:3, :3]
        places = seen[:, :2] / (CAMERA_RADIUS - seen[:, 2:])
        middle = (places.min(axis=0) + places.max(axis=0)) / 2
        centre = centre + input_c2w[:3, :2] @ middle * CAMERA_RADIUS / scale
        wanted = scale * LARGEST_SHARE * 2 * tangent / np.ptp(places, axis=0).max()
        scale = min(wanted, MOST_CLOSER * placement.scale)
    return Placement(placement.rotation, centre, scale)


def asset_names(folder: Path) -> list[str]:
    """Paths of the GLBs below a folder, without suffix, in order."""
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.glb"))


def is_held_out(name: str, share: float) -> bool:
    """Whether an asset is kept from training: decided by its name alone, the same for ever."""
    digest = hashlib.sha256(Path(name).name.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


class AssetLibrary:
    """GLBs below a folder, split by identity into training and held-out ones, drawn from at random.

    Args:
        folder: searched for `*.glb`, subfolders too.
        cache: folder for decoded assets (made where it is not there); None decodes again in every process.
        memory_bytes: how much decoded assets may hold.
        held_out_share: part of the names that is held out.

    Raises:
        InputError: the folder is missing or holds no GLB that may be trained on.

    Attributes:
        train, held_out: names, as `animated/NAME`; objects that published evaluations use are in neither.
        skipped: name -> reason, of assets that could not be used so far; `sample` goes on to another one.
    """

    def __init__(
        self,
        folder: Path,
        cache: Path | None = None,
        memory_bytes: int = 1_500_000_000,
        held_out_share: float = 0.1,
    ):
        self.folder, self.cache, self.memory_bytes = Path(folder), cache, memory_bytes
        if not self.folder.is_dir():
            raise InputError(f"The folder of assets {folder} does not exist: give one that holds GLB files.")
        names = [name for name in asset_names(self.folder) if not is_test_object(name)]
        if not names:
            raise InputError(
                f"The folder of assets {folder} holds no GLB file, or only test objects of published evaluations: give "
                "another one."
            )
        self.held_out = tuple(name for name in names if is_held_out(name, held_out_share))
        self.train = tuple(name for name in names if not is_held_out(name, held_out_share))
        self.skipped: dict[str, str] = {}
        self._unreadable: dict[str, str] = {}
        self._scenes: OrderedDict[str, Scene] = OrderedDict()
        self._bytes = 0

    def scene(self, name: str) -> Scene:
        """The decoded asset, from memory, the cache folder or the GLB.

        Raises:
            AssetError: it cannot be used.
        """
        if name in self._scenes:
            self._scenes.move_to_end(name)
            return self._scenes[name]
        if name in self._unreadable:
            raise AssetError(self._unreadable[name])
        try:
            scene = self._read(name)
        except AssetError as error:
            self._unreadable[name] = str(error)
            raise
        self._scenes[name] = scene
        self._bytes += scene.num_bytes
        while self._bytes > self.memory_bytes and len(self._scenes) > 1:
            _, oldest = self._scenes.popitem(last=False)
            self._bytes -= oldest.num_bytes
        return scene

    def _read(self, name: str) -> Scene:
        path = self.folder / f"{name}.glb"
        if not path.is_file():
            raise AssetError("the file is missing")
        if self.cache is None:
            return load_scene(path)
        stat = path.stat()
        key = content_hash([str(path.resolve()), stat.st_size, stat.st_mtime_ns, CACHE_VERSION])
        kept = self.cache / f"{key}.npz"
        if kept.is_file():
            try:
                return Scene.open(kept)
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                kept.unlink(missing_ok=True)  # damaged: decode again
        scene = load_scene(path)
        with atomic_path(kept) as temporary:
            scene.save(temporary)
        return scene

    def sample(
        self,
        rng: np.random.Generator,
        frames: int = 1,
        names: Sequence[str] | None = None,
        elevation_deg: float = 0.0,
        kind: Literal["animated", "static"] | None = None,
        yaw_deg: float | None = None,
        lighting: Lighting | None = None,
        longest_window_s: float = LONGEST_WINDOW_S,
        largest_stretch: float = 1.0,
        cropped_share: float = 0.0,
    ) -> AssetSample:
        """A random asset, clip, window of it, turn, light and stretch.

        Args:
            frames: T, moments evenly spaced over the window.
            names: drawn from, default `train`.
            elevation_deg: of the input camera (azimuth 0), for which the size is chosen.
            kind: only assets below `animated/` or `static/`; default any.
            yaw_deg: turn about z after glTF's front +z was laid on +x (towards the input camera); default random.
            lighting: default random.
            longest_window_s: of the clip that the T moments cover.
            largest_stretch: each axis of the asset is made longer or shorter by a random factor of at most this.
            cropped_share: of the samples that are placed as a film cropped around its object shows it (`as_cropped`).

        Raises:
            InputError: none of the assets can be used.
        """
        pool = [name for name in (self.train if names is None else names) if kind is None or name.startswith(kind)]
        for _ in range(TRIES * len(pool)):
            # what failed before is drawn again, and takes as much of `rng`: a process that starts later does the same
            name, own = pool[int(rng.integers(len(pool)))], np.random.default_rng(rng.integers(2**63))
            try:
                return self._sample(
                    name,
                    own,
                    frames,
                    elevation_deg,
                    yaw_deg,
                    lighting,
                    longest_window_s,
                    largest_stretch,
                    cropped_share,
                )
            except AssetError as error:
                self.skipped[name] = str(error)
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(self.skipped.items())[:3])
        raise InputError(f"No asset of {self.folder} can be used ({reasons or 'none was asked for'}).")

    def _sample(
        self,
        name: str,
        rng: np.random.Generator,
        frames: int,
        elevation_deg: float,
        yaw_deg: float | None,
        lighting: Lighting | None,
        longest_window_s: float,
        largest_stretch: float,
        cropped_share: float,
    ) -> AssetSample:
        scene = self.scene(name)
        turn = rng.uniform(0.0, 360.0) if yaw_deg is None else yaw_deg
        rotation = yaw_rotation(90.0 + turn)
        if largest_stretch > 1.0:
            rotation = rotation * largest_stretch ** rng.uniform(-1.0, 1.0, 3)
        light = draw_lighting(rng) if lighting is None else lighting
        cropped = cropped_share > 0.0 and rng.random() < cropped_share
        moving = np.flatnonzero(scene.clip_spans[:, 1] > scene.clip_spans[:, 0])
        input_c2w = look_at_cameras(np.zeros(1), np.array([elevation_deg]))[0]

        def place_for(points: Float[np.ndarray, "n 3"]) -> Placement:
            placement = fit(points, rotation, input_c2w)
            return as_cropped(placement, points, input_c2w) if cropped else placement

        if not len(moving):
            placement = place_for(_drawn(pose(scene, None, 0.0)))
            return AssetSample(name, scene, None, np.zeros(frames), placement, light)
        clip = int(rng.choice(moving))
        times, meshes = _window(scene, clip, frames, rng, longest_window_s)
        placement = place_for(np.concatenate([_drawn(mesh) for mesh in meshes]))
        sample = AssetSample(name, scene, clip, times, placement, light)
        if len(meshes) == frames:
            sample._meshes.update({t: placed(mesh, placement) for t, mesh in enumerate(meshes)})
        return sample


CACHE_VERSION = 2
"""Of the decoded arrays: a change of `Scene` changes it."""


def _drawn(mesh: PosedMesh) -> Float[np.ndarray, "n 3"]:
    """Vertices that a face uses."""
    used = np.zeros(len(mesh.positions), bool)
    used[mesh.scene.faces.reshape(-1)] = True
    return mesh.positions[used]


def _window(
    scene: Scene, clip: int, frames: int, rng: np.random.Generator, longest_s: float
) -> tuple[Float[np.ndarray, " t"], list[PosedMesh]]:
    """Times of T moments in a random window of a clip in which the object stays about its place, posed in asset space.

    For few frames there are more poses than times: they decide the size.
    """
    first, last = scene.clip_spans[clip]
    length = min(last - first, rng.uniform(min(SHORTEST_WINDOW_S, longest_s / 3), longest_s))
    for _ in range(WINDOW_TRIES):
        start = rng.uniform(first, last - length)
        count = frames if frames >= PROBES else PROBES
        moments = start + length * np.arange(count) / max(count - 1, 1)
        meshes = [pose(scene, clip, float(moment)) for moment in moments]
        centres = np.stack([mesh.positions.mean(axis=0) for mesh in meshes])
        diagonal = float(np.linalg.norm(np.ptp(meshes[0].positions, axis=0)))
        if np.linalg.norm(centres - centres[0], axis=1).max() <= MOST_DRIFT * diagonal:
            break
        length *= 0.5
    if count == frames:
        return moments, meshes
    return (np.linspace(start, start + length, frames) if frames > 1 else rng.uniform(start, start + length, 1)), meshes


def placed(mesh: PosedMesh, placement: Placement) -> PosedMesh:
    """A mesh posed in the asset's own space, in the world."""
    positions = placement.scale * (mesh.positions @ placement.rotation.T - placement.centre)
    return replace(mesh, positions=np.ascontiguousarray(positions), normals=mesh.normals @ placement.rotation.T)
