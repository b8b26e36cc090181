"""The wheel: what is in it, and that it works outside the checkout, with default flags but for length."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_BYTES = 25_000_000
PICTURES = {".png", ".webp", ".jpg", ".gif", ".mp4"}


def run(command: list[str], folder: Path, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the files git knows, as a release is."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], ROOT).split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            copy = folder / "source" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), "-q"]
    run([*build, str(folder / "source")], folder)
    (found,) = folder.glob("*.whl")
    return found


def test_it_holds_what_runs_need_and_no_pictures(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if Path(name).suffix in PICTURES]
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "examples"))]
    for wanted in ("diffusion_pytorch_model.safetensors", "u2netp.safetensors", "viewer.html", "sv4d.py"):
        assert any(name.endswith(wanted) for name in names), wanted
    assert wheel.stat().st_size < MOST_BYTES


def test_every_package_is_in_it(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = [path.relative_to(ROOT) for path in (ROOT / "sv4d_ns").rglob("*.py")]
    sources += [Path("sv4d_ns") / path.relative_to(ROOT) for path in (ROOT / "method_configs").rglob("*.py")]
    assert not [str(path) for path in sources if path.as_posix() not in names]


def test_it_runs_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    # the tested dependencies lie in this interpreter's site-packages; a plain path does not bring its editable installs
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    run([str(python), "-m", "pip", "install", "--no-deps", "-q", str(wheel)], tmp_path)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    (tmp_path / "video.mp4").write_bytes((ROOT / "assets" / "sample.mp4").read_bytes())

    where = run([str(python), "-c", "import sv4d_ns; print(sv4d_ns.__file__)"], tmp_path)
    assert Path(where.strip()).is_relative_to(site)
    run([str(tmp_path / "venv" / "bin" / "sv4d"), "doctor", "video.mp4"], tmp_path)
    train = "from nerfstudio.scripts.train import entrypoint; entrypoint()"
    length = ["--max-num-iterations", "4", "--pipeline.datamanager.max-frames", "3", "--pipeline.movies"]
    flags = ["sv4d", "--data", "video.mp4", *length]
    said = run([str(python), "-c", train, *flags], tmp_path)
    assert "Finished. Next:" in said
    (config,) = tmp_path.glob("outputs/video/sv4d/*/config.yml")
    assert config.is_file()
