"""The main job under fire: killed at random moments, out of disk, without permission, with damaged files.

    python benchmarks/faults.py --kills 30

Every fault is done to a short main job in processes of their own; then the same command is given again until it ends.
It passes if the job ends with the same figures as an undisturbed one, or stops with one clear sentence (and, where the
damage is to a file it keeps, ends after the sentence's remedy). One table is printed; the exit code is the number of
faults that did not pass.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import tyro

FLAGS = {
    "--max-num-iterations": "40",
    "--steps-per-save": "8",
    "--vis": "tensorboard",
    "--pipeline.refine-steps": "24",
    "--pipeline.datamanager.input-size": "64",
    "--pipeline.datamanager.train-num-rays-per-batch": "256",
}
NS_TRAIN = Path(sys.executable).parent / "ns-train"
MOST_RUNS = 6
"""Runs of the same command after a fault; more means that it does not recover."""


@dataclass
class Settings:
    kills: int = 30
    """SIGKILLs at random moments, each in a job of its own."""
    seed: int = 0
    """Of the moments."""
    only: str = ""
    """Only faults whose name contains this."""


@dataclass(frozen=True)
class Job:
    """One main job: a video and an output folder."""

    video: Path
    output: Path

    def start(self) -> subprocess.Popen[str]:
        """Start it; both its outputs come through one pipe."""
        # the movies at the end of a run are switched off: their flag without a value
        flags = {"--data": str(self.video), "--output-dir": str(self.output), **FLAGS}
        command = [str(NS_TRAIN), "sv4d", *(word for pair in flags.items() for word in pair), "--pipeline.movies"]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )

    def finish(self) -> tuple[int, str]:
        """Run it to its end; exit code and what it printed."""
        process = self.start()
        said, _ = process.communicate()
        return process.returncode, said

    def summary(self) -> dict[str, float] | None:
        """The figures of its (only) finished run."""
        found = list(self.output.rglob("summary.json"))
        return json.loads(found[0].read_text()) if len(found) == 1 else None


def write_video(path: Path) -> None:
    """Four frames of a moving creature on white."""
    from sv4d_ns.cameras import ViewPlan
    from sv4d_ns.procedural import creature, render

    rgba = render(creature(2**31 + 5), np.linspace(0, 1, 4), ViewPlan.EMBEDDED.c2w()[:1], 96)[:, 0] / 255.0
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


def recover(job: Job, expected: dict[str, float]) -> str:
    """Give the command again until it ends; "ok ..." or what is wrong."""
    for count in range(1, MOST_RUNS + 1):
        code, said = job.finish()
        if code == 0:
            found = job.summary()
            if found is None:
                return "FAILED: not one finished run"
            worst = max(abs(found[name] - expected[name]) for name in expected)
            return (
                f"ok, after {count} more run(s), figures within {worst:.2g}"
                if worst < 0.2
                else (f"FAILED: figures differ by {worst:.2g}: {found} instead of {expected}")
            )
        if len(sentences(said)) != 1:
            return f"FAILED: no clear sentence: {said[-400:]}"
        if not _follow_remedy(said):
            return f"ok, stops with: {sentences(said)[0][:110]}"
    return f"FAILED: not finished after {MOST_RUNS} runs"


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


def kill_at(job: Job, moment: float) -> str:
    """SIGKILL so many seconds after the start; what the run had on disk."""
    process = job.start()
    time.sleep(moment)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return f"killed after {moment:.1f} s"


def interrupt_twice(job: Job, moment: float) -> str:
    """SIGINT, and again while the first is being handled."""
    process = job.start()
    time.sleep(moment)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.05)
    said, _ = process.communicate()
    calm = "Traceback" not in said
    return f"exit {process.returncode}{'' if calm else ', WITH A TRACEBACK'}"


def files_of(job: Job) -> Iterator[Path]:
    """One file of each kind that a run keeps."""
    for pattern in (
        "**/.windows/*/*.safetensors",
        "**/views/grid.json",
        "**/views/images/view00_frame0000.png",
        "**/views/images/view01_frame0001.png",
        "**/nerfstudio_models/*.ckpt",
        "**/run.json",
        "**/config.yml",
    ):
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
    """No permission to read (has no effect on root)."""
    path.chmod(0)


def small_disk(folder: Path, megabytes: int) -> bool:
    """Mount a small tmpfs; False where that is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


def main(settings: Settings) -> int:
    """Do every fault and print a line for each; returns the number that failed."""
    rows: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        video = folder / "creature.mp4"
        write_video(video)

        def report(fault: str, outcome: str) -> None:
            rows.append((fault, outcome))
            print(f"{fault:<44} {outcome}", flush=True)

        whole = Job(video, folder / "whole")
        began = time.monotonic()
        code, said = whole.finish()
        duration = time.monotonic() - began
        expected = whole.summary()
        if code or expected is None:
            print(said)
            return 1
        print(f"undisturbed: {duration:.0f} s, {expected}", flush=True)
        numbers = random.Random(settings.seed)

        def wanted(fault: str) -> bool:
            return settings.only in fault

        def unfinished(number: int) -> Job:
            """A job killed near its end, with everything a run keeps."""
            job = Job(video, folder / f"unfinished{number}")
            shutil.copytree(whole.output, job.output)
            for file in job.output.rglob("summary.json"):
                file.unlink()
            return job

        for number in range(settings.kills):
            job = Job(video, folder / f"kill{number}")
            moment = numbers.uniform(0, duration)
            if wanted(f"kill {number}"):
                report(f"kill {number}: {kill_at(job, moment)}", recover(job, expected))
                shutil.rmtree(job.output, ignore_errors=True)
        if wanted("interrupt"):
            job = Job(video, folder / "interrupt")
            report(f"interrupt twice: {interrupt_twice(job, 0.7 * duration)}", recover(job, expected))
        spoilers: dict[str, Callable[[Path], None]] = {"truncate": truncate, "flip a byte of": flip, "forbid": forbid}
        for word, spoil in spoilers.items():
            for index in range(len(list(files_of(whole)))):
                job = unfinished(len(rows))
                file = list(files_of(job))[index]
                fault = f"{word} {file.name}"
                if wanted(fault):
                    spoil(file)
                    report(fault, recover(job, expected))
                shutil.rmtree(job.output)
        for megabytes in (1, 3, 8):
            job = Job(video, folder / f"disk{megabytes}")
            if not wanted(f"disk of {megabytes}"):
                continue
            if not small_disk(job.output, megabytes):
                report(f"disk of {megabytes} MB", "not tried: tmpfs cannot be mounted here")
                continue
            try:
                code, said = job.finish()
                clear = code != 0 and len(sentences(said)) == 1
                report(
                    f"disk of {megabytes} MB", f"ok, {sentences(said)[0][:110]}" if clear else f"FAILED: {said[-300:]}"
                )
            finally:
                subprocess.run(["umount", str(job.output)], check=False)
    failed = sum("FAILED" in outcome or "TRACEBACK" in fault for fault, outcome in rows)
    print(f"{len(rows) - failed} of {len(rows)} passed")
    return failed


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
