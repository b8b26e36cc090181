"""What the page shows of a job, read from what its programs have written so far."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sv4d_ns.app.jobs import Job, Store, plain_name
from sv4d_ns.app.runner import PROGRESS_FILE, TRAIN_LOG, Runner, run_folder
from sv4d_ns.app.work import CROP_FILE, CUTOUT_FILE, LOOK_FILE, OBJ_FILE, PAGE_FILE, RESULT_FOLDER
from sv4d_ns.runs.layout import MOVIE_FOLDER, SUMMARY_FILE, VIEW_FOLDERS, newest_views
from sv4d_ns.views.grid import GRID_FILE, image_name

PHASES = (
    "Get ready",
    "Make views of the sides not seen",
    "Fit the 4D object",
    "Improve the views",
    "Fit it again",
    "Pictures and movies",
    "Files to download",
)
"""Of a run, in their order."""
DOWNLOADS = (
    ("mesh.glb", "GLB", "for Blender, the web and game engines"),
    ("mesh.usdz", "USDZ", "for Apple devices and USD programs"),
    (OBJ_FILE, "OBJ", "one mesh for each frame, packed"),
    (PAGE_FILE, "Web page", "this viewer in one file"),
)
"""Files of the result: name, what it is called, what it is for."""


def brief(job: Job) -> dict[str, Any]:
    """A job's line in the list."""
    return {"id": job.id, "title": job.title, "state": job.state, "added": job.added}


def described(store: Store, runner: Runner, job: Job) -> dict[str, Any]:
    """All the page shows of a job."""
    folder = store.folder(job)
    run = run_folder(folder) if job.begun else None
    seen: dict[str, Any] = {
        **brief(job),
        **{"error": job.error, "matting": job.matting, "crop": job.crop, "begun": job.begun},
        "since": job.since,
        "stopping": runner.is_stopping(job),
        "files": sorted(files(store, job)),
    }
    if job.state == "waiting":
        waiting = [other.id for other in store.queue("waiting")]
        seen["before"] = waiting.index(job.id) + sum(1 for _ in store.queue("running"))
    if job.state == "looking":
        seen["before"] = [other.id for other in store.queue("looking")].index(job.id)
    if job.state not in ("looking", "refused"):
        seen["look"] = _json(folder / LOOK_FILE)
    if job.state == "running":
        seen |= {"phases": PHASES, **_progress(folder, run)}
    if run is not None:
        seen["summary"] = _sentences(folder / TRAIN_LOG) if (run / SUMMARY_FILE).is_file() else []
    if job.state == "finished":
        seen["downloads"] = list(_downloads(store, job))
    return seen


def files(store: Store, job: Job) -> dict[str, Path]:
    """What a browser may fetch of a job, by our own names for it: no visitor ever gives a path."""
    folder = store.folder(job)
    found = {"input": store.video(job), "cutout": folder / CUTOUT_FILE, "crop": folder / CROP_FILE}
    run = run_folder(folder) if job.begun else None
    if run is not None:
        found["sheet"] = run / "contact_sheet.png"
        found |= {f"movie-{path.stem}": path for path in sorted((run / MOVIE_FOLDER).glob("*.mp4"))}
        found |= _views(run)
    found |= {name: folder / RESULT_FOLDER / name for name, *_ in DOWNLOADS}
    return {key: path for key, path in found.items() if path.is_file()}


def download_name(job: Job, path: Path) -> str:
    """What a browser saves a file as: after the video."""
    name = plain_name(job.title)
    return f"{name}{path.suffix}" if path.parent.name == RESULT_FOLDER else f"{name}-{path.stem}{path.suffix}"


def _views(run: Path) -> dict[str, Path]:
    """The middle frame of every view there is, the newest ones."""
    views = newest_views(run)
    if views is None:
        return {}
    grid = _json(views / GRID_FILE) or {}
    middle = int(grid.get("num_frames", 1)) // 2
    candidates = {f"view-{view}": views / image_name("images", view, middle) for view in range(64)}
    return {key: path for key, path in candidates.items() if path.is_file()}


def _progress(folder: Path, run: Path | None) -> dict[str, Any]:
    """Phase, share and time left of a run that is under way."""
    shown = _json(folder / PROGRESS_FILE) or {}
    exporting = run is not None and (run / SUMMARY_FILE).is_file() and (folder / "export.log").is_file()
    views = 0 if run is None else sum((run / name).is_dir() for name in VIEW_FOLDERS[:2])
    number = 6 if exporting else _phase(str(shown.get("phase", "")), views)
    about = next((line.removeprefix("Time: ") for line in _lines(folder / TRAIN_LOG) if line.startswith("Time: ")), "")
    return {"phase": number, "progress": shown, "about": about.partition(";")[0]}


def _phase(bar: str, views: int) -> int:
    """Index into `PHASES` of what a bar of training shows, with so many view grids made."""
    fitting = 4 if views > 1 else 2
    for beginning, phase in (
        ("Stage 1", fitting if views else 1),  # the bar is full, and the fitting is being prepared
        ("Fitting", fitting),
        ("Estimating", fitting),
        ("Stage 2", 3),
        ("Rendering", 5),
        ("Making", 5),
    ):
        if bar.startswith(beginning):
            return phase
    return 0


def _sentences(log: Path) -> list[str]:
    """What the run said of its result."""
    beginnings = ("What the camera saw", "Not seen", "Confidence in the sides")
    return [line for line in _lines(log) if line.startswith(beginnings)]


def _downloads(store: Store, job: Job) -> Iterator[dict[str, Any]]:
    found = files(store, job)
    movies = [(key, f"MP4: {key.removeprefix('movie-')}", "movie") for key in found if key.startswith("movie-")]
    for key, label, what in (*DOWNLOADS, *movies):
        if key in found:
            yield {"file": key, "label": label, "what": what, "bytes": found[key].stat().st_size}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
