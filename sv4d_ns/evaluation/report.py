"""The HTML page of an evaluation: one file that opens from disk, with everything in it."""

import base64
import html
import io
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sv4d_ns.utils.images import over_white

if TYPE_CHECKING:
    from sv4d_ns.evaluation.command import Side

SHEET_PIXELS = 96
"""Side of a picture in a contact sheet."""
COLUMNS = 7
"""Moments in a contact sheet."""
ROWS = 8
"""Views in a contact sheet."""

BETTER = {
    "psnr": 1, "psnr_box": 1, "ssim": 1, "ssim_box": 1, "iou": 1, "clip_s": 1, "clip_c": 1, "hull": 1,
    "lpips_alex": -1, "lpips_vgg": -1, "dssim_box": -1, "flicker": -1,
}  # fmt: skip
"""Metric: 1 where higher is better, -1 where lower is; Fréchet distances are all lower."""

TITLES = {
    "psnr": "PSNR, dB",
    "psnr_box": "PSNR in the box, dB",
    "ssim": "SSIM",
    "ssim_box": "SSIM in the box",
    "dssim_box": "D-SSIM in the box",
    "iou": "silhouette IoU",
    "lpips_alex": "LPIPS (AlexNet)",
    "lpips_vgg": "LPIPS (VGG)",
    "clip_s": "CLIP-S / CLIP-I",
    "clip_c": "CLIP-C",
    "flicker": "temporal flicker",
    "flicker_truth": "temporal flicker of the truth",
    "hull": "hull agreement",
    "fvd_f": "FVD-F",
    "fvd_v": "FVD-V",
    "fvd_diag": "FVD-Diag",
    "fvd_4d": "FV4D",
    "rfd_f": "RFD-F (random features, not FVD)",
    "rfd_v": "RFD-V (random features, not FVD)",
    "rfd_diag": "RFD-Diag (random features, not FVD)",
    "rfd_4d": "RFD-4D (random features, not FV4D)",
}

STYLE = """
:root { color-scheme: light; --line: #d8d8d4; --soft: #6a6a66; --a: #1f6feb; --b: #c2410c; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1a; background: #fff; margin: 2rem auto; max-width: 76rem;
       padding: 0 1.25rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .35rem; }
p, li { max-width: 60rem; } .soft { color: var(--soft); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .28rem .9rem .28rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; } td.n { text-align: right; } .best { font-weight: 700; }
.scroll { overflow-x: auto; } img, svg { max-width: 100%; height: auto; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; }
.flag { color: #9a3412; } pre { background: #f6f6f3; padding: .75rem; overflow-x: auto; font-size: 12px; }
.a { color: var(--a); } .b { color: var(--b); }
"""


def html_page(report: dict[str, Any], sides: "Sequence[Side]") -> str:
    """The page; `report` is what report.json holds, `sides` the pictures behind it."""
    labels = [
        f'<b class="{"ab"[i]}">{html.escape("AB"[i])}</b> {html.escape(side.label)}' for i, side in enumerate(sides)
    ]
    truth = ", ".join(case["name"] for case in report["truth"]) or "none: only what needs no truth was measured"
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>Evaluation: {html.escape(report['protocol'])}</title><style>{STYLE}</style></head><body>",
        f"<h1>Evaluation by the protocol {html.escape(report['protocol'])}</h1>",
        f"<p>{'<br>'.join(labels)}<br><span class='soft'>truth: {html.escape(truth)}</span></p>",
        "<h2>Figures</h2>",
        figures_table(report),
        notes(report),
        geometry_table(report),
    ]
    for index, side in enumerate(sides[0].opened):
        name = html.escape(side.pictures.name)
        parts.append(f"<h2>{name}</h2>")
        parts.append(plots(sides, index))
        parts.append(sheets(sides, index))
    parts += [
        "<h2>Choices</h2><ul>",
        *[f"<li>{html.escape(choice)}</li>" for choice in report["choices"]],
        "</ul><h2>What was read and run</h2>",
        f"<pre>{html.escape(json.dumps(_identities(report), indent=1))}</pre>",
        "</body></html>",
    ]
    return "\n".join(parts)


def figures_table(report: dict[str, Any]) -> str:
    """Every metric of every side with its interval and the number of units it rests on."""
    sides = report["candidates"]
    names = list(dict.fromkeys(name for side in sides for name in side["summary"]))
    names.sort(key=lambda name: list(TITLES).index(name) if name in TITLES else len(TITLES))
    heads = "".join(f"<th>{'AB'[i]}</th><th class='soft'>95 %</th><th class='soft'>n</th>" for i in range(len(sides)))
    difference = "<th>B − A</th><th class='soft'>95 %</th>" if len(sides) == 2 else ""
    rows = [f"<tr><th>metric</th>{heads}{difference}</tr>"]
    for name in names:
        cells = [f"<td>{html.escape(TITLES.get(name, name))} {_arrow(name)}</td>"]
        best = _best([side["summary"].get(name) for side in sides], (report.get("difference") or {}).get(name), name)
        for i, side in enumerate(sides):
            cells.append(_estimate_cells(side["summary"].get(name), bold=best == i))
        if difference:
            cells.append(_difference_cells(report["difference"].get(name)))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f"<div class='scroll'><table>{''.join(rows)}</table></div>"


def notes(report: dict[str, Any]) -> str:
    """What is wrong with figures, what was left out, and views that were not compared."""
    lines: dict[str, list[str]] = {}
    for i, side in enumerate(report["candidates"]):
        for name, estimate in side["summary"].items():
            if estimate["note"]:
                lines.setdefault(estimate["note"], []).append(f"{TITLES.get(name, name)} of {'AB'[i]}")
        for one in side["objects"]:
            if one["views_of_the_truth_it_lacks"]:
                lacks = ", ".join(one["views_of_the_truth_it_lacks"])
                lines.setdefault(f"not compared, because it has no such view: {lacks}", []).append(f"{'AB'[i]}")
    items = [f"<li class='flag'>{html.escape(', '.join(who))}: {html.escape(note)}</li>" for note, who in lines.items()]
    for sentence in dict.fromkeys(report["left_out"].values()):
        items.append(f"<li>Left out. {html.escape(sentence)}</li>")
    return f"<ul>{''.join(items)}</ul>" if items else ""


def geometry_table(report: dict[str, Any]) -> str:
    """Surface and track figures of runs whose truth has geometry."""
    shown = {
        "chamfer": "Chamfer",
        "chamfer_floor": "(of a perfect surface)",
        "f_score@0.01": "F at 0.01",
        "f_score@0.02": "F at 0.02",
        "normal_consistency": "normal consistency",
        "track": "track error",
        "track_if_static": "(if nothing moved)",
    }
    rows = []
    for i, side in enumerate(report["candidates"]):
        for name, figures in side["geometry"].items():
            cells = "".join(f"<td class='n'>{_figure(figures.get(key))}</td>" for key in shown)
            rows.append(f"<tr><td>{'AB'[i]}</td><td>{html.escape(name)}</td>{cells}</tr>")
    if not rows:
        return ""
    head = "".join(f"<th>{title}</th>" for title in shown.values())
    return (
        "<h2>Geometry</h2><p class='soft'>World units; the object's box is 1.14 wide.</p><div class='scroll'><table>"
        f"<tr><th></th><th>object</th>{head}</tr>{''.join(rows)}</table></div>"
    )


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def plots(sides: "Sequence[Side]", index: int) -> str:
    """Metrics of one object over azimuth and over time, both sides in one frame."""
    wanted = ("psnr", "iou", "lpips_alex", "lpips_vgg", "clip_s", "hull")
    names = [name for name in wanted if any(name in side.figures[index] for side in sides)]
    return f"<div class='plots'>{''.join(_plot(sides, index, name) for name in names)}</div>"


def _plot(sides: "Sequence[Side]", index: int, name: str) -> str:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 2.3), layout="constrained")
    over_azimuth, over_time = figure.subplots(1, 2, sharey=True)
    for i, side in enumerate(sides):
        if name not in side.figures[index]:
            continue
        pictures, values = side.opened[index].pictures, np.asarray(side.figures[index][name])
        color = ("#1f6feb", "#c2410c")[i]
        for level in np.unique(np.round(pictures.elevations_deg, 3)):
            at = np.flatnonzero(np.abs(pictures.elevations_deg - level) < 1e-2)
            at = at[np.argsort(pictures.azimuths_deg[at] % 360)]
            azimuth = pictures.azimuths_deg[at] % 360
            style = "-" if abs(level) < 0.5 else ":"
            over_azimuth.plot(azimuth, values[:, at].mean(0), style, marker="o", ms=3, lw=1.3, color=color)
        over_time.plot(pictures.times, values.mean(1), lw=1.3, color=color, marker="o", ms=2)
        low, high = values.min(1), values.max(1)
        over_time.fill_between(pictures.times, low, high, color=color, alpha=0.12, lw=0)
    over_azimuth.set(xlabel="azimuth, degrees (dotted: other elevation)", ylabel=TITLES[name], xlim=(0, 360))
    over_azimuth.set_xticks(range(0, 361, 90))
    over_time.set(xlabel="time (band: worst to best view)")
    for axis in (over_azimuth, over_time):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


def sheets(sides: "Sequence[Side]", index: int) -> str:
    """Contact sheets of one object: truth, each side, and each side's error."""
    first = sides[0].opened[index].pictures
    parts = []
    if first.truth is not None:
        parts.append(("Truth", sheet(first.truth)))
    for i, side in enumerate(sides):
        pictures = side.opened[index].pictures
        parts.append((f"{'AB'[i]}", sheet(pictures.made)))
        if pictures.truth is not None:
            parts.append((f"Error of {'AB'[i]}: mean |difference|, black 0, white 0.5 and more", error_sheet(pictures)))
    rows = f"Rows: {', '.join(html.escape(first.view_names[v]) for v in _some(len(first.view_names), ROWS))}. "
    moments = ", ".join(f"{first.times[t]:.2f}" for t in _some(len(first.times), COLUMNS))
    caption = f"<p class='soft'>{rows}Columns: times {moments}.</p>"
    pictures_html = "".join(
        f"<h3>{html.escape(title)}</h3><img alt='{html.escape(title)}' src='{_data_url(picture)}'>"
        for title, picture in parts
    )
    return caption + pictures_html


def sheet(rgba: UInt8[np.ndarray, "t v s s 4"]) -> UInt8[np.ndarray, "H W 3"]:
    """Some views (rows) at some times (columns), on white."""
    return _tiled(over_white(_chosen(rgba)))


def error_sheet(pictures: Any) -> UInt8[np.ndarray, "H W 3"]:
    """Mean absolute difference of the channels on white, a grey level of 255 for 0.5."""
    made, truth = (over_white(_chosen(rgba)).astype(np.float32) for rgba in (pictures.made, pictures.truth))
    error = np.clip(np.abs(made - truth).mean(-1) * 2, 0, 255).astype(np.uint8)
    return _tiled(np.repeat(error[..., None], 3, -1))


def _chosen(rgba: UInt8[np.ndarray, "t v s s 4"]) -> UInt8[np.ndarray, "c r s s 4"]:
    return rgba[_some(rgba.shape[0], COLUMNS)][:, _some(rgba.shape[1], ROWS)]


def _some(count: int, at_most: int) -> list[int]:
    """At most so many indices, evenly spread."""
    return [int(i) for i in np.unique(np.linspace(0, count - 1, min(count, at_most)).round())]


def _tiled(rgb: UInt8[np.ndarray, "t v s s 3"]) -> UInt8[np.ndarray, "H W 3"]:
    def small(picture: np.ndarray) -> np.ndarray:
        side = min(SHEET_PIXELS, picture.shape[0])
        return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BOX))

    rows = [np.concatenate([small(frame[view]) for frame in rgb], axis=1) for view in range(rgb.shape[1])]
    return np.concatenate(rows, axis=0)


def _data_url(picture: UInt8[np.ndarray, "H W 3"]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _direction(name: str) -> int:
    return -1 if name.startswith(("fvd", "rfd")) else BETTER.get(name, 0)


def _arrow(name: str) -> str:
    return {1: "<span class='soft'>↑</span>", -1: "<span class='soft'>↓</span>", 0: ""}[_direction(name)]


def _best(estimates: list[dict[str, Any] | None], difference: dict[str, Any] | None, name: str) -> int | None:
    """Which of two is better, by what both have where that is known; None where it cannot be said."""
    known = [estimate for estimate in estimates if estimate is not None]
    if len(known) < 2 or _direction(name) == 0:
        return None
    if difference is not None:
        gain = difference["value"] * _direction(name)
        return None if gain == 0 else int(gain > 0)
    values = [estimate["value"] * _direction(name) for estimate in known]
    comparable = known[0]["units"] == known[1]["units"] and values[0] != values[1]
    return int(np.argmax(values)) if comparable else None


def _estimate_cells(estimate: dict[str, Any] | None, bold: bool) -> str:
    if estimate is None:
        return "<td class='n'>–</td><td></td><td></td>"
    flag = "<span class='flag'> !</span>" if estimate["note"] else ""
    return (
        f"<td class='n{' best' if bold else ''}'>{estimate['value']:.4g}{flag}</td>"
        f"<td class='soft'>{estimate['low']:.4g} to {estimate['high']:.4g}</td>"
        f"<td class='soft n'>{estimate['units']}</td>"
    )


def _difference_cells(estimate: dict[str, Any] | None) -> str:
    if estimate is None:
        return "<td></td><td></td>"
    return (
        f"<td class='n'>{estimate['value']:+.4g}</td>"
        f"<td class='soft'>{estimate['low']:+.4g} to {estimate['high']:+.4g}</td>"
    )


def _identities(report: dict[str, Any]) -> dict[str, Any]:
    """The report without its figures: hashes, versions, settings."""
    return {
        "settings": report["settings"],
        "code": report["code"],
        "networks": report["networks"],
        "truth": report["truth"],
        "candidates": [{one["name"]: one["inputs"] for one in side["objects"]} for side in report["candidates"]],
    }
