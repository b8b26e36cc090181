"""What is judged: finished runs, saved view grids, or folders of pictures, each seen through the cameras of a truth."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, UInt8

from sv4d_ns.evaluation.alignment import Alignment, Similarity, check_source_size, run_to_source, whole_picture
from sv4d_ns.evaluation.cases import INPUT_ROLE, Case, CaseView
from sv4d_ns.evaluation.protocols import CONSISTENT4D_AZIMUTHS, eval_files
from sv4d_ns.evaluation.scores import Pictures
from sv4d_ns.geometry.rays import project_array
from sv4d_ns.runs.layout import checkpoint_steps
from sv4d_ns.utils.callbacks import Progress
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.files import content_hash, sha256
from sv4d_ns.utils.images import resize_rgba
from sv4d_ns.views.grid import GRID_FILE, ViewGrid

if TYPE_CHECKING:
    from sv4d_ns.video.crop import Framing

CONFIG_FILE = "config.yml"
ANGLE_TOLERANCE_DEG = 0.5
"""Views this close in azimuth and elevation are the same view."""
FRAMES_COMPARED, SAME_FILM = 5, 0.6
"""Frames of a run's film that are compared with its case's, and the silhouettes' mean IoU below which it is another
film: cut-outs of one film overlap by 0.9 and more, objects in the middle of two films by 0.3."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """One object to be judged, not yet opened."""

    path: Path
    kind: str
    """run, grid or pictures."""


def find_candidate(path: Path, object_name: str | None = None) -> Candidate:
    """A run (config.yml or its folder), a grid (folder with grid.json), or pictures (eval_0/0.png, ...).

    Args:
        object_name: where `path` holds one of these for each object, the object's name: the one below it is taken.

    Raises:
        InputError: nothing of the kind is there, or more than one.
    """
    if path.is_file() and path.name == CONFIG_FILE:
        return Candidate(path.parent, "run")
    for marker, kind in ((CONFIG_FILE, "run"), (GRID_FILE, "grid"), ("eval_0", "pictures")):
        if (path / marker).exists():
            return Candidate(path, kind)
    if not path.is_dir():
        wrong = "is no config.yml of a run" if path.is_file() else "does not exist"
        raise InputError(f"{path} {wrong}: give a run's folder, a view grid's folder, or a folder of them.")
    if object_name is None:
        raise InputError(f"{path} is neither a run ({CONFIG_FILE}) nor a view grid ({GRID_FILE}).")
    below = path / object_name
    runs = sorted(below.rglob(CONFIG_FILE)) if below.is_dir() else []
    if len(runs) > 1:
        raise InputError(f"{below} holds {len(runs)} runs: give the folder of one.")
    if runs:
        return Candidate(runs[0].parent, "run")
    if not below.is_dir():
        raise InputError(f"{path} has nothing named {object_name}: name what is to be judged like the truth's objects.")
    return find_candidate(below)


@dataclass(frozen=True, eq=False)
class Opened:
    """A candidate's pictures beside their truth, and what it is made of."""

    pictures: Pictures
    facts: dict[str, Any]
    """Hashes and settings for the report."""
    skipped: tuple[str, ...]
    """Views of the truth the candidate does not have."""
    run: Any = None
    """The opened run (`runs.open.FinishedRun`), for geometry; None for pictures."""
    to_source: Alignment | None = None
    """From the run's world to the truth's."""


def open_candidate(candidate: Candidate, case: Case | None, size: int | None, progress: Progress) -> Opened:
    """Read or render a candidate at the views and times of a truth, or at its own where there is none.

    Args:
        size: pixels along the side of the pictures; None takes the truth's (without one, the grid's novel views').

    Raises:
        InputError: the candidate cannot be opened, or has no view or time of the truth.
    """
    if candidate.kind == "run":
        return _open_run(candidate.path, case, size, progress)
    if candidate.kind == "grid":
        return _open_grid(candidate.path, case, size)
    if case is None:
        raise InputError(f"{candidate.path} holds pictures without cameras: give --truth with their truth.")
    return _open_pictures(candidate.path, case, size)


def novel_views(case: Case) -> tuple[CaseView, ...]:
    """All views but the input."""
    return tuple(view for view in case.views if INPUT_ROLE not in view.roles)


def _open_run(folder: Path, case: Case | None, size: int | None, progress: Progress) -> Opened:
    from sv4d_ns.runs.open import load_run

    run = load_run(folder / CONFIG_FILE)
    grid = run.views
    facts = {"kind": "run", "path": str(folder), **_run_facts(folder), "grid": grid.content_id}
    facts["provenance"] = grid.provenance
    if case is not None:
        to_source = alignment_to(grid, case)
        pictures = render_views(run, case, novel_views(case), to_source, size or case.size, progress)
        return Opened(pictures, facts, (), run, to_source)
    size = size or grid.novel_views.shape[2]
    cameras, focal = grid.plan.c2w()[1:], grid.plan.focal_px(size)
    made = _rendered(run, cameras, focal, size, grid.times, progress)
    return Opened(Pictures(run.name, made, None, *_plan_views(grid), grid.times, cameras, focal), facts, (), run)


def render_views(
    run: Any, case: Case, views: Sequence[CaseView], to_source: Alignment, size: int, progress: Progress
) -> Pictures:
    """A run's field seen by cameras of its case, beside the truth.

    Args:
        run: a `runs.open.FinishedRun`.
        to_source: from the run's world to the case's (`alignment_to`).
    """
    moments = [to_source.at(float(time)).inverse() for time in case.times]
    cameras = np.stack([[moment.camera(view.c2w) for view in views] for moment in moments])
    focal = case.focal_px * size / case.size
    made = _rendered(run, cameras, focal, size, case.times, progress)
    truth = np.stack([case.frames(view, size) for view in views], axis=1)
    return Pictures(case.name, made, truth, *_case_views(case, views), case.times, cameras, focal)


def _rendered(
    run: Any,
    cameras: Float[np.ndarray, "*t v 4 4"],
    focal: float,
    size: int,
    times: Float[np.ndarray, " t"],
    progress: Progress,
) -> UInt8[np.ndarray, "t v size size 4"]:
    from sv4d_ns.field.images import render_rgba

    count = cameras.shape[-3]
    made = np.empty((len(times), count, size, size, 4), np.uint8)
    moving = np.broadcast_to(cameras, (len(times), count, 4, 4))
    for frame, time in enumerate(times):
        for view, camera in enumerate(moving[frame]):
            made[frame, view] = render_rgba(run.field, run.occupancy, camera, focal, size, float(time))
            progress(frame * count + view + 1, made.shape[0] * made.shape[1])
    return made


def alignment_to(grid: ViewGrid, case: Case) -> Alignment:
    """From the world of a grid (and of the field fitted to it) to that of its case; see `alignment`.

    Raises:
        InputError: the grid was made from another video.
    """
    squares = _squares(grid, case)
    if case.input_view.files:  # Consistent4D's truth has no input video to compare with
        check_source_size(squares[0], case.size, str(case.folder))
    elif squares[0].source_width != squares[0].source_height:
        raise InputError(f"The run for {case.name} was made from a video that is not square: no truth fits it.")
    _check_film(grid, squares, case)
    focal = case.focal_px * squares[0].source_width / case.size
    return Alignment(
        tuple(run_to_source(square, grid.plan, case.input_view.c2w, focal, case.radius) for square in squares)
    )


def _check_film(grid: ViewGrid, squares: "tuple[Framing, ...]", case: Case) -> None:
    """Raises `InputError` if the silhouettes of a grid's film are not those of the case's."""
    from sv4d_ns.metrics.images import silhouette_iou

    files = case.input_view.files
    if not files:
        return
    frames = np.unique(np.linspace(0, grid.num_frames - 1, FRAMES_COMPARED).round().astype(int))
    moments = np.round(grid.times[frames] * (len(files) - 1)).astype(int)
    truth = case.frames(case.input_view, case.size)[moments]
    size = grid.input_frames.shape[1]
    shown = [
        replace(squares[min(frame, len(squares) - 1)], size=size).apply(picture[None])[0, ..., 3]
        for frame, picture in zip(frames, truth, strict=True)
    ]
    same = float(silhouette_iou(grid.input_frames[frames, ..., 3], np.stack(shown)).mean())
    if same < SAME_FILM:
        raise InputError(
            f"The film that was used is not the one of {case.folder}: their silhouettes overlap by {same:.0%} only; "
            "evaluate against its own case."
        )


def _squares(grid: ViewGrid, case: Case) -> "tuple[Framing, ...]":
    """The crop of each frame, or one for all."""
    from sv4d_ns.video.crop import Framing
    from sv4d_ns.video.stabilised import StabilisedFraming

    if grid.framing is None:
        return (whole_picture(case.size),)
    if isinstance(grid.framing["center_x"], list):
        return StabilisedFraming.from_dict(grid.framing).squares
    return (Framing.from_dict(grid.framing),)


def _run_facts(folder: Path) -> dict[str, Any]:
    steps = checkpoint_steps(folder / "nerfstudio_models")
    facts: dict[str, Any] = {"config": sha256(folder / CONFIG_FILE)}
    if steps:
        facts["step"] = steps[-1]
        facts["checkpoint"] = sha256(folder / "nerfstudio_models" / f"step-{steps[-1]:09d}.ckpt")
    return facts


def _open_grid(folder: Path, case: Case | None, size: int | None) -> Opened:
    grid = ViewGrid.load(folder)
    size = size or (case.size if case else grid.novel_views.shape[2])
    names, azimuths, elevations = _plan_views(grid)
    facts = {"kind": "grid", "path": str(folder), "grid": grid.content_id, "provenance": grid.provenance}
    cameras, focal = grid.plan.c2w()[1:], grid.plan.focal_px(size)
    made = resize_rgba(grid.novel_views, size)
    if case is None:
        name = folder.resolve().name
        return Opened(Pictures(name, made, None, names, azimuths, elevations, grid.times, cameras, focal), facts, ())
    squares = _squares(grid, case)
    if squares[0].source_width == case.size:  # else the crop is in other pixels than the case's
        _check_film(grid, squares, case)
    if grid.framing is not None and not _is_whole(grid.framing):
        made = uncropped(grid, case, size)
    frames, true_frames = _common_times(grid.times, case.times, folder)
    pairs, skipped = [], []
    for view in novel_views(case):
        wanted = (view.azimuth_deg - case.input_view.azimuth_deg, view.elevation_deg - case.input_elevation_deg)
        same = [i for i in range(grid.num_views) if _same_view((azimuths[i], elevations[i]), wanted)]
        pairs += [(same[0], view)] if same else []
        skipped += [] if same else [view.name]
    if not pairs:
        raise InputError(f"{folder} has none of the views of {case.folder}: it has azimuths {azimuths.tolist()}.")
    index = [number for number, _ in pairs]
    truth = np.stack([case.frames(view, size)[true_frames] for _, view in pairs], axis=1)
    pictures = Pictures(
        case.name,
        made[frames][:, index],
        truth,
        tuple(view.name for _, view in pairs),
        azimuths[index],
        elevations[index],
        case.times[true_frames],
        np.stack([view.c2w for _, view in pairs]),
        case.focal_px * size / case.size,
    )
    return Opened(pictures, facts, tuple(skipped))


def _is_whole(framing: dict[str, Any]) -> bool:
    return not isinstance(framing["center_x"], list) and (
        framing["side"] == framing["source_width"] == framing["source_height"]
        and 2 * framing["center_x"] == framing["source_width"]
        and 2 * framing["center_y"] == framing["source_height"]
    )


def uncropped(grid: ViewGrid, case: Case, size: int) -> np.ndarray:
    """Novel views of a framed grid as the uncropped cameras of its case show them, uint8 [t, v, size, size, 4].

    The picture of a scaled and shifted object is the picture scaled about the image of the crop's origin: exact on the
    plane through the object that faces the camera, as in `alignment.run_to_source`.
    """
    to_source = alignment_to(grid, case)
    columns = []
    for view, relative in enumerate(zip(grid.plan.azimuths_deg, grid.plan.elevations_deg, strict=True)):
        same = [v for v in novel_views(case) if _same_view(_relative(case, v), relative)]
        source = grid.novel_views[:, view]
        if same:
            framings = [
                _shown_part(to_source.at(float(t)), same[0], case, grid, source.shape[1], size) for t in grid.times
            ]
            source = np.concatenate([f.apply(picture[None]) for f, picture in zip(framings, source, strict=True)])
        columns.append(resize_rgba(source, size))
    return np.stack(columns, axis=1)


def _shown_part(moment: Similarity, view: CaseView, case: Case, grid: ViewGrid, pixels: int, size: int) -> "Framing":
    """The part of the grid's picture (of `pixels` along its side, in its own pixels) that the case's picture shows."""
    from sv4d_ns.video.crop import Framing

    origin = moment.points(np.zeros((1, 3)))[0]
    centre, magnified = _seen_at(origin, view.c2w, case, moment.scale, grid)
    part = pixels / magnified
    return Framing(
        center_x=pixels / 2 + (0.5 - centre[0]) * part,
        center_y=pixels / 2 + (0.5 - centre[1]) * part,
        side=part,
        source_width=pixels,
        source_height=pixels,
        size=size,
    )


def _seen_at(
    origin: Float[np.ndarray, " 3"], c2w: Float[np.ndarray, "4 4"], case: Case, scale: float, grid: ViewGrid
) -> tuple[Float[np.ndarray, " 2"], float]:
    """Where the grid's origin is in a case's picture (shares of its side) and how much larger than in the grid's."""
    centre, depth = (value[0] for value in project_array(origin[None], c2w, case.focal_px / case.size, 1))
    in_case = case.focal_px / case.size * scale / depth
    in_grid = grid.plan.focal_px(1) / grid.plan.radius
    return centre, float(in_case / in_grid)


def _open_pictures(folder: Path, case: Case, size: int | None) -> Opened:
    size = size or case.size
    views = novel_views(case)
    angles, wanted = [_relative(case, view) for view in views], [(azimuth, 0.0) for azimuth in CONSISTENT4D_AZIMUTHS]
    if len(angles) != len(wanted) or not all(map(_same_view, angles, wanted)):
        raise InputError(f"{folder} holds pictures in Consistent4D's layout: judge them with --protocol consistent4d.")
    files = [eval_files(folder, number) for number in range(len(views))]
    if any(len(one) != case.num_frames for one in files):
        raise InputError(f"{folder} has other numbers of pictures than the truth's {case.num_frames} a view.")
    made = np.stack([resize_rgba(np.stack([_read(path) for path in one]), size) for one in files], axis=1)
    truth = np.stack([case.frames(view, size) for view in views], axis=1)
    names, azimuths, elevations = _case_views(case, views)
    cameras, focal = np.stack([view.c2w for view in views]), case.focal_px * size / case.size
    facts = {"kind": "pictures", "path": str(folder), "pictures": content_hash(made)}
    return Opened(Pictures(case.name, made, truth, names, azimuths, elevations, case.times, cameras, focal), facts, ())


def _read(path: Path) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG",)) as image:
            picture = image.convert("RGBA")
    except (OSError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is damaged ({error}): make it again.") from error
    if picture.width != picture.height:
        raise InputError(f"{path} is {picture.width}x{picture.height}: only square pictures are evaluated.")
    return np.array(picture)


def _plan_views(
    grid: ViewGrid,
) -> tuple[tuple[str, ...], Float[np.ndarray, " v"], Float[np.ndarray, " v"]]:
    azimuths, elevations = np.array(grid.plan.azimuths_deg), np.array(grid.plan.elevations_deg)
    names = tuple(f"az{a % 360:03.0f}_el{e:+03.0f}" for a, e in zip(azimuths, elevations, strict=True))
    return names, azimuths, elevations


def _relative(case: Case, view: CaseView) -> tuple[float, float]:
    return view.azimuth_deg - case.input_view.azimuth_deg, view.elevation_deg - case.input_elevation_deg


def _case_views(
    case: Case, views: Sequence[CaseView]
) -> tuple[tuple[str, ...], Float[np.ndarray, " v"], Float[np.ndarray, " v"]]:
    relative = np.array([_relative(case, view) for view in views])
    return tuple(view.name for view in views), relative[:, 0], relative[:, 1]


def _same_view(first: tuple[float, float], second: tuple[float, float]) -> bool:
    turn = abs((first[0] - second[0] + 180.0) % 360.0 - 180.0)
    return turn < ANGLE_TOLERANCE_DEG and abs(first[1] - second[1]) < ANGLE_TOLERANCE_DEG


def _common_times(
    grid: Float[np.ndarray, " t"], truth: Float[np.ndarray, " u"], folder: Path
) -> tuple[list[int], list[int]]:
    """Indices of the times that both have, in order."""
    pairs = [(i, int(j)) for i, time in enumerate(grid) for j in np.flatnonzero(np.abs(truth - time) < 1e-4)]
    if not pairs:
        raise InputError(f"{folder} has no time in common with its truth: its {len(grid)} frames fall between them.")
    return [i for i, _ in pairs], [j for _, j in pairs]
