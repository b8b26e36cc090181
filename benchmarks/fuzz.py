"""Coverage-guided fuzzing of the loaders of files from strangers, for as long as you like.

    pip install atheris
    python benchmarks/fuzz.py cameras --seconds 120

Targets: mp4, gif, png (video reader), grid, transforms (grid loader), cameras, checkpoint, config. A loader has to
return or raise `InputError` and to write nothing; anything else ends the run with the input that did it in the current
folder. The libraries' own C code (FFmpeg, Pillow, torch) is not instrumented.
"""

import sys
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))


def main(
    target: Annotated[
        Literal["mp4", "gif", "png", "grid", "transforms", "cameras", "checkpoint", "config"], tyro.conf.Positional
    ],
    seconds: int = 120,
) -> None:
    """Fuzz one target.

    Args:
        target: Which loader.
        seconds: How long.
    """
    try:
        import atheris
    except ImportError:
        raise SystemExit("Error: this needs atheris: pip install atheris") from None
    with atheris.instrument_imports(include=["sv4d_ns", "json"]):
        from fuzz_targets import TARGETS, example
    with tempfile.TemporaryDirectory() as name:
        folder, seeds, work = (Path(name) / part for part in ("good", "seeds", "work"))
        for place in (folder, seeds, work):
            place.mkdir()
        (seeds / "example").write_bytes(example(target, folder))
        run = TARGETS[target]
        options = [f"-max_total_time={seconds}", "-timeout=60", "-rss_limit_mb=4000", "-print_final_stats=1"]
        atheris.Setup([sys.argv[0], *options, str(seeds)], lambda data: run(data, work))
        atheris.Fuzz()


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
