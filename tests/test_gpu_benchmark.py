"""`benchmarks/gpu.py` on a CPU at a small size: parts, resuming, what is kept of a part that fails, packs of assets."""

import json
import multiprocessing
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from glb_fixture import box, solid, waving

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import asset_pack
import gpu

from sv4d_ns.diffusion.bundled.network import VolumeDenoiser
from sv4d_ns.training_data.gltf_scene import load_scene
from sv4d_ns.utils.errors import InputError


def measure(folder: Path, *parts: str, **changes: Any) -> gpu.Measure:
    return gpu.Measure(folder, 5.0, "cpu", True, parts, workers=1, **changes)


STAND_IN = """
import ctypes, json, os, pathlib, signal, subprocess, sys, time

ctypes.CDLL(None).prctl(1, signal.SIGKILL)
words = sys.argv[1:]
name, out = words[words.index("--only") + 1], pathlib.Path(words[words.index("--out") + 1])
tried = out / f"{name}.tries"
tried.write_text(tried.read_text() + "x" if tried.is_file() else "x")
kept = {"rows": {"first": {"seconds": 1.5}}}
(out / f"{name}.json").write_text(json.dumps(kept))
first = len(tried.read_text()) == 1
if name == "fails" and first:
    sys.exit("no")
if name == "hangs" and first:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (out / "pids").write_text(f"{os.getpid()} {child.pid}")
    time.sleep(600)
kept["rows"]["second"] = {"not here": "a | b"}
(out / f"{name}.json").write_text(json.dumps({**kept, "finished": True}))
"""
"""A part's process that needs no torch: it fails, or hangs with a child of its own, at its first try."""


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, *names: str, minutes: float = 1.0) -> None:
    script = folder / "part.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(gpu, "__file__", str(script))
    monkeypatch.setattr(gpu, "PARTS", tuple(gpu.Part(name, lambda *_: None, minutes) for name in names))


def tries(folder: Path) -> dict[str, int]:
    return {path.stem: len(path.read_text()) for path in folder.glob("*.tries")}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_part_that_fails_or_hangs_is_noted_and_stops_no_other_and_only_it_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, "fails", "hangs", "works", minutes=0.05)
    measure(tmp_path, "fails", "hangs", "works").main()
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert "ended with 1" in kept["fails"]["ended"] and (tmp_path / "fails.log").read_text() == "no\n"
    assert kept["hangs"]["ended"] == "ended after 0.1 minutes"
    assert not any(alive(int(pid)) for pid in (tmp_path / "pids").read_text().split())
    assert [kept[name].get("finished", False) for name in ("fails", "hangs", "works")] == [False, False, True]
    assert all(part["rows"]["first"] == {"seconds": 1.5} for part in kept.values()), "what was noted before is kept"
    measure(tmp_path, "fails", "hangs", "works").main()
    measure(tmp_path, "fails", "hangs", "works").main()
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert all(part["finished"] for part in kept.values())
    assert tries(tmp_path) == {"fails": 2, "hangs": 2, "works": 1}
    assert "| second |  | a / b |" in (tmp_path / "gpu.md").read_text()


def test_a_killed_command_takes_its_part_with_it_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, "works", "hangs")
    process = multiprocessing.get_context("fork").Process(target=measure(tmp_path, "works", "hangs").main)
    process.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "pids").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.join()
    part, child = map(int, (tmp_path / "pids").read_text().split())
    while alive(part) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    assert not alive(part)
    measure(tmp_path, "works", "hangs").main()
    assert tries(tmp_path) == {"works": 1, "hangs": 2}
    assert all(part["finished"] for part in json.loads((tmp_path / "gpu.json").read_text()).values())


def test_a_part_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    measure(tmp_path, "precision").main()
    kept = json.loads((tmp_path / "gpu.json").read_text())["precision"]
    assert kept["finished"] and not kept["ended"], (tmp_path / "precision.log").read_text()
    assert kept["rows"]["bfloat16, native"]["mean relative difference"] < 0.05
    assert "| bfloat16, native |" in (tmp_path / "gpu.md").read_text()


@pytest.mark.parametrize("name", ["nvvs 12x4", "field"])
def test_every_part_runs_on_a_cpu(tmp_path: Path, name: str) -> None:
    part = next(part for part in gpu.PARTS if part.name == name)
    gpu.run_part(part, measure(tmp_path).setting(1.0))
    kept = gpu.result(tmp_path, part)
    assert kept["finished"] and kept["rows"]
    failed = {row for row, figures in kept["rows"].items() if "not here" in figures}
    assert not failed & {"step, native", "window, none", "stage 1"}
    assert gpu.tables({name: kept}).count("\n| ") > len(kept["rows"])


def test_training_goes_on_to_the_planned_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sv4d_ns.diffusion_training.bundled.train.sample_sheet", lambda *_: None)
    small = partial(VolumeDenoiser, 16, (8, 8, 16, 16), (16, 16, 8), 8, 1)
    monkeypatch.setattr("sv4d_ns.diffusion_training.bundled.train.VolumeDenoiser", small)
    part = gpu.PARTS[-1]
    (tmp_path / "plan.json").write_text(json.dumps({"steps": 2, "steps/s": 1.0}))
    gpu.run_part(part, measure(tmp_path).setting(2.0))
    row = gpu.result(tmp_path, part)["rows"]["training"]
    assert row["steps"] == row["of"] == 2 and (tmp_path / "bundled" / "model" / "model_index.json").is_file()


def test_unusable_calls_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--parts nothing is no part"):
        measure(tmp_path, "nothing").main()
    with pytest.raises(InputError, match="No GLB below"):
        asset_pack.pack(tmp_path, 10**6)


def test_a_pack_holds_as_many_assets_as_fit_animated_ones_first(tmp_path: Path) -> None:
    for folder in ("animated", "static"):
        (tmp_path / "assets" / folder).mkdir(parents=True)
    waving(tmp_path / "assets" / "animated" / "bird.glb")
    solid(tmp_path / "assets" / "static" / "stone.glb", box())
    everything, names = asset_pack.pack(tmp_path / "assets", 10**6)
    assert names == ["animated/bird", "static/stone"]
    (tmp_path / "all.pack").write_bytes(everything)
    asset_pack.unpack(tmp_path / "all.pack", tmp_path / "again")
    scenes = [load_scene(tmp_path / folder / "animated" / "bird.glb") for folder in ("assets", "again")]
    assert (scenes[0].positions == scenes[1].positions).all() and (scenes[0].clip_spans == scenes[1].clip_spans).all()
    first = asset_pack.pack(tmp_path / "assets", asset_pack.MARGIN + 4096)[1]
    assert first == ["animated/bird"] or len(everything) < asset_pack.MARGIN
