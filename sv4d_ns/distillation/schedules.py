"""What changes over the 4D optimisation: noise levels, loss weights, the size of the renders.

Source: aejion/4Diffusion @ 627d0cd (threestudio's scheduled values) and the paper's appendix A.1. Steps are those of
the reference's 35,000-step run; a shorter run passes the same schedule faster (`reference_step`).
"""

from dataclasses import dataclass, field, replace

REFERENCE_STEPS = 35_000
NOISE_STEPS = 1000
"""Steps of the diffusion process."""


@dataclass(frozen=True)
class Ramp:
    """`start` until `start_step`, `end` from `end_step` on, linear between."""

    start_step: int
    start: float
    end: float
    end_step: int

    @classmethod
    def constant(cls, value: float) -> "Ramp":
        """The same at every step."""
        return cls(0, value, value, 1)

    def scaled(self, factor: float) -> "Ramp":
        """The same ramp with other values."""
        return replace(self, start=self.start * factor, end=self.end * factor)

    def at(self, step: float) -> float:
        """The value at a step of the reference's run."""
        done = (step - self.start_step) / (self.end_step - self.start_step)
        return self.start + (self.end - self.start) * max(min(1.0, done), 0.0)


@dataclass(frozen=True)
class LossRamps:
    """Weights of the terms of the objective. The paper's names are in docs/4diffusion.md."""

    sds: Ramp = field(default_factory=lambda: Ramp.constant(1.0))
    lpips: Ramp = field(default_factory=lambda: Ramp.constant(200.0))
    """The reference's configuration says 100 and its code adds the term twice."""
    ssim: Ramp = field(default_factory=lambda: Ramp.constant(100.0))
    """Likewise: 50, added twice."""
    orientation: Ramp = field(default_factory=lambda: Ramp(0, 10.0, 1000.0, 5000))
    sparsity: Ramp = field(default_factory=lambda: Ramp.constant(100.0))
    opaque: Ramp = field(default_factory=lambda: Ramp(10_000, 0.0, 100.0, 10_001))
    z_variance: Ramp = field(default_factory=lambda: Ramp.constant(0.0))
    """HiFA's variance of depth along a ray; off in the reference."""
    pixels: Ramp = field(default_factory=lambda: Ramp.constant(0.0))
    """Mean squared error at the anchor, which the reference does not have."""

    def at(self, step: float) -> dict[str, float]:
        """Every weight at a step of the reference's run."""
        return {name: ramp.at(step) for name, ramp in vars(self).items()}


SHORT_RUN = 0.05
"""Factor of the regularisers in runs of hundreds of steps, whose anchor and views settle the shape early."""
PIXELS = 10_000.0
"""Weight of the squared error of pixels in place of LPIPS; our judgement, not measured."""


def own_weights(short_run: bool, perceptual: bool) -> LossRamps:
    """The reference's weights, changed where its premises do not hold.

    Args:
        short_run: hundreds of steps instead of tens of thousands.
        perceptual: LPIPS is at hand; without it structure alone would leave colours free.
    """
    weights = LossRamps()
    if short_run:
        names = ("orientation", "sparsity", "opaque")
        weights = replace(weights, **{name: getattr(weights, name).scaled(SHORT_RUN) for name in names})
    return weights if perceptual else replace(weights, pixels=Ramp.constant(PIXELS))


@dataclass(frozen=True)
class NoiseLevels:
    """From which levels a step's noise is drawn, as shares of the diffusion process."""

    lowest: Ramp
    highest: Ramp

    def at(self, step: float) -> tuple[int, int]:
        """Lowest and highest diffusion step that may be drawn at a step of the reference's run, both inclusive."""
        return int(NOISE_STEPS * self.lowest.at(step)), int(NOISE_STEPS * self.highest.at(step))


REFERENCE_NOISE = NoiseLevels(Ramp(0, 0.98, 0.02, 5000), Ramp(0, 0.98, 0.25, 5000))
"""Annealed: coarse shape first, then detail."""
ONE_STEP_NOISE = NoiseLevels(Ramp.constant(0.85), Ramp.constant(0.98))
"""For models that sample in one step, and for the bundled one. A one-step model knows best at the noise it starts from;
below it it repeats what it is shown. Measured with the former bundled model, which sampled in one step
(docs/4diffusion.md); today's samples in three and was not measured."""

RENDER_SIZES = ((0, 64), (5000, 192), (10_000, 256))
"""(first step, pixels a side) of the renders."""


def reference_step(step: int, total_steps: int, first: int = 0) -> float:
    """Where a step of a run of `total_steps` is in the reference's run, of which it makes the part after `first`."""
    return first + step * (REFERENCE_STEPS - first) / total_steps


def render_size(step: float) -> int:
    """Pixels along the side of the square renders."""
    return max(size for first, size in RENDER_SIZES if step >= first)
