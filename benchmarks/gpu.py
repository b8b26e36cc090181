"""Everything that wants measuring on a GPU, in one command that can be cut anywhere and goes on.

    python benchmarks/gpu.py --minutes 40 --out runs/gpu [--assets assets.pack] [--write docs/performance.md]
    python benchmarks/gpu.py pack ASSETS --out assets.pack

In order of worth: half precision against float32; the tests of what only runs on a card; stages 1 and 2 at 512 pixels;
a window of both released models at full size with random weights; training of the bundled model with what is left of
the time. Each part is a process of its own with a limit. The same command skips what is finished, tries again what
failed and goes on training; where a machine is lent for ten minutes at a time, give `--minutes 9.5` again and again. It
leaves gpu.json, gpu.md and the trained model below `--out`. `--device cpu --tiny` runs the same code without a GPU; its
figures mean nothing.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from sv4d_ns.utils.errors import InputError, one_sentence_errors
from sv4d_ns.utils.files import atomic_path
from sv4d_ns.utils.processes import end_with_the_parent

sys.path.insert(0, str(Path(__file__).parent))
from asset_pack import Pack
from gpu_parts import PARTS, Part, Setting, slug

START, END = "<!-- gpu: start -->", "<!-- gpu: end -->"


@dataclass(frozen=True)
class Measure:
    """Run the parts that are not finished, and write the tables."""

    out: Path = Path("runs/gpu")
    """Folder for results and the trained model."""
    minutes: float = 40.0
    """Time for this call."""
    device: str = "cuda"
    """torch device."""
    tiny: bool = False
    """Small sizes: exercises the code only."""
    parts: tuple[str, ...] = tuple(part.name for part in PARTS)
    """Those to run."""
    assets: Path | None = None
    """A pack of GLB files, or a folder of them, to train on beside creatures."""
    workers: int = 14
    """Processes that make training data."""
    write: Path | None = None
    """Put the tables between the marks of this file."""
    only: str | None = None
    """Run this one part here, in this process: what the command does for each part."""

    def main(self) -> None:
        """Run."""
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise InputError(
                f"--device {self.device}: torch sees no CUDA device; give --device cpu --tiny to try the code."
            )
        self.out.mkdir(parents=True, exist_ok=True)
        if self.only is not None:
            end_with_the_parent()  # a part that is left behind would share the card with its next try
            run_part(next(part for part in PARTS if part.name == self.only), self.setting(self.minutes))
            return
        unknown = sorted(set(self.parts) - {part.name for part in PARTS})
        if unknown:
            raise InputError(f"--parts {unknown[0]} is no part: give some of {', '.join(part.name for part in PARTS)}.")
        ends = time.monotonic() + 60 * self.minutes
        for part in PARTS:
            left = (ends - time.monotonic()) / 60
            if part.name in self.parts and left > 0 and not result(self.out, part).get("finished"):
                self._start(part, min(left, part.minutes))
                self._write_tables()
        print(self._write_tables())

    def setting(self, minutes: float) -> Setting:
        """What a part is told."""
        return Setting(self.device, self.tiny, self.out, minutes, self.assets, self.workers)

    def _start(self, part: Part, minutes: float) -> None:
        """Run a part in a process of its own; what it noted before it failed or was ended is kept."""
        print(f"{part.name}: at most {minutes:.1f} minutes", flush=True)
        command = [
            sys.executable, __file__, "--only", part.name, "--out", str(self.out), "--minutes", str(minutes),
            "--device", self.device, "--workers", str(self.workers), "--tiny" if self.tiny else "--no-tiny",
            *(["--assets", str(self.assets)] if self.assets else []),
        ]  # fmt: skip
        began = time.monotonic()
        with (self.out / f"{slug(part.name)}.log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                code = process.wait(60 * minutes + 20 * part.resumes)
                ended = "" if code == 0 else f"ended with {code}: see {log.name}"
            except subprocess.TimeoutExpired:
                ended = f"ended after {minutes:.1f} minutes"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # and what it started
                process.wait()
        kept = result(self.out, part)
        kept.update(minutes=(time.monotonic() - began) / 60, ended=ended)
        save(self.out, part, kept)

    def _write_tables(self) -> str:
        results = {part.name: kept for part in PARTS if (kept := result(self.out, part))}
        text = tables(results)
        for name, content in (("gpu.json", json.dumps(results, indent=1)), ("gpu.md", text)):
            with atomic_path(self.out / name) as path:
                path.write_text(content)
        if self.write is not None:
            head, _, rest = self.write.read_text().partition(START)
            self.write.write_text(f"{head}{START}\n{text}\n{END}{rest.partition(END)[2]}")
        return text


def run_part(part: Part, setting: Setting) -> None:
    """Run a part; every row is on disk as soon as it is known."""
    card = torch.cuda.get_device_name() if setting.on_gpu else "CPU (the figures mean nothing)"
    kept: dict[str, Any] = {"card": card, "torch": torch.__version__, "rows": {}}

    def note(row: str, figures: dict[str, Any]) -> None:
        kept["rows"][row] = figures
        save(setting.out, part, kept)
        print(row, figures, flush=True)

    part.run(setting, note)
    # training says itself whether it came to its last step
    kept["finished"] = all(figures.get("complete", True) for figures in kept["rows"].values())
    save(setting.out, part, kept)


def result(out: Path, part: Part) -> dict[str, Any]:
    """What is known of a part; nothing if it has not begun."""
    path = out / f"{slug(part.name)}.json"
    return json.loads(path.read_text()) if path.is_file() else {}  # type: ignore[no-any-return]


def save(out: Path, part: Part, kept: dict[str, Any]) -> None:
    """Whole or as before."""
    with atomic_path(out / f"{slug(part.name)}.json") as path:
        path.write_text(json.dumps(kept, indent=1))


def tables(results: dict[str, dict[str, Any]]) -> str:
    """A markdown table for each part."""
    parts = []
    for name, kept in results.items():
        rows = kept.get("rows", {})
        columns = list(dict.fromkeys(column for figures in rows.values() for column in figures))
        state = "finished" if kept.get("finished") else f"not finished {kept.get('ended', '')}".strip()
        parts += [f"**{name}** ({kept.get('card', 'no card')}, {kept.get('minutes', 0):.1f} minutes, {state})", ""]
        if rows:
            parts += [f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
            for row, figures in rows.items():
                parts.append(f"| {row} | {' | '.join(_cell(figures.get(column)) for column in columns)} |")
            parts.append("")
    return "\n".join(parts)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def main(arguments: list[str]) -> None:
    """`pack`, or measure."""
    if arguments[:1] == ["pack"]:
        tyro.cli(Pack, args=arguments[1:]).main()
    else:
        tyro.cli(Measure, description=__doc__, args=arguments).main()


if __name__ == "__main__":
    with one_sentence_errors():
        main(sys.argv[1:])
