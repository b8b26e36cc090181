"""`sv4d evaluate`: judge runs or view grids by a named protocol, and say every choice."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Optional

import numpy as np
import tyro

from sv4d_ns.evaluation.candidates import Opened, find_candidate, open_candidate
from sv4d_ns.evaluation.cases import GEOMETRY_FILE, Case
from sv4d_ns.evaluation.frechet import Estimate
from sv4d_ns.evaluation.protocols import PROTOCOLS, Protocol, ProtocolName, load_truth
from sv4d_ns.evaluation.scores import Backbones, Figures, load_backbones, picture_figures, summarise, video_figures
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.files import atomic_path, content_hash, sha256
from sv4d_ns.utils.limits import between, check_value

JSON_NAME, HTML_NAME = "report.json", "report.html"
REPORT_FORMAT = 1
LARGEST = 2048
"""Pixels along the side of pictures that are compared, at most."""


@dataclass
class Evaluate:
    """Judge one run or view grid, or compare two, by a named protocol."""

    candidates: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_GRID [RUN_OR_GRID]")]
    """One or two of: a run's folder (or its config.yml), a view grid's folder, a folder of Consistent4D pictures, or a
    folder that holds one of these for each object of the truth, under the object's name."""
    protocol: ProtocolName = "benchmark"
    """Which views, sizes and networks; docs/evaluation.md and every report say what each one is."""
    truth: Optional[Path] = None  # noqa: UP045 - tyro shows it as in nerfstudio
    """The truth: a case or a folder of cases. Without it, only what needs none is measured."""
    out: Path = Path("evaluation")
    """Folder for report.json and report.html."""
    size: Optional[int] = None  # noqa: UP045
    """Pixels along the side of the pictures; the protocol's by default. Anything else is not that protocol any more,
    and the report says so."""
    fetch: bool = False
    """Download networks that are missing, from their official places."""
    i3d: Optional[Path] = None  # noqa: UP045
    """The I3D TorchScript file of FVD."""
    i3d_sha256: Optional[str] = None  # noqa: UP045
    """Accept a file of this sha256 as --i3d instead of the official one. A TorchScript file is a program."""

    def main(self) -> None:
        """Measure, and write both files.

        Raises:
            InputError: something given cannot be used; nothing is written then.
        """
        if not 1 <= len(self.candidates) <= 2:
            raise InputError(f"Give one or two runs or grids, not {len(self.candidates)}.")
        if self.size is not None:
            check_value("size", self.size, between(16, LARGEST, f"16 to {LARGEST} pixels"))
        protocol = PROTOCOLS[self.protocol]
        cases: list[Case | None] = [*load_truth(self.truth, protocol)] if self.truth is not None else [None]
        chosen = [[find_candidate(path, case.name if case else None) for case in cases] for path in self.candidates]
        _check_output(self.out)
        backbones = load_backbones(protocol, self.fetch, self.i3d, self.i3d_sha256)
        for sentence in dict.fromkeys(backbones.missing.values()):
            print(f"Left out: {sentence}")
        size = self.size or protocol.size
        sides = [
            judge_side(
                str(path), [(one, case) for one, case in zip(row, cases, strict=True)], size, backbones, protocol
            )
            for path, row in zip(self.candidates, chosen, strict=True)
        ]
        report = describe(self, protocol, cases, sides, backbones)
        from sv4d_ns.evaluation.report import html_page

        with atomic_path(self.out / JSON_NAME) as path:
            path.write_text(json.dumps(report, indent=1, allow_nan=False))
        with atomic_path(self.out / HTML_NAME) as path:
            path.write_text(html_page(report, sides))
        print(text_table(report))
        print(f"Report: {self.out / HTML_NAME} and {self.out / JSON_NAME}")


@dataclass(frozen=True, eq=False)
class Side:
    """One candidate, judged on all objects."""

    label: str
    opened: list[Opened]
    figures: list[Figures]
    """Of each object."""
    summary: dict[str, Estimate]
    geometry: dict[str, dict[str, Any]]
    """Object: `geometry.evaluate_geometry`; runs with true geometry only."""


def judge_side(
    label: str, objects: Sequence[tuple[Any, Case | None]], size: int | None, backbones: Backbones, protocol: Protocol
) -> Side:
    """Open, render and measure one candidate on all objects."""
    from sv4d_ns.utils.progress import bar

    opened, figures, geometry = [], [], {}
    for candidate, case in objects:
        name = case.name if case else label
        of = f"{name} ({label})" if case else name
        with bar(f"Pictures of {of}") as progress:
            one = open_candidate(candidate, case, size, progress)
        opened.append(one)
        with bar(f"Comparing pictures of {of}") as progress:
            figures.append(picture_figures(one.pictures, backbones, progress))
        truth = case.geometry() if case is not None and one.run is not None else None
        if truth is not None:
            from sv4d_ns.evaluation.geometry import evaluate_geometry

            assert one.to_source is not None, "a candidate that is judged against truth knows its way there"
            print(f"Surface and tracks of {of} ...", flush=True)
            geometry[name] = evaluate_geometry(
                one.run.field, one.run.occupancy, truth, one.run.views.times, one.to_source
            )
    summary = summarise(figures) | video_figures([one.pictures for one in opened], backbones, protocol)
    return Side(label, opened, figures, summary, geometry)


def describe(
    settings: Evaluate, protocol: Protocol, cases: Sequence[Case | None], sides: Sequence[Side], backbones: Backbones
) -> dict[str, Any]:
    """The report as plain JSON values: figures, what they rest on, every hash, setting and choice."""
    choices = list(protocol.choices)
    standard = settings.size is None or settings.size == protocol.size
    if not standard:
        choices.append(f"NOT THE PROTOCOL'S SIZE: pictures were compared at {settings.size}.")
    report: dict[str, Any] = {
        "format": REPORT_FORMAT,
        "protocol": protocol.name + ("" if standard else f" (at {settings.size} pixels)"),
        "choices": choices,
        "settings": {name: _plain(value) for name, value in asdict(settings).items()},
        "candidates": [_describe_side(side) for side in sides],
        "truth": [_describe_case(case) for case in cases if case is not None],
        "networks": [asdict(identity) for identity in backbones.identities],
        "left_out": backbones.missing,
        "code": {"package": code_hash(), **_versions()},
    }
    if len(sides) == 2:
        report["difference"] = {name: asdict(value) for name, value in paired_differences(sides[0], sides[1]).items()}
    return report


def paired_differences(first: Side, second: Side) -> dict[str, Estimate]:
    """Second minus first for each picture metric, resampled over the views both sides have."""
    from sv4d_ns.evaluation.frechet import mean_with_interval

    differences: dict[str, list[float]] = {}
    for a, b, fa, fb in zip(first.opened, second.opened, first.figures, second.figures, strict=True):
        shared = [name for name in a.pictures.view_names if name in b.pictures.view_names]
        for metric in fa.keys() & fb.keys():
            for view in shared:
                mean_a = fa[metric][:, a.pictures.view_names.index(view)].mean()
                mean_b = fb[metric][:, b.pictures.view_names.index(view)].mean()
                differences.setdefault(metric, []).append(float(mean_b - mean_a))
    return {name: mean_with_interval(np.array(values)) for name, values in sorted(differences.items())}


def _describe_side(side: Side) -> dict[str, Any]:
    return {
        "label": side.label,
        "summary": {name: asdict(value) for name, value in side.summary.items()},
        "geometry": side.geometry,
        "objects": [
            {
                "name": one.pictures.name,
                "inputs": one.facts,
                "size": one.pictures.made.shape[2],
                "times": one.pictures.times.tolist(),
                "views": list(one.pictures.view_names),
                "azimuths_deg": np.asarray(one.pictures.azimuths_deg, float).tolist(),
                "elevations_deg": np.asarray(one.pictures.elevations_deg, float).tolist(),
                "views_of_the_truth_it_lacks": list(one.skipped),
                "made_pictures": content_hash(one.pictures.made),
                "figures": {name: np.round(values, 6).tolist() for name, values in figures.items()},
            }
            for one, figures in zip(side.opened, side.figures, strict=True)
        ],
    }


def _describe_case(case: Case) -> dict[str, Any]:
    pictures = sorted({path for view in case.views for path in view.files})
    geometry = case.folder / GEOMETRY_FILE
    return {
        "name": case.name,
        "folder": str(case.folder),
        "pictures": content_hash(*(sha256(path) for path in pictures)),
        "geometry": sha256(geometry) if geometry.is_file() else None,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    return value if isinstance(value, int | float | str | bool) or value is None else str(value)


def code_hash() -> str:
    """Hash of all sources of the package."""
    import sv4d_ns

    folder = Path(sv4d_ns.__file__).parent
    return content_hash(*(f"{path.relative_to(folder)}\n{path.read_text()}" for path in sorted(folder.rglob("*.py"))))


def _versions() -> dict[str, str]:
    packages = ("sv4d-ns", "torch", "torchmetrics", "transformers", "numpy", "scipy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _check_output(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"--out {folder} cannot be written ({error.strerror}): choose a folder you own.") from error


def text_table(report: dict[str, Any]) -> str:
    """The figures for the terminal: one line for each metric."""
    sides = report["candidates"]
    names = list(dict.fromkeys(name for side in sides for name in side["summary"]))
    lines = [f"protocol {report['protocol']}"]
    if len(sides) > 1:
        lines += [f"  {'':<14}" + "   ".join(f"{letter:<34}" for letter in "AB").rstrip()]
    for name in names:
        cells = [_cell(side["summary"].get(name)) for side in sides]
        apart = (report.get("difference") or {}).get(name)
        if apart is not None:
            cells.append(f"B - A {apart['value']:+.4g} [{apart['low']:+.4g}, {apart['high']:+.4g}]")
        lines.append(f"  {name:<14}" + "   ".join(f"{cell:<34}" for cell in cells).rstrip())
    for side in sides:
        for name, figures in side["geometry"].items():
            shown = (
                "chamfer",
                "chamfer_floor",
                "f_score@0.01",
                "f_score@0.02",
                "normal_consistency",
                "track",
                "track_if_static",
            )
            lines.append(f"  {name}: " + ", ".join(f"{key} {figures[key]:.4f}" for key in shown if key in figures))
    if any(estimate["note"] for side in sides for estimate in side["summary"].values()):
        lines.append("  (!) see the notes of the report")
    return "\n".join(lines)


def _cell(estimate: dict[str, Any] | None) -> str:
    if estimate is None:
        return "-"
    flag = "  (!)" if estimate["note"] else ""
    return f"{estimate['value']:.4g} [{estimate['low']:.4g}, {estimate['high']:.4g}] n={estimate['units']}{flag}"


def run(arguments: Sequence[str]) -> None:
    """The command line of `sv4d evaluate`.

    Raises:
        InputError: see `Evaluate`.
        SystemExit: help was asked for, or the arguments do not parse.
    """
    tyro.cli(Evaluate, prog="sv4d evaluate", args=list(arguments), description=__doc__).main()
