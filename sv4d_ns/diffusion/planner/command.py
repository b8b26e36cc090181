"""The command `sv4d plan`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from rich.table import Table

from sv4d_ns.diffusion.planner.plan import (
    CARDS,
    DTYPES,
    GIB,
    RAN_ON,
    USABLE,
    Card,
    ModelName,
    Offload,
    Plan,
    plan_memory,
    this_device,
)
from sv4d_ns.utils.errors import InputError


@dataclass(frozen=True)
class PlanConfig:
    """Expected peak memory and time of one window of the diffusion model, before any weight is loaded."""

    model: ModelName = "official4"
    """official4 (12 frames x 4 views) or official8 (5 x 8)."""
    device: str = "auto"
    """auto, cpu, cuda (this machine's), or a card by name, for example rtx-4090."""
    frames: int | None = None
    """Frames of a window; the model's own by default."""
    views: int | None = None
    """Views of a call; the model's own by default."""
    size: int | None = None
    """Side of the pictures in pixels; the model's own by default."""
    steps: int | None = None
    """Denoising steps; the model's own by default."""
    dtype: Literal["fp32", "fp16", "bf16"] | None = None
    """Of the network; fp16 by default."""
    offload: Annotated[Offload | None, tyro.conf.EnumChoicesFromValues] = None
    """Only this way of offloading; all of them by default."""
    fp8_storage: bool = False
    """The network's weights in one byte each."""
    chunk_size: int = 8
    """Images the autoencoder takes at once."""


def command(arguments: Sequence[str]) -> None:
    """`sv4d plan`: prints two tables and a recommendation."""
    config = tyro.cli(PlanConfig, prog="sv4d plan", args=list(arguments))
    name, card = _device(config.device)
    dtype = config.dtype or "fp16"
    plan = plan_memory(
        config.model,
        card,
        config.frames,
        config.views,
        config.size,
        config.steps,
        DTYPES[dtype],
        config.fp8_storage,
        config.chunk_size,
    )
    from sv4d_ns.utils.progress import console as the_console

    console = the_console()
    console.print(_components(plan, f"{config.model}, {dtype}{', fp8 storage' if config.fp8_storage else ''}"))
    kinds = list(Offload) if config.offload is None else [config.offload]
    console.print(_offloading(plan, kinds, name, card))
    console.print(_advice(plan, kinds, name, card))
    console.print(tried())


def _device(name: str) -> tuple[str, Card]:
    if name in ("auto", "cpu", "cuda"):
        return this_device(name)  # type: ignore[arg-type]
    if name not in CARDS:
        raise InputError(f"--device '{name}' is not known: give auto, cpu, cuda, or one of {', '.join(CARDS)}.")
    return name, CARDS[name]


def _components(plan: Plan, title: str) -> Table:
    table = Table("component", "weights GiB", "features GiB", "passes", "TFLOP", title=title)
    for part in plan.components:
        sizes = (f"{part.weights / GIB:.2f}", f"{part.activations / GIB:.2f}")
        table.add_row(part.name, *sizes, str(part.passes), f"{part.flops / 1e12:.1f}")
    return table


def _offloading(plan: Plan, kinds: Sequence[Offload], name: str, card: Card) -> Table:
    table = Table("offload", "peak GiB", "fits", "about", title=f"{name}, {card.memory / GIB:.1f} GiB, one window")
    for kind in kinds:
        needed = plan.bytes_by_offload[kind]
        fits = "yes" if needed <= USABLE * card.memory else "no"
        table.add_row(kind.value, f"{needed / GIB:.1f}", fits, _duration(plan.seconds_by_offload[kind]))
    return table


def _advice(plan: Plan, kinds: Sequence[Offload], name: str, card: Card) -> str:
    best = plan.recommended(card.memory)
    if best is None:
        return f"Nothing fits on {name}: try --fp8-storage, a smaller --chunk-size, fewer --frames or a smaller --size."
    if best not in kinds:
        return f"Recommended instead of offload '{kinds[0].value}' on {name}: '{best.value}'."
    return f"Recommended on {name}: offload '{best.value}'. Times assume 30 % of the matrix rate and are rough."


def tried() -> str:
    """On which cards these models have run."""
    cards = ", ".join(RAN_ON)
    return f"The released size has run with random weights on {cards}, nowhere else yet (docs/performance.md)."


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )
