"""Is the exported GLB what the run fitted? Reads the file on its own and compares pictures and shape, frame by frame.

    python benchmarks/export_fidelity.py --glb OUT/mesh.glb --config RUN/config.yml --out sheet.png
    python benchmarks/export_fidelity.py --glb OUT/mesh.glb --config RUN/config.yml --case CASE

Pictures: every frame of the file drawn at the input camera, on white, against the input video (PSNR, peak 1, sRGB;
intersection over union of the silhouettes). Shape, with --config: distance of the file's surface to the field's own
at that time (marching cubes of its density) and back, as a share of the box's diagonal. With --case, a benchmark case
with truth: the same pictures at its elevated views, which no fit uses, and the Chamfer distance to the true surface of
the file and of the field's own surface. The file is read with struct, json and numpy (`tests/export_reader.py`) and
drawn by a z-buffer rasteriser of this script; nothing of the exporter is used for either.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from jaxtyping import Float, Int, UInt8
from PIL import Image

from sv4d_ns.runs.layout import newest_views
from sv4d_ns.utils.errors import InputError, one_sentence_errors
from sv4d_ns.utils.files import atomic_path
from sv4d_ns.views.grid import ViewGrid

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
import export_reader

from sv4d_ns.utils.compiled import njit

SUPERSAMPLES = 3
"""Samples along each side of a pixel."""
SURFACE_SAMPLES = 20_000
"""Points on each surface when distances are measured."""


@dataclass(frozen=True)
class PlayedGlb:
    """An animated GLB evaluated at its own key times."""

    seconds: Float[np.ndarray, " t"]
    positions: Float[np.ndarray, "t n 3"]
    """glTF axes: y up, front +z."""
    faces: Int[np.ndarray, "f 3"]
    linear_colors: Float[np.ndarray, "n 3"] | None
    uv: Float[np.ndarray, "n 2"] | None = None
    image: UInt8[np.ndarray, "s s 3"] | None = None
    """sRGB."""
    moves: tuple[Float[np.ndarray, "t 2"], Float[np.ndarray, "t 2"]] | None = None
    """Offset and scale of `uv` at each frame, of an animated texture."""


def read_glb(path: Path) -> PlayedGlb:
    """Apply the first animation at each of its key times: morph targets or a skin, and the node's own motion."""
    if not path.is_file():
        raise InputError(f"--glb {path} does not exist: give the file that 'ns-export mesh' wrote.")
    glb = export_reader.read_glb(path)
    if glb.json.get("skins"):
        seconds, positions = glb.skinned()
    else:
        seconds, positions = glb.posed("POSITION")
        channels = glb.channels()
        if (0, "translation") in channels:
            positions = positions + channels[0, "translation"][1][:, None]
    positions = in_run_coordinates(positions, glb.json)
    faces = glb.accessor(glb.primitive["indices"]).reshape(-1, 3).astype(np.int64)
    if "COLOR_0" in glb.primitive["attributes"]:
        return PlayedGlb(seconds, positions, faces, glb.attribute("COLOR_0")[:, :3] / 65535)
    return PlayedGlb(seconds, positions, faces, None, glb.attribute("TEXCOORD_0"), glb.image(), glb.texture_moves())


def in_run_coordinates(positions: Float[np.ndarray, "t n 3"], document: dict[str, Any]) -> Float[np.ndarray, "t n 3"]:
    """Positions (glTF axes) before the exporter scaled them and put them on the ground, as the file's extras say."""
    placement = document["asset"].get("extras", {}).get("sv4d", {}).get("placement")
    if placement is None:
        return positions
    return (positions - np.array([0.0, placement["lift"], 0.0])) / placement["scale"]


def render(
    glb: PlayedGlb, frame: int, c2w: Float[np.ndarray, "4 4"], focal: float, size: int
) -> tuple[Float[np.ndarray, "size size 3"], Float[np.ndarray, "size size"]]:
    """sRGB picture on white and coverage, both in [0, 1]; OpenGL camera of the world, both sides of faces drawn."""
    world = glb.positions[frame][:, [2, 0, 1]]  # glTF (y, z, x) back to the world's (x, y, z)
    view = (world - c2w[:3, 3]) @ c2w[:3, :3]
    fine = size * SUPERSAMPLES
    depth = -view[:, 2]
    pixels = 0.5 * fine + focal * SUPERSAMPLES * np.stack([view[:, 0], -view[:, 1]], axis=-1) / depth[:, None]
    shown, weights = _rasterise(pixels, depth, glb.faces, fine)
    covered = shown >= 0
    on_white = np.ones((fine, fine, 3))
    on_white[covered] = _colors(glb, frame, glb.faces[shown[covered]], weights[covered])

    def reduced(picture: np.ndarray) -> np.ndarray:
        return picture.reshape(size, SUPERSAMPLES, size, SUPERSAMPLES, -1).mean(axis=(1, 3))

    return reduced(on_white), reduced(covered.astype(np.float64))[..., 0]


def _colors(
    glb: PlayedGlb, frame: int, corners: Int[np.ndarray, "k 3"], weights: Float[np.ndarray, "k 3"]
) -> Float[np.ndarray, "k 3"]:
    """sRGB in [0, 1] of points on faces."""
    if glb.linear_colors is not None:
        linear = np.einsum("kj,kjc->kc", weights, glb.linear_colors[corners])
        return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055)
    assert glb.uv is not None and glb.image is not None
    side = len(glb.image)
    offset, scale = (0.0, 1.0) if glb.moves is None else (glb.moves[0][frame], glb.moves[1][frame])
    texel = (np.einsum("kj,kjc->kc", weights, glb.uv[corners]) * scale + offset) * side - 0.5
    low = np.floor(texel).astype(int)
    share = texel - low
    result = np.zeros((len(corners), 3))
    for dx in (0, 1):
        for dy in (0, 1):
            x, y = np.clip(low[:, 0] + dx, 0, side - 1), np.clip(low[:, 1] + dy, 0, side - 1)
            part = np.abs(1 - dx - share[:, 0]) * np.abs(1 - dy - share[:, 1])
            result += part[:, None] * glb.image[y, x] / 255
    return result


@njit(cache=True)
def _rasterise(pixels, depth, faces, size):  # type: ignore[no-untyped-def]
    """Nearest triangle at each sample centre and its perspective-correct weights."""
    nearest = np.full((size, size), np.inf)
    shown = np.full((size, size), -1, np.int64)
    weights = np.zeros((size, size, 3))
    for index in range(faces.shape[0]):
        a, b, c = faces[index]
        x0, y0, x1, y1, x2, y2 = (
            pixels[a, 0], pixels[a, 1], pixels[b, 0], pixels[b, 1], pixels[c, 0], pixels[c, 1],
        )  # fmt: skip
        area = (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)
        if area == 0.0:
            continue
        left, right = max(int(min(x0, x1, x2)), 0), min(int(max(x0, x1, x2)) + 1, size)
        top, bottom = max(int(min(y0, y1, y2)), 0), min(int(max(y0, y1, y2)) + 1, size)
        for row in range(top, bottom):
            for column in range(left, right):
                x, y = column + 0.5, row + 0.5
                u = ((x1 - x) * (y2 - y) - (x2 - x) * (y1 - y)) / area
                v = ((x2 - x) * (y0 - y) - (x0 - x) * (y2 - y)) / area
                w = 1.0 - u - v
                if u < 0.0 or v < 0.0 or w < 0.0:
                    continue
                u, v, w = u / depth[a], v / depth[b], w / depth[c]
                total = u + v + w
                if total > 0.0 and 1.0 / total < nearest[row, column]:
                    nearest[row, column] = 1.0 / total
                    shown[row, column] = index
                    weights[row, column] = u / total, v / total, w / total
    return shown, weights


@dataclass(frozen=True)
class Comparison:
    """Renders of the file beside true pictures, and how close they are."""

    renders: Float[np.ndarray, "t s s 3"]
    truths: Float[np.ndarray, "t s s 3"]
    psnr: Float[np.ndarray, " t"]
    iou: Float[np.ndarray, " t"]


def compare(glb: PlayedGlb, grid: ViewGrid) -> Comparison:
    """Frame i of the file against input frame i.

    Raises:
        InputError: the two have different numbers of frames.
    """
    if len(glb.seconds) != grid.num_frames:
        raise InputError(f"The GLB has {len(glb.seconds)} frames but the grid {grid.num_frames}: they are not one run.")
    size = grid.input_frames.shape[1]
    return compare_at(glb, grid.input_frames, grid.plan.c2w()[0], grid.plan.focal_px(size))


def compare_at(
    glb: PlayedGlb, frames: UInt8[np.ndarray, "t s s 4"], c2w: Float[np.ndarray, "4 4"], focal: float
) -> Comparison:
    """Frame i of the file against frame i of a camera's RGBA video."""
    renders, truths, psnr, iou = [], [], [], []
    for index, rgba in enumerate(frames / 255):
        picture, coverage = render(glb, index, c2w, focal, frames.shape[1])
        truth = rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]
        inside, expected = coverage > 0.5, rgba[..., 3] > 0.5
        renders.append(picture)
        truths.append(truth)
        psnr.append(-10 * np.log10(np.mean((picture - truth) ** 2)))
        iou.append((inside & expected).sum() / (inside | expected).sum())
    return Comparison(np.stack(renders), np.stack(truths), np.array(psnr), np.array(iou))


def contact_sheet(comparison: Comparison, columns: int = 6) -> Int[np.ndarray, "H W 3"]:
    """uint8: true pictures, renders of the file, and their absolute difference (dark is equal), some frames."""
    chosen = np.linspace(0, len(comparison.psnr) - 1, min(columns, len(comparison.psnr))).round().astype(int)
    truths, renders = comparison.truths[chosen], comparison.renders[chosen]
    rows = [np.concatenate(list(row), axis=1) for row in (truths, renders, np.abs(truths - renders))]
    return np.round(np.concatenate(rows) * 255).clip(0, 255).astype(np.uint8)


# --------------------------------------------------------------------------------------------------------- the shape


def shape(glb: PlayedGlb, config: Path, case: Path | None, frames: list[int] | None = None) -> dict[str, Any]:
    """Distances between the file's surface, the field's own, and the true one where a case has it."""
    from scipy.spatial import cKDTree

    from sv4d_ns.evaluation.cases import Case
    from sv4d_ns.evaluation.geometry import sample_surface, surface_at
    from sv4d_ns.runs.open import load_run

    run = load_run(config)
    low, high = run.field.aabb.cpu().numpy()
    diagonal = float(np.linalg.norm(high - low))
    truth = Case.load(case).geometry() if case is not None else None
    known = list(truth.frame_indices) if truth is not None else []
    rows: dict[str, list[float]] = {"to_field": [], "from_field": [], "chamfer": [], "chamfer_field": []}
    for frame in range(len(glb.seconds)) if frames is None else frames:
        mesh = sample_surface(glb.positions[frame][:, [2, 0, 1]], glb.faces, SURFACE_SAMPLES).points
        own = surface_at(run.field, run.occupancy, float(run.views.times[frame])).points
        own = own[:: max(len(own) // SURFACE_SAMPLES, 1)]
        to_own, to_mesh = cKDTree(own).query(mesh)[0].mean(), cKDTree(mesh).query(own)[0].mean()
        rows["to_field"].append(to_own / diagonal)
        rows["from_field"].append(to_mesh / diagonal)
        line = f"frame {frame:3d}   to the field's surface {to_own / diagonal:.3%}   from it {to_mesh / diagonal:.3%}"
        if truth is not None and frame in known:
            points = truth.points[known.index(frame)]
            for name, made in (("chamfer", mesh), ("chamfer_field", own)):
                there, back = cKDTree(points).query(made)[0].mean(), cKDTree(made).query(points)[0].mean()
                rows[name].append(0.5 * (there + back))
            line += f"   Chamfer {rows['chamfer'][-1]:.5f}, the field's {rows['chamfer_field'][-1]:.5f}"
        print(line, flush=True)
    result = {f"{name}_mean": float(np.mean(values)) for name, values in rows.items() if values}
    result["to_field_worst_frame"] = float(np.max(rows["to_field"] + rows["from_field"]))
    if rows["chamfer"]:
        result["chamfer_ratio"] = result["chamfer_mean"] / result["chamfer_field_mean"]
    return result


def unused_views(glb: PlayedGlb, case: Path) -> dict[str, float]:
    """PSNR and overlap at the case's elevated views."""
    from sv4d_ns.evaluation.cases import Case

    known = Case.load(case)
    compared = [
        compare_at(glb, known.frames(view, known.size), view.c2w, known.focal_px)
        for view in known.views
        if "elev" in view.roles
    ]
    return {
        "unused_psnr": float(np.mean([comparison.psnr for comparison in compared])),
        "unused_iou": float(np.mean([comparison.iou for comparison in compared])),
    }


def main(
    glb: Path,
    config: Path | None = None,
    grid: Path | None = None,
    case: Path | None = None,
    out: Path | None = None,
    frames: Path | None = None,
) -> None:
    """Compare an exported GLB with its run.

    Args:
        glb: the file that `ns-export mesh` wrote.
        config: the run's config.yml; its newest view grid and its field are used.
        grid: a folder with a view grid, instead of a run.
        case: a benchmark case with truth, for a run on its input camera.
        out: picture to write: input, render and difference.
        frames: folder for this script's renders, one picture per frame.
    """
    if (config is None) == (grid is None):
        raise InputError("Give either --config (a run) or --grid (a folder with a view grid).")
    folder = grid if config is None else newest_views(config.parent)
    if folder is None:
        raise InputError(f"{config} belongs to a run without views: let ns-train make them, or give --grid.")
    played = read_glb(glb)
    comparison = compare(played, ViewGrid.load(folder))
    for index, (psnr, iou) in enumerate(zip(comparison.psnr, comparison.iou, strict=True)):
        print(f"frame {index:3d}   PSNR {psnr:6.2f} dB   silhouette IoU {iou:.3f}")
    if out is not None:
        with atomic_path(out) as temporary:
            Image.fromarray(contact_sheet(comparison)).save(temporary)
    if frames is not None:
        frames.mkdir(parents=True, exist_ok=True)
        for index, picture in enumerate(comparison.renders):
            Image.fromarray(np.round(picture * 255).clip(0, 255).astype(np.uint8)).save(
                frames / f"frame_{index:04d}.png"
            )
    result: dict[str, Any] = {"psnr": float(comparison.psnr.mean()), "iou": float(comparison.iou.mean())}
    if case is not None:
        result |= unused_views(played, case)
    if config is not None:
        result |= shape(played, config, case)
    print(json.dumps({name: round(value, 5) for name, value in result.items()}))


if __name__ == "__main__":
    with one_sentence_errors():
        tyro.cli(main)
