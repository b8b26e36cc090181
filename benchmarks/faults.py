"""The main job under fire: killed at random moments, out of disk, without permission, with damaged files.

    python benchmarks/faults.py --kills 30

Every fault is done to a short main job in processes of their own; then the same command is given again until it ends.
It passes if the job ends with the same figures as an undisturbed one, or stops with one clear sentence (and, where the
damage is to a file it keeps, ends after the sentence's remedy). One table is printed; the exit code is the number of
faults that did not pass. Linux; as root the jobs without permission run without root's right to read everything.
"""

import errno
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import tyro

FLAGS = {
    "--max-num-iterations": "24",
    "--steps-per-save": "4",
    "--vis": "tensorboard",
    "--pipeline.refine-steps": "14",
    "--pipeline.datamanager.input-size": "64",
    "--pipeline.datamanager.train-num-rays-per-batch": "128",
    "--pipeline.visibility-every": "3",
}
FORK = multiprocessing.get_context("forkserver")
NS_TRAIN = Path(sys.executable).parent / "ns-train"
MOST_RUNS = 6
"""Runs of the same command after a fault; more means that it does not recover."""
SAME = 1e-6
"""Largest difference of a figure (dB, IoU) that counts as the same."""
IMPORTED = [
    "nerfstudio.scripts.train",
    "sv4d_ns.plugin.trainer",
    "sv4d_ns.video",
    "sv4d_ns.movies.movies",
    "sv4d_ns.field.images",
    "sv4d_ns.fitting.objective",
    "sv4d_ns.export.command",
    "sv4d_ns.diffusion.sv4d.grid",
    "sv4d_ns.diffusion.sv4d.pipeline",
    "sv4d_ns.diffusion.bundled",
]
"""What a job imports; jobs are forked from a process that has done so."""
FIRST_LINE = "Device: "
"""What the job prints first, when everything is imported and nothing is done."""
UNPRIVILEGED = ("setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner")
"""Before a command: root that has to keep to permissions like anyone else."""


@dataclass
class Settings:
    """Which faults to do."""

    kills: int = 30
    """SIGKILLs at random moments."""
    kills_per_job: int = 10
    """A job is killed so many times in a row, if it does not end before, until it is left in peace."""
    seed: int = 0
    """Of the moments."""
    only: tuple[str, ...] = ()
    """Only faults whose name contains one of these."""
    folder: Path | None = None
    """Where the jobs work (a temporary folder by default)."""


def ns_train(words: list[str], output: Path) -> None:
    """What the executable does, in a process of its own that has everything imported already."""
    os.setsid()
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.argv = [str(NS_TRAIN), *words]
    from nerfstudio.scripts.train import entrypoint

    entrypoint()


@dataclass
class Running:
    """A job that was started; it writes both its outputs into a file."""

    process: Any
    """A `subprocess.Popen` or a `multiprocessing.Process`."""
    output: Path

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

    def said(self) -> str:
        """What it printed."""
        return self.output.read_text() if self.output.exists() else ""

    def wait_for_work(self) -> None:
        """Return when it has imported everything and begins (or has ended)."""
        while self.code is None and FIRST_LINE not in self.said():
            time.sleep(0.05)

    def work(self, most: float = math.inf) -> float:
        """Return when it has used so many more seconds of CPU time (or has ended), with those it has used.

        CPU time, because other programs on the machine do not change how far it brings a job.
        """
        used, began = 0.0, None
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.process.pid)
            while self.code is None and used < most:
                times = process.cpu_times()
                began = times.user + times.system if began is None else began
                used = times.user + times.system - began
                time.sleep(0.02)
        return used

    def wait(self) -> tuple[int, str]:
        """Its exit code and what it printed."""
        while self.code is None:
            time.sleep(0.05)
        return self.code, self.said()

    def signal(self, number: signal.Signals) -> None:
        """To the whole group of processes; none is left is no error."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


@dataclass(frozen=True)
class Job:
    """One main job: a video and an output folder."""

    video: Path
    output: Path

    def start(self, *before: str, executable: bool = False) -> Running:
        """Start it: by the executable, with words before it, or forked from a process that has imported its modules
        (most of what a short job costs)."""
        # the movies at the end of a run are switched off: their flag without a value
        flags = {"--data": str(self.video), "--output-dir": str(self.output), **FLAGS}
        words = ["sv4d", *(word for pair in flags.items() for word in pair), "--pipeline.movies"]
        log = self.output.with_suffix(".log")
        log.unlink(missing_ok=True)
        if before or executable:
            with log.open("w") as file:
                command = [*before, str(NS_TRAIN), *words]
                return Running(subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True), log)
        process = FORK.Process(target=ns_train, args=(words, log))
        process.start()
        return Running(process, log)

    def finish(self, *before: str, executable: bool = False) -> tuple[int, str]:
        """Run it to its end; exit code and what it printed."""
        return self.start(*before, executable=executable).wait()

    def summary(self) -> dict[str, float] | None:
        """The figures of its (only) finished run."""
        found = list(self.output.rglob("summary.json"))
        if len(found) != 1:
            return None
        figures = json.loads(found[0].read_text())
        return {name: value for name, value in figures.items() if isinstance(value, int | float)}

    def stage(self) -> str:
        """How far it came, by what is on the disk."""
        marks = {
            "summary.json": "finished",
            "contact_sheet.png": "finish",
            "views_refined_1": "stage 2",
            "nerfstudio_models/*.ckpt": "stage 1",
            "views": "views made",
            "../.windows/*/*.safetensors": "synthesis",
            "run.json": "ingest",
        }
        runs = list(self.output.glob("*/sv4d/[0-9]*"))
        if not runs:
            return "nothing written"
        return next((stage for mark, stage in marks.items() if any(runs[0].glob(mark))), "folder made")


def write_video(path: Path) -> None:
    """Two frames of a moving creature on white."""
    from sv4d_ns.geometry.cameras import ViewPlan
    from sv4d_ns.training_data.procedural import creature, render

    rgba = render(creature(2**31 + 5), np.linspace(0, 1, 2), ViewPlan.BUNDLED.c2w()[:1], 96)[:, 0] / 255.0
    frames = np.round(255 * (rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:])).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width = stream.height = 96
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def sentences(said: str) -> list[str]:
    """The error sentences of an output."""
    return [line for line in said.splitlines() if line.startswith("Error: ")]


def recover(job: Job, expected: dict[str, float], *before: str) -> str:
    """Give the command again until it ends; "ok ..." or what is wrong."""
    last = ""
    for count in range(1, MOST_RUNS + 1):
        code, said = job.finish(*before)
        if code == 0:
            found = job.summary()
            if found is None:
                return "FAILED: not one finished run"
            worst = max(abs(found[name] - expected[name]) for name in expected)
            if worst > SAME:
                return f"FAILED: figures differ by {worst:.2g}: {found} instead of {expected}"
            return f"ok, ends after {count} more run(s), the same figures{last}"
        if len(sentences(said)) != 1 or "Traceback" in said:
            return f"FAILED: no clear sentence: {said[-1500:]}"
        last = f"; it had said: {short(said)}"
        if not _follow_remedy(said):
            return f"ok, stops with: {short(said)}"
    return f"FAILED: not finished after {MOST_RUNS} runs{last}"


def short(said: str) -> str:
    """The sentence an output ends with, without folders."""
    words = sentences(said)[0].removeprefix("Error: ").split()
    return " ".join(word.rsplit("/", 1)[-1] if word.startswith("/") else word for word in words)


def _follow_remedy(said: str) -> bool:
    """Delete the file the sentence says to delete; False if it says something else."""
    sentence = sentences(said)[0]
    words = [word.rstrip(":,;") for word in sentence.split()]
    paths = [Path(word) for word in words if word.startswith("/") and Path(word).exists()]
    if "delete" not in sentence or not paths:
        return False
    shutil.rmtree(paths[0]) if paths[0].is_dir() else paths[0].unlink()
    return True


# --- faults ----------------------------------------------------------------------------------------------------------


def kill_at(job: Job, moment: float) -> str | None:
    """SIGKILL after so many seconds of CPU time at work; how far it had come, or None if it had ended by itself."""
    running = job.start()
    running.wait_for_work()
    running.work(moment)
    if running.code is not None:
        return None
    running.signal(signal.SIGKILL)
    running.wait()
    return job.stage()


def interrupt_twice(job: Job, moment: float) -> str:
    """SIGINT, and again while the first is being handled."""
    running = job.start(executable=True)
    running.wait_for_work()
    running.work(moment)
    stage = job.stage()
    for _ in range(2):
        running.signal(signal.SIGINT)
        time.sleep(0.05)
    code, said = running.wait()
    # the second may find Python already ending, which lets the system end it
    calm = "Traceback" not in said and code in (130, -signal.SIGINT)
    return f"in {stage}" + ("" if calm else f" NOT CALM (exit {code}): {said[-1500:]}")


KINDS = (
    "**/.windows/*/*.safetensors",
    "**/views/grid.json",
    "**/views/images/view00_frame0000.png",
    "**/views_refined_1/images/view01_frame0001.png",
    "**/nerfstudio_models/*.ckpt",
    "**/run.json",
    "**/config.yml",
)
KEPT = ("**/.windows/*/*.safetensors", "**/views*/*.json", "**/views*/*/*.png", "**/nerfstudio_models/*.ckpt")


def files_of(job: Job) -> Iterator[Path]:
    """One file of each kind that a run keeps."""
    for pattern in KINDS:
        yield from sorted(job.output.glob(pattern))[:1]


def truncate(path: Path) -> None:
    """Half a file."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def flip(path: Path) -> None:
    """A byte in the middle turned over."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def forbid(path: Path) -> None:
    """No permission to read or write."""
    path.chmod(0)


def small_disk(folder: Path, kilobytes: int) -> bool:
    """Mount a small tmpfs; False where that is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


@dataclass
class Bench:
    """Where the faults are done, and what came of them."""

    settings: Settings
    folder: Path
    whole: Job
    """The undisturbed job."""
    expected: dict[str, float]
    duration: float
    """Seconds of CPU time it was at work."""
    rows: list[tuple[str, str]] = field(default_factory=list)

    def wanted(self, fault: str) -> bool:
        """Whether the user asked for it."""
        return not self.settings.only or any(word in fault for word in self.settings.only)

    def report(self, fault: str, outcome: str) -> None:
        """Keep and print a row."""
        self.rows.append((fault, outcome))
        print(f"{fault:<60} {outcome}", flush=True)

    def job(self, name: str) -> Job:
        """A new job."""
        return Job(self.whole.video, self.folder / name)

    def unfinished(self, name: str) -> Job:
        """A job killed near its end, with everything a run keeps."""
        job = self.job(name)
        shutil.copytree(self.whole.output, job.output)
        for file in job.output.rglob("summary.json"):
            file.unlink()
        return job


def kills(bench: Bench) -> None:
    """SIGKILL at random moments, several in a row."""
    numbers, done = random.Random(bench.settings.seed), 0
    while done < bench.settings.kills and bench.wanted("kill"):
        job, stages = bench.job(f"kill{done}"), []
        while len(stages) < min(bench.settings.kills_per_job, bench.settings.kills - done):
            stage = kill_at(job, numbers.uniform(0, bench.duration))
            if stage is None:
                break
            stages.append(stage)
        done += len(stages)
        bench.report(f"killed in: {', '.join(stages)} ({done})", recover(job, bench.expected))
        shutil.rmtree(job.output, ignore_errors=True)


def interrupts(bench: Bench) -> None:
    """SIGINT twice, at four moments."""
    for share in (0.1, 0.5):
        if bench.wanted("interrupt"):
            job = bench.job(f"interrupt{share}")
            bench.report(
                f"interrupted twice {interrupt_twice(job, share * bench.duration)}", recover(job, bench.expected)
            )
            shutil.rmtree(job.output, ignore_errors=True)


def damage(bench: Bench) -> None:
    """A file of each kind cut in half, changed in the middle, forbidden to read."""
    spoilers: dict[str, Callable[[Path], None]] = {"truncate": truncate, "flip a byte of": flip, "forbid": forbid}
    for word, spoil in spoilers.items():
        for index, kind in enumerate(files_of(bench.whole)):
            fault = f"{word} {kind.name}"
            if bench.wanted(fault):
                job = bench.unfinished(f"damage{len(bench.rows)}")
                spoil(list(files_of(job))[index])
                bench.report(fault, recover(job, bench.expected, *_unprivileged(spoil)))
                shutil.rmtree(job.output)
    for name, place in (("the video", lambda job: job.video), ("the output folder", lambda job: job.output)):
        if bench.wanted(f"forbid {name}"):
            job = bench.unfinished(f"forbidden{len(bench.rows)}")
            video = bench.folder / f"forbidden{len(bench.rows)}.mp4"
            shutil.copy(job.video, video)
            job = Job(video, job.output)
            forbid(place(job))
            code, said = job.finish(*_unprivileged(forbid))
            clear = code == 1 and len(sentences(said)) == 1 and "Traceback" not in said
            bench.report(f"forbid {name}", f"ok, stops with: {short(said)}" if clear else f"FAILED: {said[-1500:]}")


def _unprivileged(spoil: Callable[[Path], None]) -> tuple[str, ...]:
    return UNPRIVILEGED if spoil is forbid and os.geteuid() == 0 else ()


def every_file(bench: Bench) -> None:
    """Every file the cache keeps cut in half, in turn: `sv4d cache verify` has to name it."""
    from sv4d_ns.runs.cache import entries, flaws

    if not bench.wanted("truncate every file"):
        return
    job = bench.unfinished("every")
    unnamed = []
    kept = [file for pattern in KEPT for file in sorted(job.output.glob(pattern))]
    for file in kept:
        whole = file.read_bytes()
        truncate(file)
        entry = next(entry for entry in entries(job.output) if entry.path in file.parents)
        if not any(file.name in flaw for flaw in flaws(entry)):
            unnamed.append(str(file.relative_to(job.output)))
        file.write_bytes(whole)
    outcome = f"FAILED: not named: {unnamed}" if unnamed else f"ok, each of {len(kept)} files is named"
    bench.report("truncate every file", outcome)
    shutil.rmtree(job.output)


def full_disks(bench: Bench) -> None:
    """A disk that is full at some point of the job, and larger afterwards."""
    size = sum(file.stat().st_size for file in bench.whole.output.rglob("*") if file.is_file()) // 1024
    for kilobytes in (40, 3000, size - size // 5):
        fault = f"disk of {kilobytes} KB (a run takes {size})"
        job = bench.job(f"disk{kilobytes}")
        if not bench.wanted(fault):
            continue
        if not small_disk(job.output, kilobytes):
            bench.report(fault, f"not tried: tmpfs cannot be mounted here ({os.strerror(errno.EPERM)})")
            continue
        try:
            code, said = job.finish()
            stage = job.stage()
            if code != 1 or len(sentences(said)) != 1 or "Traceback" in said:
                bench.report(fault, f"FAILED (exit {code}): {said[-1500:]}")
                continue
            subprocess.run(["mount", "-o", f"remount,size={4 * size}k", str(job.output)], check=True)
            bench.report(f"{fault}: in {stage}: {short(said)}", recover(job, bench.expected))
        finally:
            subprocess.run(["umount", str(job.output)], check=False)


def undisturbed(settings: Settings, folder: Path) -> Bench:
    """The job as it should be.

    Raises:
        SystemExit: it does not end by itself.
    """
    video = folder / "creature.mp4"
    write_video(video)
    job = Job(video, folder / "whole")
    running = job.start()
    running.wait_for_work()
    duration = running.work()
    code, said = running.wait()
    expected = job.summary()
    if code or expected is None:
        raise SystemExit(said)
    print(f"undisturbed: {duration:.0f} s of CPU time at work, {expected}", flush=True)
    return Bench(settings, folder, job, expected, duration)


def main(settings: Settings) -> int:
    """Do every fault and print a line for each; returns the number that failed."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would ours
    os.environ |= {"PYTHONUNBUFFERED": "1", "COLUMNS": "400"}  # of the jobs; sentences on one line each
    FORK.set_forkserver_preload(IMPORTED)
    if settings.folder is not None:
        settings.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=settings.folder) as name:
        bench = undisturbed(settings, Path(name))
        for fault in (full_disks, interrupts, every_file, damage, kills):
            fault(bench)
    failed = sum("FAILED" in outcome or "NOT CALM" in fault for fault, outcome in bench.rows)
    print(f"{len(bench.rows) - failed} of {len(bench.rows)} passed")
    return failed


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
