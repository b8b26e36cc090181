"""Loading the released files: tiny files of the same layout, the full-size layout, and everything that goes wrong."""

import gzip
import json
from pathlib import Path

import huggingface_hub.errors
import pytest
import torch
from diffusion_fixture import CAMERA_DIMS, tiny_pipeline
from safetensors.torch import load_file, save_file

from sv4d_ns.diffusion import official
from sv4d_ns.diffusion.attention import CameraAttention
from sv4d_ns.diffusion.checkpoints import (
    convert_clip,
    convert_unet,
    convert_vae,
    restore_clip,
    restore_unet,
    restore_vae,
)
from sv4d_ns.diffusion.guidance import GuidanceKind
from sv4d_ns.diffusion.official import Architecture, load_official_pipeline
from sv4d_ns.diffusion.pipeline import StableVideo4D2Pipeline
from sv4d_ns.errors import InputError

WITHOUT = "--pipeline.datamanager.synthesis embedded"
URL = "https://huggingface.co/stabilityai/sv4d2.0"
LAYOUT = Path(__file__).parent / "data" / "sv4d2" / "keys_sv4d2.json.gz"


def tiny_architecture(source: StableVideo4D2Pipeline) -> Architecture:
    unet = {name: value for name, value in source.unet.config.items() if not name.startswith("_")}
    vae = {name: value for name, value in source.vae.config.items() if not name.startswith("_")}
    unet.pop("camera_attention")
    return Architecture(unet, vae, source.image_encoder.config.to_dict(), CAMERA_DIMS, image_size=16)


def prefixed(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor.contiguous() for name, tensor in state.items()}


def official_state(source: StableVideo4D2Pipeline) -> dict[str, torch.Tensor]:
    """The pipeline's weights as a released file holds them, with what such a file has beside them."""
    vae = restore_vae(source.vae.state_dict(), len(source.vae.config.block_out_channels))
    leftovers = {"post_quant_conv.weight": torch.full((4, 4, 1, 1), 7.0)}
    text = {
        "positional_embedding": torch.zeros(3),
        "token_embedding.weight": torch.zeros(2),
        "logit_scale": torch.ones(()),
    }
    state = prefixed("model.diffusion_model.", restore_unet(source.unet.state_dict(), source.unet.config))
    state |= prefixed(
        "conditioner.embedders.0.open_clip.model.", restore_clip(source.image_encoder.state_dict()) | text
    )
    for index in (1, 4, 5):
        # the decoders beside the encoders are not those of the first stage
        other = {name: tensor + index if name.startswith("decoder.") else tensor for name, tensor in vae.items()}
        state |= prefixed(f"conditioner.embedders.{index}.encoder.", other | leftovers)
    decoder = {name: tensor for name, tensor in vae.items() if name.startswith("decoder.")}
    return {name: tensor.clone() for name, tensor in (state | prefixed("first_stage_model.", decoder)).items()}


@pytest.fixture(scope="module")
def source():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def state(source):
    return official_state(source)


@pytest.fixture
def written(tmp_path, state):
    """Writes a file that differs from the right one as told; None leaves a tensor out."""

    def write(changes=None, name="sv4d2.safetensors"):
        changed = {**state, **(changes or {})}
        save_file({key: value for key, value in changed.items() if value is not None}, tmp_path / name)
        return tmp_path / name

    return write


def load(path, source, dtype=torch.float32):
    pipeline = load_official_pipeline("cpu", path, dtype, tiny_architecture(source))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def failure(path, source) -> str:
    with pytest.raises(InputError) as caught:
        load(path, source)
    return str(caught.value)


def test_weights_arrive(written, source, capsys):
    loaded = load(written(), source)
    assert "Stability AI Community License" in capsys.readouterr().out
    for name in ("unet", "vae", "image_encoder"):
        expected, got = getattr(source, name).state_dict(), getattr(loaded, name).state_dict()
        assert expected.keys() == got.keys() and not getattr(loaded, name).training
        for key, tensor in expected.items():
            assert torch.equal(tensor, got[key]), key
        assert not any(tensor.is_meta for tensor in [*loaded.components[name].buffers(), *got.values()])


@pytest.mark.parametrize("name, frames, views", [("sv4d2.safetensors", 12, 4), ("sv4d2_8views.safetensors", 5, 8)])
def test_pictures_equal_those_of_the_source(written, source, name, frames, views):
    loaded = load(written(name=name), source)
    attention = CameraAttention.RELEASED if views == 4 else CameraAttention.PER_VIEW_PIXEL
    kind = GuidanceKind.LINEAR if views == 4 else GuidanceKind.SPATIOTEMPORAL
    assert loaded.unet.config.camera_attention == attention.value
    assert (loaded.config.num_frames, loaded.config.num_views) == (frames, views)
    assert loaded.config.guidance["kind"] == kind.value

    direct = tiny_pipeline(guidance=loaded.config.guidance)
    settings = {key: value for key, value in direct.unet.config.items() if not key.startswith("_")}
    direct.register_modules(unet=type(direct.unet)(**{**settings, "camera_attention": attention.value}).eval())
    direct.unet.load_state_dict(source.unet.state_dict())
    video = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(4))

    def pictures(pipeline):
        generator = torch.Generator().manual_seed(0)
        call = pipeline(video, [90.0, 200.0], [0.0, 5.0], num_inference_steps=2, generator=generator)
        return call.frames

    assert torch.equal(pictures(loaded), pictures(direct))


def test_half_precision_keeps_the_autoencoder_in_float32(written, source):
    loaded = load(written(), source, torch.bfloat16)
    assert loaded.unet.dtype == loaded.image_encoder.dtype == torch.bfloat16
    assert loaded.vae.dtype == torch.float32
    frames = loaded(torch.rand(2, 3, 16, 16), [90.0], [0.0], num_inference_steps=1).frames
    assert frames.shape == (2, 1, 3, 16, 16) and frames.isfinite().all()


def test_every_wrong_tensor_is_named(written, source, state):
    gone, bent, new = (
        "model.diffusion_model.out.2.weight",
        "conditioner.embedders.0.open_clip.model.visual.proj",
        "model.diffusion_model.extra.weight",
    )
    fused = "conditioner.embedders.0.open_clip.model.visual.transformer.resblocks.0.attn.in_proj_weight"
    message = failure(
        written({gone: None, fused: None, bent: torch.zeros(3, 5), new: torch.zeros(1), "stray": torch.zeros(1)}),
        source,
    )
    assert f"2 missing ({gone}, {fused})" in message
    assert f"2 unknown ({new}, stray)" in message
    assert f"1 wrongly shaped ({bent} [3, 5] instead of {list(state[bent].shape)})" in message
    assert "\n" not in message and URL in message


def test_long_lists_are_cut(written, source):
    message = failure(written({f"stray.{index:02d}": torch.zeros(1) for index in range(14)}), source)
    assert "14 unknown" in message and "stray.09 and 4 more" in message and "stray.10" not in message


def test_different_autoencoders_are_refused(written, source, state):
    name = "conditioner.embedders.4.encoder.encoder.conv_in.weight"
    message = failure(written({name: state[name] + 0.5}), source)
    assert name in message and "0.5" in message and "conditioner.embedders.1.encoder.encoder.conv_in.weight" in message


@pytest.mark.parametrize("damage", [lambda data: data[:-40], lambda data: b"", lambda data: b"<html>" * 50])
def test_damaged_files(written, source, damage):
    path = written()
    path.write_bytes(damage(path.read_bytes()))
    message = failure(path, source)
    assert str(path) in message and "damaged" in message and WITHOUT in message and "\n" not in message


def test_values_that_are_not_finite(written, source, state):
    name = "model.diffusion_model.out.2.bias"
    message = failure(written({name: torch.full_like(state[name], float("nan"))}), source)
    assert name in message and "not finite" in message


def test_names_that_are_not_released_files(tmp_path, source):
    assert "sv4d2_8views.safetensors" in failure("sv3d_u.safetensors", source)
    assert "does not exist" in failure(tmp_path / "sv4d2.safetensors", source)


def hub_error(name: str) -> Exception:
    kind = getattr(huggingface_hub.errors, name)
    if issubclass(kind, huggingface_hub.errors.HfHubHTTPError):
        error = kind.__new__(kind)
        Exception.__init__(error, "401 Client Error.\n\nCannot access")
        return error
    return kind("first line\nsecond line")


@pytest.mark.parametrize(
    "name, offline, words",
    [
        ("GatedRepoError", False, [URL, "accept the licence", "hf auth login", "Stability AI Community License"]),
        ("RepositoryNotFoundError", False, [URL, "accept the licence", "hf auth login"]),
        ("LocalEntryNotFoundError", True, ["HF_HUB_OFFLINE", "HF_HOME", "cache"]),
        ("LocalEntryNotFoundError", False, [URL, "cannot be reached"]),
        ("EntryNotFoundError", False, [URL, "sv4d2.safetensors"]),
        ("HfHubHTTPError", False, [URL, "401 Client Error. Cannot access", "hf auth login"]),
    ],
)
def test_the_hub_refuses(monkeypatch, tmp_path, name, offline, words):
    def refuse(repository, file):
        assert (repository, file) == ("stabilityai/sv4d2.0", "sv4d2.safetensors")
        raise hub_error(name)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(official, "hf_hub_download", refuse)
    monkeypatch.setattr(official.constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(InputError) as caught:
        StableVideo4D2Pipeline.from_official()
    message = str(caught.value)
    assert all(word in message for word in [*words, WITHOUT]) and "\n" not in message


def test_from_the_hub(monkeypatch, tmp_path, written, source):
    path = written(name="sv4d2_8views.safetensors")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr(official, "hf_hub_download", lambda repository, file: str(path) if file == path.name else None)
    assert load("sv4d2_8views.safetensors", source).config.num_views == 8


@pytest.mark.parametrize("warm", [False, True])
def test_offline_with_the_real_client(monkeypatch, tmp_path, warm):
    """A cached file is found without the network; one that is not there is a sentence."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(official.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(official.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder, revision = tmp_path / "hub" / "models--stabilityai--sv4d2.0", "0" * 40
    if warm:
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(revision)
        (folder / "snapshots" / revision).mkdir(parents=True)
        (folder / "snapshots" / revision / "sv4d2.safetensors").write_bytes(b"x")
        path, release = official.locate("sv4d2.safetensors")
        assert path == folder / "snapshots" / revision / "sv4d2.safetensors" and release.num_views == 4
    else:
        with pytest.raises(InputError, match=f"cache {tmp_path}/hub and HF_HUB_OFFLINE forbids"):
            official.locate("sv4d2.safetensors")


def test_full_size_layout():
    """What the loader asks of a file is what the reference's model code writes, name by name and shape by shape."""
    keys = json.loads(gzip.decompress(LAYOUT.read_bytes()))
    sections = {name.split(" ")[0]: shapes for name, shapes in keys.items() if name != "meta"}
    embedder = sections.pop("conditioner.embedders.{1,4,5}")
    unet_section = sections.pop("model.diffusion_model")
    found = {f"model.diffusion_model.{name}": tuple(shape) for name, shape in unet_section.items()}
    for index in (1, 4, 5):
        found |= {f"conditioner.embedders.{index}.{name}": tuple(shape) for name, shape in embedder.items()}
    for section in sections.values():
        found |= {name: tuple(shape) for name, shape in section.items()}
    assert len(found) == keys["meta"]["summary"]["sv4d2"]["n_keys"] == 3204

    for release in official.RELEASES.values():
        modules = official._empty_modules(Architecture(), release)
        parts = official._parts(*modules)
        official._check_layout(Path("sv4d2.safetensors"), found, parts)
        assert sum(len(part.shapes) for part in parts[:1]) == 1924
    assert all(parameter.is_meta for module in modules for parameter in module.parameters())
    for name in (
        "model.diffusion_model.input_blocks.7.0.skip_connection.weight",
        "first_stage_model.decoder.conv_in.bias",
    ):
        with pytest.raises(InputError, match=f"1 missing \\({name}\\)"):
            official._check_layout(Path("f"), {key: shape for key, shape in found.items() if key != name}, parts)


def test_restoring_is_the_inverse_of_converting(source):
    levels = len(source.vae.config.block_out_channels)
    round_trips = {
        "unet": convert_unet(restore_unet(source.unet.state_dict(), source.unet.config), 1),
        "vae": convert_vae(restore_vae(source.vae.state_dict(), levels), levels),
        "image_encoder": convert_clip(restore_clip(source.image_encoder.state_dict())),
    }
    for name, state in round_trips.items():
        expected = getattr(source, name).state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())


def test_a_file_of_half_precision(written, source, state, tmp_path):
    path = written({name: tensor.half() for name, tensor in state.items()})
    assert load_file(path)["model.diffusion_model.out.2.bias"].dtype == torch.float16
    assert load(path, source).unet.conv_out.weight.dtype == torch.float32
