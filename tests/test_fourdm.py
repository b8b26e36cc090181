"""4DM beyond parity: its checkpoints, long videos, and what the network is given."""

import pickle
from contextlib import suppress

import numpy as np
import pytest
import torch
from fourdm_fixture import NETWORK as TINY

from sv4d_ns.diffusion.fourdm import official
from sv4d_ns.diffusion.fourdm.checkpoints import MOTION, convert_network, keys_of
from sv4d_ns.diffusion.fourdm.conditioning import FourDMCondition, TokenOrder, flat_cameras, network_rows
from sv4d_ns.diffusion.fourdm.guidance import ddim_scheduler
from sv4d_ns.diffusion.fourdm.motion_module import MotionModule
from sv4d_ns.diffusion.fourdm.pipeline import FourDMPipeline, view_cameras
from sv4d_ns.diffusion.fourdm.unet import FourDMUNet
from sv4d_ns.synthesis.fourdm import FourDMSynthesizer, fourdm_plan
from sv4d_ns.utils.errors import InputError


def tiny_network(seed: int = 0) -> FourDMUNet:
    torch.manual_seed(seed)
    network = FourDMUNet(**TINY).eval()
    for module in network.modules():
        if isinstance(module, MotionModule):  # untrained ones do nothing
            torch.nn.init.normal_(module.proj_out.weight, std=0.2)
    return network


def reference_names() -> dict[str, tuple[str, ...]]:
    """Names of the tiny network's tensors in the reference's layout, found by asking for every plausible one."""
    shapes = tiny_network().state_dict()
    residual = ["in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection"]
    block = "transformer_blocks.0"
    linear = [f"{block}.attn{i}.{to}" for i in (1, 2) for to in ("to_q", "to_k", "to_v", "to_out.0")]
    linear += [f"{block}.norm{i}" for i in (1, 2, 3)] + [f"{block}.ff.net.0.proj", f"{block}.ff.net.2"]
    spatial = ["norm", "proj_in", "proj_out", f"{block}.attn2.to_k_ip", f"{block}.attn2.to_v_ip", *linear]
    attention = [f"{block}.attention_blocks.{i}.{to}" for i in (0, 1) for to in ("to_q", "to_k", "to_v", "to_out.0")]
    motion = ["norm", "proj_in", "proj_out", *attention, f"{block}.norms.0", f"{block}.norms.1", f"{block}.ff_norm"]
    motion += [f"{block}.ff.net.0.proj", f"{block}.ff.net.2"]
    places = [f"{side}_blocks.{i}" for side in ("input", "output") for i in range(4)] + ["middle_block"]
    inside = [f"0.{name}" for name in residual] + [f"1.{name}" for name in spatial] + [f"3.{name}" for name in residual]
    inside += [f"2.temporal_transformer.{name}" for name in motion] + ["0.op", "2.conv"]
    names = [f"{place}.{name}" for place in places for name in inside if not (place[0] != "m" and name[0] == "3")]
    names += [f"time_embed.{i}" for i in (0, 2)] + [f"camera_embed.{i}" for i in (0, 2)]
    names += ["input_blocks.0.0", "out.0", "out.2"]
    names += [f"image_embed.{name}" for name in ("proj_in", "proj_out", "norm_out")]
    resampler = ("0.norm1", "0.norm2", "0.to_q", "0.to_kv", "0.to_out", "1.0", "1.1", "1.3")
    names += [f"image_embed.layers.{i}.{name}" for i in range(4) for name in resampler]
    full = [f"{name}.{kind}" for name in names for kind in ("weight", "bias")] + ["image_embed.latents"]
    full += [
        f"{place}.2.temporal_transformer.{block}.attention_blocks.{i}.pos_encoder.pe"
        for place in places
        for i in (0, 1)
    ]
    found = {}
    for name in full:
        with suppress(InputError):
            keys = keys_of(name, 1)
            if keys and all(key in shapes for key in keys):
                found[name] = keys
    assert {key for keys in found.values() for key in keys} == set(shapes)
    return found


def reference_state(network: FourDMUNet) -> dict[str, torch.Tensor]:
    """The network under the reference's names, with the second copy of the time positions."""
    state = network.state_dict()
    made = {name: torch.cat([state[key] for key in keys]) for name, keys in reference_names().items()}
    for name in [name for name in made if name.endswith("attention_blocks.0.pos_encoder.pe")]:
        made[name.replace("attention_blocks.0", "attention_blocks.1")] = made[name]
    return made


def imagedream_state(network: FourDMUNet) -> dict[str, torch.Tensor]:
    """Without motion modules, under ImageDream's indices."""
    renamed = {}
    for name, value in reference_state(network).items():
        if MOTION not in name:
            renamed[name.replace("middle_block.3", "middle_block.2").replace("1.2.conv", "1.1.conv")] = value
    return renamed


def same_weights(a: FourDMUNet, b: FourDMUNet) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def test_a_checkpoint_of_the_whole_network(tmp_path):
    network, empty = tiny_network(), tiny_network(seed=1)
    path = tmp_path / "4dm.ckpt"
    torch.save({"state_dict": {f"module.{k}": v for k, v in reference_state(network).items()}}, path)
    assert not same_weights(network, empty)
    report = official.fill_network(empty, path, None)
    assert (report.contents, report.tensors) == ("whole network", len(reference_state(network)))
    assert same_weights(network, empty)
    assert not official.holds_motion_only(path)


def test_a_checkpoint_of_the_motion_modules_alone(tmp_path):
    network, empty = tiny_network(), tiny_network(seed=1)
    motion = {f"module.{name}": value for name, value in reference_state(network).items() if MOTION in name}
    path, base = tmp_path / "4dm.ckpt", tmp_path / "imagedream.pt"
    torch.save({"state_dict": motion}, path)
    others = {"vae_model.encoder.conv_in.weight": torch.zeros(1), "clip_model.logit_scale": torch.zeros(1)}
    named = {f"model.diffusion_model.{name}": value for name, value in imagedream_state(network).items()}
    torch.save({**named, **others}, base)
    with pytest.raises(InputError, match="ImageDream's weights"):
        official.fill_network(empty, path, None)
    report = official.fill_network(empty, path, official.read_tensors(base))
    assert report.contents == "motion modules" and "on top of ImageDream" in report.sentence()
    assert same_weights(network, empty)
    assert official.holds_motion_only(path)


def test_a_checkpoint_that_could_run_code_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return (print, ("ran",))

    path = tmp_path / "4dm.ckpt"
    torch.save({"state_dict": {"module.x": torch.zeros(1)}, "hook": Payload()}, path)
    with pytest.raises(InputError, match=r"4dm\.ckpt is refused, because it holds more than tensors"):
        official.read_tensors(path)
    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(InputError):
        official.read_tensors(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("out.0.bias"), r"1 missing \(unet.conv_norm_out.bias\)"),
        (lambda s: s.update({"out.0.bias": torch.zeros(3)}), "1 of another shape"),
        (lambda s: s.update({"lora.down": torch.zeros(3)}), "'lora.down' is not a tensor of 4Diffusion's network"),
    ],
)
def test_a_checkpoint_that_does_not_fit(tmp_path, change, message):
    state = reference_state(tiny_network())
    change(state)
    path = tmp_path / "4dm.ckpt"
    torch.save({"state_dict": state}, path)
    with pytest.raises(InputError, match=message):
        official.fill_network(tiny_network(), path, None)


def test_a_missing_or_damaged_checkpoint(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        official.read_tensors(tmp_path / "4dm.ckpt")
    (tmp_path / "4dm.ckpt").write_bytes(b"PK not a checkpoint")
    with pytest.raises(InputError, match=r"4dm\.ckpt"):
        official.read_tensors(tmp_path / "4dm.ckpt")
    torch.save({"state_dict": {"a": 1}}, tmp_path / "4dm.ckpt")
    with pytest.raises(InputError, match="no state_dict of tensors"):
        official.read_tensors(tmp_path / "4dm.ckpt")


def test_positions_that_differ_are_noticed():
    state = reference_state(tiny_network())
    name = next(name for name in state if name.endswith("attention_blocks.1.pos_encoder.pe"))
    state[name] = state[name] + 1
    with pytest.raises(InputError, match="differ"):
        convert_network(state, 1)


def tiny_condition(frames: int, seed: int = 0) -> FourDMCondition:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(2, 5, 16, generator=generator)
    tokens = torch.randn(frames + 1, 3, 16, generator=generator)
    return FourDMCondition(text[0], text[1], tokens[1:], tokens[0], torch.randn(frames, 4, 8, 8, generator=generator))


def pipeline(network: FourDMUNet) -> FourDMPipeline:
    return FourDMPipeline(None, None, None, None, None, network, ddim_scheduler(), num_frames=3, image_size=8)


def test_frames_and_views_do_not_leak_where_they_must_not():
    """A change of one frame's image reaches other frames through motion modules only."""
    network = FourDMUNet(**TINY).eval()  # motion modules untrained: the identity
    condition = tiny_condition(3)
    rows = network_rows(condition, flat_cameras(view_cameras([0, 90, 180, 270])))
    noise = torch.randn(12, 4, 8, 8, generator=torch.Generator().manual_seed(1))

    def predict(noise):
        grid = torch.cat([noise.unflatten(0, (3, 4)), torch.zeros(3, 1, 4, 8, 8)], 1).flatten(0, 1).repeat(2, 1, 1, 1)
        arguments = (rows.text, rows.image_tokens, rows.cameras, 3, 5, rows.image_latents)
        with torch.no_grad():
            return network(grid, 500, *arguments)[15:].unflatten(0, (3, 5))

    changed = noise.clone()
    changed[0] += 1
    difference = (predict(changed) - predict(noise)).abs().amax((2, 3, 4))
    assert (difference[0] > 0).all(), "views of a frame see each other"
    assert difference[1:].max() == 0, "frames do not, without motion"
    network = tiny_network()
    difference = (predict(changed) - predict(noise)).abs().amax((2, 3, 4))
    assert (difference[1:, 0] > 0).all(), "with motion they do, view by view"


def test_known_latents_stay_and_steer():
    network, condition = tiny_network(), tiny_condition(3)
    noise = torch.randn(12, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    free = pipeline(network).sample(condition, noise, 3)
    known = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    held = pipeline(network).sample(condition, noise, 3, known=known)
    assert torch.equal(held[:4], known)
    assert (held[4:] - free[4:]).abs().max() > 1e-3


def test_token_orders_agree_for_a_single_image_only():
    condition = tiny_condition(3)
    cameras = flat_cameras(view_cameras([0, 90, 180, 270]))
    right = network_rows(condition, cameras, TokenOrder.FRAME).image_tokens
    demo = network_rows(condition, cameras, TokenOrder.DEMO_SCRIPT).image_tokens
    assert torch.equal(right[15:20], condition.image_tokens[:1].expand(5, -1, -1))
    assert torch.equal(demo[15:18], condition.image_tokens)


def test_more_frames_than_positions():
    with pytest.raises(InputError, match="at most 32 frames"):
        pipeline(tiny_network()).sample(tiny_condition(33), torch.zeros(132, 4, 8, 8), 2)


class PaintingPipeline:
    """Stands where a `FourDMPipeline` does: "denoises" to a picture that says frame and view."""

    device = torch.device("cpu")

    class config:
        num_frames, image_size = 8, 16

    def __init__(self, weight: float = 0.0):
        self.calls = []
        self.unet = self.vae = torch.nn.PReLU(init=weight)

    def condition(self, frames, prompt, generator):
        return FourDMCondition(*(torch.zeros(1, 1),) * 2, torch.zeros(len(frames), 1, 1), torch.zeros(1, 1),
                               torch.from_numpy(frames[:, 0, 0, :1].astype(np.float32))[:, :, None, None])  # fmt: skip

    def noise(self, condition, generator):
        return torch.randn(condition.num_frames * 4, 1, 1, 1, generator=generator)

    def sample(self, condition, noise, steps, known=None, start=None, strength=1.0, on_step=None):
        self.calls.append((condition.image_latents.flatten().tolist(), known))
        on_step(steps)
        return condition.image_latents.repeat_interleave(4, 0)[:, :, 0, 0, None, None]

    def decode_latents(self, latents):
        return (latents / 255).expand(-1, 3, 16, 16)

    def encode_images(self, images):
        return images[:, :1, :1, :1]


def frames_of(count: int) -> np.ndarray:
    frames = np.full((count, 16, 16, 4), 255, np.uint8)
    frames[:, 0, 0, 0] = np.arange(count) * 5
    return frames


def test_long_videos_are_made_in_windows_that_share_a_frame(tmp_path):
    painting = PaintingPipeline()
    synthesizer = FourDMSynthesizer(painting, "test", num_inference_steps=2)  # type: ignore[arg-type]
    frames = frames_of(18)
    done = []
    views = synthesizer.generate(
        frames, synthesizer.default_plan(), seed=0, store=tmp_path, progress=lambda a, b: done.append((a, b))
    )
    assert views.images.shape == (18, 4, 16, 16, 4)
    shown = np.round(views.images[:, 0, 8, 8, 0] / 5.0)
    assert np.array_equal(shown, np.arange(18)), "every frame comes from its own window"
    starts = [call[0][0] / 5 for call in painting.calls]
    assert starts == [0, 7, 10]
    assert painting.calls[0][1] is None and painting.calls[1][1] is not None
    assert done[-1] == (6, 6)
    again = PaintingPipeline()
    resumed = FourDMSynthesizer(again, "test", num_inference_steps=2)  # type: ignore[arg-type]
    second = resumed.generate(frames, resumed.default_plan(), seed=0, store=tmp_path, progress=lambda a, b: None)
    assert not again.calls and np.array_equal(second.images, views.images)
    other = PaintingPipeline(weight=1.0)
    trained_on = FourDMSynthesizer(other, "test", num_inference_steps=2)  # type: ignore[arg-type]
    trained_on.generate(frames, trained_on.default_plan(), seed=0, store=tmp_path, progress=lambda a, b: None)
    assert len(other.calls) == 3, "windows of other weights are not used"


def test_plans_4dm_has_no_views_for(tmp_path):
    synthesizer = FourDMSynthesizer(PaintingPipeline(), "test")  # type: ignore[arg-type]
    from sv4d_ns.geometry.cameras import ViewPlan

    with pytest.raises(InputError, match="four views a quarter turn apart"):
        synthesizer.generate(frames_of(2), ViewPlan.BUNDLED, seed=0, store=tmp_path, progress=lambda a, b: None)
    turned = fourdm_plan(-90.0)
    assert turned.azimuths_deg == (270.0, 0.0, 90.0, 180.0)
    synthesizer._front(turned)
