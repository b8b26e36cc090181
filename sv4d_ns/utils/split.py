"""Work on the rows of tensors, split over the threads of `utils.threads`, with gradients.

torch spreads the inside of one operation over threads, which must meet after each of them. Here each thread goes
through all operations of its rows, forwards and backwards, and they meet once. torch lets go of the GIL in its
operations, so this pays where they are not tiny.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sv4d_ns.utils.threads import run_in_threads

Result = TypeVar("Result")
Task = Callable[[], tuple[Tensor, ...]]


def results_of(tasks: Sequence[Callable[[], Result]]) -> list[Result]:
    """What each task returns; whether they record gradients is as where this is called."""
    results: dict[int, Result] = {}
    recording = torch.is_grad_enabled()

    def run(number: int) -> None:
        with torch.set_grad_enabled(recording):  # every thread has a switch of its own
            results[number] = tasks[number]()

    run_in_threads([partial(run, number) for number in range(len(tasks))])
    return [results[number] for number in range(len(tasks))]


def run_split(tasks: Sequence[Task], parameters: Iterable[nn.Parameter]) -> tuple[Tensor, ...]:
    """What tasks return, their rows joined in the order of the tasks.

    Gradients reach `parameters` and nothing else that the tasks use. An output that depends on them in no task comes
    without a gradient.

    Args:
        tasks: each returns as many tensors as the others, of the same kinds.
        parameters: all that the tasks' results are to be differentiated by.
    """
    if len(tasks) == 1:
        return tasks[0]()
    if not torch.is_grad_enabled():
        return _joined(results_of(tasks))
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    return _Split.apply(tasks, *wanted)  # type: ignore[no-any-return]


def _joined(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat([part.detach() for part in column]) for column in zip(*parts, strict=True))


class _Split(torch.autograd.Function):
    """Keeps the graph of each task and goes back through each in its own thread."""

    @staticmethod
    def forward(ctx: Any, tasks: Sequence[Task], *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        with torch.enable_grad():
            ctx.parameters, ctx.parts = parameters, results_of(tasks)
        out = _joined(ctx.parts)
        columns = zip(out, zip(*ctx.parts, strict=True), strict=True)
        ctx.mark_non_differentiable(*[o for o, column in columns if not any(part.requires_grad for part in column)])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        edges = [0] * len(grads)
        tasks = []
        for part in ctx.parts:
            rows = [slice(edge, edge + len(value)) for edge, value in zip(edges, part, strict=True)]
            edges = [row.stop for row in rows]
            asked = [
                (value, grad[row])
                for value, grad, row in zip(part, grads, rows, strict=True)
                if grad is not None and value.requires_grad
            ]
            tasks.append(partial(_gradients, asked, ctx.parameters))
        del ctx.parts
        found = results_of(tasks)
        return (None, *(_sum(column) for column in zip(*found, strict=True)))


def _gradients(asked: Sequence[tuple[Tensor, Tensor]], parameters: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    if not asked:
        return (None,) * len(parameters)
    values, grads = zip(*asked, strict=True)
    return torch.autograd.grad(values, parameters, grads, allow_unused=True)


def _sum(parts: Sequence[Tensor | None]) -> Tensor | None:
    known = [part for part in parts if part is not None]
    if not known:
        return None
    first, *others = known
    for other in others:
        first = first.add_(other)
    return first
