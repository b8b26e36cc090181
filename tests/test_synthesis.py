"""Between pictures and a model's own image space, and the noise level of stage 2."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusion_fixture import FRAMES, SIZE, small_pipeline

from sv4d_ns.diffusion.planner.plan import GIB, Offload, Plan
from sv4d_ns.diffusion.sv4d.grid import GeneratedGrid, GridOptions
from sv4d_ns.diffusion.sv4d.windows import ViewReferences, WindowStride
from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.synthesis.base import from_model_space, to_model_space
from sv4d_ns.synthesis.choice import load_synthesizer
from sv4d_ns.synthesis.sv4d import DiffusionSynthesizer, fitting_offload, refine_sigma
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.images import over_white, resize_rgba


def disc(size: int = 32) -> np.ndarray:
    """A soft-edged dark disc, RGBA uint8 [size, size, 4]."""
    y, x = np.mgrid[:size, :size] - size / 2 + 0.5
    alpha = np.clip(size / 3 - np.hypot(x, y) + 0.5, 0, 1)
    colour = np.broadcast_to(np.array([40, 90, 160]), (size, size, 3))
    return np.concatenate([colour, 255 * alpha[..., None]], -1).round().astype(np.uint8)


@pytest.mark.parametrize("channels", [3, 4])
def test_pictures_survive_the_way_to_a_model_and_back(channels: int) -> None:
    picture = disc()[None]
    back = from_model_space(to_model_space(picture, channels))
    inside = picture[..., 3] == 255
    assert np.abs(back.images[inside].astype(int) - picture[inside]).max() <= 2
    assert (back.images[..., 3][picture[..., 3] == 0] == 0).all()
    assert (back.confidence[inside] >= 250).all()


def test_a_coin_toss_is_not_believed_and_silhouettes_are_cut_at_one_half() -> None:
    coverage = torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0])
    images = torch.cat([1 - coverage.expand(3, -1) * 0.5, coverage[None]])[:, None]
    views = from_model_space(images[None])
    assert views.images[0, 0, :, 3].tolist()[:2] == [0, 0] and views.images[0, 0, :, 3].tolist()[3:] == [255, 255]
    assert 120 < views.images[0, 0, 2, 3] < 136
    confidence = views.confidence[0, 0].tolist()
    assert confidence[2] == 0 and confidence[0] == confidence[4] == 255 and 0 < confidence[1] < 255


def test_resizing_takes_no_colour_from_empty_pixels() -> None:
    picture = disc(64)
    picture[picture[..., 3] == 0] = [255, 0, 0, 0]  # a colour nobody should see
    small = resize_rgba(picture[None], 16)[0]
    visible = small[..., 3] > 40
    assert np.abs(small[visible][:, :3].astype(int) - [40, 90, 160]).max() <= 3
    large, little = over_white(picture).mean(), over_white(small).mean()
    assert abs(float(large) - float(little)) < 2.0


def test_the_noise_level_of_stage_2_follows_the_schedule() -> None:
    schedule = {"sigma_min": 0.02, "sigma_max": 40.0}
    levels = [refine_sigma(schedule, strength) for strength in (0.1, 0.4, 1.0)]
    assert levels == sorted(levels) and levels[-1] == pytest.approx(40.0)
    assert refine_sigma(schedule, 1e-9) == pytest.approx(0.02, rel=1e-3)


def small_synthesizer(**settings: Any) -> DiffusionSynthesizer:
    return DiffusionSynthesizer(small_pipeline(), "small", SIZE, ViewPlan.ring((90.0, 180.0)), 1, **settings)


def test_the_choice_of_model_is_said_and_refused_where_it_cannot_run() -> None:
    synthesizer, sentence = load_synthesizer("auto", "cpu")
    assert "bundled" in sentence and "cpu" in sentence
    assert synthesizer.default_plan() == ViewPlan.BUNDLED
    with pytest.raises(InputError, match="synthesis bundled"):
        load_synthesizer("official", "cpu")


def test_settings_of_the_official_model_are_refused_for_the_bundled_one() -> None:
    for option, flag in (("references", "view-references"), ("guidance_scale", "guidance-scale")):
        with pytest.raises(InputError, match=flag):
            load_synthesizer("auto", "cpu", options={option: "anchored"})


def test_options_are_in_the_description() -> None:
    options = GridOptions(stride=WindowStride.RELEASED_T, references=ViewReferences.INDEPENDENT, guidance_scale=2.0)
    synthesizer = small_synthesizer(options=options)
    described = json.loads(json.dumps(synthesizer.describe()))
    assert described["options"]["stride"] == "released_t" and len(described["weights"]) == 32
    assert small_synthesizer().describe()["options"] != synthesizer.describe()["options"]
    with pytest.raises(InputError, match="sideways"):
        GridOptions.from_values({"references": "sideways"})


def test_a_long_video_tells_how_far_its_windows_drift(tmp_path: Path) -> None:
    frames = np.stack([disc(SIZE)] * (2 * FRAMES - 1))
    views = small_synthesizer().generate(
        frames, ViewPlan.ring((90.0, 180.0)), seed=0, store=tmp_path, progress=lambda done, total: None
    )
    assert views.images.shape == (2 * FRAMES - 1, 2, SIZE, SIZE, 4)
    assert views.drift and all(np.isfinite(boundary.psnr) for boundary in views.drift)


def test_the_bundled_model_makes_views_and_refines_renders(tmp_path: Path) -> None:
    synthesizer, _ = load_synthesizer("bundled", "cpu")
    frames, plan = np.stack([disc(synthesizer.image_size)] * 2), ViewPlan((90.0, 180.0), (0.0, 30.0))
    seen: list[tuple[int, int]] = []
    ways = {"seed": 1, "store": tmp_path, "progress": lambda done, total: seen.append((done, total))}
    made = synthesizer.generate(frames, plan, **ways)
    again = synthesizer.generate(frames, plan, **ways)
    refined = synthesizer.refine(frames, made.images, plan, strength=0.3, **ways)
    assert made.images.shape == refined.images.shape == (2, 2, synthesizer.image_size, synthesizer.image_size, 4)
    np.testing.assert_array_equal(made.images, again.images)
    assert made.images[..., 3].max() > 128 and not np.array_equal(made.images, refined.images)
    steps = synthesizer.pipeline.config.num_inference_steps
    # a prediction and its pictures for each step, the last pictures included: 100 % is the end
    half_steps = [*range(2, 2 * steps, 2), 2 * steps - 1, 2 * steps]
    assert seen == [(done, 2 * steps) for done in half_steps] * 2 + [(1, 2), (2, 2)]
    assert json.dumps(synthesizer.describe())


def test_the_way_of_offloading_is_chosen_by_the_memory_and_said() -> None:
    ways = (Offload.NONE, Offload.MODEL, Offload.GROUP, Offload.SEQUENTIAL)
    peaks, seconds = (20.0, 12.0, 6.0, 4.0), (9.0, 10.0, 30.0, 60.0)
    plan = Plan(
        (),
        {way: peak * GIB for way, peak in zip(ways, peaks, strict=True)},
        dict(zip(ways, seconds, strict=True)),
    )
    for memory, way in ((80, "none"), (16, "model"), (8, "group"), (5, "sequential")):
        offload, sentence = fitting_offload(plan, memory * GIB)
        assert offload.value == way and f"'{way}'" in sentence and f"{memory}.0 GiB" in sentence
    with pytest.raises(InputError, match=r"needs 4\.0 GiB"):
        fitting_offload(plan, 2 * GIB)


def test_stage_2_starts_at_its_noise_level_and_leaves_the_schedule_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synthesizer = small_synthesizer()
    scheduler, asked = synthesizer.pipeline.scheduler, []

    def made(self, frames, plan, steps, *, seed, store, progress, initial_views):  # type: ignore[no-untyped-def]
        assert synthesizer.pipeline.scheduler is scheduler, "meanwhile, too: others may use the pipeline"
        asked.append((seed, store, self.pipeline.scheduler.config.sigma_max))
        return GeneratedGrid(torch.full((1, 1, 4, 8, 8), 0.9))

    monkeypatch.setattr(DiffusionSynthesizer, "_run", made)
    empty = np.zeros((1, 8, 8, 4), np.uint8)
    views = synthesizer.refine(
        empty, empty[:, None], ViewPlan.ring((90.0,)), strength=0.5, seed=3, store=tmp_path,
        progress=lambda done, total: None,
    )  # fmt: skip
    assert asked == [(3, tmp_path, pytest.approx(refine_sigma(scheduler.config, 0.5)))]
    assert synthesizer.pipeline.scheduler is scheduler
    assert views.confidence.flatten()[0] == round(255 * 0.8**2)
