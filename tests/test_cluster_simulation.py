"""`benchmarks/cluster_simulation.py`: what can be reckoned by hand comes out, and lost workers cost what they must."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from cluster_simulation import Measured, Simulation, simulate


def test_without_losses_the_work_is_divided_by_the_workers() -> None:
    one = simulate([3600.0], 12, 1, 0.0, 0.0, 0.0, 0)
    assert (one.hours, one.busy_hours, one.lost_tasks, one.tail_minutes) == (12.0, 12.0, 0, 0.0)
    four = simulate([3600.0], 14, 4, 0.0, 0.0, 0.0, 0)
    assert four.hours == 4.0 and four.busy_hours == 14.0 and four.tail_minutes == 60.0, "two have nothing at the end"


def test_one_scheduler_hands_out_one_task_after_the_other() -> None:
    busy = simulate([1.0], 1000, 100, 0.0, 0.0, 0.1, 0)
    assert busy.hours * 3600 == pytest.approx(1000 * 0.1 + 1.0, rel=0.02), "hundred workers wait for it"


def test_lost_workers_cost_their_tasks_and_no_object() -> None:
    kept = simulate([600.0, 1800.0], 2000, 20, 0.0, 0.0, 0.0, 0)
    lossy = simulate([600.0, 1800.0], 2000, 20, 4 * 3600.0, 600.0, 0.0, 0)
    assert lossy.busy_hours == pytest.approx(kept.busy_hours) and lossy.given_up == 0
    expected = lossy.hours * 20 / 4  # one loss every four hours of each worker
    assert 0.7 * expected < lossy.lost_tasks < 1.2 * expected and lossy.hours > kept.hours
    # half a task is lost each time, long ones more often
    assert 300 < lossy.lost_hours * 3600 / lossy.lost_tasks < 1200
    short_lived = simulate([3600.0], 50, 5, 600.0, 60.0, 0.0, 0)
    assert short_lived.given_up > 0, "an object longer than its workers live is given up"


def test_the_table_has_a_row_for_each_cluster() -> None:
    text = Simulation(objects=100, workers=(2, 4), lost_after_hours=(0.0, 1.0)).table(Measured([5.0, 9.0], 12.0, 0.002))
    assert text.count("| 2 workers") == text.count("| 4 workers") == 2 and "none lost" in text
