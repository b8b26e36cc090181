"""nerfstudio's local writer (`--logging.local-writer.enable True`), whose figures stand behind our bar.

nerfstudio's own prints a table that is as wide as it has figures, and moves the cursor up over it at every step: in a
terminal that is narrower, or beside a bar, each step leaves lines behind.
"""

from dataclasses import dataclass, field
from typing import Any

from nerfstudio.configs.base_config import LocalWriterConfig
from nerfstudio.utils import writer
from nerfstudio.utils.writer import EventName, LocalWriter

from sv4d_ns.utils.progress import TrainingBar

OWN = (EventName.ETA.value, EventName.TOTAL_TRAIN_TIME.value)
"""Figures the bar has already."""


@dataclass
class BarWriterConfig(LocalWriterConfig):
    """`LocalWriterConfig` that shows its figures behind the bar."""

    _target: type = field(default_factory=lambda: BarWriter)


class BarWriter(LocalWriter):
    """Hands the tracked figures of every `steps_per_log` steps to a bar."""

    bar: TrainingBar | None = None
    """Set by the trainer; nothing is shown without one."""

    def write_stats_log(self, step: int) -> None:
        """Show the figures recorded for a step."""
        if self.bar is None or step % writer.GLOBAL_BUFFER["steps_per_log"]:
            return
        latest = {event["name"]: event["event"] for event in writer.EVENT_STORAGE}
        shown = [name for name in self.stats_to_track if name in latest and name not in OWN]
        self.bar.also(", ".join(f"{name.removesuffix(' (time)')} {_figure(name, latest[name])}" for name in shown))


def _figure(name: str, value: Any) -> str:
    if name.endswith("(time)"):
        return f"{1000 * float(value):.0f} ms"
    return writer.human_format(float(value)).strip() if "Rays" in name else f"{float(value):.2f}"


def show_behind(bar: TrainingBar) -> None:
    """Let the writers nerfstudio has set up show their figures behind a bar."""
    for one in writer.EVENT_WRITERS:
        if isinstance(one, BarWriter):
            one.bar = bar
