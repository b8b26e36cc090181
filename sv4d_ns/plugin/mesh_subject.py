"""What a run's own movies show: the mesh that an export makes of it.

Drawing it takes a small part of the time in which the field is rendered at that size, and it is what leaves the run.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

from sv4d_ns.export.terminal import Terminal
from sv4d_ns.movies.movies import Shot, Subject
from sv4d_ns.utils.callbacks import Progress
from sv4d_ns.utils.files import content_hash
from sv4d_ns.utils.images import resize_rgba

if TYPE_CHECKING:
    from sv4d_ns.export.formats.asset import AnimatedMesh

FACES = 10_000
"""Half of an export's: at a movie's size nobody sees the difference, and it is made in two thirds of the time."""
STAGES = 12
"""Bars that an export shows."""
FIELD_SIZE = 192
"""Pixels along the side of the field's pictures where no mesh can be made of it; they are enlarged."""


class _Stages(Terminal):
    """One bar for all that making a mesh takes; what is found on the way is an export's to say."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self._done = 0

    def say(self, line: str) -> None:
        """Nothing."""

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        """A stage."""
        yield lambda: None
        self._done = min(self._done + 1, STAGES)
        self._progress(self._done, STAGES)


@dataclass(frozen=True, eq=False)
class MeshSubject(Subject):
    """A run as its mesh; as its field where that has no surface."""

    @property
    def name(self) -> str:
        """Of what the pictures show."""
        return "4D asset (mesh)" if self._made else super().name

    def identity(self) -> str:
        """Of the field and of how the mesh is made."""
        return content_hash(super().identity(), "mesh", FACES)

    @cached_property
    def _made(self) -> "list[AnimatedMesh]":
        """The mesh, once it is made."""
        return []

    def prepare(self, progress: Progress) -> None:
        """Make the mesh.

        Raises:
            InputError: there is no surface; pictures will be of the field.
        """
        from sv4d_ns.export.make import Options, make_asset
        from sv4d_ns.runs.open import FinishedRun

        run = FinishedRun(self.field, self.occupancy, self.grid, name="", extras={})
        self._made.append(make_asset(run, Options(max_faces=FACES), _Stages(progress)))
        progress(STAGES, STAGES)

    def render(self, shot: Shot, size: int) -> UInt8[np.ndarray, "size size 4"]:
        """One square picture, straight alpha."""
        if not self._made:
            return resize_rgba(super().render(shot, min(size, FIELD_SIZE))[None], size)[0]
        from sv4d_ns.export.colour.picture import draw

        frame = shot.time * (self.grid.num_frames - 1)
        return draw(self._made[0], frame, shot.c2w, self.grid.plan.focal_px(size), size)
