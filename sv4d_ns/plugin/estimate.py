"""How long a run takes: a guess beforehand, and what its own steps teach while it runs.

Steps of one run cost different amounts (the static phase looks at one frame, distillation renders whole pictures), so
the mean speed so far is no estimate. What is kept here is how much each part costs *relative* to the others, as
measured on one machine; how fast this machine is, with this video, is learned from the steps it has done.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True, eq=False)
class Work:
    """What a run consists of, in seconds of the reference machine (one thread of an AMD EPYC)."""

    start: float
    """Start-up and the making of views, before the first step."""
    steps: Float[np.ndarray, " n"]
    """Each training step."""
    rounds: Mapping[int, float] = field(default_factory=dict)
    """Step before which stage 2 makes new views: how long that takes."""
    end: float = 0.0
    """Contact sheet, movies and figures, after the last step."""

    @property
    def total(self) -> float:
        """Of the whole run."""
        return self.start + float(self.steps.sum()) + sum(self.rounds.values()) + self.end

    def until(self, step: int) -> float:
        """From the first step until `step` steps are done, stage 2 before the next one not counted."""
        made = sum(seconds for before, seconds in self.rounds.items() if before < step)
        return float(self.steps[:step].sum()) + made

    def next_stop(self, step: int) -> int:
        """The end of the phase that a step belongs to: the next round of stage 2, or the last step."""
        return min((before for before in self.rounds if before > step), default=len(self.steps))


STATIC_STEP, GROWING_STEP, WHOLE_STEP = 0.11, 0.14, 0.14
"""Seconds of a step of sv4d while one frame is fitted, while the window grows, and once the clip is whole."""
STATIC_UNTIL, WHOLE_FROM = 0.12, 0.65
"""Shares of the schedule (`sampling.ScheduleConfig`)."""
VIEW_SECONDS = 0.014
"""Seconds of a generated picture of the embedded model."""
RENDER_SECONDS = 0.05
"""Seconds of a picture of the field for stage 2."""
WARM_STEP, DISTILLING_STEP = 0.2, 1.5
"""Seconds of a step of 4diffusion with an SV4D model behind it: while views are fitted, and distilling."""
START_SECONDS = 12.0
END_SECONDS = 20.0


def sv4d_work(steps: int, frames: int, views: int, rounds: tuple[int, ...]) -> Work:
    """Of `ns-train sv4d` with the embedded model.

    Args:
        rounds: the steps before which stage 2 renders and refines all views.
    """
    share = np.arange(steps) / max(steps, 1)
    costs = np.where(share < STATIC_UNTIL, STATIC_STEP, np.where(share < WHOLE_FROM, GROWING_STEP, WHOLE_STEP))
    pictures = frames * views
    return Work(
        START_SECONDS + VIEW_SECONDS * pictures,
        costs,
        {step: (RENDER_SECONDS + 2 * VIEW_SECONDS) * pictures for step in rounds if step < steps},
        END_SECONDS,
    )


def distillation_work(steps: int, frames: int, views: int, warm_up: int) -> Work:
    """Of `ns-train 4diffusion` with the embedded model; `warm_up` is the number of its first, cheap steps."""
    costs = np.where(np.arange(steps) < warm_up, WARM_STEP, DISTILLING_STEP)
    return Work(START_SECONDS + VIEW_SECONDS * frames * views, costs, end=END_SECONDS)


@dataclass
class Remaining:
    """The time that is left of a run's training, from its plan and the time its own steps took."""

    work: Work
    now: Callable[[], float] = time.monotonic
    _began: tuple[int, float] | None = None
    """Step and time at which this process began to train."""

    def begin(self, step: int) -> None:
        """The steps before `step` are done and not to be learned from."""
        self._began = (step, self.now())

    def after(self, step: int) -> tuple[float, float] | None:
        """Seconds until the end of the phase and of the run once `step` steps are done; None with nothing to go by."""
        if self._began is None or step <= self._began[0]:
            return None
        first, since = self._began
        done = self.work.until(step)
        pace = (self.now() - since) / max(done - self.work.until(first), 1e-9)
        stop = self.work.next_stop(step - 1)
        phase = float(self.work.steps[step:stop].sum())
        return pace * phase, pace * (self.work.total - self.work.start - done)


def time_sentence(work: Work | None) -> str:
    """What to say of a run's time before it begins.

    Args:
        work: None where nothing is known of the machine, as on a GPU.
    """
    if work is None:
        return "learned from the first steps and shown behind the bar."
    minutes = max(round(work.total / machine_speed() / 60), 1)
    return f"about {minutes} min; what the steps themselves teach is shown behind the bar."


REFERENCE_GFLOPS = 95.0
"""What `machine_speed` measured where the figures above come from."""


def machine_speed() -> float:
    """Speed of this machine in float32 matrix products, relative to the one of `REFERENCE_GFLOPS`."""
    import torch

    a = torch.rand(768, 768)
    a @ a
    started = time.perf_counter()
    for _ in range(8):
        a @ a
    gflops = 8 * 2 * 768**3 / (time.perf_counter() - started) / 1e9
    return gflops / REFERENCE_GFLOPS
