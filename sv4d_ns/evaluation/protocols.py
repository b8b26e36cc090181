"""The protocols under their names: which views, at which size, through which networks.

What a paper or its code states is kept; what it leaves open is decided here and written into every report
(`Protocol.choices`). Figures of different protocols must not stand in one column.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from sv4d_ns.evaluation.cases import INPUT_ROLE, Case, CaseView, find_cases
from sv4d_ns.geometry.cameras import FIELD_OF_VIEW_DEG, look_at_cameras
from sv4d_ns.metrics.lpips import LpipsNet
from sv4d_ns.utils.errors import InputError

ProtocolName = Literal["benchmark", "consistent4d", "objaversedy"]

CONSISTENT4D_AZIMUTHS = (-75.0, 15.0, 105.0, 195.0)
"""Of eval_0 to eval_3, degrees; elevation 0."""
CONSISTENT4D_RADIUS = 2.0


@dataclass(frozen=True)
class Protocol:
    """One way of measuring."""

    name: ProtocolName
    size: int | None
    """Pixels that pictures are compared at; None takes the truth's own."""
    lpips: tuple[LpipsNet, ...]
    fvd_of_each_video: bool
    """One distance for every video, then their mean; otherwise all videos of all objects make two sets."""
    choices: tuple[str, ...]
    """Every choice, a sentence each, with where it comes from."""


COMMON_CHOICES = (
    "Pictures are composited on white in 8-bit sRGB before anything is measured.",
    "PSNR (peak 1) and SSIM (11x11 Gaussian window, sigma 1.5) are of whole pictures, meaned over pictures; identical "
    "pictures count 100 dB. Figures marked box are inside the box around the true object over all frames of a view.",
    "Silhouettes are alpha >= 0.5.",
    "LPIPS is version 0.1 in torchmetrics, pictures in [-1, 1].",
    "CLIP-S is the cosine of the image embeddings of a picture and its truth (SV4D); CLIP-I of 4Diffusion is the same "
    "cosine, CLIP-C the mean cosine of consecutive frames of a view (the paper does not say which pairs).",
    "Image matrices for FVD hold the novel views on the ring of the input's elevation in the order of azimuth, never "
    "the input view. FVD-F: each view's frames; FVD-V: each frame's views; FVD-Diag: one view further with each frame, "
    "around the ring; FV4D: all images in zig-zag order, view by view, as one video an object (SV4D).",
    "I3D: Kinetics-400 logits, pictures resized to 224 bilinearly with antialiasing, in [-1, 1].",
    "Intervals are 95 % percentile bootstraps (seed 0): of the means of views for picture metrics, of videos for FVD.",
)

PROTOCOLS: dict[ProtocolName, Protocol] = {
    "benchmark": Protocol(
        "benchmark",
        None,
        ("alex", "vgg"),
        False,
        (
            *COMMON_CHOICES,
            "Views: all of the case but the input; a grid is judged on those it has. Pictures at the case's own size.",
            "A run's crop is undone by the similarity of its stored framing; nothing is fitted to the truth.",
        ),
    ),
    "consistent4d": Protocol(
        "consistent4d",
        512,
        ("vgg",),
        True,
        (
            *COMMON_CHOICES,
            "Views at azimuths -75, 15, 105, 195 and elevation 0, pictures at 512, LPIPS of VGG, CLIP ViT-B/32 "
            "(Consistent4D's evaluation code); pictures are resized with premultiplied colours (there: PIL bicubic).",
            "FVD-F for each view of each object, then the mean, as its code; with one video a side this is the squared "
            "distance of two features. Its network file differs (i3d_pretrained_400.pt), so values do not carry over.",
            f"The truth's field of view is not published: {FIELD_OF_VIEW_DEG:g} degrees are assumed; it changes "
            "perspective only, because size and place are those of the run's stored framing.",
        ),
    ),
    "objaversedy": Protocol(
        "objaversedy",
        None,
        ("alex", "vgg"),
        False,
        (
            *COMMON_CHOICES,
            "Views: all of the case but the input (SV4D: 21 views x 21 frames of 20 objects, whose renderings are not "
            "public: render them into folders of the benchmark's format). The papers name neither LPIPS network nor "
            "CLIP variant nor the picture size: both LPIPS are given, CLIP ViT-B/32, the case's own size.",
            "A run's crop is undone by the similarity of its stored framing; nothing is fitted to the truth.",
        ),
    ),
}


def load_truth(folder: Path, protocol: Protocol) -> list[Case]:
    """The objects of a truth folder: one or many cases, or Consistent4D's object/eval_K/I.png.

    Raises:
        InputError: nothing of the protocol's format is there.
    """
    if protocol.name != "consistent4d":
        return [Case.load(path) for path in find_cases(folder)]
    objects = [folder] if (folder / "eval_0").is_dir() else sorted(path.parent for path in folder.glob("*/eval_0"))
    if not objects:
        raise InputError(f"{folder} holds no object of Consistent4D's layout (OBJECT/eval_0/0.png): unpack it there.")
    return [_consistent4d_case(path) for path in objects]


def eval_files(folder: Path, number: int) -> tuple[Path, ...]:
    """The pictures of eval_`number` in the order of their numbers; raises `InputError` if there is none."""
    files = [path for path in (folder / f"eval_{number}").glob("*.png") if path.stem.isdigit()]
    if not files:
        raise InputError(f"{folder / f'eval_{number}'} holds no pictures 0.png, 1.png, ...: unpack the object again.")
    return tuple(sorted(files, key=lambda path: int(path.stem)))


def _consistent4d_case(folder: Path) -> Case:
    files = [eval_files(folder, number) for number in range(len(CONSISTENT4D_AZIMUTHS))]
    counts = {len(view) for view in files}
    if len(counts) != 1:
        raise InputError(f"The views of {folder} have different numbers of pictures: unpack the object again.")
    try:
        with Image.open(files[0][0], formats=("PNG",)) as image:
            width, height = image.size
    except (OSError, Image.DecompressionBombError) as error:
        raise InputError(f"{files[0][0]} is damaged ({error}): unpack the object again.") from error
    if width != height:
        raise InputError(f"{files[0][0]} is {width}x{height}: only square pictures are evaluated.")
    azimuths = np.array([0.0, *CONSISTENT4D_AZIMUTHS])
    c2w = look_at_cameras(azimuths, np.zeros(len(azimuths)), CONSISTENT4D_RADIUS)
    views = [CaseView("input", frozenset({INPUT_ROLE}), 0.0, 0.0, c2w[0], ())]
    for number, azimuth in enumerate(CONSISTENT4D_AZIMUTHS):
        views.append(CaseView(f"eval_{number}", frozenset({"eval"}), azimuth, 0.0, c2w[number + 1], files[number]))
    return Case(
        name=folder.resolve().name,
        folder=folder,
        size=width,
        focal_px=0.5 * width / float(np.tan(np.deg2rad(FIELD_OF_VIEW_DEG) / 2)),
        fov_deg=FIELD_OF_VIEW_DEG,
        radius=CONSISTENT4D_RADIUS,
        input_elevation_deg=0.0,
        times=np.linspace(0, 1, len(files[0])),
        views=tuple(views),
        fps=10.0,
    )
