"""What stage 2 adds over stage 1 alone, on held-out creatures and the bundled model's own views.

    python benchmarks/stage2.py --out OUT --objects 3

For each creature the bundled model makes the novel views of a short clip, and the field is fitted to them up to the
step of stage 2. From there it goes on in as many ways as are compared, all for the same number of steps: with the same
views (`alone`), and with views refined from its own renders (`refined`, at some strengths). Judged are pictures of the
field at the views of the ring, where the true creature is rendered too, and at two elevated views; besides, the targets
themselves. D-SSIM in the box and RFD-4D stand in for LPIPS and FV4D (docs/evaluation.md), which are given where
their networks are at hand.
"""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from jaxtyping import UInt8
from PIL import Image

from sv4d_ns.diffusion_training.evaluate import FIRST_EVALUATED
from sv4d_ns.evaluation.protocols import PROTOCOLS
from sv4d_ns.evaluation.scores import Backbones, Pictures, load_backbones, pair_figures, video_figures
from sv4d_ns.field.images import render_grid
from sv4d_ns.fitting.fit import FitOptions, GridFit
from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.synthesis.base import ViewSynthesizer
from sv4d_ns.synthesis.choice import load_synthesizer
from sv4d_ns.training_data.procedural import creature, render
from sv4d_ns.utils.errors import one_sentence_errors
from sv4d_ns.utils.files import atomic_path
from sv4d_ns.utils.images import over_white, resize_rgba
from sv4d_ns.views.grid import ViewGrid

ELEVATED = ((45.0, 30.0), (225.0, 30.0))
"""Azimuth and elevation of the views nothing is made for, degrees."""


@dataclass
class Stage2:
    """Compare stage 2 with stage 1 alone."""

    out: Path
    """Results and pictures."""
    objects: int = 3
    """Held-out creatures."""
    frames: int = 11
    """Frames of the clip, a twentieth of the motion apart."""
    size: int = 96
    """Pixels along the side of the input view and of all judged pictures."""
    steps: int = 900
    """Length of the whole schedule."""
    refine_at: float = 0.64
    """Share of it at which stage 2 begins (as in ns-train sv4d)."""
    strengths: tuple[float, ...] = (0.4, 0.9)
    """Noise levels of stage 2 to compare."""
    rays: int = 1024
    """Single rays of a step."""

    def main(self) -> None:
        """Run all creatures, print and write the table."""
        self.out.mkdir(parents=True, exist_ok=True)
        synthesizer, sentence = load_synthesizer("bundled", "cpu")
        print(sentence)
        backbones, rows = load_backbones(PROTOCOLS["benchmark"]), []
        for number in range(self.objects):
            finished = self.out / f"{number}.json"
            if not finished.is_file():
                report = self.compare(FIRST_EVALUATED + number, synthesizer, backbones)
                with atomic_path(finished) as path:
                    path.write_text(json.dumps(report, indent=1))
            rows += json.loads(finished.read_text())
            print(table(rows), flush=True)

    def compare(self, seed: int, synthesizer: ViewSynthesizer, backbones: Backbones) -> list[dict[str, Any]]:
        """All ways on for one creature."""
        truth, grid = self.clip(seed, synthesizer)
        fit = GridFit(grid, FitOptions(self.steps, self.rays)).run(round(self.refine_at * self.steps))
        ways: dict[str, ViewGrid] = {"alone": grid}
        renders = render_grid(fit.field, fit.occupancy, grid, synthesizer.image_size, _quiet)
        for strength in self.strengths:
            ways[f"refined {strength:g}"] = self.refined(synthesizer, grid, renders, strength)
        rows, sheets = [], [over_white(truth.made[:, :-2])]
        for name, way in ways.items():
            one = fit.copy()
            if way is not grid:
                one.use_grid(way)
            began = time.process_time()
            one.run(self.steps)
            cpu_s = time.process_time() - began
            made = self.pictures(one, truth)
            figures = judge(made, truth, backbones) | targets(way.novel_views, truth, backbones)
            rows.append({"creature": seed, "way": name, **figures, "cpu_s": cpu_s})
            print(rows[-1], flush=True)
            sheets += [over_white(resize_rgba(way.novel_views, self.size)), over_white(made.made[:, :-2])]
        save_sheet(self.out / f"{seed}.png", sheets)
        return rows

    def clip(self, seed: int, synthesizer: ViewSynthesizer) -> tuple[Pictures, ViewGrid]:
        """The true pictures at all judged views, and the grid the synthesizer makes of the input view."""
        plan, times = synthesizer.default_plan(), np.arange(self.frames) / 20.0
        judged = ViewPlan(
            (*plan.azimuths_deg, *(a for a, _ in ELEVATED)), (*plan.elevations_deg, *(e for _, e in ELEVATED))
        )
        made = render(creature(seed), times, judged.c2w(), self.size)
        truth = Pictures(
            name=str(seed),
            made=made[:, 1:],
            truth=made[:, 1:],
            view_names=tuple(f"{azimuth:g}" for azimuth in judged.azimuths_deg),
            azimuths_deg=np.array(judged.azimuths_deg),
            elevations_deg=np.array(judged.elevations_deg),
            times=np.linspace(0, 1, self.frames),
            c2w=judged.c2w()[1:],
            focal_px=judged.focal_px(self.size),
        )
        frames = resize_rgba(made[:, 0], synthesizer.image_size)
        views = synthesizer.generate(frames, plan, seed=0, store=self.out / "windows" / str(seed), progress=_quiet)
        return truth, ViewGrid(made[:, 0], views.images, plan, fps=10.0, confidence=views.confidence)

    def refined(
        self, synthesizer: ViewSynthesizer, grid: ViewGrid, renders: UInt8[np.ndarray, "t v s s 4"], strength: float
    ) -> ViewGrid:
        """The grid of stage 2, as the pipeline makes it."""
        frames = resize_rgba(grid.input_frames, synthesizer.image_size)
        store = self.out / "windows" / f"{grid.content_id}-{strength}"
        views = synthesizer.refine(frames, renders, grid.plan, strength=strength, seed=1, store=store, progress=_quiet)
        confidence = views.confidence
        return replace(grid, novel_views=views.images, confidence=confidence)

    def pictures(self, fit: GridFit, truth: Pictures) -> Pictures:
        """The field at all judged views."""
        plan = ViewPlan(tuple(truth.azimuths_deg), tuple(truth.elevations_deg))
        everything = ViewGrid(truth.made[:, 0], truth.made, plan, fps=10.0)
        return replace(truth, made=render_grid(fit.field, fit.occupancy, everything, self.size, _quiet))


def judge(made: Pictures, truth: Pictures, backbones: Backbones) -> dict[str, float]:
    """Means over the ring, over the elevated views, and the video distance of the ring."""
    figures: dict[str, float] = {}
    ring, elevated = made.ring, [view for view in range(made.made.shape[1]) if view not in made.ring]
    for group, views in (("ring", ring), ("elev", elevated)):
        each = [pair_figures(made.made[:, view], truth.made[:, view], backbones) for view in views]
        for name in ("psnr_box", "dssim_box", "iou", *(name for name in each[0] if name.startswith("lpips"))):
            figures[f"{group}_{name}"] = float(np.mean([one[name].mean() for one in each]))
    videos = video_figures([made.columns(ring)], backbones, PROTOCOLS["benchmark"])
    return figures | {name: estimate.value for name, estimate in videos.items() if name.endswith("_4d")}


def targets(views: UInt8[np.ndarray, "t v s s 4"], truth: Pictures, backbones: Backbones) -> dict[str, float]:
    """How good the pictures are that the field is fitted to."""
    size = views.shape[2]
    true = resize_rgba(truth.made[:, : views.shape[1]], size)
    each = [pair_figures(views[:, view], true[:, view], backbones) for view in range(views.shape[1])]
    return {f"target_{name}": float(np.mean([one[name].mean() for one in each])) for name in ("psnr_box", "dssim_box")}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: means over creatures, a row for each way, and its change against stage 1 alone."""
    names = [name for name, value in rows[0].items() if isinstance(value, float)]
    lines = ["| way | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    alone = [row for row in rows if row["way"] == "alone"]
    for way in dict.fromkeys(row["way"] for row in rows):
        cells = []
        for name in names:
            value, before = (
                float(np.mean([row[name] for row in some])) for some in ([r for r in rows if r["way"] == way], alone)
            )
            cells.append(f"{value:.4g} ({100 * (value / before - 1):+.1f} %)")
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def save_sheet(path: Path, rows: list[UInt8[np.ndarray, "t v s s 3"]]) -> None:
    """The middle moment: a row for each picture matrix, a column for each view."""
    middle = rows[0].shape[0] // 2
    Image.fromarray(np.concatenate([np.concatenate(list(row[middle]), axis=1) for row in rows])).save(path)


def _quiet(done: int, total: int) -> None:
    pass


if __name__ == "__main__":
    with one_sentence_errors():
        tyro.cli(Stage2, description=__doc__).main()
