"""`sv4d batch`: a 4D asset from each of many videos, on one machine or many."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from PIL import Image

from sv4d_ns.runs.cluster import open_cluster, run_all
from sv4d_ns.runs.layout import BATCH_LOCK, SUMMARY_FILE, latest_run
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.files import atomic_path, content_hash, sole_use
from sv4d_ns.utils.processes import end_with_the_parent
from sv4d_ns.video.sources import FILM_SUFFIXES

STATE_FILE, TABLE_FILE, SHEET_FILE, LOG_FILE = "batch.json", "batch.md", "batch.png", "batch.log"
SHEET_ROW = 256
"""Height in pixels of a run on the contact sheet."""


@dataclass(frozen=True)
class BatchConfig:
    """Make a 4D asset from each of many videos.

    The same command goes on where it was stopped: finished videos are not made again. Settings of `ns-train sv4d` go
    behind `--`, for example `sv4d batch films --out assets -- --max-num-iterations 1800`.
    """

    videos: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Videos, folders of videos, patterns in quotes, or text files with one video a line."""
    out: Path = Path("outputs")
    """The runs of all videos, and the batch's table and contact sheet, go here."""
    method: Literal["sv4d", "4diffusion"] = "sv4d"
    """What `ns-train` runs."""
    cluster: str | None = None
    """Where to work: local:N (processes of this machine), tcp://HOST:PORT (a Dask scheduler), or a YAML file of
    dask-jobqueue settings; one process of this machine by default."""


@dataclass(frozen=True)
class Outcome:
    """What became of a video."""

    video: str
    key: str
    """Hash of the video and the settings."""
    run: str = ""
    """Its run's folder, where it was finished."""
    error: str = ""
    """One sentence, where it was not."""


def find_videos(names: Sequence[str]) -> list[Path]:
    """The videos that names, folders, patterns and lists stand for, each once, in their order.

    Raises:
        InputError: one of them stands for no video, or there is none.
    """
    if not names:
        raise InputError("no video is given: give videos, folders of videos, patterns in quotes, or lists.")
    found: dict[Path, None] = {}
    for name in names:
        for path in _videos_of(Path(name).expanduser()):
            found[path.absolute()] = None
    return list(found)


def _videos_of(path: Path) -> list[Path]:
    if path.is_dir():
        videos = sorted(child for child in path.iterdir() if child.suffix.lower() in FILM_SUFFIXES and child.is_file())
        if not videos:
            raise InputError(f"{path} holds no video ({', '.join(sorted(FILM_SUFFIXES))}).")
        return videos
    if path.is_file() and path.suffix.lower() == ".txt":
        lines = [Path(line.strip()) for line in path.read_text().splitlines() if line.strip()]
        listed = [line if line.is_absolute() else path.parent / line for line in lines]
        missing = next((line for line in listed if not line.exists()), None)
        if missing is not None or not listed:
            raise InputError(f"{path} lists {missing or 'nothing'}, which does not exist: give one video a line.")
        return listed
    if path.exists():
        return [path]
    matches = sorted(path.parent.glob(path.name)) if any(sign in path.name for sign in "*?[") else []
    if not matches:
        raise InputError(f"{path} does not exist and matches no video: give videos, folders, patterns or lists.")
    return matches


def names_of(videos: Sequence[Path]) -> list[str]:
    """A run's name for each video: its own without the ending, with its folder's before it where two are alike."""
    stems = [video.stem for video in videos]
    names: list[str] = []
    for video, stem in zip(videos, stems, strict=True):
        name = stem if stems.count(stem) == 1 else f"{video.parent.name}-{stem}{video.suffix.replace('.', '-')}"
        while name in names:
            name += "-2"
        names.append(name)
    return names


def run_training(video: str, name: str, out: str, method: str, settings: Sequence[str]) -> tuple[str, str]:
    """Run `ns-train` on a video in a process of its own that ends with this one; (run folder, error sentence).

    A run that was stopped goes on, because `ns-train` finds it by its data and settings.
    """
    command = [
        sys.executable, "-m", "sv4d_ns.cli.batch", method, "--data", video, "--output-dir", out,
        "--experiment-name", name, "--vis", "tensorboard", *settings,
    ]  # fmt: skip
    log = Path(out) / name / LOG_FILE
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, check=False).returncode
    run = latest_run(Path(out) / name / method)
    if code == 0 and run is not None and (run / SUMMARY_FILE).is_file():
        return str(run), ""
    return "", error_in(log) or f"ns-train ended with code {code}; see {log}."


def error_in(log: Path) -> str:
    """The sentence a command ended with, from what it printed; empty where there is none."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if line.startswith("Error: ")), "")
    return said.removeprefix("Error: ")


def train(arguments: Sequence[str]) -> None:
    """`ns-train` in this process."""
    from nerfstudio.scripts.train import entrypoint

    sys.argv = ["ns-train", *arguments]
    entrypoint()


def batch(config: BatchConfig, settings: Sequence[str]) -> list[Outcome]:
    """Make every video's asset; finished ones are left as they are.

    Raises:
        InputError: no video, or another batch works on the same folder.
    """
    videos = find_videos(config.videos)
    taken = f"Another 'sv4d batch' works on {config.out}: wait for it, or give another --out."
    with sole_use(config.out, BATCH_LOCK, taken):
        return _locked_batch(config, videos, list(settings))


def _locked_batch(config: BatchConfig, videos: list[Path], settings: list[str]) -> list[Outcome]:
    from sv4d_ns.utils.progress import bar, say

    names = names_of(videos)
    keys = [content_hash(video.name, _size_and_time(video), config.method, settings) for video in videos]
    known = {outcome.key: outcome for outcome in _read_state(config.out)}
    outcomes: dict[int, Outcome] = {
        number: known[key] for number, key in enumerate(keys) if key in known and _is_finished(known[key])
    }
    coming = [number for number in range(len(videos)) if number not in outcomes]
    before = f", {len(outcomes)} finished before" if outcomes else ""
    count = f"{len(coming)} video{'s' if len(coming) != 1 else ''} to make{before}"
    say(f"{count}; what each run says is in {config.out / 'NAME' / LOG_FILE}.")
    if coming:
        out = str(config.out.absolute())
        arguments = [(str(videos[n]), names[n], out, config.method, settings) for n in coming]
        with open_cluster(config.cluster) as client, bar("Videos") as show:
            show(0, len(coming))

            def on_result(index: int, result: object) -> None:
                number = coming[index]
                run, error = result if isinstance(result, tuple) else ("", f"the worker failed ({result}).")
                outcomes[number] = Outcome(str(videos[number]), keys[number], run, error)
                _write_state(config.out, [*known.values(), *outcomes.values()])
                say(f"{videos[number].name}: {error or f'finished, {run}'}")
                show(sum(n in outcomes for n in coming), len(coming))

            run_all(client, run_training, arguments, on_result)
    return [outcomes[number] for number in range(len(videos))]


def _size_and_time(video: Path) -> list[tuple[str, int, int]]:
    files = sorted(video.iterdir()) if video.is_dir() else [video]
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _is_finished(outcome: Outcome) -> bool:
    return bool(outcome.run) and (Path(outcome.run) / SUMMARY_FILE).is_file()


def _read_state(out: Path) -> list[Outcome]:
    path = out / STATE_FILE
    if not path.is_file():
        return []
    try:
        return [Outcome(**values) for values in json.loads(path.read_text())]
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged: delete it (finished runs are found again by ns-train).") from error


def _write_state(out: Path, outcomes: list[Outcome]) -> None:
    newest = {outcome.key: outcome for outcome in outcomes}
    with atomic_path(out / STATE_FILE) as temporary:
        temporary.write_text(json.dumps([asdict(outcome) for outcome in newest.values()], indent=1))


def write_report(out: Path, outcomes: list[Outcome]) -> list[Path]:
    """A table of all videos (Markdown) and, if any was finished, a contact sheet with a row each."""
    lines = ["| video | input view PSNR | run |", "|---|---|---|"]
    for outcome in outcomes:
        summary = json.loads((Path(outcome.run) / SUMMARY_FILE).read_text()) if outcome.run else {}
        psnr = summary.get("input_view_psnr")
        figure = f"{psnr:.1f} dB" if psnr is not None else "-"
        lines.append(f"| {Path(outcome.video).name} | {figure} | {outcome.run or outcome.error} |")
    with atomic_path(out / TABLE_FILE) as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    sheets = [Path(outcome.run) / "contact_sheet.png" for outcome in outcomes if outcome.run]
    rows = [Image.open(sheet).convert("RGB") for sheet in sheets if sheet.is_file()]
    if not rows:
        return [out / TABLE_FILE]
    small = [row.resize((max(SHEET_ROW * row.width // row.height, 1), SHEET_ROW)) for row in rows]
    sheet = np.full((SHEET_ROW * len(small), max(row.width for row in small), 3), 255, dtype=np.uint8)
    for index, row in enumerate(small):
        sheet[index * SHEET_ROW : (index + 1) * SHEET_ROW, : row.width] = np.asarray(row)
    with atomic_path(out / SHEET_FILE) as temporary:
        Image.fromarray(sheet).save(temporary)
    return [out / TABLE_FILE, out / SHEET_FILE]


def command(arguments: Sequence[str]) -> None:
    """`sv4d batch`: exit code 1 where any video failed."""
    words = list(arguments)
    split = words.index("--") if "--" in words else len(words)
    config = tyro.cli(BatchConfig, prog="sv4d batch", args=words[:split])
    outcomes = batch(config, words[split + 1 :])
    failed = [outcome for outcome in outcomes if outcome.error]
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} videos finished.")
    for path in write_report(config.out, outcomes):
        print(path)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    end_with_the_parent()
    train(sys.argv[1:])
