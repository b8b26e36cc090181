"""Does the exported GLB show the input video? Renders every frame of the file at the input camera and compares.

    python benchmarks/export_fidelity.py --glb OUT/mesh.glb --config RUN/config.yml --out sheet.png

The file is read with pygltflib and numpy and drawn by a small z-buffer rasteriser; nothing of the exporter is used.
Pictures are compared on white: PSNR over all pixels (peak 1, sRGB), and intersection over union of the silhouettes
(coverage above a half).
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numba
import numpy as np
import pygltflib
import tyro
from jaxtyping import Float, Int
from PIL import Image

from sv4d_ns.errors import InputError, one_sentence_errors
from sv4d_ns.files import atomic_path
from sv4d_ns.runs import newest_views
from sv4d_ns.views import ViewGrid

SUPERSAMPLES = 3
"""Samples along each side of a pixel."""

COMPONENTS = {"SCALAR": 1, "VEC3": 3, "VEC4": 4}
DTYPES = {pygltflib.UNSIGNED_SHORT: np.uint16, pygltflib.UNSIGNED_INT: np.uint32, pygltflib.FLOAT: np.float32}


@dataclass(frozen=True)
class PlayedGlb:
    """An animated GLB evaluated at its own key times."""

    seconds: Float[np.ndarray, " t"]
    positions: Float[np.ndarray, "t n 3"]
    """glTF axes: y up, front +z."""
    faces: Int[np.ndarray, "f 3"]
    linear_colors: Float[np.ndarray, "n 3"]


def read_glb(path: Path) -> PlayedGlb:
    """Apply the morph weights of the first animation at each of its key times."""
    if not path.is_file():
        raise InputError(f"--glb {path} does not exist: give the file that 'ns-export mesh' wrote.")
    gltf = pygltflib.GLTF2.load_binary(str(path))
    blob = gltf.binary_blob()

    def accessor(index: int) -> np.ndarray:
        entry = gltf.accessors[index]
        offset = (gltf.bufferViews[entry.bufferView].byteOffset or 0) + (entry.byteOffset or 0)
        width = COMPONENTS[entry.type]
        flat = np.frombuffer(blob, DTYPES[entry.componentType], entry.count * width, offset)
        return flat.reshape(-1, width)

    primitive = gltf.meshes[0].primitives[0]
    sampler = gltf.animations[0].samplers[0]
    seconds = accessor(sampler.input)[:, 0]
    weights = accessor(sampler.output).reshape(len(seconds), -1)
    targets = np.stack([accessor(target["POSITION"]) for target in primitive.targets])
    return PlayedGlb(
        seconds,
        accessor(primitive.attributes.POSITION) + np.einsum("tk,kni->tni", weights, targets),
        accessor(primitive.indices).reshape(-1, 3).astype(np.int64),
        accessor(primitive.attributes.COLOR_0)[:, :3] / 65535,
    )


def render(
    points: Float[np.ndarray, "n 3"],
    faces: Int[np.ndarray, "f 3"],
    linear_colors: Float[np.ndarray, "n 3"],
    c2w: Float[np.ndarray, "4 4"],
    focal: float,
    size: int,
) -> tuple[Float[np.ndarray, "size size 3"], Float[np.ndarray, "size size"]]:
    """sRGB picture on white and coverage, both in [0, 1]; world points, OpenGL camera, both sides of faces drawn."""
    view = (points - c2w[:3, 3]) @ c2w[:3, :3]
    fine = size * SUPERSAMPLES
    depth = -view[:, 2]
    pixels = 0.5 * fine + focal * SUPERSAMPLES * np.stack([view[:, 0], -view[:, 1]], axis=-1) / depth[:, None]
    linear, covered = _rasterise(pixels, depth, faces, linear_colors, fine)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055)
    on_white = np.where(covered[..., None], srgb, 1.0)

    def reduced(picture: np.ndarray) -> np.ndarray:
        return picture.reshape(size, SUPERSAMPLES, size, SUPERSAMPLES, -1).mean(axis=(1, 3))

    return reduced(on_white), reduced(covered.astype(np.float64))[..., 0]


@numba.njit(cache=True)
def _rasterise(pixels, depth, faces, colors, size):  # type: ignore[no-untyped-def]
    """Nearest triangle at each sample centre; attributes are interpolated with perspective."""
    nearest = np.full((size, size), np.inf)
    picture = np.zeros((size, size, 3))
    for face in faces:
        a, b, c = face
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
                    for i in range(3):
                        picture[row, column, i] = (u * colors[a, i] + v * colors[b, i] + w * colors[c, i]) / total
    return picture, nearest < np.inf


@dataclass(frozen=True)
class Comparison:
    """Renders of the file beside the input frames, and how close they are."""

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
    c2w, focal = grid.plan.c2w()[0], grid.plan.focal_px(size)
    renders, truths, psnr, iou = [], [], [], []
    for positions, rgba in zip(glb.positions, grid.input_frames / 255, strict=True):
        world = positions[:, [2, 0, 1]]  # glTF (y, z, x) back to the world's (x, y, z)
        picture, coverage = render(world, glb.faces, glb.linear_colors, c2w, focal, size)
        truth = rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]
        inside, expected = coverage > 0.5, rgba[..., 3] > 0.5
        renders.append(picture)
        truths.append(truth)
        psnr.append(-10 * np.log10(np.mean((picture - truth) ** 2)))
        iou.append((inside & expected).sum() / (inside | expected).sum())
    return Comparison(np.stack(renders), np.stack(truths), np.array(psnr), np.array(iou))


def contact_sheet(comparison: Comparison, columns: int = 6) -> Int[np.ndarray, "H W 3"]:
    """uint8: input frames, renders of the file, and their absolute difference (dark is equal), some frames."""
    chosen = np.linspace(0, len(comparison.psnr) - 1, min(columns, len(comparison.psnr))).round().astype(int)
    truths, renders = comparison.truths[chosen], comparison.renders[chosen]
    rows = [np.concatenate(list(row), axis=1) for row in (truths, renders, np.abs(truths - renders))]
    return np.round(np.concatenate(rows) * 255).clip(0, 255).astype(np.uint8)


def main(glb: Path, config: Path | None = None, grid: Path | None = None, out: Path | None = None) -> None:
    """Compare an exported GLB with the input video of its run.

    Args:
        glb: the file that `ns-export mesh` wrote.
        config: the run's config.yml; its newest view grid is used.
        grid: a folder with a view grid, instead of a run.
        out: picture to write: input, render and difference.
    """
    if (config is None) == (grid is None):
        raise InputError("Give either --config (a run) or --grid (a folder with a view grid).")
    folder = grid if config is None else newest_views(config.parent)
    if folder is None:
        raise InputError(f"{config} belongs to a run without views: let ns-train make them, or give --grid.")
    comparison = compare(read_glb(glb), ViewGrid.load(folder))
    for index, (psnr, iou) in enumerate(zip(comparison.psnr, comparison.iou, strict=True)):
        print(f"frame {index:3d}   PSNR {psnr:6.2f} dB   silhouette IoU {iou:.3f}")
    if out is not None:
        with atomic_path(out) as temporary:
            Image.fromarray(contact_sheet(comparison)).save(temporary)
    print(json.dumps({"psnr": round(float(comparison.psnr.mean()), 3), "iou": round(float(comparison.iou.mean()), 4)}))


if __name__ == "__main__":
    with one_sentence_errors():
        tyro.cli(main)
