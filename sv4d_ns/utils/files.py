"""Files that are either whole or absent, and names that say what is in them."""

import ctypes
import hashlib
import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from sv4d_ns.utils.errors import InputError

TEMPORARY = ".sv4d-tmp-"
"""How the names of half-written files and folders begin; nobody else's do, so what a killed process left can be told
from files of others."""


def is_temporary(path: Path) -> bool:
    """Whether a file or folder is a half-written one of this module."""
    return path.name.startswith(TEMPORARY)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it replaces `path` when the block ends without an exception.

    The suffix is kept, because writers choose the format by it. A process killed inside the block leaves `path`
    as it was (and at most a hidden temporary file).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle, name = tempfile.mkstemp(prefix=f"{TEMPORARY}{path.stem}-", suffix=path.suffix, dir=path.parent)
    except OSError as error:  # it names the temporary file
        raise OSError(error.errno, error.strerror, str(path)) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes private files; a result is an ordinary file under the user's umask
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        # a full disk names no file, and nobody knows the temporary one
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


@contextmanager
def atomic_folder(folder: Path, mark: str, kind: str) -> Iterator[Path]:
    """`replaced_folder` that replaces nothing but its like.

    Args:
        folder: the place of the result.
        mark: a file that every folder of its kind holds; only such a folder, or an empty one, is ever replaced.
        kind: what such a folder is, for the message.

    Raises:
        InputError: something else is at the place.
    """
    if folder.exists() and not (folder / mark).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not {kind}: choose another place for it.")
    with replaced_folder(folder) as new:
        yield new


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder` that takes its place when the block ends without an exception.

    A process killed inside the block leaves `folder` as it was, and at most a hidden temporary folder. Where the system
    can exchange two folders (Linux and macOS, on most disks), a kill during the change of places does so, too;
    elsewhere one between its two renames leaves the former folder as `old` in the temporary one.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    workplace = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}{folder.name}-", dir=folder.parent))
    try:
        new, old = workplace / "new", workplace / "old"
        new.mkdir()
        yield new
        if not folder.exists():
            new.rename(folder)
        elif not _exchange(new, folder):
            folder.rename(old)
            try:
                new.rename(folder)
            except OSError:
                old.rename(folder)
                raise
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


_EXCHANGES = {"linux": ("renameat2", -100, 2), "darwin": ("renameatx_np", -2, 2)}
"""By system: the function of the C library, the number that stands for the current folder, and the flag to exchange."""


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders of a disk change places in one step; whether it was done, for not every system and disk can."""
    name, here, flag = _EXCHANGES.get(sys.platform, ("", 0, 0))
    function = getattr(ctypes.CDLL(None), name, None) if name else None
    return function is not None and function(here, os.fsencode(one), here, os.fsencode(other), flag) == 0


def check_zip(path: Path) -> None:
    """Compare every part of a zip archive (a torch checkpoint is one) with its checksum.

    Raises:
        ValueError: a part differs, or the file is no such archive.
        OSError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            flawed = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(f"not a whole archive: {error}") from error
    if flawed is not None:
        raise ValueError(f"the part {flawed} differs from its checksum")


def content_hash(*parts: Any) -> str:
    """32 hexadecimal digits of blake2b over arrays (dtype, shape, bytes) and JSON-serialisable values."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).tobytes())
        else:
            digest.update(json.dumps(part, sort_keys=True, default=str).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def sole_use(folder: Path, lock: str, taken: str) -> Iterator[None]:
    """Hold a folder, which is made if needed, for this process alone; a lock ends with its process, however it ends.

    Args:
        lock: name of the lock's file in it.
        taken: what to say where another process holds it.

    Raises:
        InputError: another process holds it.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    held = FileLock(folder / lock)
    try:
        held.acquire(timeout=0)
    except Timeout as error:
        raise InputError(taken) from error
    try:
        yield
    finally:
        held.release()
