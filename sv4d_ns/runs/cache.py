"""`sv4d cache`: what runs have left on the disk; which files are whole; making room.

Kept: the finished windows of the diffusion model and the fields at the end of stage 1 (`.windows` and `.stages`, shared
by the runs of a video), and of every run its view grids and checkpoints. A process that is at work holds its run's
lock; such runs, and what they share, are never touched.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sv4d_ns.runs.layout import RUN_FILE, STAGES, SUMMARY_FILE, VIEW_FOLDERS, WINDOWS, claim_lock, release_run
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.files import check_zip

State = Literal["finished", "unfinished", "in use", "windows", "stage 1"]
SHARED: dict[str, State] = {WINDOWS: "windows", STAGES: "stage 1"}
"""Folders that the runs of a video share, and what each of their entries is."""


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
    runs = [Entry(record.parent, _state(record.parent), _size(record.parent)) for record in _records(output_dir)]
    shared = [
        Entry(folder, state, _size(folder))
        for name, state in SHARED.items()
        for place in output_dir.rglob(name)
        for folder in place.iterdir()
        if folder.is_dir()
    ]
    return sorted([*runs, *shared], key=lambda entry: entry.path)


def _records(output_dir: Path) -> Iterator[Path]:
    return output_dir.rglob(RUN_FILE)


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

        found = (flaw_of(file) for file in sorted(entry.path.rglob("*.safetensors")))
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


def leftovers(output_dir: Path) -> list[Path]:
    """Half-written files of processes that were killed: nothing reads them."""
    hidden = [path for path in output_dir.rglob(".*") if path.name not in (*SHARED, ".writable")]
    return sorted({*hidden, *output_dir.rglob("checkpoint.partial")})


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
        shared = SHARED.values()
        doomed = [entry.path for entry in found if entry.state in shared and entry.path.parent.parent not in busy]
        doomed += [entry.path for entry in found if self.unfinished and entry.state == "unfinished"]
        doomed += [path for path in leftovers(self.output_dir) if not any(parent in path.parents for parent in busy)]
        size = sum(_size(path) if path.is_dir() else path.lstat().st_size for path in doomed)
        for path in doomed:
            print(path)
            if self.yes:
                _delete(path)
        done = "deleted" if self.yes else "would be deleted (--yes deletes them)"
        print(f"{len(doomed)} files and folders, {size / 1e6:.1f} MB, {done}.")


def _delete(path: Path) -> None:
    """Delete a file or folder; a run that somebody has begun to continue meanwhile is left alone."""
    is_run = (path / RUN_FILE).is_file()
    if is_run and not claim_lock(path):
        print(f"{path} is in use now and stays.")
        return
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if is_run:
        release_run(path)


def command(arguments: Sequence[str]) -> None:
    """`sv4d cache list|verify|prune`."""
    commands: Any = tyro.extras.subcommand_type_from_defaults(
        {"list": List(), "verify": Verify(), "prune": Prune()}, sort_subcommands=False
    )
    tyro.cli(commands, prog="sv4d cache", args=list(arguments)).run()
