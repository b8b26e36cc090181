"""The whole main job by phases, against another commit in the same run.

    python benchmarks/main_job.py --against c09ba52 --output benchmarks/results/main_job.md

Runs `ns-train sv4d --data assets/sample.mp4` with default settings, this checkout and the other commit in turns, with
the environment of this interpreter, and compares wall and processor time: a regression shows as a ratio above 1. Phases
are read off the times at which a run's files appear, so commits of any age can be compared. The machine must be idle.
"""

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from sv4d_ns.utils.files import atomic_path

ROOT = Path(__file__).parents[1]
PHASES = (
    ("start-up, background, views", ("views/grid.json",)),
    ("stage 1", ("views_refined_1/grid.json",)),
    ("stage 2", ("nerfstudio_models/*.ckpt",)),
    ("contact sheet", ("contact_sheet.png",)),
    ("movies and the end", ()),
)
"""Phase and the files whose appearance ends it; the last one ends with the process."""


@dataclass(frozen=True)
class Config:
    """What to run."""

    video: Path = ROOT / "assets" / "sample.mp4"
    """The film."""
    against: str | None = None
    """Another commit; without one, this checkout alone is timed."""
    rounds: int = 1
    """Runs of each, in turns; the medians are compared."""
    threads: int = 0
    """OpenMP and numba threads; 0 leaves them to the program."""
    output: Path | None = None
    """Also write the table here."""


@dataclass(frozen=True)
class Timing:
    """Seconds of a run: on the wall by phase and in all, and of all its processors."""

    phases: dict[str, float]
    wall: float
    cpu: float
    peak_mb: float


def checkout(revision: str, folder: Path) -> Path:
    """A commit's files, importable beside the installed dependencies."""
    subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "--detach", str(folder), revision], check=True)
    # the package's table of folders puts the top-level folder there when it is installed
    (folder / "sv4d_ns" / "method_configs").symlink_to(folder / "method_configs")
    return folder


def timed(code: Path, config: Config) -> Timing:
    """One run of the main job with a checkout's code, in a fresh output folder."""
    threads = {name: str(config.threads) for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")} if config.threads else {}
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        command = [
            sys.executable, "-c", "import sys; from nerfstudio.scripts.train import entrypoint; entrypoint()", "sv4d",
            "--data", str(config.video.absolute()), "--output-dir", str(out),
            "--viewer.quit-on-train-completion", "True",
        ]  # fmt: skip
        # libraries are compiled to bytecode once on a machine, and not in every run
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        began, began_wall = time.monotonic(), time.time()
        subprocess.run(
            command, check=True, cwd=out, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            env={**kept, **threads, "PYTHONPATH": str(code)},
        )  # fmt: skip
        wall = time.monotonic() - began
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        (run,) = [path.parent for path in out.glob("*/sv4d/*/summary.json")]
        ends, last = {}, 0.0
        for name, patterns in PHASES:
            times = [file.stat().st_mtime - began_wall for pattern in patterns for file in run.glob(pattern)]
            end = max(times) if times else (wall if not patterns else last)
            ends[name], last = end - last, end
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Timing(ends, wall, cpu, after.ru_maxrss / 1024)


def table(found: dict[str, list[Timing]]) -> str:
    """Medians of every phase, and the ratio of this checkout to the other commit."""
    names = list(found)
    lines = [f"| | {' | '.join(f'{name}, s' for name in names)} |" + (" ratio |" if len(names) == 2 else "")]
    lines.append("|---|" + "---|" * (len(names) + (len(names) == 2)))

    def row(title: str, values: list[float]) -> None:
        ratio = f" {values[0] / max(values[1], 1e-9):.2f} |" if len(values) == 2 else ""
        lines.append(f"| {title} | {' | '.join(f'{value:.1f}' for value in values)} |{ratio}")

    for phase, _ in PHASES:
        row(phase, [statistics.median(t.phases[phase] for t in found[name]) for name in names])
    row("whole command, wall", [statistics.median(t.wall for t in found[name]) for name in names])
    row("whole command, CPU", [statistics.median(t.cpu for t in found[name]) for name in names])
    row("peak memory, MB", [max(t.peak_mb for t in found[name]) for name in names])
    return "\n".join(lines)


def main(config: Config) -> None:
    """Time and compare."""
    here = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    folder = Path(tempfile.mkdtemp()) / "other"
    places = {f"this ({here})": checkout("HEAD", folder.with_name("this"))}
    try:
        if config.against:
            places[config.against] = checkout(config.against, folder)
        found: dict[str, list[Timing]] = {name: [] for name in places}
        for _ in range(config.rounds):
            for name, code in places.items():
                found[name].append(timed(code, config))
    finally:
        for place in places.values():
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(place)], check=False)
        shutil.rmtree(folder.parent, ignore_errors=True)
    text = f"{table(found)}\n\n`python benchmarks/main_job.py {' '.join(sys.argv[1:])}` at {here}."
    print(text)
    if config.output is not None:
        with atomic_path(config.output) as temporary:
            temporary.write_text(text + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
