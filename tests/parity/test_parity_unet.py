"""The network against recordings of the reference, module by module where traced."""

from collections.abc import Callable

import parity_folder as folder
import pytest
import torch
from torch import Tensor

from sv4d_ns.diffusion.sv4d.conditioning import camera_vectors
from sv4d_ns.diffusion.sv4d.unet import MultiViewVideoUNet
from sv4d_ns.diffusion.weights.key_maps import unet_key

UNETS = folder.names("unet_", "_weights.safetensors")
TRACES = [stem.split("_trace_") for stem in folder.names("unet_", ".safetensors") if "_trace_" in stem]


def run(unet: MultiViewVideoUNet, case: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return unet(case["x"], case["timesteps"], case["context"], case["y"], case["cond_view"]).sample


def load(name: str) -> tuple[MultiViewVideoUNet, dict[str, Tensor]]:
    folder.need(f"unet_{name}_cases.safetensors")
    return folder.load_unet(name), folder.tensors(f"unet_{name}_cases.safetensors")


@pytest.mark.parametrize("name", UNETS)
def test_output(name):
    unet, recorded = load(name)
    found = folder.cases(recorded, "out")
    assert found
    for case_name in found:
        case = folder.part(recorded, case_name)
        folder.assert_within(run(unet, case), case["out"], folder.ATOL)


@pytest.mark.parametrize("name", UNETS)
def test_camera_vectors_of_the_cases(name):
    """Every case's y is the camera vector of its angles; the first half of a CFG batch lacks the noise level's part."""
    folder.need(f"unet_{name}.json", f"unet_{name}_cases.safetensors")
    described, recorded = folder.read_json(f"unet_{name}.json"), folder.tensors(f"unet_{name}_cases.safetensors")
    dims, frames = list(described["y_dims"].values()), described["T"]
    for case_name in folder.cases(recorded, "polar_rad"):
        case = folder.part(recorded, case_name)
        angles = zip(case["polar_rad"].double(), case["azimuth_rad"].double(), strict=True)
        samples = [camera_vectors(p, a, described["sigma_cond_value"], dims).repeat(frames, 1) for p, a in angles]
        if not case["context"][0].any():
            samples[0][:, : dims[0]] = 0
        folder.assert_within(torch.cat(samples), case["y"], 1e-6)


@pytest.mark.parametrize("name", UNETS)
def test_gradient_checkpointing_changes_nothing(name):
    unet, recorded = load(name)
    case = folder.part(recorded, "b1")
    unet.enable_gradient_checkpointing()
    output = unet(case["x"], case["timesteps"], case["context"], case["y"], case["cond_view"]).sample
    folder.assert_within(output.detach(), case["out"], folder.ATOL)
    output.square().mean().backward()
    assert all(p.grad is not None for n, p in unet.named_parameters() if not never_used(n))


def never_used(name: str) -> bool:
    return any(part in name for part in (".norm2.", ".attn2.to_q.", ".attn2.to_k.")) and "transformer_blocks" in name


# Our modules keep tokens as [b, t, v, pixel, c] and group them their own way; the reference's layouts, for b = 1:
def camera_layout(x: Tensor, released: bool, views: int) -> Tensor:
    """[1, t, m, s, c] groups -> [(v p), t, c] where released, [v, (t p), c] where per pixel."""
    _, t, m, s, c = x.shape
    if released:
        return x.reshape(m, t, s, c).transpose(1, 2).reshape(m * s, t, c)
    return x[0].permute(2, 0, 1, 3).reshape(s, t * m, c)


def time_layout(x: Tensor) -> Tensor:
    """[1, v, p, t, c] -> [t, (v p), c]."""
    return x[0].permute(2, 0, 1, 3).flatten(1, 2)


def grid_to_images(x: Tensor) -> Tensor:
    return x.flatten(0, 2)


def view_of_grid(x: Tensor, released: bool) -> Tensor:
    """[1, t, v, p, c] -> [v, (t p), c], or [(v p), t, c] where released."""
    moved = x[0].permute(1, 0, 2, 3) if not released else x[0].permute(1, 2, 0, 3)
    return moved.flatten(1, 2) if not released else moved.flatten(0, 1)


def time_of_grid(x: Tensor) -> Tensor:
    """[1, t, v, p, c] -> [t, (v p), c]."""
    return x[0].flatten(1, 2)


def squeezed(x: Tensor) -> Tensor:
    return x.flatten(0, -2)


def converter(reference_name: str, released: bool, views: int) -> Callable[[Tensor], Tensor]:
    """From our layout of a module's tensor to the recorded one."""
    if reference_name.endswith("motion_blocks.0"):
        return time_layout
    if reference_name.endswith("time_mix_blocks.0"):
        return lambda x: camera_layout(x, released, views)
    if reference_name.endswith("transformer_blocks.0"):
        return grid_to_images
    if reference_name.endswith("time_mixer_motion"):
        return time_of_grid
    if reference_name.endswith(".1.time_mixer"):
        return lambda x: view_of_grid(x, released)
    if "_embed" in reference_name or reference_name == "label_emb":
        return squeezed
    return lambda x: x


def place_of(reference_name: str, depth: int) -> str:
    """Our module for a module of the reference; a whole block of it is its last module here."""
    whole = {"time_embed": "time_embedding", "label_emb": "add_embedding", "middle_block": "mid_block"}
    if reference_name in whole:
        return whole[reference_name]
    if reference_name == "input_blocks.0":
        return "conv_in"
    for table in ("time_mix_time_embed", "time_mix_motion_embed"):
        if reference_name.endswith(table):
            return unet_key(f"{reference_name}.0", depth).rpartition(".")[0]
    if reference_name.endswith(".time_mix_blocks"):
        return unet_key(f"{reference_name}.in_layers.0", depth).rpartition(".")[0]
    if reference_name.count(".") >= 2:
        return unet_key(f"{reference_name}.x", depth).removesuffix(".spatial_res_block.x").removesuffix(".x")
    raise LookupError(reference_name)


def block_place(unet: MultiViewVideoUNet, reference_name: str, depth: int) -> str:
    """Our module whose output is that of `input_blocks.i` or `output_blocks.i`."""
    side, index = reference_name.split(".")
    level, layer = divmod(int(index) - (side == "input_blocks"), depth + 1)
    place = f"{'down' if side == 'input_blocks' else 'up'}_blocks.{level}"
    block = unet.get_submodule(place)
    if side == "input_blocks" and layer == depth:
        return f"{place}.downsamplers.0"
    if side == "output_blocks" and layer == depth and len(block.upsamplers):
        return f"{place}.upsamplers.0"
    return f"{place}.attentions.{layer}" if layer < len(block.attentions) else f"{place}.resnets.{layer}"


def is_block(reference_name: str) -> bool:
    side, _, index = reference_name.partition(".")
    return side in ("input_blocks", "output_blocks") and index.isdigit() and reference_name != "input_blocks.0"


def kept_images(ours: Tensor, recorded: Tensor, views: int) -> Tensor:
    """Some recordings hold the images (t, v) = (0, 0) and (1, 1) only."""
    return ours[[0, views + 1]] if len(recorded) == 2 and len(ours) > 2 and ours.ndim == 4 else ours


@pytest.mark.parametrize(("name", "case"), TRACES)
def test_trace(name, case):
    unet, recorded = load(name)
    described = folder.read_json(f"unet_{name}.json")
    depth, views = described["reference_kwargs"]["num_res_blocks"], described["V"]
    released = described["reference_kwargs"]["use_3d_attention"]
    trace = folder.tensors(f"unet_{name}_trace_{case}.safetensors")
    seen: dict[str, Tensor] = {}

    def keep(key: str, convert: Callable[[Tensor], Tensor]) -> Callable[..., None]:
        def hook(_, inputs, output):
            seen[key] = convert(output if key.endswith(".out") else inputs[0])

        return hook

    for key in trace:
        module_name = key.rpartition(".")[0]
        place = block_place(unet, module_name, depth) if is_block(module_name) else place_of(module_name, depth)
        hook = keep(key, converter(module_name, released, views))
        unet.get_submodule(place).register_forward_hook(hook)
    run(unet, folder.part(recorded, case))

    assert seen.keys() == trace.keys() and trace
    for key, reference in trace.items():
        folder.assert_relative_to_peak(kept_images(seen[key], reference, views), reference, folder.ATOL, least=1.0)
