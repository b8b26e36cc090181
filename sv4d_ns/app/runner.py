"""Who is next: one run at a time, and beside it one look of the doctor, which takes seconds."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from sv4d_ns.app.jobs import Job, State, Store, plain_name, without_flags
from sv4d_ns.app.work import LOOK_FILE, PAGE_FILE, RESULT_FOLDER
from sv4d_ns.cli.batch import error_in
from sv4d_ns.runs.layout import SUMMARY_FILE, latest_run
from sv4d_ns.utils.progress import PROGRESS_VARIABLE

PROGRAM = ("-m", "sv4d_ns.app.work")
"""What does the work: arguments of Python."""
PROGRESS_FILE, TRAIN_LOG = "progress.json", "train.log"
LOOK_SECONDS = 900
"""The doctor needs seconds, and minutes where a model has to cut the object out; what takes longer is made to do so."""
GRACE_SECONDS = 30.0
"""A run that is stopped finishes its step and saves a checkpoint; after so long it is ended as it is."""
DOCTORS_FLAGS = tuple(f"--pipeline.datamanager.{name}" for name in ("max-frames", "fps"))
"""Settings of `ns-train` that the doctor has to know, too."""


@dataclass(frozen=True)
class Settings:
    """How this server makes assets."""

    train: tuple[str, ...] = ()
    """More arguments of `ns-train sv4d`."""
    resolution: int = 128
    max_faces: int = 20_000
    texture_size: int | None = None


def run_folder(job_folder: Path) -> Path | None:
    """The newest run of a job."""
    return latest_run(job_folder / "run", "*/sv4d/*")


class Runner:
    """Works through the jobs of a store, in the event loop of the server; the work itself is in other processes."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self.store = store
        self.settings = settings
        self._news = {"looking": asyncio.Event(), "waiting": asyncio.Event()}
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._cancelled: set[str] = set()
        self._closing = False

    async def serve(self) -> None:
        """Take the next job, and the next, until `close`."""
        await asyncio.gather(self._lane("looking"), self._lane("waiting"))

    async def close(self) -> None:
        """Stop what is under way; it goes on when it is asked for again."""
        self._closing = True
        for event in self._news.values():
            event.set()
        await asyncio.gather(*(self._end(process) for process in self._processes.values()))

    def wake(self) -> None:
        """There is a new job, or one came into another state."""
        for event in self._news.values():
            event.set()

    # ------------------------------------------------------------------------------------- what visitors ask for

    def look(self, job: Job, matting: str, crop: str) -> Job:
        """Let the doctor look (again), with these settings; `Doctor` refuses others than it has."""
        job.allow("look")
        (self.store.folder(job) / LOOK_FILE).unlink(missing_ok=True)
        changed = replace(job.to("looking"), matting=matting, crop=crop)  # type: ignore[arg-type]
        return self._saved(changed)

    def start(self, job: Job) -> Job:
        """Start a run or go on with it, when its turn comes."""
        job.allow("start")
        return self._saved(job.to("waiting"))

    def cancel(self, job: Job) -> Job:
        """Take a job out of the queue, or stop it."""
        job.allow("cancel")
        if job.state == "waiting":
            return self._saved(job.to("stopped" if job.begun else "ready"))
        process = self._processes.get(job.id)
        if process is not None:
            self._ending = asyncio.ensure_future(self._end(process))
        if job.state == "looking":  # its turn ends without a word, because the job is another one then
            return self._saved(job.to("refused", "Looking at it was cancelled."))
        self._cancelled.add(job.id)
        return job

    def is_stopping(self, job: Job) -> bool:
        """Whether a run was told to stop and has not done so yet."""
        return job.id in self._cancelled

    def _saved(self, job: Job) -> Job:
        self.store.save(job)
        self.wake()
        return job

    # ------------------------------------------------------------------------------------------------- the work

    async def _lane(self, state: State) -> None:
        news = self._news[state]
        while not self._closing:
            job = next(self.store.queue(state), None)
            if job is None:
                news.clear()
                await news.wait()
                continue
            try:
                await (self._look(job) if state == "looking" else self._run(job))
            except OSError as error:
                self._give_up(job, error)

    def _give_up(self, job: Job, error: OSError) -> None:
        """A full disk is the end of a job's turn, not of the server."""
        self._cancelled.discard(job.id)
        sentence = f"The server could not work on it ({error.strerror or error}): free space on its disk and try again."
        state: State = "refused" if job.state == "looking" else "failed"
        self.store.settle(self.store.get(job.id).to(state, sentence))

    async def _look(self, job: Job) -> None:
        video = self.store.video(job)
        given = [word for flag in DOCTORS_FLAGS for word in _flag(self.settings.train, flag)]
        words = ["look", str(video), "--matting", job.matting, "--crop", job.crop, *given]
        error = await self._work(job, "look.log", words, LOOK_SECONDS)
        if self.store.get(job.id) != job:  # another look was asked for meanwhile: the job's turn comes again
            return
        if not self._closing:  # a doctor that was disturbed looks again when the server is back
            ready = not error and (self.store.folder(job) / LOOK_FILE).is_file()
            self._settle(job, "ready" if ready else "refused", _for_the_page(error, video, job))

    async def _run(self, job: Job) -> None:
        job = self.store.save(replace(job.to("running"), begun=True))
        error = await self._work(job, TRAIN_LOG, self.train_words(job))
        run = run_folder(self.store.folder(job))
        if not error and not self._closing and not self.is_stopping(job):
            if run is None or not (run / SUMMARY_FILE).is_file():
                error = "ns-train ended without a result."
            else:
                error = await self._work(job, "export.log", self.export_words(job, run))
        if self._closing or self.is_stopping(job):
            self._cancelled.discard(job.id)
            self._settle(job, "stopped")
        elif error:
            self._settle(job, "failed", _for_the_page(error, self.store.video(job), job))
        else:
            self._settle(job, "finished")

    def train_words(self, job: Job) -> list[str]:
        """The arguments of `ns-train`, the same for the first time and for every time a stopped run goes on."""
        return [
            *("train", "sv4d", "--data", str(self.store.video(job))),
            *("--output-dir", str(self.store.folder(job) / "run"), "--experiment-name", plain_name(job.title)),
            *("--vis", "tensorboard", "--pipeline.datamanager.matting", job.matting),
            *("--pipeline.datamanager.crop", job.crop, *self.settings.train),
        ]

    def export_words(self, job: Job, run: Path) -> list[str]:
        """The arguments of `work.Export`."""
        settings = self.settings
        size = () if settings.texture_size is None else ("--texture-size", str(settings.texture_size))
        return [
            *("export", "--load-config", str(run / "config.yml")),
            *("--folder", str(self.store.folder(job) / RESULT_FOLDER)),
            *("--resolution", str(settings.resolution), "--max-faces", str(settings.max_faces), *size),
        ]

    def _settle(self, job: Job, state: State, error: str = "") -> None:
        """Write down what became of a job; one that was finished has a result to show."""
        if state == "finished" and not (self.store.folder(job) / RESULT_FOLDER / PAGE_FILE).is_file():
            state, error = "failed", "The files of the result were not written."
        self._saved(job.to(state, error))

    async def _work(self, job: Job, log: str, words: Sequence[str], seconds: float | None = None) -> str:
        """Run a program for a job; the sentence it ended with, if it did not end well."""
        folder = self.store.folder(job)
        progress = folder / PROGRESS_FILE
        progress.unlink(missing_ok=True)
        with (folder / log).open("w") as file:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, *PROGRAM, *words),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**os.environ, PROGRESS_VARIABLE: str(progress)},
                start_new_session=True,
            )
        self._processes[job.id] = process
        try:
            if self.is_stopping(job) or self._closing:
                await self._end(process)
            code = await asyncio.wait_for(process.wait(), seconds)
        except asyncio.TimeoutError:
            await self._end(process, 0)
            return f"Looking at the video took longer than {LOOK_SECONDS} s and was ended: shorten it."
        finally:
            del self._processes[job.id]
            progress.unlink(missing_ok=True)
        if code == 0:
            return ""
        return error_in(folder / log) or _of_code(code, log)

    @staticmethod
    async def _end(process: asyncio.subprocess.Process, grace: float | None = None) -> None:
        """Ctrl-C for the process and its children; where that does not help, the end of them."""
        patient = GRACE_SECONDS if grace is None else grace
        for sign, patience in ((signal.SIGINT, patient), (signal.SIGKILL, 10.0)):
            if process.returncode is not None:
                return
            with suppress(ProcessLookupError):
                os.killpg(process.pid, sign)
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(process.wait(), patience)


def _flag(words: Sequence[str], flag: str) -> list[str]:
    """A flag and its value, if they are among the words, in whichever way ns-train takes them."""
    for number, word in enumerate(words):
        name, joined, value = word.partition("=")
        if name.replace("_", "-") == flag:
            return [flag, *([value] if joined else words[number + 1 : number + 2])]
    return []


def _for_the_page(error: str, video: Path, job: Job) -> str:
    """A sentence that names the video as its owner does, and no flags."""
    return without_flags(error.replace(str(video), job.title))


def _of_code(code: int, log: str) -> str:
    """A sentence about a program that said none itself."""
    if code == -signal.SIGKILL:
        return "The program was killed, most likely because the memory of the server was full; start it again."
    return f"The program ended with code {code}: {log} in the job's folder says more; start it again to go on."
