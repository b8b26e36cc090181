"""The `sv4d` command: this package's commands without nerfstudio's script names.

Only the first word is read here; each command imports what it needs when it runs, so `sv4d --help` is quick.
"""

import importlib
import sys
from collections.abc import Sequence

from sv4d_ns import __version__
from sv4d_ns.utils.errors import one_sentence_errors
from sv4d_ns.utils.terminal import accept_any_encoding, files_are_no_flags

# command: (what it does, "module:function" that takes the arguments after the command's name)
COMMANDS: dict[str, tuple[str, str]] = {
    "app": ("Open a page on this machine: drop a video, watch the run, play the result.", "sv4d_ns.app.server:command"),
    "batch": ("Make a 4D asset from each of many videos, on one machine or many.", "sv4d_ns.cli.batch:command"),
    "cache": ("List, verify and prune what runs have left on the disk.", "sv4d_ns.runs.cache:command"),
    "doctor": ("Say what the main job makes of a video, and what may spoil the result.", "sv4d_ns.cli.doctor:command"),
    "convert": (
        "Convert a released SV4D 2.0 file into a folder that diffusers loads.",
        "sv4d_ns.diffusion.weights.convert:command",
    ),
    "data": (
        "Render training data from assets or creatures ('sv4d data render'), and sort it out ('sv4d data curate').",
        "sv4d_ns.training_data.command:command",
    ),
    "evaluate": (
        "Judge a run or a view grid by a named protocol, or compare two: JSON and one HTML page.",
        "sv4d_ns.evaluation.command:run",
    ),
    "export": (
        "Write files from a finished run: 'sv4d export mesh' and all of nerfstudio's ns-export.",
        "sv4d_ns.export.command:run",
    ),
    "plan": (
        "Expected memory and time of the diffusion model on a device, before any weight is loaded.",
        "sv4d_ns.diffusion.planner.command:command",
    ),
    "render": (
        "Write a movie of a run: orbit, time, orbit-time, side-by-side or overlay.",
        "sv4d_ns.movies.command:command",
    ),
    "train": (
        "Train a multi-view video diffusion model, from scratch or from existing weights.",
        "sv4d_ns.diffusion_training.train:command",
    ),
}


def _run(target: str, arguments: Sequence[str]) -> None:
    """Import `module:function` and call it with the arguments."""
    module, function = target.split(":")
    getattr(importlib.import_module(module), function)(arguments)


def usage() -> str:
    """The text of `sv4d --help`."""
    lines = [f"  {name:<10}{text}" for name, (text, _) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: sv4d [-h] [--version] COMMAND ...",
            "",
            "One video of an object becomes an animated 3D model. The main job is 'ns-train sv4d --data video.mp4'.",
            "",
            *lines,
            "",
            "'sv4d COMMAND --help' lists a command's flags.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The `sv4d` console script; returns the exit code."""
    accept_any_encoding()
    arguments = files_are_no_flags(sys.argv[1:] if arguments is None else arguments)
    word, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if word in ("-h", "--help"):
        print(usage())
        return 0
    if word == "--version":
        print(f"sv4d_ns {__version__}")
        return 0
    if word not in COMMANDS:
        print(f"Error: sv4d has no command '{word}': 'sv4d --help' lists them.", file=sys.stderr)
        return 2
    with one_sentence_errors(rest):
        _run(COMMANDS[word][1], rest)
    return 0
