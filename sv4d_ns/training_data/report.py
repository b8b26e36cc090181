"""What curation kept and dropped, as a page and as a picture."""

import base64
import html
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from sv4d_ns.utils.files import atomic_path

Row = tuple[str, dict[str, float], list[str], np.ndarray]
"""Name, measurements, reasons for dropping (empty: kept), strip of thumbnails."""

STYLE = """
body { font: 14px sans-serif; margin: 2em; } td, th { padding: 2px 10px 2px 0; vertical-align: top; text-align: left; }
.dropped { color: #a02020; } .kept { color: #207020; } img { border: 1px solid #ddd; } small { color: #666; }
"""
SHEET_ROWS = 200
SHEET_LABEL = 14


def write_html(path: Path, rows: Sequence[Row], thresholds: dict[str, Any]) -> None:
    """One page that needs no other file: counts, thresholds, and a row for every object, the dropped ones first."""
    counts = Counter(reason for _, _, reasons, _ in rows for reason in reasons)
    kept = sum(not reasons for _, _, reasons, _ in rows)
    parts = [
        f"<!doctype html><meta charset=utf-8><title>Curation</title><style>{STYLE}</style>",
        f"<h1>{kept} of {len(rows)} objects kept</h1>",
        _table(["reason", "objects"], [[html.escape(r), str(n)] for r, n in counts.most_common()]),
        "<details><summary>Thresholds</summary>",
        _table(["name", "value"], [[name, html.escape(str(value))] for name, value in thresholds.items()]),
        "</details>",
    ]
    body = []
    for name, measurements, reasons, strip in sorted(rows, key=lambda row: (not row[2], row[0])):
        kind, verdict = ("dropped", ", ".join(reasons)) if reasons else ("kept", "kept")
        numbers = "; ".join(f"{key} {value:.3g}" for key, value in sorted(measurements.items()))
        picture = f'<img src="data:image/png;base64,{_encoded(strip)}">'
        label = f"{html.escape(name)}<br><span class={kind}>{html.escape(verdict)}</span><br><small>{numbers}</small>"
        body.append([picture, label])
    parts.append(_table(["first frame from four sides, then over time", "object"], body))
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(parts))


def write_sheet(path: Path, rows: Sequence[Row]) -> None:
    """The first objects of the page as one picture."""
    shown = sorted(rows, key=lambda row: (not row[2], row[0]))[:SHEET_ROWS]
    height = max(strip.shape[0] for *_, strip in shown) + SHEET_LABEL
    width = max(strip.shape[1] for *_, strip in shown)
    sheet = Image.new("RGB", (width, height * len(shown)), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (name, _, reasons, strip) in enumerate(shown):
        sheet.paste(Image.fromarray(strip), (0, index * height + SHEET_LABEL))
        colour = (160, 32, 32) if reasons else (32, 112, 32)
        pen.text((2, index * height + 1), f"{name}: {', '.join(reasons) or 'kept'}", fill=colour)
    with atomic_path(path) as temporary:
        sheet.save(temporary)


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{title}</th>' for title in head)}</tr>{cells}</table>"


def _encoded(strip: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(strip).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
