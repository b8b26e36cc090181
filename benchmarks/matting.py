"""How well the model of this package finds objects before photographs: IoU with the true silhouettes, and confidence.

    python benchmarks/matting.py CASES --frames 5

The cases of the public benchmark are laid over photographs that come with scikit-image and scikit-learn, some without
a subject of their own (texture, sky) and some with one (a face, a cup, a cat). Each clip is judged as a run sees it:
the background still, a little noise, the model's answers steadied over time, a second question where things move.
"""

import argparse
import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from sv4d_ns.video.background import border_background
from sv4d_ns.video.foreground import _matted
from sv4d_ns.video.matting import BUNDLED, load_matting
from sv4d_ns.video.reader import Clip

PLAIN = ("brick.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png")
WITH_SUBJECT = ("coffee.png", "chelsea.png", "astronaut.png", "rocket.jpg", "china.jpg", "flower.jpg")
SIZE = (480, 360)
NOISE = 2.0


def photograph(name: str) -> np.ndarray:
    """A photograph from an installed package, [h, w, 3]."""
    folders = [
        Path(find_spec(package).origin).parent / place
        for package, place in (("skimage", "data"), ("sklearn", "datasets/images"))
    ]
    file = next(folder / name for folder in folders if (folder / name).is_file())
    return np.asarray(Image.open(file).convert("RGB").resize(SIZE), np.float32)


def composite(case: Path, behind: np.ndarray, count: int) -> tuple[Clip, np.ndarray]:
    """A case over a photograph, and its true coverage [t, h, w] in [0, 1]."""
    draw = np.random.default_rng(0)
    files = sorted((case / "input").glob("*.webp"))
    pictures, truth = [], []
    for file in files[::2][:count]:  # a run has the frames between, too: less motion than here
        rgba = np.zeros((*behind.shape[:2], 4), np.float32)
        part = np.asarray(Image.open(file), np.float32)
        top, left = (behind.shape[0] - part.shape[0]) // 2, (behind.shape[1] - part.shape[1]) // 2
        rgba[top : top + part.shape[0], left : left + part.shape[1]] = part
        alpha = rgba[..., 3:] / 255
        picture = rgba[..., :3] * alpha + behind * (1 - alpha) + draw.normal(0, NOISE, behind.shape)
        pictures.append(np.dstack([picture, np.full_like(alpha, 255)]).round().clip(0, 255).astype(np.uint8))
        truth.append(alpha[..., 0])
    return Clip(np.stack(pictures), 10.0, case.name, False), np.stack(truth)


def main() -> None:
    """Print a line for each clip and the means."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmark", type=Path)
    parser.add_argument("--frames", type=int, default=5)
    parser.add_argument("--photographs", nargs="*", default=[*PLAIN, *WITH_SUBJECT])
    settings = parser.parse_args()
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    matting = load_matting(BUNDLED)
    scores: dict[str, list[float]] = {}
    for name in settings.photographs:
        behind = photograph(name)
        for case in sorted(path.parent for path in settings.benchmark.glob("*/input")):
            clip, truth = composite(case, behind, settings.frames)
            found = _matted(clip, matting, border_background(clip))
            inside, true = found.alpha >= 128, truth >= 0.5
            score = float((inside & true).sum() / (inside | true).sum())
            scores.setdefault(name, []).append(score)
            print(f"{name:24s}{case.name:16s} IoU {score:.3f}  confidence {found.confidence:.2f}", flush=True)
    for title, names in (("no subject of its own", PLAIN), ("with a subject", WITH_SUBJECT)):
        values = [score for name in names for score in scores.get(name, [])]
        if values:
            print(f"{title}: mean IoU {np.mean(values):.3f}, lowest {min(values):.3f}, {len(values)} clips")


if __name__ == "__main__":
    main()
