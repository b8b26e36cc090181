"""What a user can get wrong on the command line: one sentence, exit code 1, nothing written."""

import io
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from permissions import ordinary_user
from PIL import Image
from test_run import object_frames, short_config, write_video
from test_video import BAD, ball, over
from test_video import write_video as write_any_video
from test_views import DAMAGE, make_grid

from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.plugin.trainer import SV4DTrainerConfig
from sv4d_ns.plugin.validation import LIMITS
from sv4d_ns.runs.layout import read_checkpoint
from sv4d_ns.utils.errors import InputError, one_sentence_errors
from sv4d_ns.video.reader import open_film

LONGEST = 500
"""Characters of a sentence, with the folders of the tests."""


def sentence_of(config: SV4DTrainerConfig) -> str:
    """The sentence a run ends with before it has written anything."""
    with pytest.raises(SystemExit) as ended:
        config.set_timestamp()
        config.save_config()
    assert isinstance(ended.value.code, str), "a string exits with code 1 and is printed on stderr"
    assert ended.value.code.startswith("Error: ")
    assert "\n" not in ended.value.code and len(ended.value.code) < LONGEST
    return ended.value.code


def config_for(folder: Path, data: Path | None, **datamanager: Any) -> SV4DTrainerConfig:
    config = short_config(folder / "outputs", data=None)
    config.pipeline.datamanager.data = data
    for name, value in datamanager.items():
        setattr(config.pipeline.datamanager, name, value)
    return config


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("good") / "good.mp4", object_frames())


@pytest.fixture(scope="module")
def index_first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the makers of `BAD` damage."""
    path = tmp_path_factory.mktemp("good") / "ball.mp4"
    return write_any_video(path, over(ball(), (255, 255, 255)), crf="16", container={"movflags": "faststart"})


# --- the video -------------------------------------------------------------------------------------------------------


def pictures(path: Path, *frames: np.ndarray) -> None:
    path.mkdir()
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(path / f"{number}.png")


def white(path: Path, good: Path) -> None:
    write_video(path, np.full((4, 64, 64, 3), 255, np.uint8))


def transparent(path: Path, good: Path) -> None:
    pictures(path, *np.zeros((3, 64, 64, 4), np.uint8))


def opaque(path: Path, good: Path) -> None:
    """Alpha that shows all of the picture but a corner."""
    frames = np.random.default_rng(0).integers(0, 255, (3, 64, 64, 4), np.uint8)
    frames[..., 3] = 255
    frames[:, 0, 0, 3] = 0
    pictures(path, *frames)


def noise(path: Path, good: Path) -> None:
    pictures(path, *np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), np.uint8))


def one_damaged_picture(path: Path, good: Path) -> None:
    pictures(path, *object_frames())
    data = bytearray((path / "1.png").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (path / "1.png").write_bytes(data)


def other_files(path: Path, good: Path) -> None:
    path.mkdir()
    for name in ("a.txt", "b.doc", ".hidden.png"):
        (path / name).write_text("no picture")


def text_as_pictures(path: Path, good: Path) -> None:
    path.mkdir()
    for name in ("0.png", "1.png"):
        (path / name).write_text("no picture")


def named_pipe(path: Path, good: Path) -> None:
    os.mkfifo(path)


def link_in_a_circle(path: Path, good: Path) -> None:
    path.symlink_to(path)


def broken_link(path: Path, good: Path) -> None:
    path.symlink_to(path.parent / "gone.mp4")


def forged_size(path: Path, good: Path) -> None:
    """A PNG that says it is 60,000 pixels wide and high."""
    pictures(path, *object_frames())

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    data = (path / "0.png").read_bytes()
    (path / "0.png").write_bytes(data[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:])


VIDEOS: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    **BAD,
    "white.mp4": (white, "white.mp4 shows no visible object"),
    "transparent": (transparent, "transparent shows no visible object"),
    "opaque": (opaque, "covers all of"),
    "noise": (noise, "noise shows no visible object"),
    "damaged picture": (one_damaged_picture, "1.png cannot be read as a picture"),
    "other files": (other_files, "other files has no pictures"),
    "text.png folder": (text_as_pictures, "0.png cannot be read as a picture"),
    "pipe.mp4": (named_pipe, "pipe.mp4 is not a file or folder"),
    "circle.mp4": (link_in_a_circle, "circle.mp4 (cannot be read|does not exist)"),
    "link.mp4": (broken_link, "link.mp4 does not exist"),
    "n" * 300 + ".mp4": (lambda path, good: None, "File name too long"),
    "two\nlines.mp4": (lambda path, good: path.write_bytes(b"junk" * 50), r"two\\nlines.mp4 is not a video"),
    "forged": (forged_size, "0.png cannot be read as a picture"),
}


@pytest.mark.parametrize("name", VIDEOS)
def test_bad_videos(tmp_path: Path, index_first: Path, name: str) -> None:
    make, says = VIDEOS[name]
    make(tmp_path / name, index_first)
    before = sorted(tmp_path.rglob("*"))
    sentence = sentence_of(config_for(tmp_path, tmp_path / name))

    assert re.search(says, sentence), sentence
    assert sorted(tmp_path.rglob("*")) == before


def forbid(path: Path) -> None:
    path.chmod(0)


@pytest.mark.parametrize("what", ["file", "folder", "folder above", "picture", "pattern"])
def test_what_may_not_be_read(tmp_path: Path, good: Path, what: str) -> None:
    folder = tmp_path / "shots"
    pictures(folder, *object_frames())
    (folder / "video.mp4").write_bytes(good.read_bytes())
    data = {"file": folder / "video.mp4", "folder above": folder / "video.mp4", "pattern": folder / "*.png"}.get(
        what, folder
    )
    forbidden = {"file": folder / "video.mp4", "picture": folder / "1.png", "pattern": folder / "1.png"}.get(
        what, folder
    )
    forbid(forbidden)
    with ordinary_user():
        sentence = sentence_of(config_for(tmp_path, data))
    forbidden.chmod(0o755)
    assert "ermission" in sentence and (data.name in sentence or forbidden.name in sentence)
    assert not (tmp_path / "outputs").exists()


def too_few(path: Path) -> None:
    pictures(path, *np.full((2, 96, 96), 255, np.uint8))


def too_small(path: Path) -> None:
    pictures(path, *np.full((3, 40, 40), 255, np.uint8))


def too_large(path: Path) -> None:
    pictures(path, *np.full((3, 192, 192), 255, np.uint8))


def empty_masks(path: Path) -> None:
    pictures(path, *np.zeros((3, 96, 96), np.uint8))


def full_masks(path: Path) -> None:
    pictures(path, *np.full((3, 96, 96), 255, np.uint8))


MASKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "gone": (lambda path: None, "gone does not exist"),
    "few": (too_few, "few holds 2 masks but .* has 3 frames"),
    "small": (too_small, "masks of .*small are 40x40, but the pictures of .* are 96x96"),
    "large": (too_large, "masks of .*large are 192x192, but the pictures of .* are 96x96"),
    "black": (empty_masks, "shows no visible object"),
    "all": (full_masks, "covers all of"),
    "folder": (Path.mkdir, "folder has no pictures"),
    "text.mp4": (lambda path: path.write_text("masks"), "text.mp4 is not a video"),
}


@pytest.mark.parametrize("name", MASKS)
def test_bad_masks(tmp_path: Path, good: Path, name: str) -> None:

    make, says = MASKS[name]
    make(tmp_path / name)
    sentence = sentence_of(config_for(tmp_path, good, masks=tmp_path / name))
    assert re.search(says, sentence), sentence
    assert not (tmp_path / "outputs").exists()


# --- view grids ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DAMAGE)
def test_bad_grids(tmp_path: Path, name: str) -> None:

    spoil, says = DAMAGE[name]
    folder = make_grid().save(tmp_path / "grid")
    spoil(folder)
    sentence = sentence_of(config_for(tmp_path, folder))
    assert re.search(says, sentence), sentence
    assert not (tmp_path / "outputs").exists()


def test_a_grid_of_one_frame_and_one_view_is_fine(tmp_path: Path) -> None:
    folder = make_grid(frames=1, plan=ViewPlan.ring((90.0,))).save(tmp_path / "grid")
    config_for(tmp_path, folder).pipeline.datamanager.check_data()


# --- flags -----------------------------------------------------------------------------------------------------------

NAN = float("nan")
IMPOSSIBLE: dict[str, list[Any]] = {
    "experiment-name": ["../elsewhere", ""],
    "timestamp": ["../../elsewhere", "/tmp/elsewhere"],
    "max-num-iterations": [-1],
    "steps-per-save": [-5],
    "machine.num-devices": [0, 2],
    "machine.num-machines": [2],
    "machine.seed": [-1, 2**40],
    "pipeline.datamanager.seed": [-1],
    "pipeline.datamanager.max-frames": [0, -3],
    "pipeline.datamanager.fps": [0.0, -1.0, NAN, float("inf")],
    "pipeline.datamanager.frame-ratio": [0.0, 1.5, NAN],
    "pipeline.datamanager.input-size": [0, -4, 1, 200_000],
    "pipeline.datamanager.synthesis-steps": [0, -2],
    "pipeline.datamanager.guidance-scale": [NAN, -1.0],
    "pipeline.datamanager.train-num-rays-per-batch": [0, -1],
    "pipeline.datamanager.patches": [-1],
    "pipeline.visibility-every": [-1],
    "pipeline.refine-steps": [(0,), (-3,), (9, 4), (4, 4), tuple(range(1, 12))],
    "pipeline.refine-strength": [0.0, 2.0, NAN],
    "pipeline.movie-size": [0, 7],
}


def set_flag(config: Any, flag: str, value: Any) -> None:
    *parts, last = flag.replace("-", "_").split(".")
    for part in parts:
        config = getattr(config, part)
    setattr(config, last, value)


def test_every_limit_is_tried() -> None:
    assert {flag for flag, _ in LIMITS} == set(IMPOSSIBLE)


@pytest.mark.parametrize(
    ("flag", "value"), [(flag, value) for flag, values in IMPOSSIBLE.items() for value in values], ids=str
)
def test_impossible_values(tmp_path: Path, good: Path, flag: str, value: Any) -> None:
    config = config_for(tmp_path, good)
    set_flag(config, flag, value)
    assert f"--{flag} is " in sentence_of(config)
    assert not (tmp_path / "outputs").exists()


def test_nan_anywhere_is_named(tmp_path: Path, good: Path) -> None:
    config = config_for(tmp_path, good)
    next(iter(config.optimizers.values()))["optimizer"].lr = NAN
    assert "optimizer.lr is not a number" in sentence_of(config)


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "azimuths without": ({"view_azimuths": ()}, "no novel view"),
    "azimuth nan": ({"view_azimuths": (NAN,)}, "not finite|not a number"),
    "elevations alone": ({"view_elevations": (1.0,)}, "needs --pipeline.datamanager.view-azimuths"),
    "one elevation": ({"view_azimuths": (90.0, 180.0), "view_elevations": (1.0,)}, "one elevation for each"),
    "overhead": ({"view_azimuths": (90.0,), "view_elevations": (90.0,)}, "between -90 and 90"),
    "both rates": ({"max_frames": 2, "fps": 5.0}, "give one of them"),
    "slow rate": ({"fps": 0.1}, "ask for a higher rate"),
    "matting model": ({"matting": "nonsense"}, "no matting model 'nonsense'"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_settings_that_do_not_go_together(tmp_path: Path, good: Path, name: str) -> None:

    values, says = OTHERS[name]
    assert re.search(says, sentence_of(config_for(tmp_path, good, **values)))
    assert not (tmp_path / "outputs").exists()


def test_no_data(tmp_path: Path) -> None:
    assert "--data" in sentence_of(config_for(tmp_path, None))
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("what", ["a file in the way", "a folder without permission"])
def test_output_folder_that_cannot_be_written(tmp_path: Path, good: Path, what: str) -> None:
    place = tmp_path / "place"
    if what == "a file in the way":
        place.write_text("")
    else:
        place.mkdir(mode=0o500)
    with ordinary_user() if place.is_dir() else nullcontext():
        sentence = sentence_of(config_for(place, good))
    assert "--output-dir" in sentence and "place" in sentence


def test_unknown_checkpoint_paths(tmp_path: Path, good: Path) -> None:
    for flag in ("load_dir", "load_checkpoint"):
        config = config_for(tmp_path, good)
        setattr(config, flag, tmp_path / "nowhere" / "models")
        sentence = sentence_of(config)
        assert "--" + flag.replace("_", "-") in sentence and "nowhere" in sentence
    assert not (tmp_path / "outputs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_cuda(tmp_path: Path, good: Path) -> None:
    config = config_for(tmp_path, good)
    config.device = "cuda"
    assert "--device" in sentence_of(config)
    assert not (tmp_path / "outputs").exists()


# --- checkpoints -----------------------------------------------------------------------------------------------------


class Harm:
    """What a pickle from a stranger may hold."""

    def __reduce__(self) -> Any:
        return os.system, ("touch harmed",)


def saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def changed(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]


def archive(name: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr(name, "text")
    return stream.getvalue()


STATE = {"step": 3, "pipeline": {"a": torch.rand(4000)}}
CHECKPOINTS: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "text": lambda: b"not a checkpoint\n" * 20,
    "truncated": lambda: saved(STATE)[:9000],
    "flipped": lambda: changed(saved(STATE)),
    "code": lambda: saved({**STATE, "more": Harm()}),
    "code in an old pickle": lambda: pickle.dumps(Harm()),
    "another archive": lambda: archive("../../escape.txt"),
    "a tensor": lambda: saved(torch.rand(3)),
    "a list": lambda: saved([1, 2]),
    "no step": lambda: saved({"pipeline": {}}),
    "a step that is no number": lambda: saved({"step": "3", "pipeline": {}}),
    "no pipeline": lambda: saved({"step": 3}),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_bad_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "step-000000003.ckpt"
    path.write_bytes(CHECKPOINTS[name]())
    with pytest.raises(
        InputError, match=r"step-000000003\.ckpt .*: give a checkpoint of ns-train, or delete it"
    ) as said:
        read_checkpoint(path)
    assert "\n" not in str(said.value)
    assert list(tmp_path.iterdir()) == [path]


def test_a_good_checkpoint_is_read(tmp_path: Path) -> None:
    (tmp_path / "good.ckpt").write_bytes(saved(STATE))
    assert read_checkpoint(tmp_path / "good.ckpt")["step"] == 3


# --- the disk, the keyboard, the command -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(28, "No space left on device", "/here/file"), r"^Error: /here/file cannot be written \(No space"),
        (OSError(28, "No space left on device"), r"^Error: A file cannot be written"),
        (PermissionError(13, "Permission denied", "/here/file"), r"^Error: /here/file cannot be opened \(Permission"),
    ],
)
def test_errors_of_the_disk_are_one_sentence(error: OSError, says: str) -> None:
    with pytest.raises(SystemExit, match=says), one_sentence_errors():
        raise error
    with pytest.raises(FileNotFoundError), one_sentence_errors():
        raise FileNotFoundError(2, "a fault of ours keeps its traceback")


def test_the_command_prints_the_sentence_and_fails(tmp_path: Path) -> None:
    """Once through the real executable, because this is what a user sees."""
    script = Path(sys.executable).parent / "ns-train"
    command = [str(script), "sv4d", "--data", "missing.mp4"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "missing.mp4" in ended.stderr.strip().splitlines()[-1]
    assert "Traceback" not in ended.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ["batch", "good.mp4", "--out", "taken"],
        ["data", "render", "procedural:0:1", "taken", "--frames", "2", "--views", "2", "--size", "16"],
        ["doctor", "good.mp4", "--picture", "taken/a.png"],
        ["doctor", "good.mp4", "--picture", "folder.png"],
        ["doctor", "good.mp4", "--picture", "."],
        ["doctor", "good.mp4", "--picture", "sheet.jpg"],
    ],
)
def test_a_place_for_results_that_is_none_is_one_sentence(
    tmp_path: Path, good: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    from sv4d_ns.cli.main import main

    monkeypatch.chdir(tmp_path)
    shutil.copy(good, "good.mp4")
    Path("taken").write_text("mine")
    Path("folder.png").mkdir()
    with pytest.raises(SystemExit) as ended:
        main(words)
    named = next(word for word in words if word.startswith(("taken", "folder", ".", "sheet")))
    assert str(ended.value).startswith("Error: ") and named.split("/")[0] in str(ended.value)
    assert Path("taken").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.png", "good.mp4", "taken"]


def test_an_error_of_ours_is_no_sentence_about_the_users_paths(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), one_sentence_errors([str(tmp_path)]):
        (tmp_path / "forgotten").read_text()


@pytest.mark.parametrize(
    ("head", "named"),
    [
        (b"glTF\2\0\0\0", "a 3D model"),
        (b"ply\nformat ascii 1.0\n", "a 3D model"),
        (b"!!python/object:x", "--load-config"),
    ],
)
def test_files_of_other_steps_given_as_the_video_are_named(tmp_path: Path, head: bytes, named: str) -> None:
    (tmp_path / "a.bin").write_bytes(head + bytes(100))
    with pytest.raises(InputError, match=named):
        open_film(tmp_path / "a.bin")


def test_a_run_given_as_the_video_is_named(tmp_path: Path) -> None:
    """Its contact sheet was taken for a film of one frame."""
    run = tmp_path / "run"
    (run / "nerfstudio_models").mkdir(parents=True)
    (run / "config.yml").touch()
    Image.new("RGB", (64, 64)).save(run / "contact_sheet.png")
    with pytest.raises(InputError, match=r"folder of a run.*--load-config"):
        open_film(run)
