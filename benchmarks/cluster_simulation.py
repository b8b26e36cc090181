"""What `sv4d data render --cluster` would take on many machines, from what single objects take here.

    python benchmarks/cluster_simulation.py --source assets/animated --sample 20 [--write benchmarks/results/cluster.md]

Renders a random sample of a source's objects one after the other on one core, measures what Dask itself needs for a
task (empty ones, handed out by the same code), and lets workers take tasks from one queue as Dask does: durations are
drawn from the measured ones, workers are lost at random and come back, a lost worker's task is begun again by another.
What is not in it: slower or faster machines than this one, and a file system that cannot take what is written.
"""

import heapq
import json
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro

from sv4d_ns.runs.cluster import TRIES, open_cluster, run_all
from sv4d_ns.training_data.clips import list_clips
from sv4d_ns.training_data.render import RenderConfig, try_asset
from sv4d_ns.training_data.sources import Asset, list_assets
from sv4d_ns.utils.errors import one_sentence_errors
from sv4d_ns.utils.files import atomic_path

EMPTY_TASKS = 400


@dataclass(frozen=True)
class Measured:
    """What was measured on this machine."""

    seconds: list[float]
    """Of each object, CPU time of one core."""
    megabytes: float
    """Written for an object, on average."""
    hand_out_seconds: float
    """Of the scheduler, for a task."""


@dataclass(frozen=True)
class Outcome:
    """How a simulated render went."""

    hours: float
    """Until the last object is finished."""
    busy_hours: float
    """Sum over workers of time spent on objects that were finished."""
    lost_hours: float
    """Sum over workers of time spent on objects whose worker was lost."""
    lost_tasks: int
    """How often that happened."""
    given_up: int
    """Objects whose worker was lost too often."""
    tail_minutes: float
    """From the first worker without a task to the end."""


@dataclass(frozen=True)
class Simulation:
    """Measure, simulate, and write a table."""

    source: str = "procedural:0:1000"
    """What to render a sample of, as in `sv4d data render`."""
    sample: int = 20
    """Objects to measure."""
    frames: int = 21
    """As in `sv4d data render`."""
    views: int = 21
    """As in `sv4d data render`."""
    size: int = 576
    """As in `sv4d data render`."""
    objects: int = 40_000
    """Objects of the simulated render."""
    workers: tuple[int, ...] = (10, 100, 400)
    """Of the simulated cluster."""
    lost_after_hours: tuple[float, ...] = (0.0, 24.0, 4.0)
    """Mean time until a worker is lost; 0 is never."""
    back_after_minutes: float = 10.0
    """Until a lost worker's place is filled again."""
    seed: int = 0
    """Of the sample, the durations and the losses."""
    measured: Path | None = None
    """Take what an earlier call measured from this file; it is written where it does not exist."""
    write: Path | None = None
    """Put the table here."""

    def main(self) -> None:
        """Run."""
        known = self._measure()
        text = self.table(known)
        print(text)
        if self.write is not None:
            with atomic_path(self.write) as path:
                path.write_text(text + "\n")

    def _measure(self) -> Measured:
        if self.measured is not None and self.measured.is_file():
            return Measured(**json.loads(self.measured.read_text()))
        config = RenderConfig(self.source, Path(), self.frames, self.views, self.size, clips=1)
        known = Measured(*rendering(config, self.sample, self.seed), handing_out(config))
        if self.measured is not None:
            with atomic_path(self.measured) as path:
                path.write_text(json.dumps(known.__dict__, indent=1))
        return known

    def table(self, known: Measured) -> str:
        """The results as markdown."""
        seconds = np.array(known.seconds)
        lines = [
            f"{len(seconds)} objects of {self.source} at {self.size} px, {self.frames} frames, {self.views} views, two "
            f"orbits: {seconds.mean():.1f} s each on one core here (median {np.median(seconds):.1f}, longest "
            f"{seconds.max():.1f}), {known.megabytes:.0f} MB written. Dask needs {1e3 * known.hand_out_seconds:.1f} ms "
            "for a task.",
            "",
            f"| {self.objects:,} objects | hours | workers' time on finished objects | lost with workers | of them | "
            "given up | last objects, minutes | written, MB/s |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for workers in self.workers:
            for lost_after in self.lost_after_hours:
                made = simulate(
                    known.seconds, self.objects, workers, lost_after * 3600, self.back_after_minutes * 60,
                    known.hand_out_seconds, self.seed,
                )  # fmt: skip
                losing = f"each lost after {lost_after:g} h" if lost_after else "none lost"
                share = made.busy_hours / (made.hours * workers)
                lines.append(
                    f"| {workers} workers, {losing} | {made.hours:.1f} | {share:.1%} | {made.lost_hours:.1f} h | "
                    f"{made.lost_tasks} | {made.given_up} | {made.tail_minutes:.1f} | "
                    f"{known.megabytes * self.objects / 3600 / made.hours:.0f} |"
                )
        return "\n".join(lines)


def rendering(config: RenderConfig, count: int, seed: int) -> tuple[list[float], float]:
    """CPU seconds of each of a random sample of a source's objects, and the megabytes an object takes on average."""
    assets, _ = list_assets(config.source, None, False)
    chosen = [assets[index] for index in np.random.default_rng(seed).permutation(len(assets))[:count]]
    if chosen[0].path is not None:
        chosen, _ = list_clips(chosen, 1, config.frames > 1)
    seconds, size = [], 0
    with tempfile.TemporaryDirectory() as folder:
        there = replace(config, output=Path(folder) / "sample")
        try_asset(chosen[0], replace(config, output=Path(folder) / "warm", size=32, views=1))  # the first one compiles
        for asset in chosen:
            began = time.process_time()  # other programs may share this core
            if try_asset(asset, there) is None:
                seconds.append(time.process_time() - began)
        size = sum(path.stat().st_size for path in there.output.rglob("*") if path.is_file())
    return seconds, size / 1e6 / len(seconds)


def handing_out(config: RenderConfig) -> float:
    """Seconds of Dask for a task that does nothing, with the arguments a real one has."""

    def nothing(asset: Asset, config: RenderConfig) -> None:
        return None

    tasks = [(Asset(f"object-{number:08d}", None, number, None, {}), config) for number in range(EMPTY_TASKS)]
    with open_cluster("local:1") as client:
        run_all(client, nothing, tasks[:10], lambda *_: None)
        began = time.perf_counter()
        run_all(client, nothing, tasks, lambda *_: None)
        return (time.perf_counter() - began) / EMPTY_TASKS


def simulate(
    seconds: list[float],
    objects: int,
    workers: int,
    lost_after: float,
    back_after: float,
    hand_out: float,
    seed: int,
) -> Outcome:
    """Workers take objects from one queue; times in seconds.

    Args:
        seconds: measured durations, from which those of the objects are drawn.
        objects: to be made.
        workers: that make them.
        lost_after: mean time until a worker is lost (exponential); 0 is never.
        back_after: until it is there again.
        hand_out: the scheduler's time for a task; it hands out one after the other.
        seed: of everything random.
    """
    rng = np.random.default_rng(seed)
    durations = rng.choice(seconds, objects)
    waiting = [(0.0, number) for number in reversed(range(objects))]
    """When an object may begin, and its number."""
    tries = np.zeros(objects, int)
    free = [(0.0, worker) for worker in range(workers)]
    dies = rng.exponential(lost_after, workers) if lost_after else np.full(workers, np.inf)
    doomed: list[tuple[float, int]] = []
    """When an object that is under way loses its worker, and its number."""
    scheduler = busy = lost = end = 0.0
    first_idle, lost_tasks, given_up = np.inf, 0, 0
    while waiting or doomed:
        if not waiting or (doomed and doomed[0][0] <= free[0][0]):
            when, number = heapq.heappop(doomed)
            tries[number] += 1
            if tries[number] > TRIES:
                given_up += 1
            else:
                waiting.append((when, number))
            continue
        now, worker = heapq.heappop(free)
        if dies[worker] <= max(now, waiting[-1][0]):  # lost while it had nothing to do
            back = max(dies[worker] + back_after, now)
            dies[worker] = back + rng.exponential(lost_after)
            heapq.heappush(free, (back, worker))
            continue
        ready, number = waiting.pop()
        begin = scheduler = max(scheduler, now, ready) + hand_out
        finish = begin + durations[number]
        if dies[worker] < finish:
            lost_tasks, lost = lost_tasks + 1, lost + max(dies[worker] - begin, 0.0)
            heapq.heappush(doomed, (dies[worker], number))
            back = dies[worker] + back_after
            dies[worker] = back + rng.exponential(lost_after)
            heapq.heappush(free, (back, worker))
        else:
            busy, end = busy + durations[number], max(end, finish)
            heapq.heappush(free, (finish, worker))
        if not waiting:
            first_idle = min(first_idle, free[0][0])
    return Outcome(
        end / 3600, busy / 3600, lost / 3600, lost_tasks, given_up, max(end - min(first_idle, end), 0.0) / 60
    )


if __name__ == "__main__":
    with one_sentence_errors():
        tyro.cli(Simulation, description=__doc__).main()
