"""`sv4d convert`: what it writes equals what diffusers would, in little memory, whatever interrupts it."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusion_fixture import tiny_pipeline
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_official_checkpoint import official_state, tiny_architecture

from sv4d_ns.cli import main as cli
from sv4d_ns.diffusion.sv4d.pipeline import StableVideo4D2Pipeline
from sv4d_ns.diffusion.weights import convert as converter
from sv4d_ns.diffusion.weights import streaming
from sv4d_ns.diffusion.weights.convert import convert
from sv4d_ns.diffusion.weights.official import load_official_pipeline
from sv4d_ns.utils.errors import InputError

OWN_FILES = {"README.md", "NOTICE", "conversion.json"}


@pytest.fixture(scope="module")
def source():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def architecture(source):
    return tiny_architecture(source)


@pytest.fixture(scope="module")
def state(source):
    return official_state(source)


@pytest.fixture(scope="module")
def file(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("official") / "sv4d2_8views.safetensors"
    save_file(state, path)
    return path


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def same_content(folder: Path, other: Path, names: set[str]) -> None:
    for name in names:
        first, second = folder / name, other / name
        if name.endswith(".json"):
            assert json.loads(first.read_text()) == json.loads(second.read_text()), name
        else:
            written, expected = load_file(first), load_file(second)
            assert written.keys() == expected.keys(), name
            for key, tensor in expected.items():
                assert written[key].dtype == tensor.dtype and torch.equal(written[key], tensor), key
            with safe_open(first, framework="pt") as opened:
                assert opened.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    "dtype, variant, size",
    [(torch.float32, None, "5GB"), (torch.float16, "fp16", "400KB"), (torch.bfloat16, None, "1MB")],
)
def test_the_folder_is_what_diffusers_writes(tmp_path, file, architecture, capsys, dtype, variant, size):
    folder = convert(
        file, tmp_path / "a" / "out", dtype=dtype, variant=variant, max_shard_size=size, architecture=architecture
    )
    assert "Stability AI Community License" in capsys.readouterr().out
    assert sorted(path.name for path in folder.parent.iterdir()) == ["out"]
    direct = load_official_pipeline("cpu", file, dtype, architecture)
    direct.vae.to(dtype)
    direct.save_pretrained(tmp_path / "saved", variant=variant, max_shard_size=size)
    names = files_of(tmp_path / "saved")
    assert files_of(folder) == names | OWN_FILES
    same_content(folder, tmp_path / "saved", names)
    assert any("-00002-of-" in name for name in names) == (size != "5GB")

    loaded = StableVideo4D2Pipeline.from_pretrained(folder, dtype=dtype, variant=variant)
    for component in ("unet", "vae", "image_encoder"):
        expected = getattr(direct, component).state_dict()
        got = getattr(loaded, component).state_dict()
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[key], tensor) and got[key].dtype == dtype for key, tensor in expected.items())
    assert loaded.unet.config.camera_attention == "per_view_pixel"
    assert json.loads((folder / "unet" / "config.json").read_text())["camera_attention"] == "per_view_pixel"
    assert (loaded.config.num_frames, loaded.config.num_views) == (5, 8)


def test_the_folder_names_licence_and_origin(tmp_path, file, architecture):
    folder = convert(file, tmp_path / "out", variant="fp16", dtype=torch.float16, architecture=architecture)
    card, record = (folder / "README.md").read_text(), json.loads((folder / "conversion.json").read_text())
    for words in ("Stability AI Community License", "https://huggingface.co/stabilityai/sv4d2.0", 'variant="fp16"'):
        assert words in card
    assert "Stability AI Community License" in (folder / "NOTICE").read_text()
    assert record["source"]["file"] == "sv4d2_8views.safetensors" and record["dtype"] == "float16"
    assert record["autoencoder_differences"] == [] == record["not_finite"]


def test_what_is_odd_is_reported_and_kept(tmp_path, state, architecture, capsys):
    broken, large = "model.diffusion_model.out.2.bias", "model.diffusion_model.out.0.weight"
    other = "conditioner.embedders.4.encoder.quant_conv.bias"
    odd = {broken: torch.full_like(state[broken], torch.nan), large: state[large] + 1e6, other: state[other] + 0.125}
    save_file({**state, **odd}, tmp_path / "sv4d2.safetensors")
    folder = convert(tmp_path / "sv4d2.safetensors", tmp_path / "out", dtype=torch.float16, architecture=architecture)
    out = capsys.readouterr().out
    assert f"{broken} (in the file)" in out and f"{large} (as float16)" in out and "--dtype bf16" in out
    assert "quant_conv.bias (max abs difference 0.125)" in out
    record = json.loads((folder / "conversion.json").read_text())
    assert len(record["not_finite"]) == 2
    assert record["autoencoder_differences"] == [
        {"embedder": "conditioner.embedders.4", "name": "quant_conv.bias", "reason": "max abs difference 0.125"}
    ]
    written = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert written["conv_out.bias"].isnan().all() and written["conv_norm_out.weight"].isinf().all()


class Killed(BaseException):
    pass


@pytest.fixture
def dying(monkeypatch):
    """Makes the conversion die inside a weights file, after so many whole ones; returns what was written."""
    written: list[str] = []
    write = streaming.write_tensors

    def arm(whole: int | None) -> list[str]:
        written.clear()

        def writing(path, shapes, dtype, tensors):
            if whole is not None and len(written) == whole:
                path.write_bytes(b"half a file")
                (path.parent / f"{path.name}.left").write_bytes(b"what a kill leaves behind")
                raise Killed
            write(path, shapes, dtype, tensors)
            written.append(path.parent.name)

        monkeypatch.setattr(converter, "write_tensors", writing)
        return written

    return arm


def test_killed_and_gone_on(tmp_path, file, architecture, dying):
    output = tmp_path / "out"
    arguments = {"max_shard_size": "1MB", "architecture": architecture}
    whole = convert(file, tmp_path / "whole", **arguments)
    dying(2)
    with pytest.raises(Killed):
        convert(file, output, **arguments)
    assert not output.exists()

    written = dying(None)
    convert(file, output, **arguments)
    names = files_of(whole)
    assert files_of(output) == names
    assert len(written) == len([name for name in names if name.endswith(".safetensors")]) - 2
    same_content(output, whole, {name for name in names if name.endswith((".safetensors", ".json"))})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_other_settings_start_anew(tmp_path, file, architecture, dying):
    dying(1)
    with pytest.raises(Killed):
        convert(file, tmp_path / "out", architecture=architecture)
    dying(0)
    with pytest.raises(Killed):
        convert(file, tmp_path / "out", dtype=torch.bfloat16, architecture=architecture)
    written = dying(None)
    convert(file, tmp_path / "out", dtype=torch.bfloat16, architecture=architecture)
    assert len(written) == 3
    for path in (tmp_path / "out").rglob("*.safetensors"):
        assert all(tensor.dtype == torch.bfloat16 for tensor in load_file(path).values())


def refused(*arguments, **options) -> str:
    with pytest.raises(InputError) as caught:
        convert(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_refusals_write_nothing(tmp_path, file, architecture, monkeypatch):
    output = tmp_path / "out"
    assert "not a size" in refused(file, output, max_shard_size="big", architecture=architecture)
    assert "--variant" in refused(file, output, variant="../x", architecture=architecture)
    assert "does not exist" in refused(tmp_path / "sv4d2.safetensors", output, architecture=architecture)
    monkeypatch.setattr(converter.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    assert "make room" in refused(file, output, architecture=architecture)
    assert list(tmp_path.iterdir()) == []

    output.mkdir()
    (output / "mine.txt").write_text("keep")
    assert "exists" in refused(file, output, architecture=architecture)
    assert files_of(output) == {"mine.txt"}


def test_two_at_once(tmp_path, file, architecture):
    (tmp_path / ".out.partial").mkdir()
    with FileLock(tmp_path / ".out.partial" / ".lock"):
        assert "Another conversion" in refused(file, tmp_path / "out", architecture=architecture)
    convert(file, tmp_path / "out", architecture=architecture)


def test_the_command(tmp_path, file, architecture, monkeypatch, capsys):
    opened = converter.open_official
    monkeypatch.setattr(
        converter,
        "open_official",
        lambda *arguments, **rest: opened(*arguments, **{**rest, "architecture": architecture}),
    )
    renamed = tmp_path / "renamed.safetensors"
    renamed.symlink_to(file)
    output = tmp_path / "out"
    flags = ["--dtype", "bf16", "--variant", "bf16", "--max-shard-size", "1MB", "--model", "sv4d2"]
    assert cli.main(["convert", str(renamed), str(output), *flags]) == 0
    assert 'dtype=torch.bfloat16, variant="bf16"' in capsys.readouterr().out
    assert json.loads((output / "unet" / "config.json").read_text())["camera_attention"] == "released"
    assert (output / "unet" / "diffusion_pytorch_model.safetensors.index.bf16.json").is_file()


def test_the_command_refuses(tmp_path, file, capsys):
    """The tiny file is not the released one: every tensor of it has another shape."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["convert", str(file), str(tmp_path / "out")])
    message = str(caught.value.code)
    assert message.startswith("Error: ") and "wrongly shaped" in message and "\n" not in message
    assert list(tmp_path.iterdir()) == []


def test_any_tensors_can_be_written(tmp_path):
    generator = torch.Generator().manual_seed(0)
    shapes = {"point": (), "empty": (0, 3), "one": (1,), "odd": (3, 5, 7), "ü": (2, 2)}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
        tensors["odd"] = tensors["odd"].transpose(0, 2).contiguous().transpose(0, 2)  # strides are not shapes
        streaming.write_tensors(tmp_path / "x.safetensors", shapes, dtype, iter(tensors.values()))
        written = load_file(tmp_path / "x.safetensors")
        assert all(
            torch.equal(written[name], tensor) and written[name].dtype == dtype for name, tensor in tensors.items()
        )
        with safe_open(tmp_path / "x.safetensors", framework="pt") as opened:
            assert opened.offset_keys() == list(shapes)
        assert streaming.layout(tmp_path / "x.safetensors")["odd"].nbytes == 105 * dtype.itemsize
    for wrong in ([torch.zeros(2)], [torch.zeros(3).half()], [], [torch.zeros(3)] * 2):
        with pytest.raises(ValueError):
            streaming.write_tensors(tmp_path / "y.safetensors", {"a": (3,)}, torch.float32, wrong)


def test_tensors_are_read_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "MAPPED_BYTES", 30)
    tensors = {str(index): torch.full((index,), float(index)) for index in range(9)}
    save_file(tensors, tmp_path / "x.safetensors")
    names = ["8", "0", "3", "3", "1", "7"]
    read = list(streaming.read_tensors(tmp_path / "x.safetensors", names))
    assert len(read) == 6 and all(torch.equal(tensor, tensors[name]) for name, tensor in zip(names, read, strict=True))
    assert list(streaming.read_tensors(tmp_path / "x.safetensors", [])) == []


def resident(what: str) -> int:
    return 1024 * int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def test_little_memory(tmp_path, monkeypatch):
    """The resident memory, mapped files included, grows by far less than the network is large."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts from here
    except OSError:
        pytest.skip("this system does not tell the peak of a process' memory")
    monkeypatch.setattr(streaming, "MAPPED_BYTES", 8 * 2**20)
    source = tiny_pipeline()
    wide = {**source.unet.config, "block_out_channels": (160, 320), "attention_head_dim": 32}
    unet = type(source.unet)(**{key: value for key, value in wide.items() if not key.startswith("_")})
    source.register_modules(unet=unet)
    size = sum(tensor.nbytes for tensor in unet.state_dict().values())
    assert size > 100e6
    architecture = tiny_architecture(source)
    save_file(official_state(source), tmp_path / "sv4d2.safetensors")
    del source, unet

    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    convert(tmp_path / "sv4d2.safetensors", tmp_path / "out", architecture=architecture)
    assert resident("VmHWM") - before < 0.5 * size
