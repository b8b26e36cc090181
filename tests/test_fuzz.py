"""Loaders of files from strangers under damage and nonsense, in small doses (benchmarks/fuzz.py runs for longer)."""

import json
from pathlib import Path
from typing import Any

import pytest
from fuzz_targets import TARGETS, example
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.video.crop import Framing

DOSE = settings(
    max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
BINARY = ("mp4", "gif", "png", "checkpoint")

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("good")
    return {name: example(name, folder) for name in TARGETS}


@pytest.mark.parametrize("name", TARGETS)
def test_good_files_pass(tmp_path: Path, good: dict[str, bytes], name: str) -> None:
    TARGETS[name](good[name], tmp_path)


@pytest.mark.parametrize("name", BINARY)
@DOSE
@given(data=st.data())
def test_damaged_bytes(tmp_path: Path, good: dict[str, bytes], name: str, data: st.DataObject) -> None:
    damaged = bytearray(good[name])
    for _ in range(data.draw(st.integers(1, 6))):
        # headers, where the interesting numbers are, as often as all the rest
        near = data.draw(st.booleans())
        damaged[data.draw(st.integers(0, min(len(damaged), 600 if near else len(damaged)) - 1))] = data.draw(
            st.integers(0, 255)
        )
    end = data.draw(st.integers(0, len(damaged)) | st.just(len(damaged)))
    TARGETS[name](bytes(damaged[:end]), tmp_path)


@pytest.mark.parametrize("name", TARGETS)
@settings(DOSE, max_examples=8)
@given(data=st.binary(max_size=200))
def test_any_bytes(tmp_path: Path, name: str, data: bytes) -> None:
    TARGETS[name](data, tmp_path)


def _replaced(value: Any, draw: st.DataObject) -> Any:
    """The value with one of its parts, somewhere, exchanged, dropped or added to."""
    if isinstance(value, dict) and value and draw.draw(st.integers(0, 3)):
        key = draw.draw(st.sampled_from(sorted(value)))
        action = draw.draw(st.sampled_from(["into", "into", "drop", "add"]))
        if action == "drop":
            return {name: part for name, part in value.items() if name != key}
        if action == "add":
            return {**value, draw.draw(st.text(max_size=4)): draw.draw(JSON)}
        return {**value, key: _replaced(value[key], draw)}
    if isinstance(value, list) and value and draw.draw(st.integers(0, 3)):
        place = draw.draw(st.integers(0, len(value) - 1))
        return [*value[:place], _replaced(value[place], draw), *value[place + 1 :]]
    return draw.draw(JSON)


@pytest.mark.parametrize("name", ["grid", "transforms"])
@DOSE
@given(data=st.data())
def test_descriptions_of_grids(tmp_path: Path, good: dict[str, bytes], name: str, data: st.DataObject) -> None:
    changed = _replaced(json.loads(good[name]), data)
    TARGETS[name](json.dumps(changed).encode(), tmp_path)


@settings(DOSE, max_examples=60)
@given(data=st.data())
def test_cameras_and_crops(tmp_path: Path, data: st.DataObject) -> None:
    crop = Framing(10.0, 12.0, 20.0, 64, 48, 32).to_dict()
    start = data.draw(st.sampled_from([ViewPlan.BUNDLED.to_dict(), crop, {**crop, "side": [20.0, 21.0]}]))
    TARGETS["cameras"](json.dumps(_replaced(start, data)).encode(), tmp_path)
