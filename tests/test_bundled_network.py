"""The volume denoiser: shapes, what starts as the identity, what is known to be empty, the pipeline's contract."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sv4d_ns.diffusion.bundled.frustum import Frustum, relative_poses
from sv4d_ns.diffusion.bundled.network import VolumeDenoiser, finer
from sv4d_ns.diffusion.bundled.pipeline import BundledVideoPipeline
from sv4d_ns.geometry.cameras import look_at_cameras


@pytest.fixture(scope="module")
def small() -> VolumeDenoiser:
    torch.manual_seed(0)
    return VolumeDenoiser(
        image_size=32, encoder_widths=(8, 16, 24, 32), widths=(32, 16, 8), view_channels=16, depth=1
    ).eval()


def inputs(frames: int, views: int = 2, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    c2w = look_at_cameras(np.linspace(0, 240, views + 1), np.zeros(views + 1))
    poses = torch.from_numpy(relative_poses(c2w, c2w[0])).float()
    return {
        "frames": torch.rand(1, frames, 4, 32, 32, generator=generator),
        "elevation_deg": torch.zeros(1),
        "known": torch.ones(1),
        "views": torch.randn(1, frames, views, 4, 32, 32, generator=generator),
        "sigma": torch.full((1, views), 3.0),
        "present": torch.ones(1, views, dtype=torch.bool),
        "to_camera": torch.linalg.inv(poses[1:])[None],
        "frustum": Frustum(),
    }


def picture(seed: int = 0, size: int = 32, frames: int = 2) -> np.ndarray:
    rgba = np.random.default_rng(seed).integers(0, 256, (frames, size, size, 4), dtype=np.uint8)
    rgba[..., 3] = 0
    rgba[:, size // 4 : -size // 4, size // 4 : -size // 4, 3] = 255
    return rgba


def test_frames_do_not_see_each_other_before_training(small: VolumeDenoiser) -> None:
    with torch.no_grad():
        clip = small(**inputs(3))
        for frame in range(3):
            still = inputs(3)
            still["frames"], still["views"] = still["frames"][:, [frame]], still["views"][:, [frame]]
            alone = small(**still)
            torch.testing.assert_close(clip.density[frame], alone.density[0], atol=1e-4, rtol=1e-4)


def test_noised_views_are_not_heard_before_training_and_are_after_their_layers_have_weights(
    small: VolumeDenoiser,
) -> None:
    with torch.no_grad():
        first, second = small(**inputs(1)), small(**{**inputs(1), "views": inputs(1, seed=5)["views"]})
        assert torch.equal(first.density, second.density)
        torch.nn.init.normal_(small.views_middle.weight, std=0.1)
        other = small(**{**inputs(1), "views": inputs(1, seed=5)["views"]})
        masked = {**inputs(1), "present": torch.zeros(1, 2, dtype=torch.bool)}
        torch.nn.init.zeros_(small.views_middle.bias)
        hidden, still_hidden = small(**masked), small(**{**masked, "views": inputs(1, seed=5)["views"]})
        torch.nn.init.zeros_(small.views_middle.weight)
    assert not torch.equal(first.density, other.density)
    assert torch.equal(hidden.density, still_hidden.density)


def test_nothing_is_where_the_input_is_empty(small: VolumeDenoiser) -> None:
    given = inputs(1)
    given["frames"][..., :16] = 0.0
    with torch.no_grad():
        logits = small(**given)
        volume = small.volume(logits, torch.ones(1, 3, 32, 32))
    assert not volume.density[..., :16].any() and volume.density[..., 16:].any()


def test_what_the_front_hides_does_not_take_the_input_pictures_colour(small: VolumeDenoiser) -> None:
    with torch.no_grad():
        logits = small(**inputs(1))
        logits.density[:] = -20.0
        logits.density[:, 12:20] = 20.0
        volume = small.volume(logits, torch.ones(1, 3, 32, 32))
    middle = volume.gate[0, :, 8, 8] / logits.gate[0, :, 8, 8]
    assert middle[6] == pytest.approx(1.0) and middle[9] < 1e-3


def test_finer_puts_eight_channels_into_the_eight_halves_of_a_cell() -> None:
    x = torch.arange(8.0).reshape(1, 8, 1, 1, 1)
    assert finer(x).shape == (1, 1, 2, 2, 2)
    assert finer(x).flatten().tolist() == list(range(8))


def test_the_pipeline_is_saved_and_opened(small: VolumeDenoiser, tmp_path: Path) -> None:
    pipeline = BundledVideoPipeline(small, num_inference_steps=2)
    pipeline.save_pretrained(tmp_path)
    again = BundledVideoPipeline.from_pretrained(tmp_path)
    call = {"azimuths_deg": (90.0,), "elevations_deg": (0.0,)}
    first = pipeline(picture(), **call, generator=torch.Generator().manual_seed(0)).frames
    second = again(picture(), **call, generator=torch.Generator().manual_seed(0)).frames
    assert again.config.num_inference_steps == 2
    np.testing.assert_array_equal(first, second)


def test_both_ways_of_asking_show_backs_in_the_inputs_colour(small: VolumeDenoiser) -> None:
    pipeline = BundledVideoPipeline(small)
    film = picture()
    film[..., :3] = (200, 40, 40)
    ring = {"azimuths_deg": (180.0,), "elevations_deg": (0.0,)}
    red = torch.tensor([200.0, 40.0, 40.0]) / 255

    def far_off(views: torch.Tensor) -> float:
        """Of premultiplied colours, where anything is."""
        colour, alpha = views[0, 0, :3], views[0, 0, 3:]
        return float((colour - alpha * red[:, None, None]).abs().max())

    def made(recolour: bool) -> torch.Tensor:
        views = pipeline(film, **ring, recolour=recolour, output_type="pt", return_dict=False)[0]
        return torch.cat([views[:, :, :3] * views[:, :, 3:], views[:, :, 3:]], 2)

    assert far_off(made(False)) > 0.1 and far_off(made(True)) < 0.02
    told = (pipeline.denoise_views(film, torch.zeros(1, 1, 4, 32, 32), 1.5, **ring) + 1) / 2
    alpha = told[:, :, 3:]
    assert far_off(torch.cat([told[:, :, :3] - 1 + alpha, alpha], 2)) < 0.02


def test_the_pipeline_takes_and_gives_pil_and_calls_back(small: VolumeDenoiser) -> None:
    pipeline = BundledVideoPipeline(small)
    frames = [Image.fromarray(frame, "RGBA") for frame in picture(frames=2)]
    seen: list[tuple[int, float]] = []

    def note(_: Any, step: int, sigma: float, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, sigma))
        return tensors

    made = pipeline(
        frames, (40.0, 80.0), (0.0, 20.0), size=48, num_inference_steps=3, output_type="pil", callback_on_step_end=note
    ).frames
    assert [step for step, _ in seen] == [0, 1, 2] and seen[0][1] == 40.0 and seen[2][1] == pytest.approx(1.5)
    assert len(made) == 2 and len(made[0]) == 2 and made[0][0].size == (48, 48) and made[0][0].mode == "RGBA"


def test_long_videos_go_through_in_windows_that_change_nothing_far_from_their_ends(
    small: VolumeDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = BundledVideoPipeline(small)
    torch.nn.init.normal_(small.blocks[0].time.out.weight, std=0.2)
    video, call = picture(frames=12), {"azimuths_deg": (90.0,), "elevations_deg": (0.0,), "output_type": "pt"}
    whole = pipeline(video, **call, generator=torch.Generator().manual_seed(0)).frames
    monkeypatch.setattr("sv4d_ns.diffusion.bundled.pipeline.FRAMES_AT_ONCE", 10)
    parts = pipeline(video, **call, generator=torch.Generator().manual_seed(0)).frames
    torch.nn.init.zeros_(small.blocks[0].time.out.weight)
    assert whole.shape == (12, 1, 4, 32, 32)
    # positions count from the window's start, so only attention's reach is the same, not every bit
    assert (whole - parts).abs().mean() < 0.05


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"azimuths_deg": ()}, "azimuths_deg"),
        ({"strength": 0.0}, "strength"),
        ({"output_type": "gif"}, "output_type"),
        ({"initial_views": np.zeros((1, 1, 32, 32, 4), np.uint8)}, "initial_views"),
    ],
)
def test_bad_calls_are_named(small: VolumeDenoiser, change: dict[str, Any], word: str) -> None:
    call = {"azimuths_deg": (90.0,), "elevations_deg": (0.0,), **change}
    with pytest.raises(ValueError, match=word):
        BundledVideoPipeline(small)(picture(), **call)
