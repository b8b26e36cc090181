"""Windows of long videos against recordings of the reference's scripts."""

import parity_folder as folder
import pytest

from sv4d_ns.diffusion.windows import Window, WindowStride, plan_windows
from sv4d_ns.errors import InputError

RULES = {
    "sv4d2|stride=T (clone)": (12, WindowStride.RELEASED_T),
    "sv4d2|stride=T-1 (upstream HEAD)": (12, WindowStride.RELEASED_T_MINUS_1),
    "sv4d2_8views|stride=T-1": (5, WindowStride.RELEASED_FULL_WINDOWS),
}


@folder.needs("windows_and_cameras.json")
@pytest.mark.parametrize("name", RULES)
def test_released_rules(name):
    size, rule = RULES[name]
    cases = folder.read_json("windows_and_cameras.json")[name]
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


def owners(windows: list[Window]) -> list[int]:
    last = {frame: index for index, window in enumerate(windows) for frame in window.frames}
    return [last[frame] for frame in sorted(last)]
