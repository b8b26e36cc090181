"""`sv4d data curate DATA`: which rendered objects are good training data, and why the others are not.

The kinds of reason are those of SV4D's ObjaverseDy (licence, too little motion), 4Diffusion's hand selection (static,
leaves the picture, rotated camera, scenes) and, beyond them, flicker, vanishing geometry and duplicates. No paper gives
numbers; the thresholds are our own, set on procedural creatures and deliberately bad assets (docs/data.md). Nothing is
deleted: `curation.json` names what is kept, and the trainer reads that.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from jaxtyping import Float, UInt8
from PIL import Image

from sv4d_ns.training_data.dataset import CURATION_FILE, ObjectRecord, RenderedDataset, disk_errors
from sv4d_ns.training_data.exclusions import is_test_object
from sv4d_ns.training_data.framing import neighbour_differences
from sv4d_ns.training_data.orbits import Orbit
from sv4d_ns.training_data.report import write_html, write_sheet
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.files import atomic_path
from sv4d_ns.utils.progress import bar

LOOKED_AT = 64
"""Pixels per side at which pictures are measured."""
MEASURED_VIEWS = 4
DESCRIPTOR_SIZE = 12


@dataclass(frozen=True)
class Thresholds:
    """What makes an object unfit. All shares and differences are in [0, 1]."""

    min_motion: float = 0.01
    """Least mean difference of neighbouring frames on the object (static below)."""
    max_motion: float = 0.8
    """Largest mean difference of neighbouring frames: above, frames have nothing in common."""
    max_outside: float = 0.05
    """Largest share of pictures in which the object touches the border."""
    min_coverage: float = 0.01
    """Least mean share of a picture that the object covers."""
    max_coverage: float = 0.6
    """Largest mean share: above, it is a scene around the camera rather than an object."""
    max_meshes: float = 300
    """Largest number of separate meshes: above, it is a scene."""
    min_flatness: float = 0.01
    """Least extent along the thinnest axis over the largest: below, it is a flat picture or a ground."""
    max_rigid_share: float = 0.97
    """Largest share of the motion that one rigid motion explains: above, the camera or a turntable moves."""
    max_drift: float = 0.6
    """Largest path of the centre in units of the object's largest side (of the box around the whole motion)."""
    min_size_change: float = 0.3
    """Least ratio of the smallest to the largest box diagonal: below, geometry vanishes or appears."""
    min_area_ratio: float = 0.25
    """Least ratio of the smallest to the median silhouette of a view: below, geometry vanishes or appears."""
    max_flicker: float = 0.12
    """Largest difference of a frame to both neighbours beyond the neighbours' own difference."""
    min_difference: float = 0.012
    """Least difference of two objects' mean pictures; below, the later one is a duplicate."""
    licences: tuple[str, ...] = ("cc0", "cc0-1.0", "by", "cc-by", "cc-by-4.0", "by-sa", "cc-by-sa", "cc-by-sa-4.0")
    """Licences that are accepted, compared without case."""
    keep_unknown_licence: bool = True
    """Keep objects whose source states no licence (your own assets)."""
    keep_test_objects: bool = False
    """Keep the test objects of ObjaverseDy and Consistent4D."""


@dataclass(frozen=True)
class CurateConfig:
    """Which rendered objects are good training data."""

    data: Annotated[Path, tyro.conf.Positional]
    """Folder made by `sv4d data render`."""
    thresholds: Thresholds = field(default_factory=Thresholds)
    report: Path | None = None
    """Folder of report.html and report.png; DATA/report by default."""


@dataclass(frozen=True)
class Verdict:
    """One object: its measurements, why it is dropped (empty: kept), and a strip of thumbnails [h, w, 3]."""

    name: str
    measurements: dict[str, float]
    reasons: list[str]
    thumbnail: UInt8[np.ndarray, "h w 3"]


def curate(config: CurateConfig) -> list[Verdict]:
    """Judge every object; writes DATA/curation.json and the report.

    Raises:
        InputError: when the folder holds no rendered data.
    """
    dataset = RenderedDataset(config.data, curated=False)
    verdicts: list[Verdict] = []
    descriptors: list[np.ndarray] = []
    hashes: dict[str, str] = {}
    with bar("Curating") as show:
        for count, record in enumerate(dataset.records):
            show(count, len(dataset))
            pictures = measured_pictures(dataset, record)
            values = {**record.measurements, **measure(pictures)}
            reasons = judge(record, values, config.thresholds)
            descriptor = describe(pictures)
            twin = hashes.get(_identity(record)) or _twin(descriptor, descriptors, verdicts, config)
            if twin is not None and not reasons:
                reasons.append(f"duplicate of {twin}")
            if not reasons:
                hashes[_identity(record)] = record.name
            verdicts.append(Verdict(record.name, values, reasons, thumbnail(pictures)))
            descriptors.append(descriptor)
        show(len(dataset), len(dataset))
    _write(config, verdicts)
    return verdicts


def _identity(record: ObjectRecord) -> str:
    """What two copies of an object share: the file's content, and the clip of it."""
    return f"{record.source.get('sha256', record.name)}:{record.source.get('clip', '')}"


def _twin(
    descriptor: np.ndarray, others: list[np.ndarray], verdicts: list[Verdict], config: CurateConfig
) -> str | None:
    """The kept object that looks the same, if any."""
    kept = [index for index, verdict in enumerate(verdicts) if not verdict.reasons]
    if not kept:
        return None
    distances = np.abs(np.stack([others[index] for index in kept]) - descriptor).mean(axis=1)
    nearest = int(distances.argmin())
    return verdicts[kept[nearest]].name if distances[nearest] < config.thresholds.min_difference else None


def measured_pictures(dataset: RenderedDataset, record: ObjectRecord) -> Float[np.ndarray, "t v h w 4"]:
    """All frames of a few views of the first orbit, small, RGBA in [0, 1] with colours multiplied by alpha."""
    orbit = Orbit(next(iter(record.orbits)))
    views = np.unique(np.linspace(0, record.views, MEASURED_VIEWS, endpoint=False).astype(int)).tolist()
    return shrunk(dataset.pictures(record, orbit, list(range(record.frames)), views), LOOKED_AT)


def shrunk(pictures: UInt8[np.ndarray, "t v h w 4"], size: int) -> Float[np.ndarray, "t v s s 4"]:
    """Pictures reduced by area averaging, colours multiplied by alpha, in [0, 1]."""
    t, v = pictures.shape[:2]
    side = min(size, pictures.shape[2])
    out = np.empty((t, v, side, side, 4), dtype=np.float32)
    for index in np.ndindex(t, v):
        straight = pictures[index].astype(np.float32) / 255.0
        straight[..., :3] *= straight[..., 3:]
        for channel in range(4):
            plane = Image.fromarray(straight[..., channel])
            out[index][..., channel] = np.asarray(plane.resize((side, side), Image.Resampling.BOX))
    return out


def measure(pictures: Float[np.ndarray, "t v h w 4"]) -> dict[str, float]:
    """Numbers taken from the pictures of one object (see `Thresholds` for their meaning)."""
    alpha = pictures[..., 3]
    straight = np.concatenate([pictures[..., :3] / np.maximum(alpha[..., None], 1e-6), alpha[..., None]], axis=-1)
    views = range(pictures.shape[1])
    border = np.concatenate(
        [alpha[..., 0, :], alpha[..., -1, :], alpha[..., :, 0], alpha[..., :, -1]], axis=-1
    )  # fmt: skip
    areas = alpha.mean(axis=(-1, -2))
    values = {
        "outside": float((border.max(axis=-1) > 0.5).mean()),
        "coverage": float(areas.mean()),
        "area_ratio": float(np.median(areas.min(axis=0) / np.maximum(np.median(areas, axis=0), 1e-6))),
    }
    if len(pictures) > 1:
        steps = np.stack([neighbour_differences(list(straight[:, view])) for view in views])
        values["motion"] = float(steps.mean())
    if len(pictures) > 2:
        over = np.stack([[_difference(straight[t - 1, v], straight[t + 1, v]) for t in range(1, len(straight) - 1)]
                         for v in views])  # fmt: skip
        values["flicker"] = float(np.median((np.minimum(steps[:, :-1], steps[:, 1:]) - over).max(axis=1)))
    return values


def _difference(first: np.ndarray, second: np.ndarray) -> float:
    return float(neighbour_differences([first, second])[0])


def judge(record: ObjectRecord, values: dict[str, float], limits: Thresholds) -> list[str]:
    """Every reason against an object; a measurement that is missing is no reason."""
    moving = record.frames > 1
    static = moving and values["motion"] < limits.min_motion
    checks = [
        ("static", static),
        ("moves too fast", moving and values["motion"] > limits.max_motion),
        ("leaves the picture", values["outside"] > limits.max_outside),
        ("barely visible", values["coverage"] < limits.min_coverage),
        ("scene-like", values["coverage"] > limits.max_coverage or values.get("meshes", 0) > limits.max_meshes),
        ("flat", values.get("flatness", 1.0) < limits.min_flatness),
        ("moves as a whole (rotating camera, turntable)", moving and not static
         and values.get("rigid_share", 0.0) > limits.max_rigid_share),
        ("travels", moving and values.get("drift", 0.0) > limits.max_drift),
        ("geometry vanishes", moving and (values.get("size_change", 1.0) < limits.min_size_change
                                          or values["area_ratio"] < limits.min_area_ratio)),
        ("flickers", values.get("flicker", 0.0) > limits.max_flicker),
        ("licence", not _licensed(record.licence, limits)),
        ("test object", not limits.keep_test_objects and is_test_object(record.name)),
    ]  # fmt: skip
    return [reason for reason, holds in checks if holds]


def _licensed(licence: str | None, limits: Thresholds) -> bool:
    if not licence:
        return limits.keep_unknown_licence
    return licence.strip().lower() in {accepted.lower() for accepted in limits.licences}


def describe(pictures: Float[np.ndarray, "t v h w 4"]) -> Float[np.ndarray, " d"]:
    """What tells objects apart: mean small pictures over the views at the first, middle and last frame."""
    frames = pictures[[0, len(pictures) // 2, -1]].mean(axis=1)
    size = frames.shape[1]
    edges = np.linspace(0, size, DESCRIPTOR_SIZE + 1).astype(int)[:-1]
    reduced = np.add.reduceat(np.add.reduceat(frames, edges, axis=1), edges, axis=2) * (DESCRIPTOR_SIZE / size) ** 2
    return reduced.reshape(-1).astype(np.float32)


def thumbnail(pictures: Float[np.ndarray, "t v h w 4"]) -> UInt8[np.ndarray, "h w 3"]:
    """First frame from every measured view, then the first view at moments of the motion; on white."""
    moments = np.unique(np.linspace(0, len(pictures) - 1, MEASURED_VIEWS + 1).astype(int))[1:]
    row = [*pictures[0], *pictures[moments, 0]]
    white = np.concatenate([picture[..., :3] + 1.0 - picture[..., 3:] for picture in row], axis=1)
    return (white.clip(0, 1) * 255).round().astype(np.uint8)


def _write(config: CurateConfig, verdicts: list[Verdict]) -> None:
    kept = [{"name": verdict.name, "measurements": verdict.measurements} for verdict in verdicts if not verdict.reasons]
    dropped: list[dict[str, Any]] = [
        {"name": verdict.name, "reasons": verdict.reasons, "measurements": verdict.measurements}
        for verdict in verdicts
        if verdict.reasons
    ]
    content = {"thresholds": asdict(config.thresholds), "kept": kept, "dropped": dropped}
    path = config.data / CURATION_FILE
    with disk_errors(path), atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1))
    folder = config.report or config.data / "report"
    with disk_errors(folder):
        rows = [(v.name, v.measurements, v.reasons, v.thumbnail) for v in verdicts]
        write_html(folder / "report.html", rows, asdict(config.thresholds))
        write_sheet(folder / "report.png", rows)


def command(config: CurateConfig) -> None:
    """Curate and say how it went."""
    verdicts = curate(config)
    dropped = [verdict for verdict in verdicts if verdict.reasons]
    print(f"{config.data}: {len(verdicts) - len(dropped)} of {len(verdicts)} objects kept.")
    for verdict in dropped:
        print(f"  dropped {verdict.name}: {', '.join(verdict.reasons)}.")
    print(f"Report: {(config.report or config.data / 'report') / 'report.html'}")
    if len(dropped) == len(verdicts):
        raise InputError(
            f"Every object of {config.data} was dropped: look at the report, and give other thresholds or other assets."
        )
