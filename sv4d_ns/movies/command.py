"""`sv4d render`: one movie of a run, of the kinds a run makes by itself, at any size."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import tyro

from sv4d_ns.utils.errors import InputError


@dataclass
class _Render:
    """What every movie needs."""

    load_config: Path
    """Path to the run's config.yml."""
    output_path: Path
    """The movie, ending in .mp4; an older one is replaced."""
    size: int = 512
    """Pixels along the side of a rendered picture, even."""
    fps: Optional[float] = None  # noqa: UP045 - as in nerfstudio
    """Pictures per second; None takes the clip's own, and 12 where time stands still."""

    preset = "time"

    def options(self) -> dict[str, Any]:
        """The flags that are this preset's own."""
        return {}

    def main(self) -> None:
        """Check the flags, load the run, write the movie.

        Raises:
            InputError: the config, the run, a flag or the output cannot be used.
        """
        self.check()
        from sv4d_ns.movies.movies import MovieOptions, Subject, movie, write_movie
        from sv4d_ns.runs.open import load_run
        from sv4d_ns.utils.progress import bar
        from sv4d_ns.utils.threads import torch_threads, useful_threads

        run = load_run(self.load_config)
        subject = Subject(run.field, run.occupancy, run.views, canonical_time(run))
        options = MovieOptions(size=self.size, fps=self.fps, **self.options())
        made = movie(self.preset, subject, options)  # type: ignore[arg-type]
        with torch_threads(useful_threads()), bar(f"Rendering {self.output_path.name}") as progress:
            write_movie(self.output_path, made, self.preset, lambda done: progress(done, made.count))
        print(f"{self.output_path}: {made.count} pictures at {made.fps:g} per second.", flush=True)

    def check(self) -> None:
        """Refuse flags before anything is loaded."""
        from sv4d_ns.runs.open import check_config_path

        check_config_path(self.load_config)
        if self.output_path.suffix.lower() != ".mp4":
            raise InputError(f"--output-path {self.output_path} does not end in .mp4: movies are written as H.264 MP4.")
        if not 16 <= self.size <= 4096 or self.size % 2:
            raise InputError(f"--size {self.size} is not an even number of pixels from 16 to 4096: choose such a one.")
        if self.fps is not None and not 0 < self.fps <= 240:
            raise InputError(f"--fps {self.fps:g} is not a rate: give a number above 0, at most 240.")


@dataclass
class Orbit(_Render):
    """Once around the object at a frozen moment."""

    time: Optional[float] = None  # noqa: UP045
    """The moment, from 0 (first frame) to 1 (last); None takes the canonical one, where the object shows most."""
    elevation: float = 15.0
    """Degrees above the input view."""
    seconds: float = 3.0
    """Once around."""
    preset = "orbit"

    def options(self) -> dict[str, Any]:
        return {"time": self.time, "elevation_deg": self.elevation, "seconds": self.seconds}

    def check(self) -> None:
        super().check()
        if self.time is not None and not 0 <= self.time <= 1:
            raise InputError(f"--time {self.time:g} is outside the clip: give a number from 0 to 1.")
        if not 0 < self.seconds <= 600:
            raise InputError(f"--seconds {self.seconds:g} is no length: give a number above 0, at most 600.")


@dataclass
class Time(_Render):
    """The clip seen from one side."""

    azimuth: float = 45.0
    """Degrees from the input view, counter-clockwise seen from above."""
    elevation: float = 15.0
    """Degrees above the input view."""
    preset = "time"

    def options(self) -> dict[str, Any]:
        return {"azimuth_deg": self.azimuth, "elevation_deg": self.elevation}


@dataclass
class OrbitTime(_Render):
    """Once around the object while the clip passes."""

    elevation: float = 15.0
    """Degrees above the input view."""
    loops: int = 2
    """Times the clip passes."""
    preset = "orbit-time"

    def options(self) -> dict[str, Any]:
        return {"elevation_deg": self.elevation, "loops": self.loops}

    def check(self) -> None:
        super().check()
        if not 1 <= self.loops <= 100:
            raise InputError(f"--loops {self.loops} is no number of times: give 1 to 100.")


@dataclass
class SideBySide(_Render):
    """The input video beside the model at the input camera."""

    preset = "side-by-side"


@dataclass
class Overlay(_Render):
    """The model put back over the source video, where the object was cut out."""

    preset = "overlay"


COMMANDS: dict[str, Callable[..., _Render]] = {
    command.preset: command for command in (Orbit, Time, OrbitTime, SideBySide, Overlay)
}


def canonical_time(run: Any) -> float:
    """The moment an orbit shows: the field's canonical one, or of a field without one where the object is largest."""
    if hasattr(run.field.config, "canonical_time"):
        return float(run.field.config.canonical_time)
    from sv4d_ns.fitting.train_views import largest_silhouette

    return float(run.views.times[largest_silhouette(run.views)])


def command(arguments: Sequence[str]) -> None:
    """Parse and run `sv4d render PRESET ...`."""
    made: Any = tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="sv4d render", args=list(arguments))
    made.main()
