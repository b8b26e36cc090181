"""Learning rates of the field's parameters, and how they fall."""

from typing import TYPE_CHECKING

from torch.optim import Adam, Optimizer

if TYPE_CHECKING:
    from sv4d_ns.field.deformable import DeformableField

LEARNING_RATES = {
    "encoding": 2e-2,
    "heads": 1e-2,
    "deformation": 1e-2,
    "appearance": 2e-2,
    "density_residual": 3e-2,
}
"""Adam's rate for each parameter group of the field (SV4D: 0.01 for all), measured in docs/optimisation.md. That of the
deformation is in grid cells a step."""
ADAM_BETAS, ADAM_EPS = (0.9, 0.99), 1e-15
"""Instant-NGP's for hash grids; epsilon is small because gradients of rarely seen grid entries are."""
WARMUP_STEPS, DECAY_FROM, FINAL_RATIO = 30, 0.4, 0.1


def decay_factor(
    step: int,
    total_steps: int,
    warmup_steps: int = WARMUP_STEPS,
    decay_from: float = DECAY_FROM,
    final_ratio: float = FINAL_RATIO,
) -> float:
    """The learning rate of `step` over the full one, a Python float in (0, 1].

    Linear warm-up from zero, a plateau until the share `decay_from` of `total_steps`, then exponential decay to
    `final_ratio`, where it stays.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    done = (step / total_steps - decay_from) / (1.0 - decay_from)
    return float(final_ratio ** min(max(done, 0.0), 1.0))


def field_optimizer(field: "DeformableField") -> Adam:
    """Adam with a group for each kind of parameter; `set_rates` gives them their rates."""
    groups = [{"params": values, "rate": LEARNING_RATES[name]} for name, values in field.parameter_groups().items()]
    return Adam(groups, lr=0.0, betas=ADAM_BETAS, eps=ADAM_EPS, fused=True)


def set_rates(optimizer: Optimizer, step: int, total_steps: int) -> None:
    """The rates of a step."""
    for group in optimizer.param_groups:
        group["lr"] = group["rate"] * decay_factor(step, total_steps)
