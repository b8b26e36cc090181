"""The second renderer of `sv4d data render`: every clip of a GLB, posed and drawn here, without Blender."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from sv4d_ns.export.colour.raster import rasterise as rasterise_coverage
from sv4d_ns.geometry.cameras import FIELD_OF_VIEW_DEG, look_at_cameras
from sv4d_ns.training_data.blender import AssetError
from sv4d_ns.training_data.framing import (
    bounding_box,
    drift,
    fitting_distance,
    key_frame_step,
    rigid_share,
    size_change,
)
from sv4d_ns.training_data.gltf_scene import Placement, PosedMesh, Scene, load_scene, pose
from sv4d_ns.training_data.lighting import Lighting, direction, light_field
from sv4d_ns.training_data.rasterise import draw
from sv4d_ns.training_data.sources import Asset

FRAME_S = 1 / 24
"""Smallest step between key frames, as with Blender."""
PREVIEW_SIZE = 32
POINTS = 4000
"""Vertices whose motion is measured."""
PROBES = 33


def list_clips(assets: list[Asset], clips: int | str, moving: bool) -> tuple[list[Asset], dict[str, str]]:
    """One asset per clip to be rendered, and the reason of each one that cannot be.

    A file with one clip keeps its name; the clips of others are called NAME__00, NAME__01, ...

    Args:
        clips: how many of a file, the first ones, or "all".
        moving: False for still pictures, which need no clip.
    """
    listed: list[Asset] = []
    skipped: dict[str, str] = {}
    for asset in assets:
        assert asset.path is not None
        if not asset.path.is_file() or asset.path.stat().st_size == 0:
            skipped[asset.name] = "the file is missing or empty"
            continue
        try:
            scene = load_scene(asset.path)
        except AssetError as error:
            skipped[asset.name] = str(error)
            continue
        if not moving:
            listed.append(asset)
        elif not scene.num_clips:
            skipped[asset.name] = "it has no animation (render still assets with --frames 1)"
        else:
            wanted = scene.num_clips if clips == "all" else min(int(clips), scene.num_clips)
            for clip in range(wanted):
                name = asset.name if scene.num_clips == 1 else f"{asset.name}__{clip:02d}"
                if scene.clip_spans[clip, 1] > scene.clip_spans[clip, 0]:
                    source = {**asset.source, "clip": str(scene.clip_names[clip])}
                    listed.append(replace(asset, name=name, clip=clip, source=source))
                else:
                    skipped[name] = f"its clip '{scene.clip_names[clip]}' has no length"
    return listed, skipped


def lighting_of(environment: dict, turn_deg: float) -> Lighting:  # type: ignore[type-arg]
    """The light of one of the built-in environments; a sun of Blender's strength pi is a lamp of strength 1."""
    lamps = environment["lamps"]
    return Lighting(
        sky=(np.array(environment["horizon"]) + np.array(environment["zenith"])) / 2,
        ground=np.array(environment["ground"]),
        directions=np.array(
            [direction(lamp["azimuth_deg"] + turn_deg, lamp["elevation_deg"]) for lamp in lamps]
        ).reshape(-1, 3),
        strengths=np.array(
            [np.array(lamp["colour"]) * lamp["strength"] / np.pi for lamp in lamps]
        ).reshape(-1, 3),
        tint=np.ones(3),
    )  # fmt: skip


@dataclass(frozen=True)
class ClipPictures:
    """A clip ready to be drawn: key times (seconds), where its cameras stand, and what is recorded about it."""

    scene: Scene
    clip: int | None
    times: Float[np.ndarray, " t"]
    placement: Placement
    distance: float
    lighting: Lighting
    measurements: dict[str, float]

    def pictures(self, unit_cameras: Float[np.ndarray, "o v 4 4"], size: int) -> Iterator[np.ndarray]:
        """RGBA pictures [o, v, h, w, 4] of one moment after the other."""
        cameras = self.cameras(unit_cameras)
        for time in self.times:
            mesh = pose(self.scene, self.clip, float(time), self.placement)
            light = light_field(mesh, self.lighting)
            yield np.stack([draw(mesh, light, rig, size) for rig in cameras])

    def cameras(self, unit_cameras: Float[np.ndarray, "o v 4 4"]) -> Float[np.ndarray, "o v 4 4"]:
        """Cameras at the distance at which everything is in sight."""
        placed = unit_cameras.copy()
        placed[..., :3, 3] *= self.distance
        return placed

    def maps(self, frame: int, c2w: Float[np.ndarray, "4 4"], size: int) -> tuple[np.ndarray, np.ndarray]:
        """Depth (object's sides, 0 where nothing is) and world normals of a camera's picture at a moment."""
        return geometry_maps(pose(self.scene, self.clip, float(self.times[frame]), self.placement), c2w, size)


def prepare_clip(
    asset: Asset, frames: int, enough_motion: float, unit_cameras: Float[np.ndarray, "o v 4 4"], lighting: Lighting
) -> ClipPictures:
    """Choose key times and framing as `blender_worker` does.

    Raises:
        AssetError: it cannot be rendered.
    """
    assert asset.path is not None
    scene = load_scene(asset.path)
    clip = asset.clip if frames > 1 else None
    step, motion, first = 0.0, 0.0, 0.0
    if clip is not None:
        first, last = scene.clip_spans[clip]
        rough = _normalising(_points(scene, clip, np.linspace(first, last, PROBES)))
        preview = look_at_cameras(np.array([30.0]), np.array([10.0]), 2.0)

        def shown(moment: float) -> np.ndarray:
            mesh = pose(scene, clip, moment, rough)
            return draw(mesh, light_field(mesh, lighting), preview, PREVIEW_SIZE)[0] / 255.0

        step, motion = key_frame_step(shown, first, last, frames, FRAME_S, enough_motion)
    times = first + step * np.arange(frames)
    points = _points(scene, clip, times)
    placement = _normalising(points)
    normalised = placement.scale * (points - placement.centre)
    distance = fitting_distance(normalised.reshape(-1, 3), unit_cameras.reshape(-1, 4, 4), FIELD_OF_VIEW_DEG)
    followed = normalised[:, :: max(normalised.shape[1] // POINTS, 1)]
    measurements = {
        "motion": motion,
        "rigid_share": rigid_share(followed),
        "drift": drift(followed),
        "size_change": size_change(normalised),
        "meshes": float(len(np.unique(scene.bone_nodes[scene.bones[scene.faces[:, 0], 0]]))),
        "flatness": float(np.ptp(normalised.reshape(-1, 3), axis=0).min()),
    }
    return ClipPictures(scene, clip, times, placement, distance, lighting, measurements)


def _points(scene: Scene, clip: int | None, times: Float[np.ndarray, " t"]) -> Float[np.ndarray, "t n 3"]:
    """Vertices of faces at all times, asset space."""
    used = np.unique(scene.faces)
    return np.stack([pose(scene, clip, float(time)).positions[used] for time in times])


def _normalising(points: Float[np.ndarray, "t n 3"]) -> Placement:
    """The largest side of the box becomes 1, its centre the origin."""
    try:
        centre, side = bounding_box(points)
    except ValueError as error:
        raise AssetError(str(error)) from error
    return Placement(np.eye(3), centre, 1.0 / side)


def geometry_maps(
    mesh: PosedMesh, c2w: Float[np.ndarray, "4 4"], size: int
) -> tuple[Float[np.ndarray, "h w"], Float[np.ndarray, "h w 3"]]:
    """Depth along the optical axis (0 where nothing is) and world normals towards the camera, at pixel centres."""
    seen = (mesh.positions - c2w[:3, 3]) @ c2w[:3, :3]
    depth = -seen[:, 2]
    focal = 0.5 * size / np.tan(np.deg2rad(FIELD_OF_VIEW_DEG) / 2)
    safe = np.where(depth > 0, depth, 1.0)[:, None]
    pixels = seen[:, :2] / safe * [focal, -focal] + size / 2
    shown = rasterise_coverage(pixels, depth, mesh.scene.faces, size)
    hit = shown.face >= 0
    corners = mesh.scene.faces[shown.face[hit]]
    normals = np.einsum("nk,nkd->nd", shown.barycentric[hit], mesh.normals[corners])
    places = np.einsum("nk,nkd->nd", shown.barycentric[hit], mesh.positions[corners])
    away = np.einsum("nd,nd->n", normals, places - c2w[:3, 3]) > 0
    normals[away] *= -1.0
    out = np.zeros((size, size, 3))
    out[hit] = normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
    return np.where(hit, shown.depth, 0.0), out
