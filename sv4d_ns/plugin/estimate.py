"""How long a run takes: a guess beforehand, and what its own steps teach while it runs.

Steps of one run cost different amounts (the static phase looks at one frame, distillation renders whole pictures), so
the mean speed so far is no estimate. What is kept here is how much each part costs *relative* to the others, as
measured on one machine; how fast this machine is, with this video, is learned from the steps it has done lately.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True, eq=False)
class Work:
    """What a run consists of, in CPU seconds of the reference machine (one thread of a busy AMD EPYC)."""

    start: float
    """Start-up, before the first step, without the views."""
    steps: Float[np.ndarray, " n"]
    """Each training step."""
    rounds: Mapping[int, float] = field(default_factory=dict)
    """Step before which stage 2 makes new views: how long that takes."""
    end: float = 0.0
    """Contact sheet, movies and figures, after the last step."""
    views: float = 0.0
    """The making of views, before the first step of a run that has none."""

    @property
    def total(self) -> float:
        """Of a whole run."""
        return self.start + self.views + self.after(0)

    def after(self, step: int) -> float:
        """From when `step` steps are done to the end, stage 2 before the next one included."""
        made = sum(seconds for before, seconds in self.rounds.items() if before >= step)
        return float(self.steps[step:].sum()) + made + self.end

    def next_stop(self, step: int) -> int:
        """The end of the phase that a step belongs to: the next round of stage 2, or the last step."""
        return min((before for before in self.rounds if before > step), default=len(self.steps))


# CPU seconds of ns-train on the sample video with OMP_NUM_THREADS=1 (tests/data/step_seconds_*.json)
STATIC_STEP, MOVING_STEP = 0.048, 0.062
"""Of a step of sv4d while one frame is fitted, and from then on."""
STATIC_UNTIL = 0.12
"""Share of the schedule (`fitting.schedule.ScheduleConfig`)."""
VIEW_SECONDS = 0.05
"""Of a generated picture of the bundled model."""
ROUND_SECONDS = 0.092
"""Of a picture of stage 2, rendered, refined and kept."""
WARM_STEP, DISTILLING_STEP = 0.11, 2.45
"""Of a step of 4diffusion with an SV4D model behind it: while views are fitted, and distilling."""
FIRST_DISTILLING, GROWN_AT = 0.7, 0.3
"""A distilling step costs this share at first, and the whole from this share of them on: the field fills up."""
START_SECONDS, SHEET_SECONDS, MOVIE_SECONDS = 10.0, 2.6, 3.0
"""From the estimate to the first step, without the views; of the contact sheet and what is said of the result; of each
movie."""
SPACE_SHEET_SECONDS, SPACE_MOVIE_SECONDS = 10.0, 4.6
"""Of 4diffusion's contact sheet, whose field costs more to look at, and of each movie, which shows its mesh."""


def sv4d_work(steps: int, frames: int, views: int, rounds: tuple[int, ...], movies: int = 5) -> Work:
    """Of `ns-train sv4d` with the bundled model.

    Args:
        rounds: the steps before which stage 2 renders and refines all views.
        movies: how many are made at the end.
    """
    share = np.arange(steps) / max(steps, 1)
    costs = np.where(share < STATIC_UNTIL, STATIC_STEP, MOVING_STEP)
    pictures = frames * views
    return Work(
        START_SECONDS,
        costs,
        {step: ROUND_SECONDS * pictures for step in rounds if step < steps},
        SHEET_SECONDS + MOVIE_SECONDS * movies,
        VIEW_SECONDS * pictures,
    )


def distillation_work(steps: int, frames: int, views: int, warm_up: int, movies: int = 5) -> Work:
    """Of `ns-train 4diffusion` with the bundled model; `warm_up` is the number of its first, cheap steps."""
    distilled = np.arange(steps) - warm_up
    grown = np.clip(distilled / max(GROWN_AT * (steps - warm_up), 1.0), 0.0, 1.0)
    costs = np.where(distilled < 0, WARM_STEP, DISTILLING_STEP * (FIRST_DISTILLING + (1.0 - FIRST_DISTILLING) * grown))
    end = SPACE_SHEET_SECONDS + SPACE_MOVIE_SECONDS * movies
    return Work(START_SECONDS, costs, end=end, views=VIEW_SECONDS * frames * views)


RECENT = 200
"""Steps that say how fast the machine is; what else it has to do changes in the course of a run."""
HICCUP = 8.0
"""A step that took more times what is usual than this counts as so much: the machine was asleep."""


ALIKE = 1.5
"""Steps whose planned costs differ by less than this factor are of a kind."""
ENOUGH = 10
"""Steps of a kind after which others, whose cost relative to theirs is another machine's, are not asked any more."""


@dataclass
class Remaining:
    """The time that is left of a run's training, from its plan and the time its own steps took.

    A round of stage 2 says nothing of the pace of steps: it is planned by theirs, and not held against the next one.
    """

    work: Work
    now: Callable[[], float] = time.monotonic
    _last: tuple[int, float] | None = None
    """Steps done, and the time, at the last call."""
    _took: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=RECENT))
    """Planned and measured seconds of recent steps; not of the first of this process, in which kernels are compiled."""

    def after(self, step: int) -> tuple[float, float] | None:
        """Seconds until the end of the phase and of the run once `step` steps are done; None while there is nothing to
        go by. To be called after every step."""
        now = self.now()
        last, self._last = self._last, (step, now)
        if last is not None and step > last[0] and not any(last[0] <= before < step for before in self.work.rounds):
            self._took.append((float(self.work.steps[last[0] : step].sum()), now - last[1]))
        if not self._took:
            return None
        pace = self._pace()
        phase = float(self.work.steps[step : self.work.next_stop(step - 1)].sum())
        return pace * phase, pace * self.work.after(step)

    def _pace(self) -> float:
        """Seconds for each planned one."""
        planned, measured = np.array(self._took).T
        planned = np.maximum(planned, 1e-9)
        alike = np.abs(np.log(planned / planned[-1])) < np.log(ALIKE)
        if alike.sum() >= ENOUGH:
            planned, measured = planned[alike], measured[alike]
        usual = float(np.median(measured / planned))
        return float(np.minimum(measured, HICCUP * usual * planned).sum() / planned.sum())


def time_sentence(seconds: float | None) -> str:
    """What to say of a run's time before it begins, or goes on.

    Args:
        seconds: of the reference machine; None where nothing is known of this one, as on a GPU.
    """
    if seconds is None:
        return "learned from the first steps and shown behind the bar."
    speed, share = machine_speed()
    minutes = max(round(seconds / speed / 60), 1)
    busy = f", as busy as this machine is now ({share:.0%} of a core is left)" if share < BUSY_SHARE else ""
    return f"about {minutes} min{busy}; what the steps themselves teach is shown behind the bar."


PROBE_POINTS = 4096
REFERENCE_PROBE = 0.0062
"""Points of a small step of the field's own kernels, and the seconds of one thread that belong to the figures above: a
Xeon takes 0.008 for it, and 1.3 times what is planned for a run (on the reference machine itself it was not measured).
Matrix products say little of a field's steps: that Xeon does them 1.7 times faster."""
THREAD_GAIN = 1.4
"""How much faster a whole run is with two or more threads than with one: it had 172 s of processor time in 126 s on two
cores (benchmarks/results/main_job.md)."""
BUSY_SHARE = 0.8
"""Share of the time a core is ours below which the user is told: the guess holds while that is so."""
SPEED_SECONDS = 1.0
"""For so long the machine's speed is measured: many times what a scheduler gives another program at once, so that the
answer is the share a busy machine has left, not whether this was its turn."""


def machine_speed() -> tuple[float, float]:
    """What this machine has for us now: its speed with torch's threads, relative to one thread of the reference
    machine, and the share of the time that one core is ours."""
    from sv4d_ns.utils.threads import torch_threads, workers

    step = _small_step()
    with torch_threads(1):
        step()  # kernels are compiled, or read from their cache
        steps, started, worked = 0, time.perf_counter(), time.process_time()
        while (seconds := time.perf_counter() - started) < SPEED_SECONDS or not steps:
            step()
            steps += 1
        worked = time.process_time() - worked
    speed = REFERENCE_PROBE * steps / seconds
    return speed * (THREAD_GAIN if workers() > 1 else 1.0), min(worked / seconds, 1.0)


def _small_step() -> Callable[[], None]:
    """A field's densities and colours at random points, forwards and backwards, as in a training step."""
    import torch

    from sv4d_ns.field.deformable import DeformableField

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        field = DeformableField()
        x = field.config.half_extent * (2.0 * torch.rand(PROBE_POINTS, 3) - 1.0)
    t = torch.full((PROBE_POINTS, 1), 0.5)

    def step() -> None:
        density, colour = field.density_and_color(x, t)
        (density.mean() + colour.mean()).backward()

    return step
