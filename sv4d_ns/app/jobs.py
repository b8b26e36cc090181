"""Videos that were dropped on the page, each a job in a folder of its own; what is written there outlives the server.

OUT/<id>/
    job.json                    the job itself, whole at any moment
    video.<ending>              what was uploaded, under a name of ours
    look.json cutout.png crop.jpg     what the doctor sees in it
    run/<title>/sv4d/<time>/    the run of ns-train
    result/                     the exported files
    look.log train.log export.log progress.json     what the programs print, and how far the one at work is
"""

import json
import re
import secrets
import shutil
import time
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.files import TEMPORARY, atomic_folder, atomic_path, is_temporary
from sv4d_ns.video.sources import FILM_SUFFIXES

State = Literal["looking", "refused", "ready", "waiting", "running", "stopped", "failed", "finished"]
"""looking: the doctor's turn is coming or on; refused: it cannot use the video; ready: to be started; waiting: for its
turn; stopped: by the user or with the server; failed: with `Job.error`."""
Crop = Literal["auto", "fixed", "stabilised"]
JOB_FILE = "job.json"
MAX_OPEN = 20
"""Jobs that may wait for the doctor or for their turn at once: more would only fill the disk."""
SPARE_BYTES = 1_000_000_000
"""So much of the disk is left free by uploads: a run takes less."""
TITLE_LENGTH = 80

STARTS: dict[str, tuple[State, ...]] = {
    "look": ("ready", "refused", "looking"),
    "start": ("ready", "stopped", "failed"),
    "cancel": ("looking", "waiting", "running"),
    "delete": ("refused", "ready", "stopped", "failed", "finished"),
}
"""What may be done with a job in which states."""


@dataclass(frozen=True)
class Job:
    """One video and what becomes of it."""

    id: str
    title: str
    """What the visitor's file was called; shown, and never used as a path."""
    file: str
    """The video's name in the job's folder."""
    added: float
    """Seconds since 1970."""
    state: State = "looking"
    since: float = 0.0
    """When it came into this state."""
    matting: str = "u2netp"
    crop: Crop = "auto"
    """As a run on the command line where nothing is said."""
    begun: bool = False
    """Whether a run of it has been started."""
    error: str = ""

    def to(self, state: State, error: str = "") -> "Job":
        """The job in another state, from now on."""
        return replace(self, state=state, error=error, since=time.time())

    def allow(self, action: str) -> None:
        """Raises `InputError` where this cannot be done with the job as it stands."""
        if self.state not in STARTS[action]:
            raise InputError(f"'{self.title}' is {self.state}: '{action}' is not possible now; reload the page.")


class Store:
    """The jobs in a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        root.mkdir(parents=True, exist_ok=True)
        self._jobs: dict[str, Job] = {}

    def recover(self) -> None:
        """Read the jobs that are there; what was under way when the last server ended is stopped, and can go on."""
        for leftover in self.root.iterdir():
            if is_temporary(leftover):
                leftover.unlink() if leftover.is_file() else shutil.rmtree(leftover, ignore_errors=True)
        for path in self.root.glob(f"*/{JOB_FILE}"):
            job = _read(path)
            if job is not None:
                self._jobs[job.id] = job
                if job.state == "running":
                    self.save(job.to("stopped", "The server ended while this run was under way."))

    def folder(self, job: Job) -> Path:
        """Where all of a job lies."""
        return self.root / job.id

    def video(self, job: Job) -> Path:
        """What was uploaded."""
        return self.folder(job) / job.file

    def all(self) -> list[Job]:
        """Newest first."""
        return sorted(self._jobs.values(), key=lambda job: job.added, reverse=True)

    def get(self, id: str) -> Job:
        """One by its id.

        Raises:
            InputError: there is none (any more).
        """
        if id not in self._jobs:
            raise InputError("There is no such run here (any more): reload the page.")
        return self._jobs[id]

    def queue(self, state: State) -> Iterator[Job]:
        """The jobs in a state, those first that came into it first."""
        yield from sorted((job for job in self._jobs.values() if job.state == state), key=lambda job: job.since)

    def save(self, job: Job) -> Job:
        """Write a job down."""
        _write(job, self.folder(job))
        self._jobs[job.id] = job
        return job

    def settle(self, job: Job) -> Job:
        """Write a job down, or at least know it until the server ends, where the disk does not take it."""
        with suppress(OSError):
            _write(job, self.folder(job))
        self._jobs[job.id] = job
        return job

    def add(self, upload: Path, title: str) -> Job:
        """A new job of an uploaded file, which is moved to its place; a kill leaves no video without a job."""
        now = time.time()
        job = Job(secrets.token_hex(6), title, f"video{suffix_of(title)}", now, since=now)
        with atomic_folder(self.folder(job), JOB_FILE, "a job") as folder:
            upload.replace(folder / job.file)
            _write(job, folder)
        self._jobs[job.id] = job
        return job

    def delete(self, job: Job) -> None:
        """Remove a job and all its files."""
        del self._jobs[job.id]
        grave = self.root / f"{TEMPORARY}{job.id}"
        self.folder(job).rename(grave)  # gone at once, however long the files take
        shutil.rmtree(grave, ignore_errors=True)

    def new_upload(self) -> Path:
        """Where the bytes of an upload go until all are there."""
        return self.root / f"{TEMPORARY}upload-{secrets.token_hex(8)}"

    def check_upload(self, title: str, size: int, max_bytes: int) -> None:
        """Refuse an upload before its first byte.

        Raises:
            InputError: it is no video, too large for the limit or for the disk, or too many wait already.
        """
        suffix_of(title)
        if size <= 0:
            raise InputError(f"'{title}' is empty: choose a video.")
        if size > max_bytes:
            raise InputError(
                f"'{title}' is larger than {max_bytes / 1e6:g} MB, which this server takes at most: shorten the video, "
                "or start 'sv4d app' with a larger --max-upload-mb."
            )
        if shutil.disk_usage(self.root).free < size + SPARE_BYTES:
            raise InputError(f"The disk of the server has no room for '{title}': delete earlier runs first.")
        if sum(job.state in ("looking", "waiting") for job in self._jobs.values()) >= MAX_OPEN:
            raise InputError(f"{MAX_OPEN} videos are waiting already: come back when some of them are done.")


def title_of(name: str) -> str:
    """A stranger's file name as a title: its last part, without what a terminal or a page may take for more than text.

    Raises:
        InputError: nothing is left of it.
    """
    last = re.split(r"[/\\]", unicodedata.normalize("NFC", name))[-1]
    printable = "".join(letter for letter in last if unicodedata.category(letter)[0] not in "CZ" or letter == " ")
    title = " ".join(printable.split())
    stem, dot, suffix = title.rpartition(".")
    if not stem.strip(" ."):
        raise InputError("The file has no name: give it one that ends in .mp4 or the like.")
    return f"{stem[: TITLE_LENGTH - len(suffix)]}{dot}{suffix}"


def suffix_of(title: str) -> str:
    """The ending of a video's name.

    Raises:
        InputError: it is not one of a video.
    """
    suffix = Path(title).suffix.lower()
    if suffix not in FILM_SUFFIXES:
        known = ", ".join(sorted(FILM_SUFFIXES))
        raise InputError(f"'{title}' does not end like a video ({known}): choose one of these.")
    return suffix


def plain_name(title: str) -> str:
    """A title as the name of folders and of downloads: letters, digits, - and _ alone."""
    name = unicodedata.normalize("NFKD", title.rpartition(".")[0]).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-_")[:60] or "video"


def without_flags(sentence: str) -> str:
    """A sentence without the flags and commands in brackets, which the page's readers cannot give."""
    return re.sub(r"(; look at (?:it|them))? (?:with )?(?:\((?:--|sv4d )[^)]*\)|sv4d doctor --picture)", "", sentence)


def _write(job: Job, folder: Path) -> None:
    with atomic_path(folder / JOB_FILE) as temporary:
        temporary.write_text(json.dumps(asdict(job), indent=1))


def _read(path: Path) -> Job | None:
    """A job that was written down; None where that is no job of ours."""
    try:
        job = Job(**json.loads(path.read_text()))
        known = job.state in get_args(State) and job.id == path.parent.name and Path(job.file).name == job.file
    except (OSError, ValueError, TypeError):
        return None
    return job if known else None
