"""How good is the 4D asset? Fits every case of a benchmark and judges pictures and geometry against the truth.

    python benchmarks/quality.py --cases DIR --views truth --out DIR            # the 4D optimisation alone
    python benchmarks/quality.py --cases DIR --views model --out DIR            # the whole main job, from input.mp4

`truth`: the case's input view and its novel views of one role become a view grid, and the field is fitted to it by
`ns-train sv4d --data GRID` (default settings, stage 2 off, because it would exchange true views for generated ones).
`model`: `ns-train sv4d --data input.mp4`, default settings; the field's world is brought to the case's by the
similarity that the run's stored framing tells, without looking at the truth.

Every case runs in a process of its own; `--minutes` counts from that process's start (imports, views and all) and
ends training after the step in progress. On a shared machine `--clock cpu` counts processor time over two instead.
Judged are views the field was not fitted to, and its surface and motion against points, normals and tracks
(sv4d_ns/evaluation/geometry.py defines each figure). Finished cases are kept, so that a run that was killed goes on; a
case is fitted anew when settings or code have changed.
"""

import json
import multiprocessing
import os
import resource
import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from sv4d_ns.utils.errors import InputError, one_sentence_errors
from sv4d_ns.utils.files import atomic_path, content_hash

Views = Literal["truth", "model"]

COLUMNS = {
    "elev_psnr": ("PSNR elev, dB", "{:.2f}"),
    "elev_ssim": ("SSIM elev", "{:.3f}"),
    "elev_iou": ("IoU elev", "{:.3f}"),
    "unused_psnr": ("PSNR unused, dB", "{:.2f}"),
    "unused_iou": ("IoU unused", "{:.3f}"),
    "input_psnr": ("PSNR input, dB", "{:.2f}"),
    "lpips_alex": ("LPIPS unused", "{:.3f}"),
    "dssim_box": ("D-SSIM box unused", "{:.4f}"),
    "fvd_4d": ("FV4D", "{:.1f}"),
    "rfd_4d": ("RFD-4D", "{:.4f}"),
    "chamfer": ("Chamfer", "{:.4f}"),
    "chamfer_floor": ("(floor)", "{:.4f}"),
    "f_score@0.01": ("F@0.01", "{:.3f}"),
    "f_score@0.02": ("F@0.02", "{:.3f}"),
    "normal_consistency": ("normals", "{:.3f}"),
    "track": ("track", "{:.4f}"),
    "track_if_static": ("(static)", "{:.4f}"),
    "aligned_chamfer": ("Chamfer aligned", "{:.4f}"),
    "aligned_track": ("track aligned", "{:.4f}"),
    "steps": ("steps", "{:.0f}"),
    "train_s": ("train, s", "{:.0f}"),
    "cpu_s": ("CPU, s", "{:.0f}"),
    "wall_s": ("wall, s", "{:.0f}"),
    "peak_mb": ("peak, MB", "{:.0f}"),
}
"""Figure in a case's result: its heading and format in the table."""


@dataclass
class Quality:
    """Fit and judge every case of a benchmark."""

    cases: Path
    """A case, or a folder of cases."""
    out: Path
    """Where grids, runs, results and the table go."""
    views: Views = "truth"
    """Fit the field to true novel views, or run the whole main job from the video."""
    only: tuple[str, ...] = ()
    """Names of some cases; all of them by default."""
    minutes: float = 10.0
    """Budget of each fit; see `clock`."""
    clock: Literal["wall", "cpu"] = "wall"
    """What the budget counts: time on the wall, or the process's own processor time divided by two cores."""
    size: int = 128
    """Pixels along the side of the pictures: of the true views the field is fitted to, and of all judged ones."""
    fit_role: str = "nv8"
    """Role of the true novel views the field is fitted to."""
    train_args: str = ""
    """More flags for ns-train, in one string, for ablations."""
    align: bool = False
    """Also give geometry after the similarity that fits the truth best; never instead of the plain figures."""
    redo: bool = False
    """Fit again what is finished."""

    def main(self) -> None:
        """Run every case and write table.md and results.json."""
        from sv4d_ns.evaluation.cases import find_cases

        if not self.minutes > 0:
            raise InputError(f"--minutes {self.minutes:g} is no time at all: give a number above 0.")
        folders = find_cases(self.cases, self.only)
        results = []
        for folder in folders:
            results.append(self._case(folder))
            self._write(results)
            print(table(results), flush=True)

    def _case(self, folder: Path) -> dict[str, Any]:
        place = self.out / self.views / folder.resolve().name
        settings = {**{k: str(v) for k, v in asdict(self).items() if k not in ("out", "only", "redo")}}
        settings["code"] = code_hash()
        finished = place / "result.json"
        if finished.is_file() and not self.redo:
            result = json.loads(finished.read_text())
            if result["settings"] == settings:
                return result
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        load = os.getloadavg()[0]
        fit_report = in_own_process(fit, folder, place, self)
        figures = in_own_process(judge, folder, Path(fit_report["config"]), place, self)
        result = {
            "case": folder.resolve().name,
            "views": self.views,
            **fit_report,
            **figures,
            "load_before": load,
            "settings": settings,
        }
        with atomic_path(finished) as path:
            path.write_text(json.dumps(result, indent=1))
        return result

    def _write(self, results: list[dict[str, Any]]) -> None:
        folder = self.out / self.views
        with atomic_path(folder / "results.json") as path:
            path.write_text(json.dumps(results, indent=1))
        with atomic_path(folder / "table.md") as path:
            path.write_text(table(results) + "\n")


def in_own_process(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Call a function of this file in a fresh process and return its dictionary.

    Raises:
        InputError: the process died; what it printed says why.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        answer: dict[str, Any] = receiver.recv()
    except EOFError as error:
        process.join()
        raise InputError(
            f"{function.__name__} of {arguments[0]} ended with exit code {process.exitcode}: see above."
        ) from error
    process.join()
    return answer


def _send(sender: Any, function: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    with one_sentence_errors():
        sender.send(function(*arguments))


def peak_mb() -> float:
    """Peak resident memory of this process, MB."""
    status = Path("/proc/self/status")
    if status.is_file():
        # ru_maxrss also counts the parent's memory at the time of the fork; the high-water mark of this image does not
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def code_hash() -> str:
    """Hash of the package's and this script's sources."""
    import sv4d_ns

    package = Path(sv4d_ns.__file__).parent
    files = [*sorted(package.rglob("*.py")), *sorted(package.parent.glob("method_configs/*.py")), Path(__file__)]
    return content_hash(*(path.read_text() for path in files))


# ------------------------------------------------------------------------------------------------------------- fitting


CORES = 2
"""Cores of the machine the benchmark's bars are stated for."""


def budget_clock(kind: Literal["wall", "cpu"]) -> float:
    """Seconds on the wall, or of this process's processor time shared evenly by `CORES`."""
    return time.monotonic() if kind == "wall" else time.process_time() / CORES


def fit(folder: Path, place: Path, settings: Quality) -> dict[str, Any]:
    """`ns-train sv4d` on a case, ended when the budget is spent; returns where the run is and what it cost."""
    started, spent_before = time.monotonic(), budget_clock(settings.clock)
    import torch
    from nerfstudio.configs.method_configs import AnnotatedBaseConfigUnion
    from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackLocation
    from nerfstudio.scripts.train import _set_random_seed

    from sv4d_ns.evaluation.cases import Case

    case = Case.load(folder)
    if settings.views == "truth":
        data = place / "grid"
        case.grid(case.with_role(settings.fit_role), settings.size).save(data)
        stage = ["--pipeline.refine-steps"]  # none
    else:
        data, stage = case.video, []
    arguments = [
        "sv4d",
        "--data",
        str(data.absolute()),
        "--output-dir",
        str((place / "runs").absolute()),
        "--experiment-name",
        case.name,
    ]
    arguments += ["--timestamp", "run", "--vis", "tensorboard", *stage, *shlex.split(settings.train_args)]
    config: Any = tyro.cli(AnnotatedBaseConfigUnion, args=arguments)
    config.set_timestamp()
    config.save_config()
    _set_random_seed(config.machine.seed)
    trainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    fitting = time.monotonic()
    done = {"steps": 0, "train_s": 0.0}

    def watch(step: int) -> None:
        done["steps"], done["train_s"] = step + 1, time.monotonic() - started
        if budget_clock(settings.clock) - spent_before >= 60 * settings.minutes:
            trainer.stop_training = True

    trainer.callbacks.append(TrainingCallback([TrainingCallbackLocation.AFTER_TRAIN_ITERATION], func=watch))
    trainer.train()
    return {
        "config": str(config.get_base_dir() / "config.yml"),
        **done,
        "before_fitting_s": fitting - started,
        "wall_s": time.monotonic() - started,
        "cpu_s": time.process_time(),
        "cut_by_budget": done["steps"] < trainer.total_steps,
        "peak_mb": peak_mb(),
        "peak_gpu_mb": torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0,
        "threads": torch.get_num_threads(),
    }


# ------------------------------------------------------------------------------------------------------------- judging


def judge(folder: Path, config: Path, place: Path, settings: Quality) -> dict[str, Any]:
    """Pictures and geometry of a finished run against its case: all views but those the field was fitted to.

    LPIPS and FV4D are given where their networks are on this machine; D-SSIM in the object's box and RFD-4D (random
    features, sv4d_ns/evaluation/backbones.py) always are, and stand in for them.
    """
    from sv4d_ns.evaluation.candidates import alignment_to, render_views
    from sv4d_ns.evaluation.cases import INPUT_ROLE, Case
    from sv4d_ns.evaluation.geometry import evaluate_geometry
    from sv4d_ns.evaluation.protocols import PROTOCOLS
    from sv4d_ns.evaluation.scores import load_backbones, pair_figures, video_figures
    from sv4d_ns.runs.open import load_run
    from sv4d_ns.utils.progress import bar

    started = time.monotonic()
    case, run = Case.load(folder), load_run(config)
    to_source = alignment_to(run.views, case)
    used = {settings.fit_role} if settings.views == "truth" else set()
    views = [view for view in case.views if INPUT_ROLE in view.roles or not view.roles & used]
    with bar(f"Judging {case.name}") as progress:
        pictures = render_views(run, case, views, to_source, settings.size, progress)
    assert pictures.truth is not None
    save_sheets(pictures, place / "pictures")
    backbones = load_backbones(PROTOCOLS["benchmark"])
    groups: dict[str, list[dict[str, float]]] = {}
    for index, view in enumerate(views):
        figures = pair_figures(pictures.made[:, index], pictures.truth[:, index], backbones)
        means = {name: float(values.mean()) for name, values in figures.items()}
        for group in [INPUT_ROLE] if INPUT_ROLE in view.roles else [*sorted(view.roles), "unused"]:
            groups.setdefault(group, []).append(means)
    result: dict[str, Any] = {
        f"{group}_{name}": float(np.mean([view[name] for view in members]))
        for group, members in groups.items()
        for name in members[0]
    }
    for name in ("lpips_alex", "dssim_box"):
        if f"unused_{name}" in result:
            result[name] = result[f"unused_{name}"]
    unused = [index for index, view in enumerate(views) if INPUT_ROLE not in view.roles]
    if unused:
        videos = video_figures([pictures.columns(unused)], backbones, PROTOCOLS["benchmark"])
        result |= {name: estimate.value for name, estimate in videos.items()}
    truth = case.geometry()
    if truth is not None:
        result |= evaluate_geometry(run.field, run.occupancy, truth, run.views.times, to_source, align=settings.align)
    return {**result, "left_out": backbones.missing, "judge_s": time.monotonic() - started}


def save_sheets(pictures: Any, folder: Path) -> None:
    """One picture a view: truth above, field below, some moments."""
    from PIL import Image

    from sv4d_ns.utils.images import over_white

    folder.mkdir(exist_ok=True)
    shown = np.unique(np.linspace(0, len(pictures.times) - 1, 6).round().astype(int))
    for view, name in enumerate(pictures.view_names):
        rows = [np.concatenate(list(over_white(rgba[shown, view])), axis=1) for rgba in (pictures.truth, pictures.made)]
        Image.fromarray(np.concatenate(rows)).save(folder / f"{name}.png")


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row for each case and one for the mean; a dash where a case has no such truth."""
    names = [name for name in COLUMNS if any(name in result for result in results)]
    lines = ["| case | " + " | ".join(COLUMNS[name][0] for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    mean = {name: float(np.mean([result[name] for result in results if name in result])) for name in names}
    for row in [*results, {"case": "mean", **mean}]:
        cells = [COLUMNS[name][1].format(row[name]) if name in row else "-" for name in names]
        lines.append(f"| {row['case']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    with one_sentence_errors():
        tyro.cli(Quality, description=__doc__).main()
