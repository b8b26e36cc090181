"""Chunks that shrink where memory runs out, and the plan of memory and time."""

from pathlib import Path

import pytest
import torch
from diffusion_fixture import FRAMES, VIEWS, tiny_pipeline, tiny_unet, tiny_video, unet_inputs

from sv4d_ns.diffusion.memory import Chunks
from sv4d_ns.diffusion.planner.command import command, tried
from sv4d_ns.diffusion.planner.plan import CARDS, GIB, RAN_ON, Offload, dry_run, plan_memory
from sv4d_ns.diffusion.sv4d import attention
from sv4d_ns.utils.errors import InputError


class Crowded(torch.nn.Module):
    """A layer on a device with memory for a few rows only."""

    def __init__(self, layer, room):
        super().__init__()
        self.layer, self.room, self.sizes = layer, room, []

    def forward(self, x):
        self.sizes.append(len(x))
        if len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.layer(x)


@pytest.mark.parametrize("grad", [False, True])
def test_memory_that_runs_out_halves_the_chunk_for_good(grad):
    layer = Crowded(torch.nn.Linear(3, 2), room=3)
    x, chunks = torch.randn(11, 3), Chunks("images")
    with torch.set_grad_enabled(grad):
        with pytest.warns(RuntimeWarning, match="going on with 2 images at once"):
            made = chunks.run(lambda start, stop: layer(x[start:stop]), len(x), at_most=8)
        torch.testing.assert_close(made, layer.layer(x))
        assert layer.sizes == [8, 4, 2, 2, 2, 2, 2, 1]
        layer.sizes.clear()
        chunks.run(lambda start, stop: layer(x[start:stop]), len(x), at_most=8)
        assert max(layer.sizes) == 2


def test_one_row_that_does_not_fit_is_an_error():
    layer = Crowded(torch.nn.Linear(3, 2), room=0)
    with pytest.raises(torch.OutOfMemoryError), pytest.warns(RuntimeWarning):
        Chunks("images").run(lambda start, stop: layer(torch.zeros(stop - start, 3)), 2, at_most=2)


def test_autoencoder_goes_on_with_smaller_chunks():
    pipeline = tiny_pipeline()
    latents = torch.randn(FRAMES * VIEWS, 4, 8, 8)
    expected_video, expected = pipeline.encode_images(tiny_video()), pipeline.decode_latents(latents)
    pipeline.vae.encoder = Crowded(pipeline.vae.encoder, room=1)
    pipeline.vae.decoder.forward = Crowded(type(pipeline.vae.decoder).forward.__get__(pipeline.vae.decoder), 2).forward
    with pytest.warns(RuntimeWarning, match="images in the autoencoder"):
        torch.testing.assert_close(pipeline.encode_images(tiny_video()), expected_video, atol=1e-5, rtol=0)
    pipeline._vae_chunks.limit = float("inf")
    with pytest.warns(RuntimeWarning, match="images in the autoencoder"):
        torch.testing.assert_close(pipeline.decode_latents(latents), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", list(attention.CameraAttention))
def test_transformers_in_chunks_are_the_same(kind, monkeypatch):
    unet, inputs = tiny_unet(camera_attention=kind), unet_inputs(2, 2, 3)
    with torch.no_grad():
        whole = unet(*inputs).sample
        monkeypatch.setattr(attention, "feature_bytes_at_once", lambda device: 20_000)
        torch.testing.assert_close(unet(*inputs).sample, whole, atol=1e-5, rtol=1e-5)
    assert unet(*inputs).sample.requires_grad


def test_transformers_go_on_with_smaller_chunks():
    unet, inputs = tiny_unet(), unet_inputs(1, 2, 3)
    with torch.no_grad():
        expected = unet(*inputs).sample
        block = unet.mid_block.attentions[0].transformer_blocks[0]
        block.norm1 = Crowded(block.norm1, room=2)
        with pytest.warns(RuntimeWarning, match="bytes of features"):
            torch.testing.assert_close(unet(*inputs).sample, expected, atol=1e-5, rtol=1e-5)
    assert min(block.norm1.sizes) <= 2 < max(block.norm1.sizes)


def measured_peak(run) -> int:
    """Peak bytes that PyTorch's CPU allocator gave out during a call, by the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def test_expected_memory_is_near_the_measured_one():
    unet, inputs = tiny_unet(), unet_inputs(2, 3, 4, size=16)
    with torch.no_grad():
        unet(*inputs)
        measured = measured_peak(lambda: unet(*inputs))
    on_meta = tiny_unet().to("meta")
    expected, flops = dry_run(on_meta, lambda: on_meta(*(torch.empty_like(value, device="meta") for value in inputs)))
    inputs_bytes = sum(value.numel() * value.element_size() for value in inputs)
    assert 0.7 < (expected - inputs_bytes) / measured < 1.5
    assert flops > 1e8


def test_plan_of_the_released_model():
    plan = plan_memory("official4", CARDS["rtx-4090"])
    weights = {part.name: part.weights for part in plan.components}
    assert weights["unet"] == 2 * 2_010_961_338
    peaks = [plan.bytes_by_offload[kind] for kind in Offload]
    assert peaks == sorted(peaks, reverse=True) and 4 * GIB < peaks[0] < 24 * GIB
    assert plan.recommended(24 * GIB) is Offload.NONE
    assert plan.recommended(peaks[1] / 0.9) is Offload.MODEL
    assert plan.recommended(1 * GIB) is None
    small = plan_memory("official4", CARDS["rtx-4090"], size=256, fp8_storage=True, chunk_size=1)
    assert small.bytes_by_offload[Offload.NONE] < 0.6 * peaks[0]
    assert small.seconds_by_offload[Offload.NONE] < 0.3 * plan.seconds_by_offload[Offload.NONE]


def test_plan_command(capsys):
    command(["--model", "official4", "--device", "rtx-4090"])
    text = capsys.readouterr().out
    assert "unet" in text and "Recommended on rtx-4090: offload 'none'" in text
    with pytest.raises(InputError, match="rtx-4090"):
        command(["--device", "rtx-1"])
    with pytest.raises(InputError, match="--size must be a multiple of 64"):
        plan_memory("official4", CARDS["t4"], size=60)
    with pytest.raises(InputError, match="--frames"):
        plan_memory("official4", CARDS["t4"], frames=0)


def test_the_plan_and_the_documents_say_the_same_of_what_has_run_on_a_card(capsys):
    root = Path(__file__).parents[1]
    tables = (root / "docs" / "performance.md").read_text().partition("<!-- gpu: start -->")[2]
    tables = tables.partition("<!-- gpu: end -->")[0]
    assert "never yet with the released weights" in (root / "README.md").read_text()
    assert all(card in tables for card in RAN_ON) and all(
        card.split()[1] in (root / "README.md").read_text() for card in RAN_ON
    )
    command(["--device", "rtx-4090", "--offload", "model"])
    assert " ".join(tried().split()) in " ".join(capsys.readouterr().out.split())
