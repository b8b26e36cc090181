"""Loading the released files: tiny files of the same layout, the full-size layout, and everything that goes wrong."""

import gzip
import hashlib
import json
import pickle
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import huggingface_hub.errors
import pytest
import torch
from diffusion_fixture import CAMERA_DIMS, tiny_pipeline
from safetensors.torch import load_file, save_file

from sv4d_ns.diffusion.sv4d.attention import CameraAttention
from sv4d_ns.diffusion.sv4d.guidance import GuidanceKind
from sv4d_ns.diffusion.sv4d.pipeline import StableVideo4D2Pipeline
from sv4d_ns.diffusion.weights import hub, official
from sv4d_ns.diffusion.weights.key_maps import (
    convert_clip,
    convert_unet,
    convert_vae,
    restore_clip,
    restore_unet,
    restore_vae,
)
from sv4d_ns.diffusion.weights.official import Architecture, load_official_pipeline
from sv4d_ns.diffusion.weights.streaming import TensorInfo
from sv4d_ns.utils.errors import InputError

WITHOUT = hub.WITHOUT
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
        # the decoders beside the encoders are not that of the first stage
        other = {name: tensor + 1 if name.startswith("decoder.") else tensor for name, tensor in vae.items()}
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


def load(path, source, dtype=torch.float32, **opening):
    pipeline = load_official_pipeline("cpu", path, dtype, tiny_architecture(source), **opening)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def failure(path, source, **opening) -> str:
    with pytest.raises(InputError) as caught:
        load(path, source, **opening)
    message = str(caught.value)
    assert "\n" not in message
    return message


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


def test_no_list_of_wrong_tensors_is_cut(written, source, state):
    gone = [name for name in state if name.startswith("model.diffusion_model.up_blocks") or ".visual." in name][:40]
    changes = dict.fromkeys(gone) | {f"stray.{index:02d}": torch.zeros(1) for index in range(14)}
    message = failure(written(changes), source)
    assert all(name in message for name in changes)


def test_only_unknown_tensors_can_be_left_out(written, source, state, capsys):
    stray = {"stray": torch.zeros(1)}
    assert "--ignore-unknown" in failure(written(stray), source)
    load(written(stray), source, ignore_unknown=True)
    assert "unknown: stray." in capsys.readouterr().out
    gone = {"model.diffusion_model.out.2.weight": None}
    message = failure(written(stray | gone), source, ignore_unknown=True)
    assert "1 missing" in message and "--ignore-unknown" not in message


def test_another_kind_of_file(tmp_path, source):
    save_file({"unet.weight": torch.zeros(2)}, tmp_path / "sv4d2.safetensors")
    message = failure(tmp_path / "sv4d2.safetensors", source)
    assert "no tensor below model.diffusion_model." in message and "unet.weight" in message


def test_numbers_that_are_no_weights(written, source, state):
    name = "model.diffusion_model.out.2.bias"
    message = failure(written({name: state[name].long()}), source)
    assert f"1 not of a floating-point type ({name} I64)" in message


EMBEDDER = "conditioner.embedders.{}.encoder.{}"


def test_equal_autoencoders_are_not_mentioned(written, source, capsys):
    load(written(), source)
    assert "autoencoder of" not in capsys.readouterr().out


def test_different_autoencoders_are_reported(written, source, state, capsys):
    """Which tensors, by how much, and what is used; frames and views are encoded by the first one."""
    encoder, decoder = EMBEDDER.format(4, "encoder.conv_in.weight"), EMBEDDER.format(5, "decoder.conv_out.bias")
    bent, gone = EMBEDDER.format(5, "quant_conv.bias"), EMBEDDER.format(4, "post_quant_conv.weight")
    changes = {encoder: state[encoder] + 0.5, decoder: state[decoder] - 0.25, bent: torch.zeros(3), gone: None}
    loaded = load(written(changes), source)
    first, second = [line for line in capsys.readouterr().out.splitlines() if line.startswith("The autoencoder of")]
    assert "conditioner.embedders.4 (views)" in first and "in 2 tensors" in first
    assert "encoder.conv_in.weight (max abs difference 0.5)" in first and "will differ" in first
    assert "post_quant_conv.weight (only in conditioner.embedders.1)" in first
    assert "conditioner.embedders.5" in second and "decoder.conv_out.bias (max abs difference 0.25)" in second
    assert "quant_conv.bias ([3] instead of [8])" in second and "no result depends" in second
    assert torch.equal(loaded.vae.encoder.conv_in.weight, source.vae.encoder.conv_in.weight)


def test_a_file_without_the_other_autoencoders(written, source, state, capsys):
    unused = [name for name in state if name.startswith(("conditioner.embedders.4.", "conditioner.embedders.5."))]
    load(written(dict.fromkeys(unused)), source)
    out = capsys.readouterr().out
    assert "has no conditioner.embedders.4 (views): conditioner.embedders.1 encodes both" in out
    assert "conditioner.embedders.5" not in out


@pytest.mark.parametrize("damage", [lambda data: data[:-40], lambda data: b"", lambda data: b"<html>" * 50])
def test_damaged_files(written, source, damage):
    path = written()
    path.write_bytes(damage(path.read_bytes()))
    message = failure(path, source)
    assert str(path) in message and "damaged" in message and WITHOUT in message


def test_values_that_are_not_finite(written, source, state):
    name = "model.diffusion_model.out.2.bias"
    message = failure(written({name: torch.full_like(state[name], float("nan"))}), source)
    assert name in message and "not finite" in message


def test_names_that_are_not_released_files(tmp_path, source, written):
    assert "sv4d2_8views.safetensors" in failure("sv3d_u.safetensors", source)
    assert "does not exist" in failure(tmp_path / "sv4d2.safetensors", source)
    path = written(name="renamed.safetensors")
    assert "--model" in failure(path, source)
    assert load(path, source, model="sv4d2_8views").config.num_views == 8
    assert "sv4d3" in failure(path, source, model="sv4d3")


@pytest.mark.parametrize("name", ["sv4d2.ckpt", "sv4d2.pt", "stabilityai/sv4d2.0/sv4d2.pth"])
def test_pickles_are_refused(tmp_path, monkeypatch, source, name):
    monkeypatch.chdir(tmp_path)
    Path("sv4d2.ckpt").write_bytes(pickle.dumps({"weight": 1}))
    message = failure(name, source)
    assert "pickle" in message and "run any code" in message and ".safetensors" in message


def test_a_pickle_by_another_name(tmp_path, source):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "sv4d2.safetensors")
    assert "damaged" in failure(tmp_path / "sv4d2.safetensors", source)


def test_folders_and_variants(written, source, tmp_path):
    path = written(name="sv4d2_8views.fp16.safetensors")
    assert load(path, source).config.num_views == 8
    assert load(tmp_path / "sv4d2_8views.safetensors", source, variant="fp16").config.num_views == 8
    loaded = load(tmp_path, source, None, filename="sv4d2_8views.safetensors", variant="fp16")
    assert loaded.config.num_views == 8 and loaded.unet.dtype == torch.float16
    assert "has no sv4d2.safetensors" in failure(tmp_path, source)
    (tmp_path / "model_index.json").write_text("{}")
    assert "from_pretrained" in failure(tmp_path, source)


@pytest.mark.parametrize(
    "checkpoint, options, expected",
    [
        ("sv4d2_8views.safetensors", {}, ("stabilityai/sv4d2.0", "sv4d2_8views.safetensors", None)),
        ("stabilityai/sv4d2.0", {}, ("stabilityai/sv4d2.0", "sv4d2.safetensors", None)),
        ("a/b", {"filename": "sv4d2_8views.safetensors"}, ("a/b", "sv4d2_8views.safetensors", None)),
        ("a/b/sv4d2_8views.safetensors", {"variant": "fp16"}, ("a/b", "sv4d2_8views.fp16.safetensors", None)),
        (f"{URL}/resolve/v1/sv4d2.safetensors", {}, ("stabilityai/sv4d2.0", "sv4d2.safetensors", "v1")),
        (f"{URL}/blob/main/sv4d2.safetensors?download=true", {}, ("stabilityai/sv4d2.0", "sv4d2.safetensors", "main")),
    ],
)
def test_names_of_the_hub(monkeypatch, tmp_path, checkpoint, options, expected):
    monkeypatch.chdir(tmp_path)
    found = hub.locate(checkpoint, **options)
    assert (found.repository, found.name, found.revision) == expected and found.path is None


@pytest.mark.parametrize(
    "checkpoint", ["weights/sv4d2.safetensors", "here/b/sv4d2.safetensors", "/a/b", "../a.safetensors"]
)
def test_paths_that_do_not_exist(monkeypatch, tmp_path, checkpoint):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        hub.locate(checkpoint)


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
    monkeypatch.setattr(hub, "hf_hub_download", refuse)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(InputError) as caught:
        StableVideo4D2Pipeline.from_official()
    message = str(caught.value)
    assert all(word in message for word in [*words, WITHOUT]) and "\n" not in message


@pytest.fixture
def hub_home(monkeypatch, tmp_path):
    """An empty HF_HOME for this process; the working folder has no weights."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr(hub.constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    return tmp_path / "home"


def cached(home: Path, path: Path, checksum: str | None = None) -> Path:
    """Lay a file out as the client's cache does; returns its blob."""
    folder, revision = home / "hub" / "models--stabilityai--sv4d2.0", "0" * 40
    blob = folder / "blobs" / (checksum or hashlib.sha256(path.read_bytes()).hexdigest())
    snapshot = folder / "snapshots" / revision
    for made in (blob.parent, snapshot, folder / "refs"):
        made.mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    blob.write_bytes(path.read_bytes())
    (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    return blob


def test_offline_with_a_warm_cache(monkeypatch, hub_home, written, source):
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    cached(hub_home, written(name="sv4d2_8views.safetensors"))
    assert load("sv4d2_8views.safetensors", source).config.num_views == 8
    assert load("stabilityai/sv4d2.0", source, filename="sv4d2_8views.safetensors").config.num_views == 8
    message = failure("sv4d2.safetensors", source)
    assert f"cache {hub_home}/hub and HF_HUB_OFFLINE forbids" in message and "path of the file" in message


def test_local_files_only(hub_home, source):
    message = failure("sv4d2.safetensors", source, local_files_only=True)
    assert "unset local_files_only" in message


def test_files_of_the_cache_are_checked_once(monkeypatch, hub_home, written, source):
    """A flipped bit is found; a file that was right is not read through again until it changes."""
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    path = written()
    blob = cached(hub_home, path)
    read = []
    compare = hub._compare
    monkeypatch.setattr(hub, "_compare", lambda path, expected: (read.append(expected), compare(path, expected)))
    load("sv4d2.safetensors", source)
    load("sv4d2.safetensors", source)
    assert read == [blob.name]

    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    message = failure("sv4d2.safetensors", source)
    assert f"should be {blob.name}" in message and "damaged" in message and read == [blob.name] * 2
    # what is no checksum in a blob's name (small files have a git hash) is not compared
    assert hub.verify(path) is None


def test_a_given_checksum(written, source):
    path = written()
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    load(path, source, sha256=right.upper())
    assert "damaged" in failure(path, source, sha256="0" * 64)
    assert "64 hexadecimal digits" in failure(path, source, sha256="abc")


class FakeHub(BaseHTTPRequestHandler):
    """Answers as the hub does for one file; `state` says how."""

    state: ClassVar[dict] = {}

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def answer(self, with_body):
        self.state["authorization"] = self.headers.get("Authorization")
        self.state["path"] = self.path
        body, code = self.state["body"], self.state.get("code", 200)
        self.send_response(code)
        if code != 200:
            self.send_header("X-Error-Code", self.state["error"])
            body = b""
        self.send_header("X-Repo-Commit", "1" * 40)
        self.send_header("ETag", f'"{self.state["etag"]}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@pytest.fixture
def server(hub_home, monkeypatch):
    FakeHub.state = {}
    running = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    Thread(target=running.serve_forever, daemon=True).start()
    yield FakeHub.state, f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


def test_the_real_client(server, written, source, monkeypatch, hub_home):
    """Downloads once, with the token; what arrives wrong is found; refusals are sentences."""
    state, endpoint = server
    body = written().read_bytes()
    state |= {"body": body, "etag": hashlib.sha256(body).hexdigest()}
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert load("sv4d2.safetensors", source, endpoint=endpoint).config.num_views == 4
    assert state["authorization"] == "Bearer hf_secret"
    assert state["path"] == "/stabilityai/sv4d2.0/resolve/main/sv4d2.safetensors"

    name = "sv4d2_8views.safetensors"
    state |= {"body": body[:-1] + b"?", "etag": hashlib.sha256(body + b"other").hexdigest()}
    assert "damaged" in failure(name, source, endpoint=endpoint)

    for code, error, words in (
        (403, "GatedRepo", "consent to the Stability AI Community License"),
        (401, "RepoNotFound", "shows no repository stabilityai/sv4d2.0"),
        (404, "EntryNotFound", "has no file sv4d2_8views.safetensors"),
        (404, "RevisionNotFound", "no revision v9"),
    ):
        state |= {"code": code, "error": error, "etag": error}
        message = failure(name, source, endpoint=endpoint, cache_dir=hub_home / error, revision="v9")
        assert words in message and URL in message
        assert ("hf auth login" in message) == (code != 404)


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
    infos = {name: TensorInfo(shape, "F32") for name, shape in found.items()}

    for release in official.RELEASES.values():
        components = official.empty_components(Architecture(), release)
        parts = official.parts_of(components)
        official.check_layout(Path("sv4d2.safetensors"), infos, parts)
        assert [len(part.shapes) for part in parts] == [1924, 392, 108, 138]

        filled = {name: {} for name in components}
        for part in parts:
            for name, shape in part.shapes.items():
                ours = part.convert(name, torch.empty(shape, device="meta"))
                assert not ours.keys() & filled[part.component].keys()
                filled[part.component] |= {key: tuple(tensor.shape) for key, tensor in ours.items()}
        for component, module in components.items():
            assert filled[component] == {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
            assert all(parameter.is_meta for parameter in module.parameters())

    read = {name for part in parts for name in part.shapes}
    left = sorted(name for name in found if name not in read and not name.startswith(official.DROPPED))
    assert left == [] and len(read) == 1924 + 392 + 108 + 138
    text = {name.removeprefix(official.CLIP_PREFIX) for name in found.keys() - read if ".open_clip." in name}
    assert text == {
        "positional_embedding", "text_projection", "logit_scale",
        "token_embedding.weight", "ln_final.weight", "ln_final.bias",
    }  # fmt: skip
    # every single name and shape counts
    kept = "model.diffusion_model.out.2.bias"
    message = refusal({name: info for name, info in infos.items() if name not in read or name == kept}, parts)
    assert set(listed(message, "missing")) == read - {kept}
    message = refusal({name: TensorInfo((7, *info.shape), "F32") for name, info in infos.items()}, parts)
    wrong = {f"{name} [{', '.join(map(str, (7, *found[name])))}] instead of {list(found[name])}" for name in read}
    assert set(listed(message, "wrongly shaped", "(?<=]), ")) == wrong


def refusal(found, parts) -> str:
    with pytest.raises(InputError) as caught:
        official.check_layout(Path("f"), found, parts)
    return str(caught.value)


def listed(message: str, what: str, separator: str = ", ") -> list[str]:
    """The names in a message of this kind; asserts that their number is told too."""
    count, names = re.search(rf"(\d+) {what} \((.+)\); give", message).groups()
    names = re.split(separator, names)
    assert int(count) == len(names)
    return names


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
