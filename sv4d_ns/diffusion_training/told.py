"""What a training prints of its steps."""

from collections.abc import Mapping
from typing import Any

EVERY, EARLY = 50, (2, 10)
"""Steps from one line to the next, and steps of a process that have one, too: they say that it works, and how long it
takes."""


def step_sentence(entry: Mapping[str, Any], total: int, first: int) -> str | None:
    """Loss, pace and time left of a step that is told; None for one that is not.

    Args:
        entry: of losses.jsonl: step (counted from 1), loss, and seconds since this process began.
        total: steps of the run.
        first: those done when the process began.
    """
    step, done = entry["step"], entry["step"] - first
    if step % EVERY and done not in EARLY:
        return None
    pace = done / max(entry["seconds"], 1e-9)
    return (
        f"step {step}/{total}  loss {entry['loss']:.4f}  {pace:.2f} steps/s, {(total - step) / pace / 60:.0f} min left"
    )
