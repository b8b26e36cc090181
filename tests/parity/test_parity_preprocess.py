"""The released script's cropping of its input video, against recordings of it."""

import numpy as np
import parity_folder as folder
import pytest

from sv4d_ns.video import released_preprocess

PREPROCESS, CASES = "preprocess.safetensors", "preprocess.json"


@pytest.mark.parametrize("case", folder.read_json(CASES)["cases"] if folder.has(CASES) else [])
def test_released_preprocess(case: str) -> None:
    folder.need(PREPROCESS)
    options = folder.read_json(CASES)["cases"][case]
    recorded = folder.part(folder.tensors(PREPROCESS), case)
    ours = released_preprocess(
        recorded["in"].numpy(), options["W"], options["H"], frame_ratio=options["image_frame_ratio"]
    )
    assert list(ours.shape) == options["out_shape"]
    difference = np.abs(ours.astype(int) - recorded["out"].numpy())
    # another Pillow may round its filter differently; with the recording's own all values are equal
    assert difference.max() <= 1
    assert (difference == 0).mean() >= 0.99


def test_every_recorded_clip_has_its_options() -> None:
    folder.need(PREPROCESS, CASES)
    assert set(folder.cases(folder.tensors(PREPROCESS), "in")) == set(folder.read_json(CASES)["cases"])
