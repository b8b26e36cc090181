"""`sv4d cache`: what is there, what is whole, what may go."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sv4d_ns.cli.main import main
from sv4d_ns.diffusion.window_store import WindowStore
from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.runs.cache import WINDOWS, entries, flaws, leftovers
from sv4d_ns.runs.layout import SUMMARY_FILE, record_run, release_run
from sv4d_ns.utils.errors import InputError
from sv4d_ns.views.grid import ViewGrid


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """A finished run, an unfinished one, and the windows both share."""
    runs = tmp_path / "outputs" / "video" / "sv4d"
    for name in ("first", "second"):
        record_run(runs / name, name)
        release_run(runs / name)
    pixels = np.random.default_rng(0).integers(0, 255, (2, 9, 16, 16, 4), np.uint8)
    ViewGrid(pixels[:, 0], pixels[:, 1:], ViewPlan.BUNDLED, fps=10).save(runs / "first" / "views")
    (runs / "first" / "nerfstudio_models").mkdir()
    torch.save({"step": 3, "x": torch.rand(9999)}, runs / "first" / "nerfstudio_models" / "step-000000003.ckpt")
    (runs / "first" / SUMMARY_FILE).write_text("{}")
    WindowStore(runs / WINDOWS / "abc").save("window000", "key", torch.rand(2, 3))
    return tmp_path / "outputs"


def test_list_names_every_run_and_window(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [(entry.path.name, entry.state) for entry in entries(outputs)] == [
        ("abc", "windows"),
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


def test_prune_keeps_finished_runs_and_asks_first(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (outputs / "video" / "sv4d" / "second" / "checkpoint.partial").write_bytes(b"half")
    (outputs / "video" / "sv4d" / ".views-partial").mkdir()
    assert len(leftovers(outputs)) == 2
    before = sorted(outputs.rglob("*"))
    main(["cache", "prune", str(outputs)])
    assert sorted(outputs.rglob("*")) == before and "would be deleted" in capsys.readouterr().out
    main(["cache", "prune", str(outputs), "--yes"])
    assert [(entry.path.name, entry.state) for entry in entries(outputs)] == [
        ("first", "finished"),
        ("second", "unfinished"),
    ]
    assert not leftovers(outputs)
    main(["cache", "prune", str(outputs), "--unfinished", "--yes"])
    assert [entry.path.name for entry in entries(outputs)] == ["first"]
    assert (outputs / "video" / "sv4d" / "first" / "views" / "grid.json").is_file()
