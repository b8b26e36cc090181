"""The network's parts: groupings, exact shortcuts, configuration, training support."""

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock, TemporalBasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusion_fixture import randomised, tiny_unet, unet_inputs

from sv4d_ns.diffusion.memory import Chunks
from sv4d_ns.diffusion.sv4d import attention
from sv4d_ns.diffusion.sv4d.attention import (
    CameraAttention,
    GroupBlock,
    SpatialBlock,
    from_camera_groups,
    single_token_attention,
    to_camera_groups,
)
from sv4d_ns.diffusion.sv4d.unet import MultiViewVideoUNet, TemporalConv

KINDS = list(CameraAttention)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [(1, 1, 1, 1), (2, 3, 4, 6), (1, 5, 3, 7)])
def test_grouping_is_undone(kind, grid):
    x = torch.arange(torch.tensor(grid).prod() * 2.0).view(*grid, 2)
    groups = to_camera_groups(x, kind)
    assert groups.shape[:2] == x.shape[:2]
    assert torch.equal(from_camera_groups(groups, kind, grid[2]), x)


def test_released_groups_and_their_frames():
    """V consecutive entries of (view, pixel) attend to each other, conditioned on a misaligned frame."""
    b, t, v, p = 2, 3, 4, 5
    frame, view, pixel = torch.meshgrid(torch.arange(t), torch.arange(v), torch.arange(p), indexing="ij")
    tokens = torch.stack([frame, view, pixel], dim=-1).expand(b, -1, -1, -1, -1)
    groups = to_camera_groups(tokens, CameraAttention.RELEASED)
    assert groups.shape == (b, t, p, v, 3)
    for context_frame in range(t):
        for members in groups[1, context_frame]:
            index = members[:, 1] * p + members[:, 2]
            f = members[0, 0]
            assert (members[:, 0] == f).all()
            assert index.tolist() == list(range(index[0], index[0] + v)) and index[0] % v == 0
            assert context_frame == ((index[0] // v) * t + f) // p


def test_pixel_and_full_groups():
    b, t, v, p = 1, 2, 3, 4
    tokens = torch.arange(t * v * p).view(b, t, v, p, 1)
    per_pixel = to_camera_groups(tokens, CameraAttention.PER_VIEW_PIXEL)
    assert torch.equal(per_pixel[0, 1, 2, :, 0], tokens[0, 1, :, 2, 0])
    full = to_camera_groups(tokens, CameraAttention.FULL_3D)
    assert torch.equal(full[0, 1, 0, :, 0], tokens[0, 1].flatten())


def outputs_of_all_kinds(t: int, v: int, size: int) -> list[torch.Tensor]:
    inputs = unet_inputs(1, t, v, size)
    unets = [tiny_unet(camera_attention=kind, block_out_channels=(32,), attention_levels=(True,)) for kind in KINDS]
    with torch.no_grad():
        return [unet(*inputs).sample for unet in unets]


def test_kinds_agree_where_the_groups_do():
    released, per_pixel, full = outputs_of_all_kinds(t=3, v=4, size=1)
    torch.testing.assert_close(released, per_pixel)
    torch.testing.assert_close(full, per_pixel)
    released, per_pixel, full = outputs_of_all_kinds(t=1, v=1, size=4)
    torch.testing.assert_close(released, per_pixel)
    assert (full - per_pixel).abs().max() > 1e-3


def test_kinds_differ_elsewhere():
    released, per_pixel, full = outputs_of_all_kinds(t=2, v=3, size=4)
    assert (released - per_pixel).abs().max() > 1e-3
    assert (released - full).abs().max() > 1e-3
    assert (per_pixel - full).abs().max() > 1e-3


def test_single_token_attention_is_the_full_one():
    torch.manual_seed(0)
    full = Attention(32, cross_attention_dim=12, heads=2, dim_head=16)
    queries, context = torch.randn(5, 7, 32), torch.randn(5, 1, 12)
    expected = full(queries, encoder_hidden_states=context)
    torch.testing.assert_close(single_token_attention(full, context).expand_as(expected), expected)


def test_blocks_are_those_of_diffusers():
    torch.manual_seed(0)
    b, t, v, p = 2, 3, 2, 6
    x, context = torch.randn(b, t, v, p, 32), torch.randn(b, t, 12)
    whole = BasicTransformerBlock(32, 2, 16, cross_attention_dim=12).eval()
    ours = SpatialBlock(32, 2, 16, 12, Chunks("bytes")).eval()
    ours.load_state_dict(whole.state_dict(), strict=True)
    expected = whole(x.flatten(0, 2), encoder_hidden_states=context.repeat_interleave(v, dim=1).flatten(0, 1)[:, None])
    torch.testing.assert_close(ours(x, context).flatten(0, 2), expected)

    temporal = TemporalBasicTransformerBlock(32, 32, 2, 16, cross_attention_dim=12).eval()
    group = GroupBlock(32, 2, 16, 12, Chunks("bytes")).eval()
    group.load_state_dict(temporal.state_dict(), strict=True)
    series = torch.randn(b, v, p, t, 32)  # attends over the second last axis
    per_pixel = torch.randn(b, v, p, 12)
    tokens = series.permute(0, 3, 1, 2, 4).reshape(b * t, v * p, 32)
    expected = temporal(tokens, num_frames=t, encoder_hidden_states=per_pixel.view(b * v * p, 1, 12))
    result = group(series, per_pixel).permute(0, 3, 1, 2, 4).reshape(b * t, v * p, 32)
    torch.testing.assert_close(result, expected)


def test_attention_in_chunks_is_the_same(monkeypatch):
    unet, inputs = tiny_unet(camera_attention="per_view_pixel"), unet_inputs(1, 2, 3)
    with torch.no_grad():
        whole = unet(*inputs).sample
        monkeypatch.setattr(attention, "MAX_ATTENTION_BATCH", 5)
        torch.testing.assert_close(unet(*inputs).sample, whole)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("values", [200, attention.CACHED_VALUES])
def test_rows_in_cache_give_the_same(kind, values, monkeypatch):
    unet, inputs = tiny_unet(camera_attention=kind), unet_inputs(1, 3, 3)
    expected = unet(*inputs).sample.detach()  # with gradients, thus on whole tensors
    monkeypatch.setattr(attention, "CACHED_VALUES", values)
    given = [value.clone() for value in inputs]
    with torch.no_grad():
        assert attention.stays_in_cache(inputs[0])
        torch.testing.assert_close(unet(*inputs).sample, expected, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(before, after) for before, after in zip(given, inputs, strict=True))


@pytest.mark.parametrize("name", ["attn1", "attn1.to_out.0", "ff", "ff.net.0.proj", "ff_in.net.2"])
def test_a_hooked_layer_is_called(name):
    unet, inputs = tiny_unet(), unet_inputs(1, 2, 2)
    layer = unet.get_submodule(f"mid_block.attentions.0.view_transformer_blocks.0.{name}")
    with torch.no_grad():
        plain = unet(*inputs).sample
        handle = layer.register_forward_hook(lambda module, args, output: output + 1)
        hooked = unet(*inputs).sample
        handle.remove()
    assert (hooked - plain).abs().max() > 1e-4


def test_autocast_on_a_cpu_is_close():
    unet, inputs = tiny_unet(), unet_inputs(1, 2, 2)
    with torch.no_grad():
        full = unet(*inputs).sample
        with torch.autocast("cpu", torch.bfloat16):
            low = unet(*inputs).sample
    assert 0 < (low.float() - full).abs().max() < 0.05 * full.abs().max()


def test_temporal_convolution_is_the_three_dimensional_one():
    torch.manual_seed(0)
    layer = TemporalConv(6)
    x = torch.randn(2, 6, 5, 3, 4)
    torch.testing.assert_close(layer(x), torch.nn.Conv3d.forward(layer, x))


def test_samples_of_a_batch_do_not_see_each_other():
    unet = tiny_unet()
    both = unet_inputs(2, 2, 3)
    with torch.no_grad():
        together = unet(*both).sample.chunk(2)
        for i in range(2):
            alone = unet(*(value.chunk(2)[i] for value in both)).sample
            torch.testing.assert_close(together[i], alone, atol=1e-5, rtol=1e-5)


def test_one_time_for_all_images():
    unet = tiny_unet()
    sample, _, *rest = unet_inputs(1, 2, 2)
    with torch.no_grad():
        each = unet(sample, torch.full((4,), 0.7), *rest).sample
        torch.testing.assert_close(unet(sample, 0.7, *rest, return_dict=False)[0], each)
        torch.testing.assert_close(unet(sample, torch.tensor(0.7), *rest).sample, each)


def test_levels_without_attention_have_none():
    unet = tiny_unet(block_out_channels=(32, 64, 64), attention_levels=(False, True, False))
    assert [len(block.attentions) for block in unet.down_blocks] == [0, 1, 0]
    assert [len(block.attentions) for block in unet.up_blocks] == [0, 2, 0]
    assert len(unet.mid_block.attentions) == 1


def test_untrained_network_predicts_zero():
    unet = MultiViewVideoUNet(
        block_out_channels=(32,),
        attention_levels=(True,),
        attention_head_dim=16,
        cross_attention_dim=16,
        projection_class_embeddings_input_dim=40,
    )
    assert not unet(*unet_inputs(1, 2, 2)).sample.any()


@pytest.mark.parametrize("name", ["down_blocks.1.attentions.0", "mid_block.resnets.0", "up_blocks.0.resnets.1"])
def test_every_used_parameter_learns(name):
    unet = tiny_unet().train()
    unet.enable_gradient_checkpointing()
    unet(*unet_inputs(1, 2, 2)).sample.square().mean().backward()
    never = (".norm2.", ".attn2.to_q.", ".attn2.to_k.")
    for key, parameter in unet.get_submodule(name).named_parameters():
        unused = "transformer_blocks" in key and any(part in f".{key}" for part in never)
        assert (parameter.grad is None) == unused, key
        assert unused or parameter.grad.any(), key


def test_saved_and_loaded(tmp_path):
    unet = tiny_unet(camera_attention=CameraAttention.PER_VIEW_PIXEL)
    unet.save_pretrained(tmp_path, variant="fp16")
    loaded = MultiViewVideoUNet.from_pretrained(tmp_path, variant="fp16")
    assert loaded.config.camera_attention == "per_view_pixel"
    assert list(loaded.config.attention_levels) == [False, True]
    inputs = unet_inputs(1, 2, 2)
    with torch.no_grad():
        assert torch.equal(loaded(*inputs).sample, unet(*inputs).sample)


def test_half_precision_is_close():
    unet, inputs = tiny_unet(), unet_inputs(1, 2, 2)
    with torch.no_grad():
        full = unet(*inputs).sample
        low = unet.to(torch.bfloat16)(*(value.bfloat16() for value in inputs)).sample
    assert low.dtype == torch.bfloat16
    assert (low.float() - full).abs().max() < 0.05 * full.abs().max()


def test_eight_bit_storage_is_close():
    unet, inputs = tiny_unet(), unet_inputs(1, 2, 2)
    with torch.no_grad():
        full = unet(*inputs).sample
        unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        assert unet.mid_block.resnets[0].spatial_res_block.conv1.weight.dtype == torch.float8_e4m3fn
        assert (unet(*inputs).sample - full).abs().max() < 0.3 * full.abs().max()


def test_attention_back_end_is_set_on_every_self_attention():
    unet, inputs = tiny_unet(), unet_inputs(1, 2, 2)
    with torch.no_grad():
        before = unet(*inputs).sample
        unet.set_attention_backend("_native_math")
        try:
            torch.testing.assert_close(unet(*inputs).sample, before, atol=1e-5, rtol=1e-5)
        finally:
            unet.set_attention_backend("native")  # diffusers' reset leaves the back end active for other models
            unet.reset_attention_backend()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: (i[0][:3], *i[1:]), "multiple"),
        (lambda i: (i[0], i[1], i[2][0], *i[3:]), "encoder_hidden_states"),
        (lambda i: (*i[:3], i[3][:2], i[4]), "class_labels"),
        (lambda i: (*i[:4], i[4][:1]), "reference_latents"),
    ],
)
def test_inputs_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        tiny_unet()(*change(unet_inputs(1, 2, 2)))


def test_settings_that_do_not_fit():
    with pytest.raises(ValueError, match="attention_levels"):
        tiny_unet(attention_levels=(True,))
    with pytest.raises(ValueError, match="multiple"):
        tiny_unet(attention_head_dim=24)
    with pytest.raises(ValueError, match="camera"):
        tiny_unet(camera_attention="camera_by_camera")


def test_randomised_leaves_no_zeros():
    assert all(p.any() for p in randomised(tiny_unet()).parameters())
