"""The layout of a run's folder, in one place.

outputs/<video>/sv4d/<timestamp>/
    config.yml  nerfstudio_models/step-*.ckpt     nerfstudio's own
    views/                                        stage 1's view grid (a nerfstudio dataset, see views/grid.py)
    views_refined_<k>/                            stage 2's grid of round k (from 1)
    contact_sheet.png  summary.json               what came out; written last
    run.json  run.lock                            the fingerprint of data and settings; held while the run is alive
outputs/<video>/sv4d/.windows/<content hash>/     finished diffusion windows, shared by runs of the same video
outputs/<video>/sv4d/.stages/<fingerprint>/       the field at the end of stage 1, shared likewise

The same command finds its run again by the fingerprint: an unfinished one is continued where it stopped, a finished
one is not made a second time. What a changed setting does not touch is found by a hash of its own: the windows of the
diffusion model by everything they are made from, stage 1 by all settings but those of stage 2.
"""

import dataclasses
import enum
import hashlib
import json
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sv4d_ns import __version__
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.files import atomic_path, check_zip, content_hash
from sv4d_ns.video.sources import local_path, source_files

WINDOWS = ".windows"
STAGES = ".stages"
RUN_FILE = "run.json"
LOCK_FILE = "run.lock"
APP_LOCK, BATCH_LOCK = ".app.lock", ".batch.lock"
"""Held while `sv4d app` and `sv4d batch` are at work in their folder of runs."""
SUMMARY_FILE = "summary.json"
MOVIE_FOLDER = "movies"
PARTIAL_CHECKPOINT = "checkpoint.partial"
"""A checkpoint that is being written, beside the folder of the finished ones."""

MAX_REFINE_ROUNDS = 8

VIEW_FOLDERS = ("views", *(f"views_refined_{k}" for k in range(1, MAX_REFINE_ROUNDS + 1)))
"""View grids in the order they are made; the last one that exists is the one the field is fitted to."""


def newest_views(run_dir: Path) -> Path | None:
    """The folder of the newest view grid of a run, or None before stage 1 has one."""
    existing = [run_dir / name for name in VIEW_FOLDERS if (run_dir / name).is_dir()]
    return existing[-1] if existing else None


def windows_folder(run_dir: Path, key: str) -> Path:
    """Where finished diffusion windows of the work `key` are kept between runs."""
    return run_dir.parent / WINDOWS / key


def stage_folder(run_dir: Path, key: str) -> Path:
    """Where the checkpoints at the end of stage 1 are kept between runs that share it."""
    return run_dir.parent / STAGES / key


def keep_stage(checkpoint: Path, folder: Path) -> None:
    """Keep a checkpoint in a folder of stages, too: by a second name of the same file where the disk can do that."""
    with atomic_path(folder / checkpoint.name) as temporary:
        temporary.unlink()
        try:
            temporary.hardlink_to(checkpoint)
        except OSError:
            shutil.copyfile(checkpoint, temporary)


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a nerfstudio_models folder, ascending (empty if there is no such folder)."""
    names = (re.fullmatch(r"step-(\d+)\.ckpt", path.name) for path in folder.glob("step-*.ckpt"))
    return sorted(int(name.group(1)) for name in names if name)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint of ns-train, read as plain tensors and compared with its checksums.

    Raises:
        InputError: it cannot be read, is damaged, holds more than tensors, or is no checkpoint of a run.
    """
    import torch

    remedy = "give a checkpoint of ns-train, or delete it and start again (the views are kept)."
    try:
        check_zip(path)  # torch does not look at the checksums it writes
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} holds more than tensors and is not opened for safety: {remedy}") from error
    except (RuntimeError, KeyError, ValueError, TypeError, EOFError, OSError, AttributeError) as error:
        reason = (str(error).splitlines() or [""])[0][:160]
        raise InputError(f"{path} cannot be read ({reason}): {remedy}") from error
    if not isinstance(state, dict) or not isinstance(state.get("step"), int) or "pipeline" not in state:
        raise InputError(f"{path} is not a checkpoint of a run: {remedy}")
    return state


def claim_run(runs: Path, name: str, fingerprint: str | None) -> tuple[str, str]:
    """The folder for a run: the newest one with the same fingerprint, or a new one; it is ours while we live.

    Args:
        runs: the folder of all runs of this video and method.
        name: of a new run.
        fingerprint: of data and settings (`fingerprint`); None for a run that is not to be found again.

    Returns:
        Its name, and a sentence about it (empty for a new run).
    """
    sentence = ""
    for folder in _same_runs(runs, fingerprint) if fingerprint else ():
        if not claim_lock(folder):
            sentence = (
                f"Another process is at work on the same data and settings in {folder}: this is a run of its own."
            )
            continue
        if (folder / SUMMARY_FILE).is_file():
            return folder.name, (
                f"{folder} was made from the same data and settings and is finished: nothing is made again "
                "(--timestamp NAME makes another run)."
            )
        return folder.name, f"Continuing the unfinished run {folder}, which has the same data and settings."
    return free_name(runs, name), sentence


def free_name(runs: Path, name: str) -> str:
    """`name`, or with a number after it where two commands of the same second would have the same folder."""
    candidates = (name if number == 1 else f"{name}-{number}" for number in count(1))
    return next(candidate for candidate in candidates if not (runs / candidate).exists())


def record_run(folder: Path, fingerprint: str | None, refine_steps: tuple[int, ...] | None = None) -> None:
    """Make the folder of a run and write down what it is made from, and when its views are refined.

    Raises:
        OSError: it cannot be written.
        RuntimeError: another process is at work in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not claim_lock(folder):
        raise RuntimeError(f"{folder} is in use by another process")
    with atomic_path(folder / RUN_FILE) as path:
        record = {"fingerprint": fingerprint, "version": __version__, "refine_steps": refine_steps}
        path.write_text(json.dumps(record))


def latest_run(runs: Path, pattern: str = "*") -> Path | None:
    """The run that was begun, continued or found finished last: each of these writes its run.json.

    Args:
        runs: a folder of runs, or one above it.
        pattern: of the runs' paths below that.
    """
    records = sorted(runs.glob(f"{pattern}/{RUN_FILE}"), key=lambda path: path.stat().st_mtime)
    return records[-1].parent if records else None


def is_run(folder: Path) -> bool:
    """Whether a folder is a run: it holds what `record_run` writes (a run.json have others, too)."""
    try:
        record = json.loads((folder / RUN_FILE).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and {"fingerprint", "version", "refine_steps"} <= set(record)


def recorded_rounds(folder: Path) -> tuple[int, ...] | None:
    """The training steps at which the views of a run are refined, if it has written them down."""
    with suppress(OSError, ValueError, AttributeError, TypeError):
        return tuple(int(step) for step in json.loads((folder / RUN_FILE).read_text()).get("refine_steps"))
    return None


_LOCKS: dict[Path, FileLock] = {}
"""The runs this process works on. The operating system frees a lock when its process ends, however it ends."""


def claim_lock(folder: Path) -> bool:
    """Take the lock of a run for this process; False if another one has it."""
    folder = folder.resolve()
    if folder not in _LOCKS:
        lock = FileLock(folder / LOCK_FILE)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        _LOCKS[folder] = lock
    return True


def release_run(folder: Path) -> None:
    """Let other processes have the run."""
    lock = _LOCKS.pop(folder.resolve(), None)
    if lock is not None:
        lock.release()


def _same_runs(runs: Path, fingerprint: str) -> Iterator[Path]:
    """Newest first (names are dates)."""
    for record in sorted(runs.glob(f"*/{RUN_FILE}"), reverse=True):
        with suppress(OSError, ValueError, AttributeError):
            if json.loads(record.read_text()).get("fingerprint") == fingerprint:
                yield record.parent


NO_INFLUENCE = frozenset({"data", "masks", "run_dir", "movies", "movie_size"})
"""Fields that do not decide the field: paths (their content counts), what the run fills in itself, and what is made
from the finished field (a run that is found again makes what is missing of it)."""
STAGE_2 = frozenset({"refine_steps", "refine_strength"})
"""Fields that decide nothing before stage 2 begins."""


def fingerprint(settings: Any, *data: Path | None, without: frozenset[str] = frozenset()) -> str:
    """Hash of nested settings and of the content of files, folders and patterns; the same in every process.

    Args:
        settings: dataclasses, containers and plain values; fields named in `NO_INFLUENCE` are left out.
        without: other fields to leave out.

    Raises:
        OSError: a file cannot be read.
    """
    plain = _plain(settings, NO_INFLUENCE | without)
    return content_hash(__version__, plain, *(_files_hash(path) for path in data))


def _plain(value: Any, left_out: frozenset[str]) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.name not in left_out]
        return [type(value).__qualname__, {name: _plain(getattr(value, name), left_out) for name in fields}]
    if isinstance(value, dict):
        return {str(key): _plain(item, left_out) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, left_out) for item in value]
    if isinstance(value, enum.Enum):
        return str(value)
    if isinstance(value, type) or callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _files_hash(path: Path | None) -> str | None:
    if path is None:
        return None
    path = local_path(path)
    if path.is_dir():  # of pictures, or of a view grid with its own folders; what others put beside them is not read
        folders = [folder for folder in (path, path / "images", path / "confidence") if folder.is_dir()]
        files = [*(file for folder in folders for file in source_files(folder)), path / "grid.json"]
        files = sorted(file for file in [*files, path / "transforms.json"] if file.is_file())
    else:
        # a pattern may match what is no file: a pipe, for one, would never end
        files = [file for file in source_files(path) if file.is_file()]
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(str(file.relative_to(path if path.is_dir() else path.parent)).encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
