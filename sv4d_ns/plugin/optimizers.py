"""The optimizers of the fields, and a learning-rate schedule whose checkpoints are plain.

nerfstudio 1.1.5's `ExponentialDecayScheduler` puts numpy scalars into the optimizer state, and torch >= 2.6 refuses to
load those (`weights_only=True`): ns-viewer, ns-eval, ns-render and --load-dir all fail. This one keeps Python floats.
"""

from dataclasses import dataclass, field

from nerfstudio.engine.optimizers import OptimizerConfig
from nerfstudio.engine.schedulers import Scheduler, SchedulerConfig
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

LEARNING_RATES = {
    "encoding": 2e-2,
    "heads": 1e-2,
    "deformation": 1e-2,
    "appearance": 2e-2,
    "density_residual": 3e-2,
}
"""Adam's rate for each parameter group of the field (SV4D: 0.01 for all), measured in docs/optimisation.md. That of the
deformation is in grid cells a step."""


@dataclass
class FusedAdamConfig(OptimizerConfig):
    """Adam with the constants of hash grids (Instant-NGP), in one pass over the parameters."""

    _target: type = Adam
    lr: float = 1e-2
    """Learning rate after warm-up."""
    eps: float = 1e-15
    """Small, because gradients of rarely seen grid entries are."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay of the two running moments."""
    fused: bool = True
    """One kernel for the whole update: a table of a million entries is otherwise read and written many times."""


@dataclass
class FusedAdamWConfig(OptimizerConfig):
    """AdamW with the constants of 4Diffusion's reference, in one pass over the parameters."""

    _target: type = AdamW
    lr: float = 1e-2
    """Learning rate."""
    eps: float = 1e-15
    """Small, because gradients of rarely seen grid entries are."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay of the two running moments."""
    weight_decay: float = 0.01
    """torch's default, which the reference leaves as it is, also for the hash tables."""
    fused: bool = True
    """One kernel for the whole update."""


@dataclass
class DecaySchedulerConfig(SchedulerConfig):
    """Linear warm-up, a plateau, then exponential decay from the optimizer's rate to `final_ratio` of it."""

    _target: type = field(default_factory=lambda: DecayScheduler)
    warmup_steps: int = 30
    """Steps of linear warm-up from zero."""
    decay_from: float = 0.4
    """Share of `max_steps` at full rate."""
    max_steps: int = 3600
    """Step at which the final rate is reached; it stays there. `ns-train sv4d` fills in its --max-num-iterations."""
    final_ratio: float = 0.1
    """Final learning rate over the optimizer's."""


def decay_factor(config: DecaySchedulerConfig, step: int) -> float:
    """The learning rate of `step` over the optimizer's, a Python float in (0, 1]."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    done = (step / config.max_steps - config.decay_from) / (1.0 - config.decay_from)
    return config.final_ratio ** min(max(done, 0.0), 1.0)


class DecayScheduler(Scheduler):
    """nerfstudio's wrapper of `decay_factor`."""

    config: DecaySchedulerConfig

    def get_scheduler(self, optimizer: Optimizer, lr_init: float) -> LRScheduler:
        return LambdaLR(optimizer, lambda step: decay_factor(self.config, step))
