"""What each part of the 4D optimisation is worth on true views: the same short fit with one part left out.

    python benchmarks/field_ablation.py --cases DIR --out DIR [--steps 700 --rays 1024 --only frog_jump]

Every fit is one of `field_fit.py --views truth`, shorter than a run, so differences between variants count and not the
figures themselves; two seeds of the whole method say how much is chance. Finished fits are kept (a killed run goes on
where it was), the table is written anew after each of them.

Parts that act on generated views only are not here: sparsity is in `field_fit.py --views generated`, stage 2 in
`quality.py --views model`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from field_fit import FitConfig, evaluate, fit, load_views

from sv4d_ns.evaluation.cases import find_cases
from sv4d_ns.field.deformable import DeformableFieldConfig
from sv4d_ns.fitting.batch_sampler import BatchConfig
from sv4d_ns.fitting.schedule import ScheduleConfig
from sv4d_ns.fitting.settings import LossWeights
from sv4d_ns.utils.errors import one_sentence_errors
from sv4d_ns.utils.files import atomic_path

FIGURES = {
    "elev_psnr": ("PSNR elev, dB", "{:.2f}"),
    "elev_iou": ("IoU elev", "{:.3f}"),
    "chamfer": ("Chamfer", "{:.4f}"),
    "track": ("track", "{:.4f}"),
    "cpu_s": ("CPU, s", "{:.0f}"),
}
"""Figure of a fit: its heading and format."""


@dataclass(frozen=True)
class Variant:
    """The whole method but for some settings."""

    name: str
    part: str
    """What of the method it is about."""
    fit: dict[str, Any] = dataclasses.field(default_factory=dict)
    losses: dict[str, Any] = dataclasses.field(default_factory=dict)
    field: dict[str, Any] = dataclasses.field(default_factory=dict)
    schedule: dict[str, Any] = dataclasses.field(default_factory=dict)
    batch: dict[str, Any] = dataclasses.field(default_factory=dict)


def without(*names: str) -> Variant:
    """Losses switched off."""
    return Variant(
        "no " + " and ".join(name.replace("_", " ") for name in names), "loss", losses=dict.fromkeys(names, 0.0)
    )


VARIANTS = (
    Variant("whole", ""),
    Variant("whole, another seed", "", fit={"seed": 1}),
    Variant("no light of each frame", "field", field={"appearance_resolutions": ()}),
    Variant("no density residual", "field", field={"density_resolutions": ()}),
    Variant("canonical frame is the first", "field", fit={"canonical": "first"}),
    Variant("no static phase", "schedule", schedule={"static_fraction": 0.0}),
    Variant("all frames from the start", "schedule", schedule={"static_fraction": 0.0, "full_window_at": 0.0}),
    Variant("3 frames a step", "schedule", batch={"frames_per_step": 3}),
    Variant("newest frames not preferred", "schedule", schedule={"frontier_probability": 0.0}),
    Variant("canonical frame not preferred", "schedule", schedule={"canonical_probability": 0.0}),
    Variant("views by chance, not orthogonal", "schedule", batch={"orthogonal": False}),
    without("mask"),
    without("structure"),
    without("distortion"),
    without("normal_smoothness"),
    without("bilateral_normal"),
    without("scene_flow"),
    without("registration", "band_rigidity"),
    without("deformation"),
    without("deformation_rigidity", "band_rigidity"),
)


@dataclass
class FieldAblation:
    """Fit every variant to every case and write ablation.md and ablation.json."""

    cases: Path
    """A benchmark case, or a folder of cases."""
    out: Path
    """Where results and the table go."""
    only: tuple[str, ...] = ()
    """Names of some cases; all of them by default."""
    variants: tuple[str, ...] = ()
    """Names of some variants; all of them by default. "whole" is always fitted."""
    steps: int = 700
    """Steps of a fit (a run: 2400)."""
    rays: int = 1024
    """Rays of a step (a run: 1536)."""
    size: int = 128
    """Pixels along the side of the views."""

    def main(self) -> None:
        """Run what is missing, case by case."""
        torch.set_flush_denormal(True)
        chosen = [v for v in VARIANTS if not self.variants or v.name in {"whole", *self.variants}]
        results: list[dict[str, Any]] = []
        for folder in find_cases(self.cases, self.only):
            for variant in chosen:
                results.append(self._result(folder.resolve(), variant))
                for name, text in (("ablation.json", json.dumps(results, indent=1)), ("ablation.md", table(results))):
                    with atomic_path(self.out / name) as path:
                        path.write_text(text)
        print(table(results))

    def _result(self, folder: Path, variant: Variant) -> dict[str, Any]:
        place = self.out / folder.name / variant.name.replace(" ", "_").replace(",", "")
        finished = place / "result.json"
        size = {"steps": self.steps, "rays": self.rays, "size": self.size}
        if finished.is_file():
            result: dict[str, Any] = json.loads(finished.read_text())
            if result["settings"] == size:
                return result
        place.mkdir(parents=True, exist_ok=True)
        views = load_views(folder, {"input"}, self.size) + load_views(folder, {"nv8"}, self.size)
        made, occupancy, report = fit(
            views,
            replace(FitConfig(steps=self.steps), **variant.fit),
            replace(LossWeights(), **variant.losses),
            replace(DeformableFieldConfig(), **variant.field),
            replace(ScheduleConfig(), **variant.schedule),
            replace(BatchConfig(rays=self.rays, input_share=0.0), **variant.batch),
            print,
        )
        report |= evaluate(made, occupancy, load_views(folder, {"elev"}, self.size), views[0], folder, place)
        result = {"case": folder.name, "variant": variant.name, "part": variant.part, "settings": size}
        result |= {name: report[name] for name in FIGURES}
        with atomic_path(finished) as path:
            path.write_text(json.dumps(result, indent=1))
        return result


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: for each variant the mean over those cases that it and the whole method were fitted to, and by how much
    that differs from the whole method on the same cases."""
    by_variant: dict[str, dict[str, dict[str, Any]]] = {}
    for result in results:
        by_variant.setdefault(result["variant"], {})[result["case"]] = result
    lines = ["| variant | part | cases | " + " | ".join(heading for heading, _ in FIGURES.values()) + " |"]
    lines += ["|---" * (3 + len(FIGURES)) + "|"]
    for name, cases in by_variant.items():
        pairs = [(made, by_variant["whole"][case]) for case, made in cases.items()]
        cells = []
        for figure, (_, shape) in FIGURES.items():
            mean, whole = (float(np.mean([pair[k][figure] for pair in pairs])) for k in (0, 1))
            change = "" if name == "whole" else " (" + shape.replace(":", ":+").format(mean - whole) + ")"
            cells.append(shape.format(mean) + change)
        lines.append(f"| {name} | {pairs[0][0]['part']} | {len(pairs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    with one_sentence_errors():
        tyro.cli(FieldAblation, description=__doc__).main()
