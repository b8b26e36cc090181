"""Windows of long videos and default cameras against recordings of the reference's scripts."""

import parity_folder as folder
import pytest
import torch

from sv4d_ns.diffusion.sv4d.conditioning import camera_angles
from sv4d_ns.diffusion.sv4d.windows import Window, WindowStride, plan_windows
from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.utils.errors import InputError

FOUR_VIEWS = ViewPlan.ring((60.0, 120.0, 180.0, 240.0))

RECORDING = "windows_and_cameras.json"
WINDOW_LENGTHS = {"sv4d2": 12, "sv4d2_8views": 5}
PLANS = {"sv4d2": FOUR_VIEWS, "sv4d2_8views": ViewPlan.OFFICIAL_8}


def recorded_rules() -> list[str]:
    return [name for name in folder.read_json(RECORDING) if "|stride=" in name] if folder.has(RECORDING) else []


def rule_of(name: str) -> tuple[int, WindowStride]:
    """Window length and rule of `<model>|stride=<stride> (<version>)`."""
    model, stride = name.split("|stride=")
    if model == "sv4d2_8views":
        return WINDOW_LENGTHS[model], WindowStride.RELEASED_FULL_WINDOWS
    rules = {"T": WindowStride.RELEASED_T, "T-1": WindowStride.RELEASED_T_MINUS_1}
    return WINDOW_LENGTHS[model], rules[stride.split(" ")[0]]


@pytest.mark.parametrize("name", recorded_rules())
def test_released_rules(name):
    size, rule = rule_of(name)
    cases = folder.read_json(RECORDING)[name]
    assert cases
    for case in cases:
        if case["error"] is not None:
            with pytest.raises(InputError, match=WindowStride.FIXED.value):
                plan_windows(case["n_frames"], size, rule)
            continue
        windows = plan_windows(case["n_frames"], size, rule)
        assert len(windows) == len(case["windows"])
        for window, reference in zip(windows, case["windows"], strict=True):
            assert window.start == reference["t0"]
            assert [window.frames[0], window.frames[-1]] == reference["frames"]
            assert (window.anchor is not None) == reference["cond_mv"]
            if reference["cond_mv"]:
                assert reference["cond_view"] == {"window": window.anchor, "frame": window.start}
        if windows:
            assert owners(windows) == case["final_window_of_each_frame"]
            assert len(owners(windows)) == case["output_frames"]


def owners(windows: list[Window]) -> list[int]:
    last = {frame: index for index, window in enumerate(windows) for frame in window.frames}
    return [last[frame] for frame in sorted(last)]


def assert_angles(azimuths_deg, elevations_deg, recorded) -> None:
    polar, azimuth = camera_angles(azimuths_deg, elevations_deg)
    folder.assert_within(polar, torch.tensor(recorded["polar_rad"], dtype=torch.float64), 1e-9)
    folder.assert_within(azimuth, torch.tensor(recorded["azimuth_rad"], dtype=torch.float64), 1e-9)


def test_default_cameras():
    folder.need(RECORDING)
    for name, recorded in folder.read_json(RECORDING).get("default_cameras", {}).items():
        assert_angles(PLANS[name].azimuths_deg, PLANS[name].elevations_deg, recorded)


def test_custom_cameras():
    """Angles are relative to the first, which is the input view."""
    folder.need(RECORDING)
    for name, recorded in folder.read_json(RECORDING).items():
        if name.startswith("custom_cameras"):
            relative = [[v - values[0] for v in values[1:]] for values in _lists(recorded)]
            assert_angles(*relative, recorded)


def _lists(recorded) -> tuple[list[float], list[float]]:
    return recorded["azimuths_deg"], recorded["elevations_deg"]
