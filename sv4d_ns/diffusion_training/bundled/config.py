"""Settings of a training run of the bundled model."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sv4d_ns.diffusion_training.bundled.data import BatchShape
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.limits import AT_LEAST_ONE, BELOW_ONE, NOT_NEGATIVE, POSITIVE, SHARE, check_numbers

FREE = ("output_dir", "threads", "workers", "device", "checkpoint_every", "sheet_every", "minutes", "changed")
"""Settings that do not decide the losses (but for noise, which each kind of device draws for itself: see
`objective.draw`)."""


@dataclass(frozen=True)
class BundledTrainConfig:
    """Train the bundled model: a denoiser of multi-view video whose prediction is the render of a volume.

    First still moments (3D), then clips beside them (4D). The same command continues an interrupted run.
    """

    output_dir: Path = Path("runs/bundled")
    """Checkpoints, losses, sample sheets and the exported model go here."""
    start: Literal["scratch", "bundled"] = "scratch"
    """Where the weights come from: a new network, or the shipped one."""
    depth: int = 5
    """Blocks at the network's coarsest resolution; those that the start lacks begin as the identity."""
    data: tuple[tuple[str, float], ...] = (("creatures", 1.0),)
    """What to train on and how often each is drawn: "creatures" (made on the fly) or folders of GLB files."""
    seed: int = 2026
    """Of new weights, data and noise."""
    steps: int = 6000
    """Steps in all."""
    steps_3d: int = 2500
    """Steps before the first clips."""
    moments: int = 8
    """Object moments in a batch: so many objects, or fewer with clips."""
    clip_frames: int = 4
    """Frames of a clip."""
    clip_share: float = 0.5
    """Share of batches with clips after `steps_3d`."""
    uses: int = 1
    """Steps that a batch is used for, with other noise, every second time mirrored: worth it where the network is
    faster than the processes that make data, as on a GPU."""
    views: int = 4
    """Novel views of an object."""
    rays: int = 384
    """Pixels compared in each picture."""
    perceptual: float = 0.0
    """Weight of LPIPS (VGG16) on a patch of one view of every moment; needs its network (docs/evaluation.md). At 0.5
    LPIPS falls by 4 to 10 % and PSNR by 0.2 dB at most (benchmarks/results/bundled_lpips.md)."""
    most_noise_share: float = 0.25
    """Share of samples under so much noise that the views say nothing, as where sampling starts: what is learned there
    is what one input view tells of the whole. Elsewhere a network learns from the views, which is easier."""
    learning_rate: float = 1.5e-3
    """Reached by a linear warm-up, then constant, at the end a half cosine down to 2 percent."""
    warmup_steps: int = 100
    """Steps of the warm-up."""
    decay_steps: int = 2000
    """Steps of the decay at the end."""
    weight_decay: float = 0.01
    """AdamW's."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    ema_decay: float = 0.998
    """Of the averaged weights, which are the ones exported."""
    precision: Literal["no", "bf16"] = "bf16"
    """Of the network's products; bf16 is 1.6 times faster on processors with instructions for it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes CUDA where there is one."""
    threads: int = 1
    """CPU threads of the network."""
    workers: int = 1
    """Processes that make data, each on a thread of its own and with up to 1.5 GB of decoded assets."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    sheet_every: int = 500
    """Steps between sample sheets and exports; 0 makes them at the end only."""
    minutes: float = 0.0
    """Stop after so many minutes with a checkpoint and an export (0: at the last step)."""
    changed: tuple[str, ...] = ()
    """When continuing a run: the settings that are now meant to differ. They are recorded in run.json."""

    def deciding(self) -> dict[str, Any]:
        """The settings that decide the losses, as JSON values."""
        return json.loads(json.dumps({name: value for name, value in asdict(self).items() if name not in FREE}))  # type: ignore[no-any-return]

    def shape(self, step: int, draw: float) -> BatchShape:
        """What the batch of a step holds; `draw` is uniform in [0, 1)."""
        if step < self.steps_3d or draw >= self.clip_share:
            return BatchShape(self.moments, 1, self.views, self.rays, self.perceptual > 0)
        objects = max(self.moments // self.clip_frames, 1)
        return BatchShape(objects, self.clip_frames, self.views, self.rays, self.perceptual > 0)


def check(config: BundledTrainConfig) -> None:
    """Raise InputError for settings that cannot be used."""
    check_numbers(config, AT_LEAST_ONE, "steps", "moments", "clip_frames", "views", "rays", "warmup_steps",
                  "decay_steps", "checkpoint_every", "workers", "uses", "depth", "threads")  # fmt: skip
    check_numbers(config, NOT_NEGATIVE, "perceptual", "steps_3d", "sheet_every", "minutes", "weight_decay")
    check_numbers(config, POSITIVE, "learning_rate", "max_grad_norm")
    check_numbers(config, BELOW_ONE, "ema_decay")
    check_numbers(config, SHARE, "clip_share", "most_noise_share")
    shares = [share for _, share in config.data]
    if not shares or min(shares) < 0 or sum(shares) <= 0:
        raise InputError("--data needs at least one source with a share above 0, for example creatures 1.")
