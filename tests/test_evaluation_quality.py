"""The benchmark that judges the main job: a fit of a small case through ns-train's own configuration, and its table."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from evaluation_fixture import write_case

from sv4d_ns.utils.errors import InputError
from sv4d_ns.views.grid import ViewGrid

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import quality

TINY = "--max-num-iterations 400 --pipeline.datamanager.train-num-rays-per-batch 128 --pipeline.datamanager.patches 0"


def test_a_case_is_fitted_within_its_budget_and_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The steps run in this process; that each gets its own is `in_own_process`, exchanged for a plain call."""
    write_case(tmp_path / "cases" / "ball")
    monkeypatch.setattr(quality, "in_own_process", lambda function, *arguments: function(*arguments))
    # the clock says 40 s for each look at it: the budget of 2 minutes ends the fit after a few steps
    seconds = iter(range(0, 10**6, 40))
    monkeypatch.setattr("sv4d_ns.field.images.SHEET_SIZE", 8)  # the sheet at the end of a run is not judged
    monkeypatch.setattr("sv4d_ns.evaluation.geometry.SURFACE_RESOLUTION", 24)
    monkeypatch.setattr(quality, "budget_clock", lambda kind: float(next(seconds)))
    settings = quality.Quality(
        cases=tmp_path / "cases", out=tmp_path / "out", minutes=2.0, size=32, train_args=TINY, align=True
    )
    settings.main()
    place = tmp_path / "out" / "truth"
    [result] = json.loads((place / "results.json").read_text())
    assert result["cut_by_budget"] and result["steps"] == 3, "the step that passes the budget is the last"
    grid = ViewGrid.load(place / "ball" / "grid")
    assert grid.novel_views.shape == (5, 9, 32, 32, 4), "the true views, at the size that was asked for"
    assert 5 < result["elev_psnr"] < 60 and 0 <= result["elev_iou"] <= 1 and result["peak_mb"] > 100
    assert result["elev_psnr"] == result["unused_psnr"], "the only view that was not used"
    assert {"chamfer", "track", "track_if_static", "dssim_box"} <= result.keys()
    assert np.isfinite(result["chamfer"]) and "nv8_psnr" not in result
    assert (place / "ball" / "pictures" / "az045_el+30.png").is_file()
    table = (place / "table.md").read_text()
    assert table.splitlines()[2].startswith("| ball | ") and table.splitlines()[3].startswith("| mean | ")
    # a second run reuses the finished case; other settings do not
    monkeypatch.setattr(quality, "in_own_process", lambda *_: pytest.fail("fitted again"))
    settings.main()
    assert "| ball |" in capsys.readouterr().out


def test_the_table_leaves_a_dash_where_a_case_has_no_such_truth() -> None:
    rows = quality.table([{"case": "a", "elev_psnr": 20.0, "chamfer": 0.01}, {"case": "b", "elev_psnr": 30.0}])
    header, _, first, second, mean = rows.splitlines()
    assert header == "| case | PSNR elev, dB | Chamfer |"
    assert (first, second) == ("| a | 20.00 | 0.0100 |", "| b | 30.00 | - |")
    assert mean == "| mean | 25.00 | 0.0100 |"


def test_wrong_settings_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--minutes 0"):
        quality.Quality(cases=tmp_path, out=tmp_path, minutes=0).main()
    with pytest.raises(InputError, match="holds no case"):
        quality.Quality(cases=tmp_path, out=tmp_path / "out").main()
    assert not (tmp_path / "out").exists()
