"""Where the released SV4D 2.0 files come from (the hub, its cache, the disk) and whether they arrived whole.

Only safetensors files are taken. What the hub's client honours is honoured: HF_HOME, HF_TOKEN, HF_HUB_OFFLINE.
"""

import hashlib
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sv4d_ns.diffusion.weights.streaming import unreadable
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.progress import bytes_bar

REPOSITORY = "stabilityai/sv4d2.0"
MODEL_URL = f"https://huggingface.co/{REPOSITORY}"
DEFAULT_FILE = "sv4d2.safetensors"
LICENCE = "Stability AI Community License"
WITHOUT = "'ns-train sv4d --pipeline.datamanager.synthesis bundled' goes without these weights"

_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")
_ON_THE_HUB = re.compile(
    r"(?:https?://(?:huggingface\.co|hf\.co)/)?"
    r"(?P<repository>[A-Za-z0-9][\w.-]*/[\w.-]+)"
    r"(?:/(?:blob|resolve)/(?P<revision>[^/]+))?"
    r"(?:/(?P<filename>[\w.-]+\.safetensors))?/?(?:\?download=true)?"
)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Source:
    """A weights file before it is fetched: a local `path`, or else a file of a `repository` of the hub."""

    name: str
    path: Path | None = None
    repository: str = REPOSITORY
    revision: str | None = None


def locate(
    checkpoint: str | PathLike[str] = DEFAULT_FILE, filename: str | None = None, variant: str | None = None
) -> Source:
    """What is meant by `checkpoint`; nothing is downloaded.

    Args:
        checkpoint: a local file; a local folder that has `filename`; a file name of `REPOSITORY`; a repository of the
            hub as "owner/name" or "owner/name/file.safetensors"; or the address of such a file on the hub.
        filename: the file in the repository or folder; `DEFAULT_FILE` by default.
        variant: a suffix of the file's name as in diffusers ("fp16": sv4d2.fp16.safetensors).

    Raises:
        InputError: for a pickle, and for a local file that does not exist.
    """
    text = str(checkpoint)
    path = Path(text).expanduser()
    for name in (path.name, filename or ""):
        if name.endswith(_PICKLES):
            raise InputError(
                f"{name} is a pickle, which can run any code when it is opened: give the .safetensors file of the "
                f"same weights ({MODEL_URL})."
            )
    if path.is_dir():
        return _in_folder(path, _with_variant(filename or DEFAULT_FILE, variant))
    local = path.with_name(_with_variant(path.name, variant)) if path.name else path
    if local.is_file():
        return Source(local.name, local)
    if path.name == text:
        return Source(local.name)
    match = _ON_THE_HUB.fullmatch(text)
    in_a_folder_here = path.suffix == ".safetensors" and Path(path.parts[0]).exists()
    if match is None or match["repository"].endswith(".safetensors") or in_a_folder_here:
        raise InputError(
            f"{local} does not exist: give an existing file, or just {DEFAULT_FILE} to fetch it from the hub."
        )
    name = _with_variant(match["filename"] or filename or DEFAULT_FILE, variant)
    return Source(name, None, match["repository"], match["revision"])


def _with_variant(name: str, variant: str | None) -> str:
    stem, dot, suffix = name.rpartition(".")
    return name if variant is None or stem.endswith(f".{variant}") else f"{stem}.{variant}{dot}{suffix}"


def _in_folder(folder: Path, name: str) -> Source:
    if (folder / name).is_file():
        return Source(name, folder / name)
    if (folder / "model_index.json").is_file():
        raise InputError(f"{folder} is a converted model: load it with StableVideo4D2Pipeline.from_pretrained.")
    raise InputError(f"{folder} has no {name}: give the file itself.")


def fetch(source: Source, **download: Any) -> Path:
    """The file on this machine: as it is, from the hub's cache, or downloaded.

    Args:
        source: from `locate`.
        download: for `huggingface_hub.hf_hub_download` (revision, token, cache_dir, local_files_only, ...).

    Raises:
        InputError: when it cannot be had; the sentence says why and what to do.
    """
    if source.path is not None:
        return source.path
    name, repository = source.name, source.repository
    if source.revision is not None:
        download = {"revision": source.revision, **download}
    url = f"https://huggingface.co/{repository}"
    log_in = f"accept the licence at {url}, log in with 'hf auth login' (or set HF_TOKEN)"
    try:
        return Path(hf_hub_download(repository, name, **download))
    except GatedRepoError as error:
        raise InputError(
            f"The official SV4D 2.0 weights need your consent to the {LICENCE}: {log_in}, and run this again; "
            f"{WITHOUT}."
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"{url} has no revision {download.get('revision')}: look there for its name.") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"The hub shows no repository {repository} to you: look at {url} (or give the path of an existing file, if "
            f"you meant one); if it is there, {log_in}, and run this again; {WITHOUT}."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        cache = download.get("cache_dir") or constants.HF_HUB_CACHE
        if constants.HF_HUB_OFFLINE or download.get("local_files_only"):
            reason = "HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "local_files_only"
            raise InputError(
                f"{name} is not in the cache {cache} and {reason} forbids to fetch it: unset {reason}, set HF_HOME to "
                f"a cache that has it, or give the path of the file copied from {url}; {WITHOUT}."
            ) from error
        raise InputError(
            f"{name} is not in the cache {cache} and the hub cannot be reached: connect to the network, or copy the "
            f"file from {url} to this machine and give its path; {WITHOUT}."
        ) from error
    except EntryNotFoundError as error:
        raise InputError(f"{url} has no file {name}: look there for its name; {WITHOUT}.") from error
    except Exception as error:  # the client's transport errors differ from version to version
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise InputError(
            f"{name} could not be fetched from {url} ({reason}): check the network, the free disk space and that you "
            f"are logged in ('hf auth login'); {WITHOUT}."
        ) from error


def damaged(path: Path, reason: object) -> InputError:
    """The sentence for a file whose content is wrong."""
    return InputError(
        f"{path} is damaged or incomplete ({reason}): delete it and fetch it again from {MODEL_URL}; {WITHOUT}."
    )


def checksum_in_cache(path: Path) -> str | None:
    """The SHA-256 the hub announced for a file in its cache; None for any other file.

    The cache names the blobs of large files by it (huggingface_hub, "Understand caching").
    """
    while path.is_symlink():
        path = path.parent / path.readlink()
        if path.parent.name == "blobs" and _SHA256.fullmatch(path.name):
            return path.name
    return None


def verify(path: Path, sha256: str | None = None) -> str | None:
    """Read a file once through SHA-256; returns the checksum that it has, or None where none is known.

    A file given with `sha256` is read each time. A file in the hub's cache is read the first time it is used and
    again when its size or time of change differs, since the client compares only sizes after a download; that it was
    right is remembered below HF_HOME. Other files have no checksum to compare with.

    Raises:
        InputError: for another checksum than expected, or one that is none.
    """
    if sha256 is not None:
        expected = sha256.lower().removeprefix("sha256:")
        if not _SHA256.fullmatch(expected):
            raise InputError(f"'{sha256}' is not a SHA-256: give its 64 hexadecimal digits.")
        _compare(path, expected)
        return expected
    cached = checksum_in_cache(path)
    if cached is None:
        return None
    with unreadable(path):
        found = path.stat()
    stamp, state = Path(constants.HF_HOME) / "sv4d" / "verified" / cached, f"{found.st_size} {found.st_mtime_ns}"
    with suppress(OSError):
        if stamp.read_text() == state:
            return cached
    _compare(path, cached)
    with suppress(OSError):  # a cache that cannot be written to is checked each time
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(state)
    return cached


def _compare(path: Path, expected: str) -> None:
    digest = hashlib.sha256()
    with bytes_bar(f"Checking {path.name}", path.stat().st_size) as advance:
        for block in _blocks(path):
            digest.update(block)
            advance(len(block))
    if digest.hexdigest() != expected:
        raise damaged(path, f"its SHA-256 is {digest.hexdigest()} and should be {expected}")


def _blocks(path: Path) -> Iterator[bytes]:
    with unreadable(path), path.open("rb") as file:
        while block := file.read(1 << 22):
            yield block
