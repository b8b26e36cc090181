"""Two packages declare the script `ns-export`: who owns it after each order of installing and removing.

Real pip and uv work on throw-away environments. The packages are empty wheels made here that declare what the real
ones declare (read from the installed metadata), so nothing heavy is installed and no registry is asked.
docs/export.md states what is asserted here.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

OURS, THEIRS = "sv4d_ns.export.command", "nerfstudio.scripts.exporter"


def empty_wheel(folder: Path, name: str, version: str, requires: list[str]) -> Path:
    """A wheel with no code and the console scripts of the installed distribution `name`."""
    scripts = [entry for entry in distribution(name).entry_points if entry.group == "console_scripts"]
    module, info = name.replace("-", "_"), f"{name.replace('-', '_')}-{version}.dist-info"
    files = {
        f"{info}/METADATA": "\n".join(
            [
                "Metadata-Version: 2.1",
                f"Name: {name}",
                f"Version: {version}",
                *(f"Requires-Dist: {r}" for r in requires),
            ]
        ),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "\n".join(
            ["[console_scripts]", *(f"{entry.name} = {entry.value}" for entry in scripts)]
        ),
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    path = folder / f"{module}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file, text in files.items():
            wheel.writestr(file, text)
    return path


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheels")
    empty_wheel(folder, "nerfstudio", "1.1.5", [])
    empty_wheel(folder, "sv4d-ns", "0.1.0", ["nerfstudio==1.1.5"])
    return folder


def call(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=clean_environment())
    assert done.returncode == 0, done.stderr


def clean_environment() -> dict[str, str]:
    """Without settings that would lead pip or uv to other indexes or environments."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "UV_", "VIRTUAL_ENV"))}
    return kept | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "UV_NO_CONFIG": "1"}


class Environment:
    """A throw-away environment and the installer that works on it."""

    def __init__(self, tool: str, folder: Path, wheels: Path, uv: list[str]):
        self.tool, self.bin, self.uv = tool, folder / "bin", uv
        self.offline = ["--no-index", "--find-links", wheels]
        self.python = self.bin / "python"
        if tool == "pip":
            call(sys.executable, "-m", "venv", folder)
        else:
            call(*uv, "venv", "--python", sys.executable, folder)

    def _run(self, verb: str, *arguments: str | Path) -> None:
        if self.tool == "pip":
            call(self.python, "-m", "pip", verb, *arguments)
        else:
            call(*self.uv, "pip", verb, "--python", self.python, *arguments)

    def install(self, *packages: str) -> None:
        self._run("install", *self.offline, *packages)

    def reinstall(self, package: str) -> None:
        force = ["--force-reinstall"] if self.tool == "pip" else ["--reinstall"]
        self._run("install", *self.offline, *force, "--no-deps", package)

    def uninstall(self, package: str) -> None:
        self._run("uninstall", *(["-y"] if self.tool == "pip" else []), package)

    def owner(self) -> str | None:
        """The module the script `ns-export` runs, or None when there is no such script."""
        script = self.bin / "ns-export"
        if not script.exists():
            return None
        return next(module for module in (OURS, THEIRS) if f"from {module} import" in script.read_text())


@pytest.fixture(scope="module")
def uv(tmp_path_factory) -> list[str]:
    if shutil.which("uv"):
        return ["uv"]
    folder = tmp_path_factory.mktemp("uv")
    call(sys.executable, "-m", "venv", folder)
    fetched = subprocess.run([folder / "bin" / "pip", "install", "-q", "uv"], capture_output=True, text=True)
    if fetched.returncode != 0:
        pytest.skip(f"uv is not installed and the registry cannot be reached: {fetched.stderr.strip()[-200:]}")
    return [str(folder / "bin" / "uv")]


@pytest.fixture(params=["pip", "uv"])
def environment(request, tmp_path, wheels):
    uv = request.getfixturevalue("uv") if request.param == "uv" else []
    return Environment(request.param, tmp_path / "env", wheels, uv)


def test_the_package_installed_last_owns_the_script(environment):
    environment.install("nerfstudio")
    assert environment.owner() == THEIRS
    environment.install("sv4d-ns")
    assert environment.owner() == OURS
    # reinstalling or upgrading nerfstudio takes the script; ours comes back with a reinstall of ours
    environment.reinstall("nerfstudio")
    assert environment.owner() == THEIRS
    environment.reinstall("sv4d-ns")
    assert environment.owner() == OURS
    # removing ours takes the file along although nerfstudio stays; its reinstall brings it back
    environment.uninstall("sv4d-ns")
    assert environment.owner() is None
    environment.reinstall("nerfstudio")
    assert environment.owner() == THEIRS


def test_both_in_one_command(environment):
    environment.install("sv4d-ns")
    if environment.tool == "pip":
        assert environment.owner() == OURS  # pip installs what is needed first, so ours comes last
    else:
        # uv installs in parallel and the slower package wins: with the real wheels that is nerfstudio
        assert environment.owner() in (OURS, THEIRS)
    environment.reinstall("sv4d-ns")
    assert environment.owner() == OURS
    environment.uninstall("nerfstudio")
    assert environment.owner() is None
    assert (environment.bin / "sv4d").exists()
