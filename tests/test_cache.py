"""`sv4d cache`: what is there, what is whole, what may go."""

import json
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from sv4d_ns.cli.main import main
from sv4d_ns.diffusion.window_store import WindowStore
from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.runs.cache import WINDOWS, entries, flaws, stale_files
from sv4d_ns.runs.layout import STAGES, SUMMARY_FILE, record_run, release_run
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.files import TEMPORARY
from sv4d_ns.views.grid import ViewGrid

KEY = "0123456789abcdef" * 2


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    return make_outputs(tmp_path / "outputs")


def make_outputs(folder: Path) -> Path:
    """A finished run, an unfinished one, and the windows both share."""
    runs = folder / "video" / "sv4d"
    for name in ("first", "second"):
        record_run(runs / name, name)
        release_run(runs / name)
    pixels = np.random.default_rng(0).integers(0, 255, (2, 9, 16, 16, 4), np.uint8)
    ViewGrid(pixels[:, 0], pixels[:, 1:], ViewPlan.BUNDLED, fps=10).save(runs / "first" / "views")
    (runs / "first" / "nerfstudio_models").mkdir()
    torch.save({"step": 3, "x": torch.rand(9999)}, runs / "first" / "nerfstudio_models" / "step-000000003.ckpt")
    (runs / "first" / SUMMARY_FILE).write_text("{}")
    WindowStore(runs / WINDOWS / KEY).save("window000", "key", torch.rand(2, 3))
    return folder


def test_list_names_every_run_and_window(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [(entry.path.name, entry.state) for entry in entries(outputs)] == [
        (KEY, "windows"),
        ("first", "finished"),
        ("second", "unfinished"),
    ]
    main(["cache", "list", str(outputs)])
    assert capsys.readouterr().out.splitlines()[-1].endswith("in 3 folders")
    with pytest.raises(InputError, match="is not a folder"):
        entries(outputs / "nothing")


def test_verify_names_every_damaged_file(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not [flaw for entry in entries(outputs) for flaw in flaws(entry)]
    files = [path for path in outputs.rglob("*") if path.suffix in (".ckpt", ".safetensors", ".png")]
    broken = {next(path for path in files if path.suffix == suffix) for suffix in (".ckpt", ".safetensors", ".png")}
    for path in broken:
        data = bytearray(path.read_bytes())
        data[len(data) * 2 // 3] ^= 0xFF
        path.write_bytes(data)
    with pytest.raises(SystemExit, match=r"3 files below .* are damaged"):
        main(["cache", "verify", str(outputs)])
    said = capsys.readouterr().out
    assert all(path.name in said for path in broken)


def test_verify_names_kept_normals_that_are_none(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = outputs / "video" / "sv4d" / WINDOWS / "normals" / f"{KEY}.npy"
    kept.parent.mkdir()
    np.save(kept, np.zeros((2, 4, 4, 3), np.float16))
    assert not [flaw for entry in entries(outputs) for flaw in flaws(entry)]
    whole = kept.read_bytes()
    for content in (b"garbage", b"PK\x03\x04garbage", whole[: len(whole) // 2]):
        kept.write_bytes(content)
        with pytest.raises(SystemExit, match=r"1 files below .* are damaged"):
            main(["cache", "verify", str(outputs)])
        assert f"{kept} holds no estimated normals" in capsys.readouterr().out


def make_old(path: Path) -> None:
    os.utime(path, (0, 0))


@pytest.mark.parametrize("lock", [".app.lock", ".batch.lock"])
def test_prune_leaves_what_an_app_or_a_batch_is_writing(outputs: Path, lock: str) -> None:
    files = [outputs / f"{TEMPORARY}upload-1", outputs / "job" / f"{TEMPORARY}model.glb"]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"half")
        make_old(file)
    with FileLock(outputs / lock):
        assert not stale_files(outputs)
    assert stale_files(outputs) == files


def test_prune_keeps_finished_runs_and_asks_first(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (outputs / "video" / "sv4d" / "second" / "checkpoint.partial").write_bytes(b"half")
    (outputs / "video" / "sv4d" / f"{TEMPORARY}views").mkdir()
    assert not stale_files(outputs), "somebody may still be writing them"
    make_old(outputs / "video" / "sv4d" / "second" / "checkpoint.partial")
    make_old(outputs / "video" / "sv4d" / f"{TEMPORARY}views")
    assert len(stale_files(outputs)) == 2
    before = sorted(outputs.rglob("*"))
    main(["cache", "prune", str(outputs)])
    assert sorted(outputs.rglob("*")) == before and "would be deleted" in capsys.readouterr().out
    main(["cache", "prune", str(outputs), "--yes"])
    assert [(entry.path.name, entry.state) for entry in entries(outputs)] == [
        ("first", "finished"),
        ("second", "unfinished"),
    ]
    assert not stale_files(outputs)
    main(["cache", "prune", str(outputs), "--unfinished", "--yes"])
    assert [entry.path.name for entry in entries(outputs)] == ["first"]
    assert (outputs / "video" / "sv4d" / "first" / "views" / "grid.json").is_file()


FOREIGN_NAMES = [
    ".DS_Store", ".git", ".generated", ".env", ".ssh", ".venv", ".writable", "._config.yml", ".windows", ".stages",
    ".Trash-1000", ".views-a1b2c3d4", "notes.txt", "run.json", "checkpoint.partial", "model.ckpt", "window.safetensors",
    "my movie.mp4", "images", "data",
]  # fmt: skip
PLACES = ["", "video", "video/sv4d", "video/sv4d/first", "video/sv4d/second", "video/sv4d/second/views",
          "video/sv4d/second/nerfstudio_models", f"video/sv4d/.windows/{KEY}", "video/sv4d/.windows", "mine/.git",
          "mine"]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    files=st.lists(
        st.tuples(
            st.sampled_from(PLACES),
            st.lists(
                st.one_of(st.sampled_from(FOREIGN_NAMES), st.from_regex(r"\.?[a-z0-9_-]{1,12}", fullmatch=True)),
                min_size=1,
                max_size=3,
            ),
        ),
        max_size=8,
    ),
    unfinished=st.booleans(),
)
def test_prune_deletes_no_file_of_others(files: list[tuple[str, list[str]]], unfinished: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        outputs = make_outputs(Path(folder) / "outputs")
        own = {path for path in outputs.rglob("*") if path.is_file()}
        foreign = set()
        for place, names in files:
            path = outputs.joinpath(place, *names)
            if path in own or path.is_dir() or any(parent.is_file() for parent in path.parents):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("mine")
            foreign.add(path)
        # the one name that is ours wherever a run is: what a killed process left of a checkpoint
        foreign.discard(outputs / "video/sv4d/first/checkpoint.partial")
        foreign.discard(outputs / "video/sv4d/second/checkpoint.partial")
        main(["cache", "prune", str(outputs), "--yes", *(["--unfinished"] if unfinished else [])])
        assert all(path.read_text() == "mine" for path in foreign)
        assert not (outputs / "video" / "sv4d" / WINDOWS / KEY / "window000.safetensors").exists()
        kept = outputs / "video" / "sv4d" / "first"
        assert (kept / "views" / "grid.json").is_file() and list((kept / "nerfstudio_models").iterdir())


def test_prune_leaves_repositories_trainings_and_links_alone(
    outputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["git", "init", "--quiet", str(outputs)], check=True)
    (outputs / ".generated").mkdir()
    (outputs / ".generated" / "fox.png").write_bytes(b"kept")
    training = outputs / "training"  # `sv4d train` has a run.json, too
    training.mkdir()
    (training / "run.json").write_text(json.dumps({"settings": {}, "changes": []}))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "window000.safetensors").write_bytes(b"somebody's")
    runs = outputs / "video" / "sv4d"
    (runs / STAGES).mkdir()
    (runs / STAGES / KEY).symlink_to(elsewhere)
    (runs / "second" / "thoughts.txt").write_text("of mine")
    before = {path for path in outputs.rglob("*") if path.is_file()}
    main(["cache", "prune", str(outputs), "--yes", "--unfinished"])
    gone = {path.relative_to(runs).as_posix() for path in before if not path.exists()}
    assert gone == {f"{WINDOWS}/{KEY}/window000.safetensors", "second/run.json", "second/run.lock"}
    assert (elsewhere / "window000.safetensors").exists() and (training / "run.json").exists()
    assert f"{runs / 'second'} stays, because it holds files that no run has written." in capsys.readouterr().out
