"""The optimizer of 4Diffusion's field."""

from dataclasses import dataclass

from nerfstudio.engine.optimizers import OptimizerConfig
from torch.optim import AdamW


@dataclass
class FusedAdamWConfig(OptimizerConfig):
    """AdamW with the reference's constants, in one pass over the parameters."""

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
