"""The bundled model against the truth on objects it never saw, beside copying the input and an older pipeline.

    python benchmarks/bundled_model.py --cases CASES --assets ASSETS/animated --sheet sheet.png

Three sets: held-out creatures (8 frames), held-out assets (the tenth of the folder that training leaves out, 21
frames), and benchmark cases (21 frames, their `nv8` views). Scores are those of `sv4d_ns.diffusion_training.evaluate`,
at 64 pixels. `--steps 1 3 5` compares numbers of sampling steps.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from jaxtyping import UInt8
from PIL import Image

from sv4d_ns.diffusion.bundled import load_bundled_pipeline
from sv4d_ns.diffusion.bundled.pipeline import BundledVideoPipeline
from sv4d_ns.diffusion_training.evaluate import Scores, as_floats, held_out_clip, score, table
from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.utils.files import atomic_path

SIZE = 64
SHEET_FRAMES = (0, 7, 14)
RING = (30.0, 75.0, 120.0, 165.0, 210.0, 255.0, 300.0, 330.0)
"""The views of the benchmark's `nv8`."""


@dataclass(frozen=True)
class Config:
    """What to measure."""

    model: Path | None = None
    """Folder of a saved pipeline or of a training run's network; the shipped one by default."""
    cases: Path | None = None
    """A folder of benchmark cases."""
    assets: Path | None = None
    """A folder of GLB files, of which the held-out tenth is used."""
    creatures: int = 48
    """Held-out creatures; 0 leaves them out."""
    most_assets: int = 24
    """Held-out assets at most."""
    cropped: bool = False
    """Show them as films that are cropped around their object do; by default as renders do, looking at its middle."""
    steps: tuple[int, ...] = (1,)
    """Numbers of sampling steps."""
    recolour: bool = True
    """Hidden sides in the colours that the input shows, as a run has them; without, as the model paints them."""
    threads: int = 1
    """CPU threads."""
    sheet: Path | None = None
    """Also write pictures here: per clip and frame the input, four true views, the same views of each row."""
    output: Path | None = None
    """Also write the rows as JSON here."""


@dataclass(frozen=True)
class Clip:
    """An object with its true views; the input is the first."""

    name: str
    pictures: UInt8[np.ndarray, "t v+1 s s 4"]
    plan: ViewPlan


Maker = Callable[[Clip], np.ndarray]
"""Makes all views of a clip, [t, v, h, w, 4] in [0, 1], RGB on white and alpha."""


def creatures(count: int) -> Iterator[Clip]:
    """Held-out creatures, eight frames each."""
    for index in range(count):
        clip = held_out_clip(index, 8, SIZE)
        yield Clip(f"creature {index}", np.concatenate([clip.inputs[:, None], clip.views], 1), clip.plan)


def assets(folder: Path, most: int, cropped: bool) -> Iterator[Clip]:
    """Held-out assets, 21 frames of their first clips, in the benchmark's light."""
    from sv4d_ns.training_data.library import AssetLibrary
    from sv4d_ns.training_data.lighting import benchmark_lighting

    library = AssetLibrary(folder)
    for index, name in enumerate(library.held_out[:most]):
        rng = np.random.default_rng([77, index])
        elevation = 0.0 if index % 2 == 0 else float(rng.uniform(-10.0, 30.0))
        found = library.sample(
            rng, 21, names=(name,), elevation_deg=elevation, lighting=benchmark_lighting(), longest_window_s=2.1,
            cropped_share=float(cropped),
        )  # fmt: skip
        plan = ViewPlan.ring(RING, elevation)
        yield Clip(name, found.draw(plan.c2w(), SIZE), plan)


def cases(folder: Path) -> Iterator[Clip]:
    """Benchmark cases at `SIZE` pixels."""
    for case in sorted(path.parent for path in folder.glob("*/cameras.json")):
        description = json.loads((case / "cameras.json").read_text())
        views = [view for view in description["views"] if "input" in view["roles"]]
        views += [view for view in description["views"] if "nv8" in view["roles"]]
        pictures = [[_read(case / name) for name in view["frames"]] for view in views]
        azimuths = tuple(float(view["azimuth_deg"]) for view in views[1:])
        plan = ViewPlan.ring(azimuths, float(description.get("input_elevation_deg", 0.0)))
        yield Clip(case.name, np.stack([np.stack(frames) for frames in pictures], axis=1), plan)


def _read(path: Path) -> UInt8[np.ndarray, "h w 4"]:
    """A picture reduced by averaging, with its alpha taken into account."""
    pixels = np.asarray(Image.open(path).convert("RGBA")).astype(np.float64) / 255.0
    pixels[..., :3] *= pixels[..., 3:]
    blocks = pixels.reshape(SIZE, pixels.shape[0] // SIZE, SIZE, -1, 4).mean(axis=(1, 3))
    colour = np.divide(blocks[..., :3], blocks[..., 3:], out=np.ones_like(blocks[..., :3]), where=blocks[..., 3:] > 0)
    return (np.concatenate([colour, blocks[..., 3:]], axis=-1).clip(0, 1) * 255).round().astype(np.uint8)


def sampled(pipeline: BundledVideoPipeline, clip: Clip, steps: int, recolour: bool) -> np.ndarray:
    """All views of a clip, [t, v, h, w, 4] in [0, 1], RGB on white."""
    made = pipeline(
        clip.pictures[:, 0], clip.plan.azimuths_deg, clip.plan.elevations_deg, clip.plan.input_elevation_deg,
        num_inference_steps=steps, recolour=recolour, generator=torch.Generator().manual_seed(0),
    ).frames  # fmt: skip
    made[..., :3] = made[..., :3] * made[..., 3:] + 1.0 - made[..., 3:]
    return made  # type: ignore[no-any-return]


def compare(
    clips: list[Clip], makers: dict[str, Callable[[Clip], np.ndarray]]
) -> tuple[list[Scores], list[np.ndarray]]:
    """Scores of every way to make views, and rows of a contact sheet."""
    truth = [as_floats(clip.pictures[:, 1:]) for clip in clips]
    plans = [clip.plan for clip in clips]
    rows, made = [], {}
    for name, maker in makers.items():
        began = time.monotonic()
        made[name] = [maker(clip) for clip in clips]
        pictures = sum(clip.pictures.shape[0] * (clip.pictures.shape[1] - 1) for clip in clips)
        rows.append(score(name, made[name], truth, plans, (time.monotonic() - began) / pictures))
    sheet = []
    for index, clip in enumerate(clips):
        for frame in [frame for frame in SHEET_FRAMES if frame < len(clip.pictures)]:
            shown = [as_floats(clip.pictures[frame, :1])[0], *truth[index][frame, ::2]]
            for name in list(makers)[1:]:
                shown += [*made[name][index][frame, ::2]]
            sheet.append(np.concatenate([picture[..., :3] for picture in shown], axis=1))
    return rows, sheet


def main(config: Config) -> None:
    """Measure every set, print one table for each (cases: for each case, and their mean)."""
    torch.set_num_threads(config.threads)
    pipeline = load_bundled_pipeline("cpu", config.model)
    pipeline.set_progress_bar_config(disable=True)
    makers: dict[str, Maker] = {
        "copy of the input": lambda clip: as_floats(clip.pictures[:, :1]).repeat(len(clip.plan.azimuths_deg), axis=1)
    }
    for steps in config.steps:
        name = f"{steps} step{'s' if steps > 1 else ''}"
        makers[name] = partial(sampled, pipeline, steps=steps, recolour=config.recolour)
    sets: dict[str, list[Clip]] = {}
    if config.creatures:
        sets[f"{config.creatures} held-out creatures"] = list(creatures(config.creatures))
    if config.assets is not None:
        sets["held-out assets"] = list(assets(config.assets, config.most_assets, config.cropped))
    if config.cases is not None:
        found = list(cases(config.cases))
        sets |= {clip.name: [clip] for clip in found} | {"all cases": found}
    results, sheets = {}, []
    for name, clips in sets.items():
        rows, sheet = compare(clips, makers)
        results[name] = [asdict(row) for row in rows]
        if name != "all cases":
            sheets += sheet[: 3 * 8]
        print(f"\n{name}\n\n{table(rows)}", flush=True)
    if config.output is not None:
        with atomic_path(config.output) as temporary:
            temporary.write_text(json.dumps(results, indent=1))
    if config.sheet is not None:
        with atomic_path(config.sheet) as temporary:
            Image.fromarray((np.concatenate(sheets).clip(0, 1) * 255).round().astype(np.uint8)).save(temporary)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
