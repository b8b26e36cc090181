"""The time that is left of a run, against recorded steps of real runs."""

import json
from pathlib import Path

import numpy as np
import pytest

from sv4d_ns.plugin.estimate import Remaining, Work, distillation_work, sv4d_work

RECORDED = Path(__file__).parent / "data"


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def worst_ratio(work: Work, seconds: np.ndarray, after: float, begin: int = 0, end: float = 0.0) -> float:
    """How far the estimate of a run's remaining time is off at worst, once `after` of its steps are done."""
    clock = Clock()
    remaining = Remaining(work, clock)
    worst = 1.0
    for step in range(begin, len(seconds)):
        clock.seconds += seconds[step]
        left = remaining.after(step + 1)
        if left is None:
            assert step == begin
            continue
        true = seconds[step + 1 :].sum() + end
        if begin + after * (len(seconds) - begin) <= step and step + 1 < 0.97 * len(seconds):
            worst = max(worst, left[1] / true, true / left[1])
    return float(worst)


def recorded(method: str) -> np.ndarray:
    return np.array(json.loads((RECORDED / f"step_seconds_{method}.json").read_text())["steps"])


@pytest.mark.parametrize("speed", [0.2, 1.0, 3.0])
def test_a_tenth_of_the_run_tells_the_rest_of_sv4d(speed: float) -> None:
    seconds = recorded("sv4d") / speed
    end = float(seconds[100:].mean() * 24 / 0.09)
    # the recorded stage 2 is in the step it comes before
    work = sv4d_work(len(seconds), frames=21, views=8, rounds=(448,))
    assert worst_ratio(work, seconds, after=0.1, end=end) < 1.3


def test_a_resumed_run_learns_from_its_own_steps_only() -> None:
    seconds = recorded("sv4d")
    work = sv4d_work(len(seconds), frames=21, views=8, rounds=(448,))
    assert worst_ratio(work, seconds, after=0.1, begin=470, end=float(seconds[100:].mean() * 24 / 0.09)) < 1.3


def test_the_phase_ends_where_stage_2_begins() -> None:
    clock = Clock()
    work = Work(start=5.0, steps=np.full(10, 2.0), rounds={6: 7.0}, end=3.0)
    remaining = Remaining(work, clock)
    assert remaining.after(0) is None
    clock.seconds = 4.0  # twice as fast as planned
    assert remaining.after(4) == pytest.approx((2.0, (12.0 + 7.0 + 3.0) / 2))
    assert remaining.after(6) == pytest.approx((0.0, (8.0 + 7.0 + 3.0) / 3))
    assert work.total == 5 + 20 + 7 + 3


def test_4diffusion_has_a_plan_of_its_own() -> None:
    work = distillation_work(500, frames=21, views=8, warm_up=250)
    assert work.steps[0] < work.steps[-1] and not work.rounds
    assert work.total > 3 * sv4d_work(500, 21, 8, ()).total
