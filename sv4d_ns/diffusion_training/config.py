"""Settings of a training run, and what of them may change while it is under way."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from sv4d_ns.diffusion_training.data import PROCEDURAL, BatchShape
from sv4d_ns.diffusion_training.model import ModelConfig, SamplingConfig
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.limits import AT_LEAST_ONE, BELOW_ONE, NOT_NEGATIVE, POSITIVE, SHARE, check_numbers

FREE = ("output_dir", "threads", "device", "checkpoint_every", "sheet_every", "trackers", "sampling", "changed")
"""Settings that do not decide the losses (of `sampling` only the first level does, where it is trained for)."""
FIXED = ("model", "start", "lora_rank", "seed")
"""Settings that belong to the weights: another value is another run."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a multi-view video model, first on still moments (3D), then on clips (4D).

    The same command continues an interrupted run. Under `accelerate launch` it runs on several GPUs or machines; batch
    sizes are those of the whole batch, however many processes share it.
    """

    output_dir: Path = Path("runs/sv4d")
    """Checkpoints, losses, sample sheets and the exported model go here."""
    start: str = "scratch"
    """Where the weights come from: scratch (a new model of --model.*), official:FILE (SV4D
    2.0), svd:FOLDER (Stable Video Diffusion in diffusers' layout), or the folder of a saved pipeline."""
    data: tuple[str, ...] = (PROCEDURAL,)
    """What to train on, drawn with equal probability: procedural (creatures made on the fly), or folders of
    `sv4d data render`."""
    seed: int = 2026
    """Of new weights, data and noise."""
    steps_3d: int = 3000
    """Steps on single moments (T = 1)."""
    steps_4d: int = 1800
    """Steps on clips, mixed with single moments, after the first stage."""
    objects_3d: int = 4
    """Objects in a batch of single moments."""
    views_3d: int = 4
    """Novel views in a batch of single moments."""
    clips: tuple[tuple[int, int], ...] = ((4, 2), (2, 4), (1, 8))
    """(objects, frames) of the clip batches, drawn with equal probability."""
    views: int = 4
    """Novel views in a batch of clips."""
    still_share: float = 0.5
    """Probability of a batch of single moments in the second stage."""
    still_blend: Literal["learned", "image_only"] = "learned"
    """How batches of single moments pass the frame attention: blended by its learned weight, or left out, as the
    image-only indicator of SVD's alpha-blenders does."""
    dynamic_share: float = 0.33
    """Probability of the dynamic orbit in the second stage, where rendered data has both (the first: static only)."""
    reference_drop: float = 0.5
    """Probability that a clip sample is given no reference views (all or none)."""
    reference_view_drop: float = 0.0
    """Probability that a single reference view is missing, in a sample that is given them."""
    self_conditioning: float = 0.0
    """Share of the given references that the network makes itself, in one step from the first noise level, as it will
    be given in later windows of a video."""
    cfg_drop: float = 0.0
    """Probability that a sample is given nothing but the cameras, so that guidance can be used."""
    log_sigma_mean: float = 1.0
    """Mean of ln(sigma) in the first stage."""
    log_sigma_mean_4d: float = 2.0
    """Mean of ln(sigma) in the second stage: clips hide less under the same noise, and with few sampling steps the
    prediction from much noise decides."""
    log_sigma_std: float = 1.4
    """Standard deviation of ln(sigma)."""
    first_level_share: float = 0.0
    """Share of samples at the sampler's first noise level (ln sigma +- 0.25) instead: for models that sample in one
    step or a few."""
    picture_loss: float = 0.0
    """Weight of the absolute error of decoded pictures and of half that of their edges, for samples whose sigma is
    above 5 (autoencoders with cheap decoders only)."""
    learning_rate: float = 7e-4
    """Reached by a linear warm-up, then constant, at the end a half cosine down to 2 percent."""
    warmup_steps: int = 150
    """Steps of the warm-up."""
    decay_steps: int = 1200
    """Steps of the decay at the end."""
    weight_decay: float = 0.01
    """AdamW's."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    ema_decay: float = 0.998
    """Of the averaged weights, which are the ones exported; smaller in the first steps."""
    accumulation: int = 1
    """Parts into which each process splits its share of a batch, one after the other (less memory, same result)."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them (less memory, a third slower)."""
    lora_rank: int = 0
    """Train low-rank adapters of this rank in the attention layers instead of all weights (0: all weights)."""
    cache_latents: bool = False
    """Encode rendered data once, before training, and train from the files (frozen image encoders only)."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Of the network's products; bf16 is slower on processors without instructions for it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes CUDA where there is one."""
    threads: int = 2
    """CPU threads of the network; data is made on one more."""
    checkpoint_every: int = 250
    """Steps between checkpoints."""
    sheet_every: int = 500
    """Steps between sample sheets, loss curves and exports; 0 makes them at the end only."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where losses and sample sheets are also sent."""
    changed: tuple[str, ...] = ()
    """When continuing a run: the settings that are now meant to differ. They are recorded in run.json."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Size of a model that starts from scratch."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How the exported model samples, where the start does not say it."""

    @property
    def total_steps(self) -> int:
        """Steps of both stages."""
        return self.steps_3d + self.steps_4d

    def deciding(self) -> dict[str, Any]:
        """The settings that decide the losses, as JSON values."""
        chosen = {name: _plain(value) for name, value in asdict(self).items() if name not in FREE}
        if self.first_level_share > 0 or self.self_conditioning > 0:
            chosen["sampling"] = {"sigma_max": self.sampling.sigma_max}  # the level that is trained for
        return chosen


def _plain(value: Any) -> Any:
    """As JSON would give it back."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _names(changed: tuple[str, ...]) -> list[str]:
    """Settings, also where they are written as flags are."""
    return [name.removeprefix("--").replace("-", "_") for name in changed]


LATER = {"perceptual": 0.0}
"""Settings that older runs do not name, as those runs behaved."""
RENAMED = {"own_references": "self_conditioning"}
"""Settings as older runs' checkpoints name them, and their names today."""


def changes_since(saved: dict[str, Any], config: TrainConfig, where: Path) -> list[dict[str, Any]]:
    """Which settings differ from those a run was made with; all must be named in `changed`.

    Raises:
        InputError: when one is not, or cannot change.
    """
    saved = LATER | {RENAMED.get(name, name): value for name, value in saved.items()}
    present = config.deciding()
    differing = [name for name in present if saved.get(name) != present[name]]
    fixed = [name for name in differing if name in FIXED]
    if fixed:
        raise InputError(
            f"{where} was made with another --{fixed[0].replace('_', '-')} ({saved.get(fixed[0])}), which cannot "
            "change during a run: use the same one, or another --output-dir."
        )
    silent = [name for name in differing if name not in _names(config.changed)]
    if silent:
        listed = ", ".join(f"{name} {saved.get(name)} -> {present[name]}" for name in silent)
        raise InputError(
            f"{where} was made with other training settings ({listed}): use the same ones, name them in --changed "
            f"{' '.join(silent)} to go on with the new values, or use another --output-dir."
        )
    return [{"name": name, "old": saved.get(name), "new": present[name]} for name in differing]


def check(config: TrainConfig, processes: int) -> None:
    """Raise InputError for settings that cannot be used."""
    unknown = [name for name in _names(config.changed) if name not in asdict(config)]
    if unknown:
        raise InputError(f"--changed {unknown[0]} names no setting: write it as in the message that asks for it.")
    if config.total_steps < 1 or min(config.steps_3d, config.steps_4d) < 0:
        raise InputError("--steps-3d and --steps-4d must add up to at least one step.")
    if config.steps_4d > 0 and not config.clips:
        raise InputError("--clips is empty: give at least one pair of objects and frames, or --steps-4d 0.")
    if min((number for pair in config.clips for number in pair), default=1) < 1:
        raise InputError("--clips needs objects and frames of at least 1.")
    check_numbers(config, AT_LEAST_ONE, "objects_3d", "views", "views_3d", "accumulation", "warmup_steps",
                  "decay_steps", "checkpoint_every", "threads")  # fmt: skip
    check_numbers(config, SHARE, "still_share", "dynamic_share", "reference_drop", "reference_view_drop",
                  "self_conditioning", "cfg_drop", "first_level_share")  # fmt: skip
    check_numbers(config, NOT_NEGATIVE, "weight_decay", "picture_loss", "lora_rank", "sheet_every", "log_sigma_std")
    check_numbers(config, POSITIVE, "learning_rate", "max_grad_norm")
    check_numbers(config, BELOW_ONE, "ema_decay")
    for shape in shapes(config):
        if shape.objects % (processes * config.accumulation):
            parts = f"{processes} processes" + (f" x {config.accumulation} parts" if config.accumulation > 1 else "")
            raise InputError(
                f"A batch of {shape.objects} objects ({shape.frames} frames) cannot be split evenly over {parts}: "
                "give --objects-3d and --clips numbers of objects that divide."
            )


def shapes(config: TrainConfig) -> list[BatchShape]:
    """Every shape a batch of the run can have."""
    still = [BatchShape(config.objects_3d, 1, config.views_3d)]
    clips = [BatchShape(objects, frames, config.views) for objects, frames in config.clips]
    return (still if config.steps_3d or config.still_share else []) + (clips if config.steps_4d else [])
