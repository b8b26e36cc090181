"""The tables of the field's benchmarks: what is compared with what, and that a run that was cut keeps its part."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from evaluation_fixture import write_case

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import field
import field_ablation


def result(case: str, variant: str, psnr: float) -> dict[str, Any]:
    figures = {"elev_psnr": psnr, "elev_iou": 0.9, "chamfer": 0.01, "track": 0.03, "cpu_s": 50.0}
    return {"case": case, "variant": variant, "part": "loss", "settings": {}, **figures}


def test_a_variant_is_compared_with_the_whole_method_on_its_own_cases() -> None:
    """A cut run has the whole method on two cases and a variant on one of them."""
    rows = field_ablation.table([result("a", "whole", 20.0), result("b", "whole", 30.0), result("a", "no mask", 19.0)])
    _, _, whole, variant = rows.splitlines()
    assert whole.startswith("| whole | loss | 2 | 25.00 |")
    assert variant.startswith("| no mask | loss | 1 | 19.00 (-1.00) | 0.900 (+0.000) |")


def test_every_variant_names_settings_that_exist_and_changes_something() -> None:
    made = [
        [
            field_ablation.replace(kind(), **getattr(variant, part))
            for part, kind in (
                ("fit", field_ablation.FitConfig),
                ("losses", field_ablation.LossWeights),
                ("field", field_ablation.DeformableFieldConfig),
                ("schedule", field_ablation.ScheduleConfig),
                ("batch", field_ablation.BatchConfig),
            )
        ]
        for variant in field_ablation.VARIANTS
    ]
    assert all(made[number] not in made[:number] for number in range(len(made)))
    assert field_ablation.VARIANTS[0].name == "whole"


def test_finished_fits_are_not_fitted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_case(tmp_path / "cases" / "ball")
    fitted = []

    def fit(views: Any, config: Any, *_: Any) -> tuple[None, None, dict[str, float]]:
        fitted.append(config.steps)
        return None, None, {"cpu_s": 1.0}

    monkeypatch.setattr(field_ablation, "fit", fit)
    monkeypatch.setattr(field_ablation, "evaluate", lambda *_: dict.fromkeys(field_ablation.FIGURES, 1.0))
    ablation = field_ablation.FieldAblation(tmp_path / "cases", tmp_path / "out", variants=("no mask",), steps=3)
    for _ in range(2):
        ablation.main()
    assert fitted == [3, 3], "the whole method and the variant, once each"
    assert len(json.loads((tmp_path / "out" / "ablation.json").read_text())) == 2
    assert "| no mask |" in capsys.readouterr().out


def test_time_to_a_psnr_is_interpolated_in_log_time_and_a_cut_report_is_a_table() -> None:
    curve = [{"seconds": 1.0, "psnr": 10.0, "steps": 1}, {"seconds": 100.0, "psnr": 20.0, "steps": 9}]
    assert field.seconds_to(curve, 15.0) == pytest.approx(10.0)
    assert field.seconds_to(curve, 9.0) == 1.0 and field.seconds_to(curve, 21.0) is None
    ours = {"seconds_per_step": 0.1, "samples_per_step": 7, "curve": curve}
    text = field.tables({"ours": ours, "literal": {**ours, "curve": [{"seconds": 100.0, "psnr": 15.0, "steps": 2}]}})
    assert "reached in 10 s, 10 times sooner" in text and "rays" not in text
