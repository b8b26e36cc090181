"""The time that is left of a run, against recorded steps of real runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sv4d_ns.plugin import estimate
from sv4d_ns.plugin.estimate import Remaining, Work, distillation_work, machine_speed, sv4d_work

RECORDED = Path(__file__).parent / "data"


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def worst_ratio(work: Work, seconds: np.ndarray, after: float, begin: int = 0, end: float = 0.0) -> float:
    """How far the estimates of the remaining time of a run and of its phases are off at worst, once `after` of its
    steps, or of the phase's, are done."""
    clock = Clock()
    remaining = Remaining(work, clock)
    worst, phase_begin = 1.0, begin
    for step in range(begin, len(seconds)):
        clock.seconds += seconds[step]
        left = remaining.after(step + 1)
        if left is None:
            assert step == begin
            continue
        if step in work.rounds:
            phase_begin = step
        phase_end = work.next_stop(step)
        if begin + after * (len(seconds) - begin) <= step and step + 1 < 0.97 * len(seconds):
            true = seconds[step + 1 :].sum() + end
            worst = max(worst, left[1] / true, true / left[1])
        if phase_begin + after * (phase_end - phase_begin) <= step < phase_begin + 0.97 * (phase_end - phase_begin):
            true = seconds[step + 1 : phase_end].sum()
            worst = max(worst, left[0] / true, true / left[0])
    return float(worst)


def recorded(method: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((RECORDED / f"step_seconds_{method}.json").read_text())
    return read | {"steps": np.array(read["steps"])}


def work_of(run: dict[str, Any]) -> Work:
    if "round_before" not in run:
        return distillation_work(len(run["steps"]), frames=21, views=8, warm_up=len(run["steps"]) // 2, movies=0)
    return sv4d_work(len(run["steps"]), frames=21, views=8, rounds=(run["round_before"],))


@pytest.mark.parametrize("speed", [0.2, 1.0, 3.0])
def test_a_tenth_of_the_run_tells_the_rest_of_sv4d(speed: float) -> None:
    run = recorded("sv4d")
    # the recorded stage 2 is in the step it comes before
    assert worst_ratio(work_of(run), run["steps"] / speed, after=0.1, end=run["end"] / speed) < 1.3


def test_a_resumed_run_learns_from_its_own_steps_only() -> None:
    run = recorded("sv4d")
    assert worst_ratio(work_of(run), run["steps"], after=0.1, begin=410, end=run["end"]) < 1.3


def test_a_machine_that_was_asleep_is_not_taken_for_a_slow_one() -> None:
    run = recorded("sv4d")
    work, clock = work_of(run), Clock()
    remaining = Remaining(work, clock)
    for step in range(100):
        clock.seconds += run["steps"][step] + (600 if step == 50 else 0)
        left = remaining.after(step + 1)
    true = run["steps"][100:].sum() + run["end"]
    assert left is not None and true / 1.3 < left[1] < true * 1.3


def test_a_machine_that_becomes_busy_is_noticed() -> None:
    work, clock = Work(start=0.0, steps=np.full(1000, 1.0)), Clock()
    remaining = Remaining(work, clock)
    for step in range(800):
        clock.seconds += 1.0 if step < 500 else 3.0
        left = remaining.after(step + 1)
    assert left is not None and left[1] == pytest.approx(600)


@pytest.mark.parametrize("network", [0.3, 1.0, 3.0])
def test_4diffusion_is_told_by_its_first_steps_of_a_kind(network: float) -> None:
    """How costly the network is beside the field is another matter on every machine."""
    run = recorded("4diffusion")
    distilling = np.repeat(run["distilling_tens"], 10) * network
    steps = np.concatenate([np.full(len(distilling), np.median(run["steps"][1:10])), distilling])
    work, clock = distillation_work(len(steps), 21, 8, len(steps) // 2, movies=0), Clock()
    remaining = Remaining(work, clock)
    for step in range(len(steps) // 2 + 12):
        clock.seconds += steps[step]
        left = remaining.after(step + 1)
    true = steps[len(steps) // 2 + 12 :].sum()
    assert left is not None and true / 1.3 < left[0] < true * 1.3


@pytest.mark.parametrize("method", ["sv4d", "4diffusion"])
def test_the_guess_beforehand_is_that_of_a_run_of_today(method: str) -> None:
    """In CPU seconds of the machine it was recorded on: what each part costs may not be of a model gone by."""
    run = recorded(method)
    assert run["total"] / 1.3 < work_of(run).total < run["total"] * 1.3


def test_the_speed_of_a_busy_machine_is_its_mean_not_its_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """99 min were promised for 12 where another program had its turn during a measurement of 20 ms."""
    calls = 0

    def stalled() -> float:  # a small step takes 9 ms, and after each tenth another program has 90 ms
        nonlocal calls
        calls += 1
        return 0.009 * calls + 0.09 * (calls // 10)

    monkeypatch.setattr(estimate.time, "perf_counter", stalled)
    monkeypatch.setattr("sv4d_ns.utils.threads.workers", lambda: 1)
    monkeypatch.setattr(estimate, "_small_step", lambda: lambda: None)
    half = estimate.REFERENCE_PROBE / 0.018
    monkeypatch.setattr(estimate.time, "process_time", lambda: 0.009 * calls)
    speed, share = machine_speed()
    assert speed == pytest.approx(half, rel=0.2) and share == pytest.approx(0.5, abs=0.1)
    assert "of a core is left" in estimate.time_sentence(60.0)


def test_the_speed_is_measured_without_touching_what_is_drawn_by_chance() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    speed, share = machine_speed()
    assert torch.rand(1) == expected and speed > 0 and 0 < share <= 1


def test_the_phase_ends_where_stage_2_begins() -> None:
    clock = Clock()
    work = Work(start=5.0, steps=np.full(10, 2.0), rounds={6: 7.0}, end=3.0)
    remaining = Remaining(work, clock)
    assert remaining.after(0) is None
    clock.seconds = 4.0  # twice as fast as planned
    assert remaining.after(4) == pytest.approx((2.0, (12.0 + 7.0 + 3.0) / 2))
    assert remaining.after(6) == pytest.approx((0.0, (8.0 + 7.0 + 3.0) / 3))
    assert work.total == 5 + 20 + 7 + 3


def test_a_run_that_goes_on_takes_what_is_left() -> None:
    work = Work(start=5.0, steps=np.full(10, 2.0), rounds={6: 7.0}, end=3.0, views=11.0)
    assert work.total == 5 + 11 + 20 + 7 + 3
    assert [work.after(step) for step in (0, 6, 7, 10)] == [30, 18, 9, 3]


def test_distilling_and_warm_up_gain_alike_from_threads() -> None:
    """A plan in which only distilling did promised 9 to 23 % too little from the first tenth of a run on."""
    run = recorded("4diffusion")
    steps = distillation_work(100, 21, 8, warm_up=50).steps
    warm, distilling = run["two_threads"]
    assert steps[-1] / steps[0] == pytest.approx(distilling / warm, rel=0.1)


def test_the_end_of_a_run_is_planned_by_method() -> None:
    """4diffusion was promised an end of 35 s that took 60."""
    run = recorded("4diffusion")
    for movies in (0, 5):
        planned = distillation_work(20, 21, 8, warm_up=10, movies=movies).end
        assert planned == pytest.approx(run["end"] + run["movies"] * movies / 5, rel=0.1)
    assert work_of(recorded("sv4d")).end == pytest.approx(recorded("sv4d")["end"], rel=0.1)


def test_4diffusion_has_a_plan_of_its_own() -> None:
    work = distillation_work(500, frames=21, views=8, warm_up=250)
    assert work.steps[0] < work.steps[-1] and not work.rounds
    assert work.total > 3 * sv4d_work(500, 21, 8, ()).total
