"""`benchmarks/gpu.py` on a CPU at a small size: parts, resuming, what is kept of a part that fails, packs of assets."""

import json
import sys
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


def test_a_part_is_skipped_once_it_is_finished_and_tried_again_where_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def fails_once(setting: Any, note: Any) -> None:
        tries.append(setting.minutes)
        note("first", {"seconds": 1.5})
        if len(tries) == 1:
            raise RuntimeError("no")
        note("second", {"not here": "a | b"})

    part = gpu.Part("made up", fails_once, 2.0)
    monkeypatch.setattr(gpu, "PARTS", (part,))

    def here(command: list[str], **_: Any) -> Any:
        code = 0
        try:
            gpu.main(command[2:])
        except RuntimeError:
            code = 1
        return type("Done", (), {"returncode": code})

    monkeypatch.setattr(gpu.subprocess, "run", here)
    for finished in (False, True, True):
        measure(tmp_path, "made up").main()
        kept = json.loads((tmp_path / "gpu.json").read_text())["made up"]
        assert kept.get("finished", False) is finished and kept["rows"]["first"] == {"seconds": 1.5}
    assert tries == [2.0, 2.0]
    assert "| second |  | a / b |" in (tmp_path / "gpu.md").read_text()


@pytest.mark.parametrize("name", ["precision", "nvvs 12x4", "field"])
def test_every_part_runs_on_a_cpu(tmp_path: Path, name: str) -> None:
    part = next(part for part in gpu.PARTS if part.name == name)
    gpu.run_part(part, measure(tmp_path).setting(1.0))
    kept = gpu.result(tmp_path, part)
    assert kept["finished"] and kept["rows"]
    failed = {row for row, figures in kept["rows"].items() if "not here" in figures}
    assert not failed & {"bfloat16, native", "step, native", "window, none", "stage 1"}
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
