"""What nerfstudio and its dependencies say that is of no use to the user of a run, silenced message by message.

Nothing is silenced as a whole: a warning goes by its words and the module it comes from, a line of nerfstudio's console
by its words. Everything else is shown.
"""

import functools
import io
import re
import warnings
from collections.abc import Iterable

import rich
from rich.console import Console, ConsoleRenderable, RenderHook
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sv4d_ns.utils.progress import CONSOLE, say

WARNINGS: tuple[tuple[str, type[Warning], str], ...] = (
    # nerfstudio 1.1.5 calls what torch has renamed since
    (r"`torch\.cuda\.amp\.custom_(fwd|bwd)\(", FutureWarning, r"nerfstudio\.field_components\.activations"),
    (r"`torch\.cuda\.amp\.GradScaler\(", FutureWarning, r"nerfstudio\.engine\.trainer"),
    # what nerfstudio indexes and copies tensors with, several lines for each picture of ns-eval and ns-render
    (r"Using a non-tuple sequence for multidimensional indexing", UserWarning, r"nerfstudio\.cameras\.cameras"),
    (r"To copy construct from a tensor", UserWarning, r"nerfstudio\.cameras\.camera_utils"),
    # the deformation takes no step in the static phase, but its schedule runs
    (r"Detected call of `lr_scheduler\.step", UserWarning, r"nerfstudio\.engine\.optimizers"),
)
"""Beginning of the message, category, and the module that warns."""

CHATTER = (
    r"Saving config to: ",
    r"Saving checkpoints to: ",
    r"Mixed precision is disabled for CPU training",
    r"\[NOTE\] Not running eval iterations since only viewer is enabled",
    r"Disabled comet/tensorboard/wandb event writers",
    r"disabled local writer",
    r"Training Finished",  # said before contact sheet and movies are made
)
"""Lines nerfstudio prints in every run, which say what the run's own first lines say better, or nothing."""


def silence_known_warnings() -> None:
    """Filter the warnings of `WARNINGS`, in this process."""
    for message, category, module in WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category, module=module)


def silence_nerfstudio() -> None:
    """From now on leave out `CHATTER` of nerfstudio's console; viser's box becomes a line."""
    silence_known_warnings()
    _push_hooks()


@functools.cache  # once in a process
def _push_hooks() -> None:
    CONSOLE.push_render_hook(_Chatter())
    rich.get_console().push_render_hook(_ViserBox())


class _Chatter(RenderHook):
    """Drops what `CHATTER` names."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [item for item in renderables if not is_chatter(item)]


def is_chatter(item: ConsoleRenderable) -> bool:
    """Whether something that is about to be printed is one of nerfstudio's lines that say nothing."""
    if not isinstance(item, Text | Table | Panel):  # a bar at work
        return False
    words = " ".join(_plain(item).split())
    return any(re.search(pattern, words) for pattern in CHATTER)


class _ViserBox(RenderHook):
    """In the place of viser's table of addresses: the one a browser is given."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        kept = list[ConsoleRenderable]()
        for item in renderables:
            address = _viser_address(item)
            if address is None:
                kept.append(item)
            else:
                say(f"Viewer: {address} (open it in a browser)")
        return kept


def _viser_address(item: ConsoleRenderable) -> str | None:
    if not isinstance(item, Panel) or "viser" not in str(item.title):
        return None
    found = re.search(r"https?://\S+", _plain(item))
    return found and found[0]


def _plain(*items: ConsoleRenderable | Iterable[ConsoleRenderable]) -> str:
    """As text, on a line of any length."""
    paper = Console(file=io.StringIO(), width=1000)
    paper.print(*items)
    assert isinstance(paper.file, io.StringIO)
    return paper.file.getvalue()
