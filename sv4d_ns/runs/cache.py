"""`sv4d cache`: what runs have left on the disk; which files are whole; making room.

Kept: the finished windows of the diffusion model and the fields at the end of stage 1 (`.windows` and `.stages`, shared
by the runs of a video), and of every run its view grids and checkpoints. A process that is at work holds its run's
lock; such runs, and what they share, are never touched.
"""

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from filelock import FileLock, Timeout

from sv4d_ns.runs.layout import (
    APP_LOCK,
    BATCH_LOCK,
    LOCK_FILE,
    MOVIE_FOLDER,
    PARTIAL_CHECKPOINT,
    RUN_FILE,
    STAGES,
    SUMMARY_FILE,
    VIEW_FOLDERS,
    WINDOWS,
    claim_lock,
    is_run,
    release_run,
)
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.files import TEMPORARY, check_zip, is_temporary

State = Literal["finished", "unfinished", "in use", "windows", "stage 1"]
SHARED: dict[str, State] = {WINDOWS: "windows", STAGES: "stage 1"}
"""Folders that the runs of a video share, and what each of their entries is."""
SHARED_NAME = re.compile(r"[0-9a-f]{32}|normals")
"""What an entry of those is called: a content hash, or what it holds."""
OWN_FILES: dict[State, re.Pattern[str]] = {
    "windows": re.compile(rf"(.+/)?({re.escape(TEMPORARY)}.*|window\d+\w*\.safetensors|[0-9a-f]{{32}}\.npy)"),
    "stage 1": re.compile(rf"{re.escape(TEMPORARY)}.*|step-\d+\.ckpt"),
}
"""Names of the files in each kind of entry, below its folder."""
OWN_RUN_FILES = re.compile(
    rf"(.+/)?{re.escape(TEMPORARY)}.*"
    r"|config\.yml|dataparser_transforms\.json|viewer_log_filename\.txt|events\.out\.tfevents\..*"
    r"|nerfstudio_models/step-\d+\.ckpt"
    r"|views(_refined_\d)?/(grid\.json|transforms\.json|(images|confidence)/view\d+_frame\d+\.png)"
    r"|movies/[a-z-]+\.mp4"
    rf"|{re.escape(PARTIAL_CHECKPOINT)}|{SUMMARY_FILE}|{RUN_FILE}|{LOCK_FILE}|contact_sheet\.png"
)
"""The same of a run."""
STALE_AFTER = 3600.0
"""Seconds without a change after which nobody writes a file any more."""
OWN_FOLDERS = frozenset({*VIEW_FOLDERS, "images", "confidence", "nerfstudio_models", MOVIE_FOLDER})


@dataclass(frozen=True)
class Entry:
    """One folder of the cache."""

    path: Path
    state: State
    """Of a run; "windows" or "stage 1" for what runs share."""
    size: int
    """Bytes."""


def entries(output_dir: Path) -> list[Entry]:
    """Every run, set of windows and stage 1 below an output folder, by path.

    Raises:
        InputError: there is no such folder.
    """
    if not output_dir.is_dir():
        raise InputError(f"{output_dir} is not a folder: give the output folder of ns-train (outputs by default).")
    folders = list(_folders(output_dir))
    runs = [Entry(folder, _state(folder), _size(folder)) for folder in folders if is_run(folder)]
    shared = [
        Entry(folder, SHARED[folder.parent.name], _size(folder))
        for folder in folders
        if folder.parent.name in SHARED and SHARED_NAME.fullmatch(folder.name)
    ]
    return sorted([*runs, *shared], key=lambda entry: entry.path)


def _folders(output_dir: Path) -> Iterator[Path]:
    """All folders below one, and itself; not those behind links and not what hidden folders of others hold."""
    for folder, names, _ in os.walk(output_dir):
        names[:] = [name for name in names if not name.startswith(".") or name in SHARED]
        yield Path(folder)


def _state(run: Path) -> State:
    if not claim_lock(run):
        return "in use"
    release_run(run)
    return "finished" if (run / SUMMARY_FILE).is_file() else "unfinished"


def _size(folder: Path) -> int:
    return sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file())


def flaws(entry: Entry) -> Iterator[str]:
    """A sentence for each damaged file of an entry; nothing where all is well."""
    if entry.state == "windows":
        from sv4d_ns.diffusion.window_store import flaw_of
        from sv4d_ns.views.normals import kept_flaw

        found = [flaw_of(file) for file in sorted(entry.path.rglob("*.safetensors"))]
        found += [kept_flaw(file) for file in own_files(entry) if file.suffix == ".npy" and not is_temporary(file)]
        yield from (flaw for flaw in found if flaw is not None)
        return
    from sv4d_ns.views.grid import ViewGrid

    for name in VIEW_FOLDERS:
        if (entry.path / name).is_dir():
            try:
                ViewGrid.load(entry.path / name)
            except InputError as error:
                yield str(error)
    checkpoints = entry.path if entry.state == "stage 1" else entry.path / "nerfstudio_models"
    for checkpoint in sorted(checkpoints.glob("*.ckpt")):
        flaw = _checkpoint_flaw(checkpoint)
        if flaw:
            yield flaw


def _checkpoint_flaw(path: Path) -> str | None:
    try:
        check_zip(path)
    except (ValueError, OSError) as error:
        return f"{path} is damaged ({error}): delete it; the views are kept."
    return None


def stale_files(output_dir: Path) -> list[Path]:
    """Half-written files and folders of processes that were killed: nothing reads them.

    Not what somebody may still be writing: what is younger than `STALE_AFTER`, or lies where an app or a batch is at
    work.
    """
    found: list[Path] = []
    at_work: set[Path] = set()
    for folder in _folders(output_dir):
        if not at_work.isdisjoint(folder.parents) or _is_at_work(folder):
            at_work.add(folder)
            continue
        found += [path for path in folder.iterdir() if is_temporary(path) and not path.is_symlink()]
        if is_run(folder) and (folder / PARTIAL_CHECKPOINT).is_file():
            found.append(folder / PARTIAL_CHECKPOINT)
    return sorted(path for path in found if time.time() - _last_change(path) > STALE_AFTER)


def _is_at_work(folder: Path) -> bool:
    """Whether `sv4d app` or `sv4d batch` holds a folder."""
    for lock in (FileLock(folder / name) for name in (APP_LOCK, BATCH_LOCK) if (folder / name).is_file()):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        lock.release()
    return False


def _last_change(path: Path) -> float:
    """Of a file, or of anything in a folder, in seconds since 1970; now where it has just gone."""
    try:
        return max(file.lstat().st_mtime for file in (path, *path.rglob("*")))
    except FileNotFoundError:
        return time.time()


def own_files(entry: Entry) -> list[Path]:
    """The files of an entry that bear names this package and nerfstudio give; not what others have put beside them."""
    own = OWN_FILES.get(entry.state, OWN_RUN_FILES)
    found: list[Path] = []
    for folder, names, files in os.walk(entry.path):
        names[:] = [name for name in names if not (Path(folder) / name).is_symlink()]
        paths = (Path(folder) / name for name in files)
        found += [path for path in paths if own.fullmatch(path.relative_to(entry.path).as_posix())]
    return sorted(found)


@dataclass
class List:
    """List runs and windows with their size."""

    output_dir: Annotated[Path, tyro.conf.Positional] = Path("outputs")
    """The output folder of ns-train."""

    def run(self) -> None:
        """Print a line for each entry and the sum."""
        found = entries(self.output_dir)
        for entry in found:
            print(f"{entry.size / 1e6:9.1f} MB  {entry.state:<10}  {entry.path}")
        print(f"{sum(entry.size for entry in found) / 1e6:9.1f} MB  in {len(found)} folders")


@dataclass
class Verify:
    """Read every kept file and name those that are damaged."""

    output_dir: Annotated[Path, tyro.conf.Positional] = Path("outputs")
    """The output folder of ns-train."""

    def run(self) -> None:
        """Print what is damaged; raises `InputError` with the number if anything is."""
        found = entries(self.output_dir)
        broken = 0
        for entry in found:
            for flaw in flaws(entry):
                broken += 1
                print(flaw)
        if broken:
            raise InputError(f"{broken} files below {self.output_dir} are damaged: see above for what to do with each.")
        print(f"All files of {len(found)} folders are whole.")


@dataclass
class Prune:
    """Delete what runs share, half-written files and, on request, unfinished runs. Finished runs are always kept."""

    output_dir: Annotated[Path, tyro.conf.Positional] = Path("outputs")
    """The output folder of ns-train."""
    unfinished: bool = False
    """Delete runs that were stopped before their end, too."""
    yes: bool = False
    """Delete; without it the command only says what it would delete."""

    def run(self) -> None:
        """Print, and with --yes delete, what is not needed any more."""
        found = entries(self.output_dir)
        busy = {entry.path.parent for entry in found if entry.state == "in use"}
        free = [entry for entry in found if entry.state in SHARED.values() and entry.path.parent.parent not in busy]
        free += [entry for entry in found if self.unfinished and entry.state == "unfinished"]
        going = {entry.path: own_files(entry) for entry in free}
        for path in stale_files(self.output_dir):
            if not {*busy, *going}.intersection(path.parents):
                going[path] = [path] if path.is_file() else [file for file in path.rglob("*") if not file.is_dir()]
        sizes = {file: file.lstat().st_size for files in going.values() for file in files}
        for path, files in going.items():
            print(path)
            if self.yes:
                _delete(path, files)
        done = "deleted" if self.yes else "would be deleted (--yes deletes them)"
        print(f"{len(going)} files and folders, {sum(sizes.values()) / 1e6:.1f} MB, {done}.")


def _delete(path: Path, files: Sequence[Path]) -> None:
    """Delete `files` at or below `path` and the folders this leaves empty; a run that is in use now is left alone."""
    run = is_run(path)
    if run and not claim_lock(path):
        print(f"{path} is in use now and stays.")
        return
    for file in files:
        file.unlink(missing_ok=True)
    emptied = {path, *(parent for file in files for parent in file.parents)}
    for name, _, _ in os.walk(path, topdown=False):
        folder = Path(name)
        if folder in emptied or folder.name in OWN_FOLDERS or is_temporary(path):
            with suppress(OSError):  # it holds something else, which stays
                folder.rmdir()
    if run:
        release_run(path)
    if path.is_dir():
        print(f"{path} stays, because it holds files that no run has written.")


def command(arguments: Sequence[str]) -> None:
    """`sv4d cache list|verify|prune`."""
    commands: Any = tyro.extras.subcommand_type_from_defaults(
        {"list": List(), "verify": Verify(), "prune": Prune()}, sort_subcommands=False
    )
    tyro.cli(commands, prog="sv4d cache", args=list(arguments)).run()
