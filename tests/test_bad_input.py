"""What a user can get wrong on the command line: one sentence, exit code 1, nothing written."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from test_run import object_frames, short_config, write_video

from sv4d_ns.trainer import SV4DTrainerConfig


def _missing(folder: Path) -> Path:
    return folder / "no_such_video.mp4"


def _text(folder: Path) -> Path:
    path = folder / "text.mp4"
    path.write_text("this is not a video\n" * 100)
    return path


def _truncated(folder: Path) -> Path:
    whole = write_video(folder / "whole.mp4", object_frames(12))
    path = folder / "truncated.mp4"
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    return path


def _one_frame(folder: Path) -> Path:
    return write_video(folder / "one.mp4", object_frames(1))


def _white(folder: Path) -> Path:
    return write_video(folder / "white.mp4", np.full((4, 64, 64, 3), 255, np.uint8))


def _transparent(folder: Path) -> Path:
    from PIL import Image

    frames = folder / "transparent"
    frames.mkdir()
    for number in range(3):
        Image.new("RGBA", (64, 64)).save(frames / f"{number}.png")
    return frames


VIDEOS: list[Callable[[Path], Path]] = [_missing, _text, _truncated, _one_frame, _white, _transparent]


def sentence_of(config: SV4DTrainerConfig) -> str:
    """The sentence a run ends with before it has written anything."""
    with pytest.raises(SystemExit) as ended:
        config.save_config()
    assert isinstance(ended.value.code, str), "a string exits with code 1 and is printed on stderr"
    assert "\n" not in ended.value.code and len(ended.value.code) < 400
    return ended.value.code


@pytest.mark.parametrize("make", VIDEOS, ids=lambda make: make.__name__.strip("_"))
def test_bad_videos(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    data = make(tmp_path)
    sentence = sentence_of(short_config(tmp_path / "outputs", data=None, pipeline=_pipeline_with(data)))
    assert data.name in sentence
    assert not (tmp_path / "outputs").exists()


def _pipeline_with(data: Path | None):  # type: ignore[no-untyped-def]
    config = short_config(Path("unused")).pipeline
    config.datamanager.data = data
    return config


@pytest.fixture
def good_video(tmp_path: Path) -> Path:
    return write_video(tmp_path / "good.mp4", object_frames())


def test_no_data(tmp_path: Path) -> None:
    assert "--data" in sentence_of(short_config(tmp_path / "outputs"))
    assert not (tmp_path / "outputs").exists()


def test_output_folder_that_cannot_be_written(tmp_path: Path, good_video: Path) -> None:
    in_the_way = tmp_path / "a_file"
    in_the_way.write_text("")
    sentence = sentence_of(short_config(in_the_way / "outputs", pipeline=_pipeline_with(good_video)))
    assert "--output-dir" in sentence and "a_file" in sentence


def test_unknown_checkpoint_paths(tmp_path: Path, good_video: Path) -> None:
    for flag in ("load_dir", "load_checkpoint"):
        config = short_config(
            tmp_path / "outputs", pipeline=_pipeline_with(good_video), **{flag: tmp_path / "nowhere" / "models"}
        )
        sentence = sentence_of(config)
        assert "--" + flag.replace("_", "-") in sentence and "nowhere" in sentence
    assert not (tmp_path / "outputs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_cuda(tmp_path: Path, good_video: Path) -> None:
    sentence = sentence_of(short_config(tmp_path / "outputs", device="cuda", pipeline=_pipeline_with(good_video)))
    assert "--device" in sentence
    assert not (tmp_path / "outputs").exists()


def test_the_command_prints_the_sentence_and_fails(tmp_path: Path) -> None:
    """Once through the real executable, because this is what a user sees."""
    script = Path(sys.executable).parent / "ns-train"
    command = [str(script), "sv4d", "--data", "missing.mp4"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "missing.mp4" in ended.stderr.strip().splitlines()[-1]
    assert "Traceback" not in ended.stderr
    assert not list(tmp_path.iterdir())
