"""What the parts of the training are worth, at small scale: the same training without one of them.

    python benchmarks/ablation.py --output-dir runs/ablation --steps 1500 --objects 50

Trains five models of one small size on the same creatures and steps (a stopped run continues), then scores them on
held-out creatures: the whole method, without 3D (camera) attention, without frame attention, without masking of the
references, and without the 3D stage. Each is sampled without references, with the true ones, and with those of another
object. Writes results.json and prints one table.
"""

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from sv4d_ns.diffusion.sv4d.pipeline import StableVideo4D2Pipeline
from sv4d_ns.diffusion_training.config import TrainConfig
from sv4d_ns.diffusion_training.data import to_model_images
from sv4d_ns.diffusion_training.evaluate import Clip, Scores, as_floats, held_out_clip, mean_views, score, table
from sv4d_ns.diffusion_training.model import ModelConfig, SamplingConfig, bypassed
from sv4d_ns.diffusion_training.train import Trainer
from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.utils.files import atomic_path

SMALL = ModelConfig(
    image_size=32, latent_channels=16, channels=(32, 64), head_dim=32, embedding_dim=64, camera_dims=(16, 32, 32)
)
PLAN = ViewPlan.ring(ViewPlan.BUNDLED.azimuths_deg[::2])


@dataclass(frozen=True)
class Variant:
    """A training with something left out.

    Attributes:
        name: as shown.
        without: attention branch that is blended out, in training and in sampling, or None.
        reference_drop: probability of masking.
        stage_3d: whether half the steps are on single moments.
    """

    name: str
    without: str | None = None
    reference_drop: float = 0.5
    stage_3d: bool = True


VARIANTS = (
    Variant("whole"),
    Variant("no 3D attention", without="view"),
    Variant("no frame attention", without="frame"),
    Variant("no masking", reference_drop=0.0),
    Variant("no 3D stage", stage_3d=False),
)


@dataclass(frozen=True)
class AblationConfig:
    """Size of the comparison."""

    output_dir: Path = Path("runs/ablation")
    """Runs and results."""
    steps: int = 1500
    """Training steps of each model, both stages together."""
    objects: int = 50
    """Held-out creatures."""
    frames: int = 4
    """Frames of a clip, in training and evaluation."""
    threads: int = 2
    """CPU threads."""
    seed: int = 7
    """Of weights, data and noise."""


def train_variant(config: AblationConfig, variant: Variant) -> StableVideo4D2Pipeline:
    """Train (or finish, or open) a variant."""
    half = config.steps // 2 if variant.stage_3d else 0
    settings = TrainConfig(
        output_dir=config.output_dir / variant.name.replace(" ", "_"),
        seed=config.seed,
        steps_3d=half,
        steps_4d=config.steps - half,
        objects_3d=8,
        clips=((2, config.frames),),
        still_share=0.25 if variant.stage_3d else 0.0,
        reference_drop=variant.reference_drop,
        first_level_share=0.5,
        warmup_steps=50,
        decay_steps=config.steps // 2,
        learning_rate=1e-3,
        ema_decay=0.99,
        threads=config.threads,
        device="cpu",
        sheet_every=0,
        model=SMALL,
        sampling=SamplingConfig(frames=config.frames),
    )
    run = Trainer(settings)
    with _without(run.state.parts.unet, variant):
        folder = run.run()
    pipeline = StableVideo4D2Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _without(unet: torch.nn.Module, variant: Variant) -> contextlib.AbstractContextManager[None]:
    return bypassed(unet, variant.without) if variant.without else contextlib.nullcontext()


def sample(pipeline: StableVideo4D2Pipeline, clip: Clip, references: np.ndarray | None, seed: int) -> np.ndarray:
    """Four views of a clip, [t, v, h, w, 4] in [0, 1]."""
    video = (to_model_images(clip.inputs) + 1) / 2
    given = None if references is None else (to_model_images(references) + 1) / 2
    frames = pipeline(
        video, list(PLAN.azimuths_deg), list(PLAN.elevations_deg), reference_views=given,
        generator=torch.Generator().manual_seed(seed),
    ).frames  # fmt: skip
    return frames.permute(0, 1, 3, 4, 2).numpy()


def judge(pipeline: StableVideo4D2Pipeline, name: str, clips: list[Clip]) -> list[Scores]:
    """Scores without references, with the true ones, and with another object's."""
    truth, plans = [as_floats(clip.views) for clip in clips], [clip.plan for clip in clips]
    rows = []
    for kind in ("no references", "true references", "wrong references"):
        made = []
        for index, clip in enumerate(clips):
            other = clips[(index + 1) % len(clips)]
            given = {"no": None, "true": clip.views[0], "wrong": other.views[0]}[kind.split()[0]]
            made.append(sample(pipeline, clip, given, index))
        # the first frame is the reference itself where it is the true one
        rows.append(score(f"{name}, {kind}", [m[1:] for m in made], [t[1:] for t in truth], plans))
    return rows


def main(config: AblationConfig) -> None:
    """Train all variants and compare them."""
    clips = [held_out_clip(index, config.frames, SMALL.image_size, PLAN) for index in range(config.objects)]
    truth, plans = [as_floats(clip.views)[1:] for clip in clips], [clip.plan for clip in clips]
    copied = [as_floats(clip.inputs)[1:, None] for clip in clips]
    mean = mean_views(SMALL.image_size, 300, PLAN)[None]
    rows = [
        score("copy of the input frame", copied, truth, plans),
        score("mean training picture", [mean] * len(clips), truth, plans),
    ]
    for variant in VARIANTS:
        pipeline = train_variant(config, variant)
        with _without(pipeline.unet, variant):
            rows += judge(pipeline, variant.name, clips)
        print(table(rows), flush=True)
    with atomic_path(config.output_dir / "results.json") as temporary:
        temporary.write_text(json.dumps({"steps": config.steps, "rows": [asdict(row) for row in rows]}, indent=1))


if __name__ == "__main__":
    main(tyro.cli(AblationConfig, description=__doc__))
