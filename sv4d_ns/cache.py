"""`sv4d cache`: what runs have left on the disk; which files are whole; making room.

Kept: the finished windows of the diffusion model (`.windows`, shared by the runs of a video), and of every run its view
grids and checkpoints. A process that is at work holds its run's lock; such runs are never touched.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sv4d_ns.errors import InputError
from sv4d_ns.files import check_zip
from sv4d_ns.runs import RUN_FILE, SUMMARY_FILE, VIEW_FOLDERS, claim_lock, release_run

WINDOWS = ".windows"

State = Literal["finished", "unfinished", "in use", "windows"]


@dataclass(frozen=True)
class Entry:
    """One folder of the cache."""

    path: Path
    state: State
    """Of a run; "windows" for the shared windows of one piece of work."""
    size: int
    """Bytes."""


def entries(output_dir: Path) -> list[Entry]:
    """Every run and every set of windows below an output folder, by path.

    Raises:
        InputError: there is no such folder.
    """
    if not output_dir.is_dir():
        raise InputError(f"{output_dir} is not a folder: give the output folder of ns-train (outputs by default).")
    runs = [Entry(record.parent, _state(record.parent), _size(record.parent)) for record in _records(output_dir)]
    windows = [
        Entry(folder, "windows", _size(folder))
        for shared in output_dir.rglob(WINDOWS)
        for folder in shared.iterdir()
        if folder.is_dir()
    ]
    return sorted([*runs, *windows], key=lambda entry: entry.path)


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
        from sv4d_ns.diffusion.store import flaw_of

        found = (flaw_of(file) for file in sorted(entry.path.glob("*.safetensors")))
        yield from (flaw for flaw in found if flaw is not None)
        return
    from sv4d_ns.views import ViewGrid

    for name in VIEW_FOLDERS:
        if (entry.path / name).is_dir():
            try:
                ViewGrid.load(entry.path / name)
            except InputError as error:
                yield str(error)
    for checkpoint in sorted((entry.path / "nerfstudio_models").glob("*.ckpt")):
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
    hidden = [path for path in output_dir.rglob(".*") if path.name != WINDOWS and WINDOWS not in path.parts[-2:-1]]
    partial = [*hidden, *output_dir.rglob("checkpoint.partial"), *output_dir.rglob(f"{WINDOWS}/*/.*")]
    return sorted(path for path in set(partial) if path.name != ".writable")


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
    """Delete shared windows, half-written files and, on request, unfinished runs. Finished runs are always kept."""

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
        doomed = [entry.path for entry in found if entry.state == "windows" and entry.path.parent.parent not in busy]
        doomed += [entry.path for entry in found if self.unfinished and entry.state == "unfinished"]
        doomed += [path for path in leftovers(self.output_dir) if not any(parent in path.parents for parent in busy)]
        size = sum(_size(path) if path.is_dir() else path.lstat().st_size for path in doomed)
        for path in doomed:
            print(path)
            if self.yes:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        done = "deleted" if self.yes else "would be deleted (--yes deletes them)"
        print(f"{len(doomed)} files and folders, {size / 1e6:.1f} MB, {done}.")


def command(arguments: Sequence[str]) -> None:
    """`sv4d cache list|verify|prune`."""
    commands: Any = tyro.extras.subcommand_type_from_defaults(
        {"list": List(), "verify": Verify(), "prune": Prune()}, sort_subcommands=False
    )
    tyro.cli(commands, prog="sv4d cache", args=list(arguments)).run()
