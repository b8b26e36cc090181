"""Both pipelines keep the contract that diffusers' own pipeline testers check."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusion_fixture import FRAMES, SIZE, tiny_pipeline

from sv4d_ns.diffusion.bundled.network import VolumeDenoiser
from sv4d_ns.diffusion.bundled.pipeline import BundledVideoPipeline

ANGLES = {"azimuths_deg": (60.0, 180.0), "elevations_deg": (0.0, 10.0)}
VIDEO_SIZE = {"sv4d": SIZE, "bundled": 32}


def bundled_pipeline() -> BundledVideoPipeline:
    torch.manual_seed(0)
    denoiser = VolumeDenoiser(
        image_size=32, encoder_widths=(8, 16, 24, 32), widths=(32, 16, 8), view_channels=16, depth=1
    ).eval()
    with torch.no_grad():
        denoiser.density.bias.fill_(2.0)  # something to be seen
        for layer in (denoiser.views_coarse, denoiser.views_middle):  # training starts deaf to the noised views
            layer.weight.normal_(std=0.3)
    pipeline = BundledVideoPipeline(denoiser, num_inference_steps=2)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


MADE = {"sv4d": tiny_pipeline, "bundled": bundled_pipeline}


@pytest.fixture(params=sorted(MADE))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pipeline(kind: str) -> DiffusionPipeline:
    return MADE[kind]()


def pictures(kind: str) -> list[PIL.Image.Image]:
    """A square that wanders over transparent ground."""
    size, frames = VIDEO_SIZE[kind], []
    for frame in range(FRAMES):
        rgba = np.zeros((size, size, 4), np.uint8)
        left = size // 4 + frame
        rgba[size // 4 : -size // 4, left : left + size // 2] = (200, 90, 40, 255)
        frames.append(PIL.Image.fromarray(rgba))
    return frames


def call(pipeline: DiffusionPipeline, kind: str, seed: int = 0, **changes: Any) -> Any:
    options = {**ANGLES, "output_type": "np", "num_inference_steps": 2, **changes}
    return pipeline(pictures(kind), generator=torch.Generator().manual_seed(seed), **options)


def test_the_arguments_have_diffusers_names(pipeline: DiffusionPipeline) -> None:
    names = set(inspect.signature(pipeline.__call__).parameters)
    wanted = {"num_inference_steps", "generator", "output_type", "return_dict", "callback_on_step_end"}
    assert wanted | {"callback_on_step_end_tensor_inputs"} <= names


def test_the_same_generator_gives_the_same(pipeline: DiffusionPipeline, kind: str) -> None:
    first, again, other = (call(pipeline, kind, seed).frames for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert first.shape[:2] == (FRAMES, 2) and np.isfinite(first).all()
    assert not np.array_equal(first, other)


def test_tuple_and_dataclass_hold_the_same(pipeline: DiffusionPipeline, kind: str) -> None:
    np.testing.assert_array_equal(call(pipeline, kind).frames, call(pipeline, kind, return_dict=False)[0])


def test_output_types_agree(pipeline: DiffusionPipeline, kind: str) -> None:
    array = call(pipeline, kind).frames
    tensor = call(pipeline, kind, output_type="pt").frames
    drawn = call(pipeline, kind, output_type="pil").frames
    np.testing.assert_allclose(np.moveaxis(tensor.numpy(), 2, -1), array, atol=1e-6)
    assert isinstance(drawn[0][0], PIL.Image.Image)
    np.testing.assert_allclose(np.asarray(drawn[1][1]) / 255, array[1, 1], atol=1.01 / 255)


def test_saved_and_loaded_it_does_the_same(pipeline: DiffusionPipeline, kind: str, tmp_path: Path) -> None:
    before = call(pipeline, kind).frames
    pipeline.save_pretrained(tmp_path)
    again = type(pipeline).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(call(again, kind).frames, before, atol=1e-5)
    assert {path.suffix for path in tmp_path.rglob("*.safetensors")} and not list(tmp_path.rglob("*.bin"))


def test_half_precision_is_saved_and_loaded(pipeline: DiffusionPipeline, kind: str, tmp_path: Path) -> None:
    pipeline.to(torch.float16).save_pretrained(tmp_path)
    again = type(pipeline).from_pretrained(tmp_path, torch_dtype=torch.float16)
    for name, component in again.components.items():
        if isinstance(component, torch.nn.Module):
            assert {p.dtype for p in component.parameters() if p.is_floating_point()} == {torch.float16}, name


def test_to_changes_the_type_of_every_component(pipeline: DiffusionPipeline) -> None:
    for dtype in (torch.float64, torch.float32):
        pipeline.to(dtype=dtype)
        modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
        assert {part.dtype for part in modules} == {dtype}


def test_components_make_another_pipeline(pipeline: DiffusionPipeline, kind: str) -> None:
    settings = {key: value for key, value in pipeline.config.items() if key not in pipeline.components}
    settings = {key: value for key, value in settings.items() if not key.startswith("_")}
    other = type(pipeline)(**pipeline.components, **settings)
    other.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(call(other, kind).frames, call(pipeline, kind).frames)


def test_the_callback_is_given_what_it_asks_for_and_heard(pipeline: DiffusionPipeline, kind: str) -> None:
    (name,) = pipeline._callback_tensor_inputs
    steps: list[int] = []

    def note(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        assert set(tensors) == {name}
        steps.append(step)
        return {name: torch.zeros_like(tensors[name])}

    changed = call(pipeline, kind, callback_on_step_end=note, callback_on_step_end_tensor_inputs=[name]).frames
    assert steps == [0, 1] and not np.array_equal(changed, call(pipeline, kind).frames)
    with pytest.raises(ValueError):
        call(pipeline, kind, callback_on_step_end=note, callback_on_step_end_tensor_inputs=["no such tensor"])


def test_the_callback_may_be_given_nothing(pipeline: DiffusionPipeline, kind: str) -> None:
    seen: list[dict[str, Any]] = []
    call(
        pipeline, kind, callback_on_step_end=lambda _, __, ___, tensors: seen.append(tensors) or {},
        callback_on_step_end_tensor_inputs=[],
    )  # fmt: skip
    assert seen == [{}, {}]


def test_the_number_of_steps_is_the_progress_bars(pipeline: DiffusionPipeline, kind: str, capsys: Any) -> None:
    pipeline.set_progress_bar_config(disable=False)
    call(pipeline, kind, num_inference_steps=3)
    assert "3/3" in capsys.readouterr().err
    pipeline.set_progress_bar_config(disable=True)
    call(pipeline, kind)
    assert capsys.readouterr().err == ""


def test_attention_slicing_and_the_like_do_not_break_it(pipeline: DiffusionPipeline, kind: str) -> None:
    before = call(pipeline, kind).frames
    pipeline.enable_attention_slicing()
    np.testing.assert_allclose(call(pipeline, kind).frames, before, atol=1e-4)


def test_ends_of_the_guidance_are_arguments() -> None:
    pipeline = tiny_pipeline()
    plain = call(pipeline, "sv4d").frames
    own = pipeline.config.guidance
    same = call(pipeline, "sv4d", min_guidance_scale=own["min_scale"], max_guidance_scale=own["scale"]).frames
    stronger = call(pipeline, "sv4d", max_guidance_scale=own["scale"] + 2).frames
    np.testing.assert_array_equal(plain, same)
    assert not np.array_equal(plain, stronger)


def test_pictures_of_two_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="one size"):
        tiny_pipeline()([PIL.Image.new("RGB", (16, 16)), PIL.Image.new("RGB", (32, 16))], **ANGLES)
