"""The optimizers of the fields, and a learning-rate schedule whose checkpoints are plain.

nerfstudio 1.1.5's `ExponentialDecayScheduler` puts numpy scalars into the optimizer state, and torch >= 2.6 refuses to
load those (`weights_only=True`): ns-viewer, ns-eval, ns-render and --load-dir all fail. This one keeps Python floats.
"""

from dataclasses import dataclass, field

from nerfstudio.engine.optimizers import OptimizerConfig
from nerfstudio.engine.schedulers import Scheduler, SchedulerConfig
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from sv4d_ns.fitting.learning_rates import ADAM_BETAS, ADAM_EPS, DECAY_FROM, FINAL_RATIO, WARMUP_STEPS, decay_factor


@dataclass
class FusedAdamConfig(OptimizerConfig):
    """Adam with the constants of hash grids (Instant-NGP), in one pass over the parameters."""

    _target: type = Adam
    lr: float = 1e-2
    """Learning rate after warm-up."""
    eps: float = ADAM_EPS
    """Small, because gradients of rarely seen grid entries are."""
    betas: tuple[float, float] = ADAM_BETAS
    """Decay of the two running moments."""
    fused: bool = True
    """One kernel for the whole update: a table of a million entries is otherwise read and written many times."""


@dataclass
class FusedAdamWConfig(FusedAdamConfig):
    """AdamW with the constants of 4Diffusion's reference."""

    _target: type = AdamW
    weight_decay: float = 0.01
    """torch's default, which the reference leaves as it is, also for the hash tables."""


@dataclass
class DecaySchedulerConfig(SchedulerConfig):
    """Linear warm-up, a plateau, then exponential decay from the optimizer's rate to `final_ratio` of it."""

    _target: type = field(default_factory=lambda: DecayScheduler)
    warmup_steps: int = WARMUP_STEPS
    """Steps of linear warm-up from zero."""
    decay_from: float = DECAY_FROM
    """Share of `max_steps` at full rate."""
    max_steps: int = 2400
    """Step at which the final rate is reached; it stays there. `ns-train sv4d` fills in its --max-num-iterations."""
    final_ratio: float = FINAL_RATIO
    """Final learning rate over the optimizer's."""


class DecayScheduler(Scheduler):
    """nerfstudio's wrapper of `decay_factor`."""

    config: DecaySchedulerConfig

    def get_scheduler(self, optimizer: Optimizer, lr_init: float) -> LRScheduler:
        c = self.config
        return LambdaLR(
            optimizer, lambda step: decay_factor(step, c.max_steps, c.warmup_steps, c.decay_from, c.final_ratio)
        )
