"""Motion modules, the network and its sampler against recordings of 4Diffusion's reference."""

import folder_4dm as folder
import pytest
import torch

from sv4d_ns.diffusion.fourdm.checkpoints import convert_network, keys_of
from sv4d_ns.diffusion.fourdm.conditioning import TokenOrder, flat_cameras
from sv4d_ns.diffusion.fourdm.guidance import ddim_scheduler
from sv4d_ns.diffusion.fourdm.motion_module import MotionModule
from sv4d_ns.diffusion.fourdm.pipeline import VIEW_AZIMUTHS_DEG, FourDMPipeline, view_cameras
from sv4d_ns.diffusion.fourdm.unet import FourDMUNet

MOTION_ATOL, UNET_ATOL = 2e-5, 1e-4
UNETS = [f"unet_{name}" for name in folder.names("unet_", "_io.safetensors")]
WHOLE = [name for name in UNETS if folder.is_whole(name)]
SAMPLED = [
    name
    for name in folder.names("ddim_")
    if folder.is_whole(str(folder.metadata(f"ddim_{name}.safetensors")["unet_weights"]))
]


def test_the_folder_has_recordings():
    assert folder.names("motion_") and UNETS, f"no motion_*.safetensors or unet_*_io.safetensors in {folder.FOLDER}"


@pytest.mark.parametrize("name", folder.names("motion_"))
def test_motion_module(name):
    recorded = folder.tensors(f"motion_{name}.safetensors")
    config = folder.metadata(f"motion_{name}.safetensors")["config"]
    assert config["num_transformer_block"] == 1 and config["temporal_attention_dim_div"] == 1
    module = MotionModule(config["in_channels"], config["num_attention_heads"])
    prefix = "middle_block.2."
    state = {f"{prefix}{key.removeprefix('sd.')}": value for key, value in recorded.items() if key.startswith("sd.")}
    converted = convert_network(state, 1)
    place = "unet.mid_block.motion_modules.0."
    module.load_state_dict({key.removeprefix(place): value for key, value in converted.items()}, strict=True)

    seen = {}
    block = module.transformer_blocks[0]
    # ours are in (b n) (h w) f order; the recorded ones in (b n f) (h w)
    watched = {
        "proj_in": module.proj_in,
        "block0.norm0": block.norm1,
        "block0.attn0": block.attn1,
        "block0.norm1": block.norm2,
        "block0.attn1": block.attn2,
        "block0.ff": block.ff,
        "block0.out": block,
    }
    for key, part in watched.items():
        part.register_forward_hook(lambda _, __, output, key=key: seen.__setitem__(key, output))
    with torch.no_grad():
        output = module.on_grid(recorded["input"], folder.FRAMES, folder.VIEWS + 1)
    folder.assert_within(output, recorded["output"], MOTION_ATOL)
    pixels = recorded["input"].shape[2] * recorded["input"].shape[3]
    for key, value in seen.items():
        if (reference := recorded.get(f"inter.{key}")) is not None:
            ours = value.unflatten(0, (-1, pixels)).transpose(1, 2).flatten(0, 1)
            folder.assert_within(ours, reference, MOTION_ATOL)


def run(model: FourDMUNet, recorded: dict[str, torch.Tensor], with_image: bool) -> torch.Tensor:
    views = folder.VIEWS + 1
    with torch.no_grad():
        tokens = recorded["inter.image_tokens"] if "ip_bf" not in recorded else model.image_tokens(recorded["ip_bf"])
        return model(
            recorded["x"],
            recorded["timesteps"],
            recorded["context"],
            tokens.repeat_interleave(views, 0),
            recorded["camera"],
            folder.FRAMES,
            views,
            recorded["ip_img"] if with_image else None,
        )


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("with_image", [True, False])
def test_network(name, with_image):
    recorded = folder.tensors(f"{name}_io.safetensors")
    output = run(folder.network(name), recorded, with_image)
    folder.assert_within(output, recorded["out" if with_image else "out_without_ip_img"], UNET_ATOL)


@pytest.mark.parametrize("name", WHOLE)
def test_image_tokens(name):
    recorded = folder.tensors(f"{name}_io.safetensors")
    with torch.no_grad():
        tokens = folder.network(name).image_tokens(recorded["ip_bf"])
    folder.assert_within(tokens, recorded["inter.image_tokens"], UNET_ATOL)


@pytest.mark.parametrize("name", UNETS)
def test_first_layer(name):
    """Embeddings, residual block, transformer and motion module of the first layer; runs on partial weights, too."""
    recorded, model = folder.tensors(f"{name}_io.safetensors"), folder.network(name)
    unet = model.unet
    first = unet.down_blocks[0]
    attends = hasattr(first, "attentions")
    seen, handles = {}, []

    def watch(module, key, prepend=False):
        def keep(_, __, output):
            seen[key] = output[0] if isinstance(output, tuple) else output

        handles.append(module.register_forward_hook(keep, prepend=prepend))

    # a prepended hook sees a layer before its motion module, an appended one after it
    watch(unet.time_embedding, "time_embed")
    watch(unet.class_embedding, "camera_embed")
    watch(first.resnets[0], "input_blocks.1.0", prepend=True)
    if attends:
        watch(first.attentions[0], "input_blocks.1.1", prepend=True)
        watch(first.attentions[0], "input_blocks.1.2")
    else:
        watch(first.resnets[0], "input_blocks.1.1")
    run(model, recorded, with_image=True)
    for handle in handles:
        handle.remove()

    compared = 0
    for key, ours in seen.items():
        if (reference := recorded.get(f"inter.{key}")) is not None:
            same_rows = ours[[0, len(ours) // 2]] if key == "time_embed" else ours[: len(reference)]
            folder.assert_within(same_rows, reference, UNET_ATOL)
            compared += key.startswith("input_blocks")
    assert compared


@pytest.mark.parametrize("name", SAMPLED)
@pytest.mark.parametrize("order", [TokenOrder.FRAME, TokenOrder.DEMO_SCRIPT])
def test_sampling(name, order):
    file = f"ddim_{name}.safetensors"
    recorded, described = folder.tensors(file), folder.metadata(file)
    model = folder.network(described["unet_weights"])
    condition = folder.condition(model, recorded, recorded["ip_img"])
    cameras = flat_cameras(view_cameras(VIEW_AZIMUTHS_DEG))
    folder.assert_within(cameras, recorded["camera"][: folder.VIEWS], 1e-6)

    pipeline = FourDMPipeline(None, None, None, None, None, model, ddim_scheduler())
    start = folder.real_views(recorded["x_T"])
    arguments = (condition, start, int(described["steps"]), float(described["guidance_scale"]))
    made = pipeline.sample(*arguments, order)
    assert sorted(pipeline.scheduler.timesteps.tolist()) == recorded["ddim_timesteps"].tolist()
    times = recorded["ddim_timesteps"]
    folder.assert_within(pipeline.scheduler.alphas_cumprod[times], recorded["ddim_alphas"].flatten(), 1e-6)
    reference = folder.real_views(recorded[f"sample.{order.value}_order"])
    folder.assert_within(made, reference, 1e-5 * reference.abs().max().item())


@pytest.mark.parametrize("name", SAMPLED)
def test_the_right_token_order_is_the_default(name):
    file = f"ddim_{name}.safetensors"
    recorded, described = folder.tensors(file), folder.metadata(file)
    model = folder.network(described["unet_weights"])
    pipeline = FourDMPipeline(None, None, None, None, None, model, ddim_scheduler())
    condition = folder.condition(model, recorded, recorded["ip_img"])
    steps: list[torch.Tensor] = []
    step = pipeline.scheduler.step

    def keep(*args, **kwargs):
        result = step(*args, **kwargs)
        steps.append(result[0])
        return result

    pipeline.scheduler.step = keep
    made = pipeline.sample(condition, folder.real_views(recorded["x_T"]), int(described["steps"]))
    reference = folder.real_views(recorded["first_step.frame_order"])
    folder.assert_within(steps[0], reference, 1e-5 * reference.abs().max().item())
    wrong = folder.real_views(recorded["sample.demo_script_order"])
    assert (made - wrong).abs().max() > 1e-2


@folder.needs("keys_4dm.json", "ldm_to_diffusers_full.json")
def test_every_key_of_the_released_network_has_its_place():
    """1361 tensors, names and shapes, on the meta device; and the same places as in the published table."""
    described, table = folder.read_json("keys_4dm.json"), folder.read_json("ldm_to_diffusers_full.json")
    with torch.device("meta"):
        model = FourDMUNet()
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = {}
    for name, shape in described["keys"].items():
        keys = keys_of(name, described["config"]["num_res_blocks"])
        rows = shape[0] // max(len(keys), 1)
        found.update(dict.fromkeys(keys, (rows, *shape[1:])))
    assert found == expected
    assert sum(parameter.numel() for parameter in model.parameters()) == described["counts"]["total_parameters"]
    motion = sum(p.numel() for name, p in model.named_parameters() if ".motion_modules." in name)
    assert motion == described["counts"]["motion_modules_parameters"]
    assert len(described["keys"]) == len(table) == described["counts"]["n_state_dict_keys"]
    for name, target in table.items():
        assert keys_of(name, 2) == our_places(target), name


def our_places(target: str) -> tuple[str, ...]:
    """The published table's places (of parts that are not joined to one module) as ours."""
    part, _, key = target.partition(":")
    if part == "ipproj":
        if key.endswith("to_kv.weight"):
            return tuple(f"image_projection.{key.replace('to_kv', to)}" for to in ("to_k", "to_v"))
        return (f"image_projection.{key}",)
    if key.endswith("attn2.pos_encoder.pe"):
        return ()
    return (f"unet.{key.replace('_ip.weight', '_ip.0.weight')}",)
