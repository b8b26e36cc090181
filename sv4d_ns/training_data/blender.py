"""Blender, in a process of its own for each asset: found, started, timed out, and asked for one sentence on failure."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from sv4d_ns.utils.errors import InputError, install_extra

WORKER = Path(__file__).with_name("blender_worker.py")
LAST_LINES = 3


class AssetError(Exception):
    """An asset cannot be rendered; the message says why."""


def find_blender(given: Path | None) -> list[str]:
    """The command that runs a Python file with Blender: the given one, this interpreter, or `blender` on the PATH.

    Raises:
        InputError: when there is none.
    """
    if given is not None:
        if shutil.which(str(given)) is None:
            raise InputError(f"--blender-python {given} cannot be run: give a Python that has bpy, or Blender itself.")
        return _command(str(given))
    if importlib.util.find_spec("bpy") is not None:
        return [sys.executable]
    if (found := shutil.which("blender")) is not None:
        return _command(found)
    raise InputError(
        f"Rendering assets needs Blender: {install_extra('render')}, or name a Python that has bpy (or Blender "
        "itself) with --blender-python; --renderer compiled draws the GLB files alone, and procedural:SEED:COUNT needs "
        "neither."
    )


def _command(program: str) -> list[str]:
    return [program, "-b", "--python-exit-code", "1", "--python"] if "blender" in Path(program).name else [program]


def run_job(blender: list[str], job: dict[str, Any], folder: Path, timeout_s: float) -> dict[str, Any]:
    """Render one asset into `folder`; returns what `blender_worker.run` does.

    Raises:
        AssetError: when the asset cannot be rendered, Blender crashes, or takes too long.
    """
    result = folder / "result.json"
    job_file = folder / "job.json"
    job_file.write_text(json.dumps({**job, "folder": str(folder), "result": str(result)}))
    separator = ["--"] if "--python" in blender else []
    try:
        finished = subprocess.run(
            [*blender, str(WORKER), *separator, str(job_file)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=timeout_s,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise AssetError(f"it took longer than {timeout_s:g} s") from error
    if not result.is_file():
        lines = [line.strip() for line in finished.stdout.splitlines() if line.strip()]
        said = " / ".join(lines[-LAST_LINES:]) or "no message"
        raise AssetError(f"Blender ended with code {finished.returncode} ({said})")
    values: dict[str, Any] = json.loads(result.read_text())
    if "error" in values:
        raise AssetError(values["error"])
    return values
