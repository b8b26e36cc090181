"""Films, folders and names as users have them: kinds that players show and a strict reader stumbles over."""

import os
import struct
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageCms, features
from test_video import FRAMES, HEIGHT, WIDTH, ball, clip_of, over, write_video

from sv4d_ns.utils.errors import InputError
from sv4d_ns.video import load_object_video, read_clip, segment
from sv4d_ns.video.background import without_bars
from sv4d_ns.video.checks import examine
from sv4d_ns.video.reader import Region
from sv4d_ns.video.sources import source_files, source_name
from sv4d_ns.video.timing import in_order

WHITE = (255, 255, 255)


# --- tracks, matrices, stamps ----------------------------------------------------------------------------------------


def film_after(path: Path, preview_frames: int, size: int) -> Path:
    """A film whose file begins with a small picture track of so many frames."""
    exact = over(ball(), WHITE)
    with av.open(str(path), "w") as output:
        preview = output.add_stream("mjpeg", rate=10)
        preview.width, preview.height, preview.pix_fmt = size, size, "yuvj420p"
        film = output.add_stream("libx264", rate=10)
        film.width, film.height, film.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for index, picture in enumerate(exact):
            if index < preview_frames:
                small = np.full((size, size, 3), 40, np.uint8)
                output.mux(preview.encode(av.VideoFrame.from_ndarray(small, format="rgb24")))
            output.mux(film.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(preview.encode())
        output.mux(film.encode())
    return path


@pytest.mark.parametrize(("name", "frames"), [("one.mp4", 1), ("several.mkv", 8), ("three.mov", 3)])
def test_the_film_is_found_behind_a_preview(tmp_path, name, frames):
    clip = read_clip(film_after(tmp_path / name, frames, 16))
    assert clip.frames.shape == (FRAMES, HEIGHT, WIDTH, 4) and clip.fps == 10


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_animated_avif(tmp_path):
    pictures = [Image.fromarray(frame) for frame in ball()]
    pictures[0].save(tmp_path / "a.avif", save_all=True, append_images=pictures[1:], duration=100, quality=90)
    clip = read_clip(tmp_path / "a.avif")
    assert len(clip.frames) == FRAMES and clip.has_alpha and clip.fps == pytest.approx(10)


def with_matrix(path: Path, good: Path, matrix: tuple[int, int, int, int]) -> Path:
    data = bytearray(good.read_bytes())
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    place = data.index(identity, data.index(b"tkhd"))
    a, b, c, d = (value << 16 for value in matrix)
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "matrix", [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)] + [(0, b, c, 0) for b in (1, -1) for c in (1, -1)]
)
def test_all_eight_display_matrices(tmp_path, matrix):
    """A dot at (x, y) is shown at (a x + c y, b x + d y), counted from the corner that becomes the first."""
    picture = np.full((2, HEIGHT, WIDTH, 3), 255, np.uint8)
    picture[:, 8:16, 32:48] = 0
    good = write_video(tmp_path / "good.mp4", picture, crf="1")
    shown = read_clip(with_matrix(tmp_path / "turned.mp4", good, matrix)).frames[0, ..., 0] < 128
    a, b, c, d = matrix
    y, x = np.mgrid[8:16, 32:48] + 0.5
    columns, rows = a * x + c * y, b * x + d * y
    width, height = (WIDTH, HEIGHT) if a else (HEIGHT, WIDTH)
    columns, rows = (np.where(columns < 0, width + columns, columns), np.where(rows < 0, height + rows, rows))
    expected = np.zeros((height, width), bool)
    expected[rows.astype(int), columns.astype(int)] = True
    np.testing.assert_array_equal(shown, expected)


def avi_with_empty_chunks(path: Path, empty: set[int]) -> Path:
    """Motion JPEG in an AVI whose chunks of the given numbers are empty: show the last picture longer."""
    good = path.with_suffix(".good.avi")
    write_video(good, over(ball(13), WHITE), "mjpeg", "yuvj420p", q="3")
    data = good.read_bytes()
    start = data.index(b"movi") + 4
    chunks, place = [], start
    while data[place : place + 4] == b"00dc":
        length = struct.unpack("<I", data[place + 4 : place + 8])[0]
        chunks.append(data[place : place + 8 + length + length % 2])
        place += len(chunks[-1])
    empty_chunk = b"00dc" + struct.pack("<I", 0)
    movi = b"".join(empty_chunk if index in empty else chunk for index, chunk in enumerate(chunks))
    lists = data.index(b"movi") - 8
    body = data[12:lists] + b"LIST" + struct.pack("<I", len(movi) + 4) + b"movi" + movi
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body) + 4) + b"AVI " + body)
    return path


@pytest.mark.parametrize("empty", [{3, 7, 11}, {12}, {9, 10, 11, 12}])
def test_dropped_frames_are_no_damage(tmp_path, empty):
    path = avi_with_empty_chunks(tmp_path / "dropped.avi", empty)
    assert len(read_clip(path).frames) == 13 - len(empty)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(InputError, match="damaged or cut off"):
        read_clip(path)


@pytest.mark.parametrize(
    ("codec", "options"), [("libx264", {"g": "10", "bf": "2"}), ("mpeg2video", {"g": "10", "bf": "2"})]
)
def test_a_transport_stream_may_begin_between_key_frames(tmp_path, codec, options):
    pictures = over(ball(30, 96, 64), WHITE)
    whole = write_video(tmp_path / "whole.ts", pictures, codec, **options).read_bytes()
    packets = len(whole) // 188
    (tmp_path / "part.ts").write_bytes(whole[: 3 * 188] + whole[packets // 4 * 188 :])
    clip = read_clip(tmp_path / "part.ts")
    assert 10 <= len(clip.frames) < 25 and "begins between two key frames" in clip.messages[0]
    true = pictures[-len(clip.frames) :]
    assert np.abs(clip.frames[..., :3].astype(int) - true).mean() < 5


def test_stamps_out_of_order_missing_or_begun_anew():
    assert in_order([0.0, 0.2, 0.1, 0.3], 10, True) == ([0.0, 0.1, 0.2, 0.3], [0, 2, 1, 3])
    assert in_order([0.0, 0.2, 0.1, 0.3], 10, False) == ([0.0, 0.1, 0.2, 0.3], [0, 1, 2, 3])
    np.testing.assert_allclose(in_order([None, None, None], 10, False)[0], [0, 0.1, 0.2])
    np.testing.assert_allclose(in_order([5000.0, 5000.1, 0.0, 0.1], 10, False)[0], [5000, 5000.1, 5000.2, 5000.3])
    np.testing.assert_allclose(in_order([0.0, 0.1, 9000.0, 9000.1], 10, False)[0], [0, 0.1, 0.2, 0.3])
    np.testing.assert_allclose(in_order([1.0, 1.0, 1.0], 10, False)[0], [1, 1.1, 1.2])
    assert in_order([], 10, False) == ([], [])


def test_pictures_stored_out_of_order_are_shown_in_order(tmp_path):
    path = tmp_path / "shuffled.mov"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("png", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.time_base = 16, 16, "rgb24", Fraction(1, 10)
        for stored, shown in enumerate((0, 2, 1, 4, 3, 5)):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 40 * shown, np.uint8), format="rgb24")
            frame.pts, frame.time_base = shown, Fraction(1, 10)
            for packet in stream.encode(frame):
                packet.pts, packet.dts = shown + 1, stored
                output.mux(packet)
    clip = read_clip(path)
    assert clip.frames[:, 0, 0, 0].tolist() == [0, 40, 80, 120, 160, 200] and clip.fps == pytest.approx(10, rel=0.01)


def test_interlaced_footage_is_brought_to_whole_pictures_and_told(tmp_path):
    """Two moments in alternate lines: without deinterlacing every second line of the bar's way is torn."""

    def moment(x):
        picture = np.full((64, 96, 3), 235, np.uint8)
        picture[:, x : x + 20] = 20
        return picture

    path = tmp_path / "interlaced.mkv"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.options = {"x264-params": "interlaced=1:tff=1", "crf": "4"}
        woven = []
        for index in range(4):
            picture = moment(8 + 12 * index)
            picture[1::2] = moment(14 + 12 * index)[1::2]
            woven.append(picture)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode())
    clip = read_clip(path)
    assert "is interlaced" in clip.messages[0]

    def torn(frames):
        level = frames[..., 1].astype(int)
        return np.abs(np.diff(level, axis=1)).mean()

    assert torn(clip.frames[1:3]) < 0.3 * torn(np.stack(woven)[1:3])
    names = [finding.name for finding in examine(clip_of(np.stack(woven)), segment(clip_of(np.stack(woven))))]
    assert "combed" in names


# --- pictures --------------------------------------------------------------------------------------------------------


def grey_ball() -> np.ndarray:
    return over(ball(3, radius=16.0), WHITE).mean(axis=-1) / 255


def _tiff(array, path):
    import tifffile

    tifffile.imwrite(path, array)


DEEP = {
    "16 bit png": lambda grey, path: Image.fromarray((65535 * grey).astype(np.uint16)).save(path.with_suffix(".png")),
    "12 bits in 16, tiff": lambda grey, path: Image.fromarray((4095 * grey).astype(np.uint16)).save(
        path.with_suffix(".tif")
    ),
    "32 bit whole": lambda grey, path: Image.fromarray((65535 * grey).astype(np.int32), "I").save(
        path.with_suffix(".tif")
    ),
    "float to 1": lambda grey, path: Image.fromarray(grey.astype(np.float32), "F").save(path.with_suffix(".tif")),
    "float to 255": lambda grey, path: Image.fromarray((255 * grey).astype(np.float32), "F").save(
        path.with_suffix(".tif")
    ),
    "float to 65535": lambda grey, path: _tiff((65535 * grey).astype(np.float32), path.with_suffix(".tiff")),
    "float rgb": lambda grey, path: _tiff(np.dstack([grey] * 3).astype(np.float32), path.with_suffix(".tif")),
    "double rgb, channels first": lambda grey, path: _tiff(np.stack([grey] * 3), path.with_suffix(".tif")),
    "16 bit rgb": lambda grey, path: _tiff((65535 * np.dstack([grey] * 3)).astype(np.uint16), path.with_suffix(".tif")),
    "32 bit rgb": lambda grey, path: _tiff((65535 * np.dstack([grey] * 3)).astype(np.uint32), path.with_suffix(".tif")),
    "palette": lambda grey, path: (
        Image.fromarray((255 * grey).astype(np.uint8)).convert("P").save(path.with_suffix(".png"))
    ),
    "cmyk": lambda grey, path: (
        Image.fromarray((255 * np.dstack([grey] * 3)).astype(np.uint8)).convert("CMYK").save(path.with_suffix(".tif"))
    ),
    "cmyk jpeg": lambda grey, path: (
        Image.fromarray((255 * np.dstack([grey] * 3)).astype(np.uint8))
        .convert("CMYK")
        .save(path.with_suffix(".jpg"), quality=95)
    ),
    "grey and alpha": lambda grey, path: Image.fromarray(
        np.dstack([255 * grey, np.full_like(grey, 255)]).astype(np.uint8), "LA"
    ).save(path.with_suffix(".png")),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", DEEP)
def test_pictures_of_every_depth_are_read_at_their_range(tmp_path, kind):
    for index, grey in enumerate(grey_ball()):
        DEEP[kind](grey, tmp_path / f"{index}.x")
    clip = read_clip(tmp_path)
    tolerance = 8 if "jpeg" in kind else 2
    np.testing.assert_allclose(clip.frames[..., 1], 255 * grey_ball(), atol=tolerance)
    assert not clip.has_alpha and segment(clip).alpha.any()


def test_transparency_of_every_kind_is_kept(tmp_path):
    exact = ball(1)[0]
    hard = np.where(exact[..., 3] >= 128, 255, 0).astype(np.uint8)
    picture = Image.fromarray(np.dstack([exact[..., :3], hard]))
    grey = Image.fromarray(np.dstack([exact[..., 0], hard]), "LA")
    key = Image.fromarray(np.where(hard[..., None] > 0, exact[..., :3], (1, 2, 3)).astype(np.uint8))
    for index, write in enumerate(
        (
            lambda path: picture.save(path),
            lambda path: picture.quantize(64).save(path),
            lambda path: grey.save(path),
            lambda path: key.save(path, transparency=(1, 2, 3)),
        )
    ):
        folder = tmp_path / str(index)
        folder.mkdir()
        write(folder / "0.png")
        write(folder / "1.png")
        np.testing.assert_array_equal(read_clip(folder).frames[0, ..., 3] > 127, hard > 0)


def test_colour_profiles_are_applied(tmp_path):
    """Whose red and green primaries are swapped: a red of the file is meant as a green."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"xXYZ").replace(b"gXYZ", b"rXYZ").replace(b"xXYZ", b"gXYZ")
    picture = Image.new("RGBA", (8, 8), (200, 30, 30, 90))
    for name, image, profile, expected in (
        ("rgba", picture, swapped, (30, 200, 30, 90)),
        ("rgb", picture.convert("RGB"), swapped, (30, 200, 30, 255)),
        ("palette", picture.quantize(4), swapped, (30, 200, 30, 90)),
        ("usual", picture, srgb, (200, 30, 30, 90)),
        ("broken", picture, b"no profile" * 20, (200, 30, 30, 90)),
        ("of another kind", picture.convert("L"), swapped, (81, 81, 81, 255)),
    ):
        (tmp_path / name).mkdir()
        for index in range(2):
            image.save(tmp_path / name / f"{index}.png", icc_profile=profile)
        shown = read_clip(tmp_path / name).frames[0, 4, 4]
        np.testing.assert_allclose(shown, expected, atol=1, err_msg=name)


def test_a_series_is_scaled_by_one_range(tmp_path):
    for index, level in enumerate((0.25, 0.5)):
        Image.fromarray(np.full((8, 8), 4000 * level, np.float32), "F").save(tmp_path / f"{index}.tif")
    levels = read_clip(tmp_path).frames[:, 0, 0, 0].astype(int)
    assert abs(levels[1] - 2 * levels[0]) <= 2 and levels[1] < 12  # of 65535, the range of such numbers


SERIES = {
    "masks": [f"{i}{kind}.png" for i in range(4) for kind in ("", "_mask")],
    "masks in front": [f"{kind}{i:03d}.png" for i in range(4) for kind in ("frame_", "mask_")],
    "twice": [f"{i}.{kind}" for i in range(4) for kind in ("png", "jpg")],
    "padded": [f"{i:0{width}d}.png" for i in range(4) for width in (1, 3)],
    "two cameras": [f"cam{camera}_{i:02d}.png" for camera in (1, 2) for i in range(5)],
    "a cover": ["cover.png", *(f"{i}.png" for i in range(4))],
}
ONE_SERIES = {
    "mixed suffixes": ["1.png", "2.jpg", "3.png"],
    "the first without a number": ["shot.png", "shot (1).png", "shot (2).png"],
    "names without numbers": ["back.png", "front.png", "side.png"],
    "dates": ["2024-01-02 10.11.12.png", "2024-01-02 10.11.13.png", "2024-01-02 10.12.12.png"],
    "a take in the name": ["take2_1.png", "take2_2.png", "take2_3.png"],
}


@pytest.mark.parametrize("name", [*SERIES, *ONE_SERIES])
def test_two_series_in_a_folder_are_named(tmp_path, name):
    for file in {**SERIES, **ONE_SERIES}[name]:
        Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / file)
    if name in ONE_SERIES:
        assert len(read_clip(tmp_path).frames) == 3
    else:
        with pytest.raises(InputError, match="holds more than one series of pictures"):
            read_clip(tmp_path)


# --- names and what is no video --------------------------------------------------------------------------------------


def test_runs_are_named_after_what_the_user_gave(tmp_path, monkeypatch):
    folder = tmp_path / "my cat.v2"
    (folder / "inner").mkdir(parents=True)
    for index in range(3):
        Image.new("RGB", (8, 8)).save(folder / f"f_{index}.png")
    monkeypatch.chdir(folder)
    for given, name in (
        (".", "my cat.v2"),
        ("..", tmp_path.name),
        ("inner/..", "my cat.v2"),
        ("*.png", "my cat.v2"),
        (str(folder / "f_%d.png"), "my cat.v2"),
        (f"file://{folder}/a%20b.mp4", "a b"),
        ("clip.one.mp4", "clip.one"),
        (".hidden.mp4", "hidden"),
        ("/", "video"),
    ):
        assert source_name(Path(given)) == name, given
    assert [path.name for path in source_files(Path("f_%d.png"))] == ["f_0.png", "f_1.png", "f_2.png"]
    assert len(read_clip(Path(f"file://{folder}/f_*.png")).frames) == 3
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(read_clip(Path("~/my cat.v2")).frames) == 3


def test_printed_commands_can_be_pasted():
    import shlex

    from sv4d_ns.plugin.base_pipeline import next_commands

    name = "my cat's #1 [new] $x"
    lines = next_commands(Path("outputs") / name, name, "ns-export")
    words = [shlex.split(line, comments=True) for line in lines]
    assert words[0] == ["ns-viewer", "--load-config", f"outputs/{name}/config.yml"]
    assert words[1][-1] == f"renders/{name}.mp4" and words[2][-1] == f"exports/{name}"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html><head><title>Sign in</title>", "a web page"),
        (b"<html>moved</html>", "a web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "server's error message"),
        (b'{"error": "not found"}', "a JSON file"),
        (b"PK\x03\x04" + bytes(60), "unpack it first"),
        (b"../.git/annex/objects/x/y", "git annex get"),
        (b"%PDF-1.7", "a PDF"),
    ],
)
def test_what_only_looks_like_a_video_is_named(tmp_path, content, says):
    for name in ("film.mp4", "folder"):
        path = tmp_path / name
        if name == "folder":
            path.mkdir()
            for index in range(2):
                (path / f"{index}.png").write_bytes(content)
        else:
            path.write_bytes(content)
        with pytest.raises(InputError, match=says):
            read_clip(path)


def test_addresses_are_told_to_be_downloaded():
    with pytest.raises(InputError, match=r"https://example\.org/a\.mp4 is an address on the network: download"):
        read_clip(Path("https://example.org/a.mp4"))


def test_terminals_that_are_not_utf8_do_not_end_a_command(tmp_path):
    code = "from sv4d_ns.utils.terminal import accept_any_encoding as a; a(); print('\\xe9 \\u2713 \\udcff')"
    for encoding in ("ascii", "latin-1", "utf-8"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


def test_a_file_whose_name_begins_with_a_dash_is_no_flag(tmp_path, monkeypatch, capsys):
    """The parsers said that the value of --data was missing."""
    from sv4d_ns.cli.main import main
    from sv4d_ns.utils.terminal import files_are_no_flags

    monkeypatch.chdir(tmp_path)
    (tmp_path / "-film.mp4").write_bytes(b"%PDF")
    (tmp_path / "--").touch()
    words = ["--data", "-film.mp4", "-h", "--", "-none.mp4"]
    assert files_are_no_flags(words) == ["--data", "./-film.mp4", "-h", "--", "-none.mp4"]
    with pytest.raises(SystemExit, match=r"-film\.mp4 is not a video but a PDF"):
        main(["doctor", "-film.mp4"])
    code = "import sv4d_ns.method_configs.sv4d, sys; print(sys.argv[1:])"
    code = "import sys; sys.argv[0] = '/bin/ns-train'; " + code
    done = subprocess.run(
        [sys.executable, "-c", code, "--data", "-film.mp4"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "['--data', './-film.mp4']"


def test_a_folder_with_films_names_them(tmp_path):
    (tmp_path / "a.mp4").touch()
    with pytest.raises(InputError, match=r"no pictures but a film: give the film itself, .*a\.mp4\."):
        read_clip(tmp_path)
    (tmp_path / "b.MOV").touch()
    with pytest.raises(InputError, match=r"2 films: give one of them, .*a\.mp4 for one, .*'sv4d batch'"):
        read_clip(tmp_path)


@pytest.mark.parametrize("kind", ["pictures", "masks"])
def test_frames_that_are_not_cut_out_among_others_that_are_end_the_run(tmp_path, kind):
    """They were taken as the object, with everything around it."""
    exact = ball()
    if kind == "masks":
        masks = exact[..., 3].copy()
        masks[2:4] = 255
        clip = clip_of(over(exact, WHITE))
    else:
        for index, frame in enumerate(exact):
            Image.fromarray(over(exact, WHITE)[index] if index in (2, 3) else frame).save(tmp_path / f"{index}.png")
        clip, masks = read_clip(tmp_path), None
    with pytest.raises(InputError, match=rf"cut nothing out in 2 of {FRAMES} frames \(first: 2\)"):
        segment(clip, masks)


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    (tmp_path / "a.mp4").symlink_to("gone.mp4")
    with pytest.raises(InputError, match=r"a\.mp4 does not exist \(it is a link to gone\.mp4\)"):
        read_clip(tmp_path / "a.mp4")


# --- backgrounds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bars", [(0, 0, 70, 70), (40, 40, 0, 0), (20, 20, 30, 30), (0, 0, 2, 0), (1, 3, 0, 0), (0, 0, 30, 0)]
)
@pytest.mark.parametrize("level", [0, 16])
def test_black_bars_are_cut_off(tmp_path, bars, level):
    """The object's place in the source is the same with and without them."""
    left, right, top, bottom = bars
    exact = ball(4, 128, 96, radius=20.0)
    inner = over(exact, (240, 240, 240))
    framed = np.pad(inner, ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=level)
    video = load_object_video(write_video(tmp_path / "bars.mkv", framed, "ffv1", "bgr0"), 64)
    plain = load_object_video(write_video(tmp_path / "plain.mkv", inner, "ffv1", "bgr0"), 64)
    assert any("Bars of one colour were cut off" in message for message in video.messages)
    assert video.framing.center_x == pytest.approx(plain.framing.center_x + left, abs=1)
    assert video.framing.center_y == pytest.approx(plain.framing.center_y + top, abs=1)
    assert video.framing.side == pytest.approx(plain.framing.side, rel=0.02)


def test_bars_are_found_in_pictures_of_which_not_every_pixel_is_looked_at():
    exact = ball(2, 128, 96, radius=20.0).repeat(12, axis=1).repeat(12, axis=2)
    inner = over(exact, (240, 240, 240))
    framed = np.pad(inner, ((0, 0), (60, 61), (7, 9), (0, 0)))
    region = without_bars(clip_of(framed))
    found = (region.left, region.top, region.left + region.width, region.top + region.height)
    assert found == pytest.approx((7, 60, 7 + inner.shape[2], 60 + inner.shape[1]), abs=1)


def test_a_dark_floor_is_no_bar(tmp_path):
    exact = ball(4, 128, 96, radius=20.0)
    pictures = over(exact, (0, 0, 0))
    assert not any(
        "bars" in m for m in load_object_video(write_video(tmp_path / "a.mkv", pictures, "ffv1", "bgr0"), 64).messages
    )


def test_rounded_corners_are_left_out():
    exact = ball(5, 128, 96, radius=20.0)
    pictures = over(exact, WHITE)
    y, x = np.mgrid[0:96, 0:128]
    for corner_x in (0, 127):
        for corner_y in (0, 95):
            pictures[:, np.abs(x - corner_x) + np.abs(y - corner_y) < 14] = 0
    foreground = segment(clip_of(pictures))
    assert not foreground.alpha[:, :16, :16].any() and not foreground.alpha[:, -16:, -16:].any()
    assert foreground.alpha[:, 40:56].any(axis=(1, 2)).all()


@pytest.mark.parametrize("kind", ["exposure", "white balance", "fade", "sideways", "downwards"])
def test_a_background_that_drifts_is_still_plain(kind):
    exact = ball(8, 128, 96, radius=22.0)
    pictures = over(exact, (215, 215, 215)).astype(float)
    time = np.linspace(0, 1, 8)[:, None, None, None]
    if kind == "exposure":
        pictures *= 0.7 + 0.3 * time
    elif kind == "white balance":
        pictures *= 1 - time * np.array([0.0, 0.1, 0.25])
    elif kind == "fade":
        pictures *= 0.3 + 0.7 * time
    else:
        shape = (1, 1, 128, 1) if kind == "sideways" else (1, 96, 1, 1)
        pictures += np.linspace(-18, 18, max(shape)).reshape(shape)
    foreground = segment(clip_of(pictures.round().clip(0, 255).astype(np.uint8)))
    inside, true = foreground.alpha >= 128, exact[..., 3] >= 128
    assert foreground.method == "plain background"
    assert (inside & true).sum() / (inside | true).sum() > 0.96


def test_what_the_background_step_filled_dropped_and_cut_is_reported():
    """A dark man of white belt and with a hole between arm and body, beside him a crumb and a mark in the corner."""
    pictures = np.full((6, 200, 200, 3), 255, np.uint8)
    for index in range(6):
        shift = 2 * index
        man = pictures[index, 30:170, 60 + shift : 120 + shift]
        man[:] = (60, 50, 90)
        man[40:70, 20:36] = 255  # between arm and body
        man[112:118] = 255  # a belt in the colour of the background: the legs are cut off
        pictures[index, 100:103, 20:23] = 0
        pictures[index, 180:190, 180:192] = (200, 30, 30)
    clip = clip_of(pictures)
    findings = {finding.name: finding for finding in examine(clip, segment(clip))}
    assert {"filled", "dropped", "loose", "still part"} <= set(findings)
    assert "1 patch (frames 0 to 5 at (93, 85), up to " in findings["filled"].sentence.replace("(94, ", "(93, ")
    assert findings["filled"].where[0, 75:95, 82:94].all() and not findings["filled"].where[:, :60].any()
    source = replace(clip, shown=Region(40, 10, 400, 400, 440, 410, 0.5))  # without bars, and scaled down
    (filled,) = (finding for finding in examine(source, segment(source)) if finding.name == "filled")
    assert "1 patch (frames 0 to 5 at (226, 180), up to " in filled.sentence.replace("(228, ", "(226, ")
    assert findings["dropped"].where[0, 101, 21] and findings["loose"].where[0, 160, 80]
    assert "bottom right" in findings["still part"].sentence and findings["still part"].where[0, 185, 185]


def test_a_shadow_on_the_floor_is_reported():
    exact = ball(6, 200, 160, colour=(180, 60, 40), radius=34.0)
    exact = np.roll(exact, -10, axis=1)
    y, x = np.mgrid[0:160, 0:200]
    pictures = over(exact, WHITE).astype(float)
    for index, frame in enumerate(pictures):
        centre = 200 * (0.3 + 0.4 * index / 5)
        shadow = 70 * np.exp(-(((x - centre) / 40) ** 2 + ((y - 108) / 10) ** 2))
        frame -= shadow[..., None] * (1 - exact[index, ..., 3:] / 255)
    clip = clip_of(pictures.clip(0, 255).astype(np.uint8))
    names = [finding.name for finding in examine(clip, segment(clip))]
    assert "shadow" in names
    without = clip_of(over(exact, WHITE))
    assert examine(without, segment(without)) == []


@pytest.mark.parametrize(("darker", "floor"), [(0.7, 255), (0.55, 235), (0.25, 235)])
def test_a_shadow_with_a_hard_edge_is_reported(darker, floor):
    """Of the sun or a lamp: it was taken for an object by the doctor."""
    exact = np.roll(ball(6, 200, 160, colour=(180, 60, 40), radius=34.0), -10, axis=1)
    y, x = np.mgrid[0:160, 0:200]
    pictures = over(exact, (floor,) * 3).astype(float)
    for index, frame in enumerate(pictures):
        centre = 200 * (0.3 + 0.4 * index / 5)
        inside = (((x - centre) / 46) ** 2 + ((y - 108) / 12) ** 2 < 1)[..., None]
        frame -= inside * (1 - darker) * floor * (1 - exact[index, ..., 3:] / 255)
    pictures += np.random.default_rng(0).normal(0, 1, pictures.shape)
    clip = clip_of(pictures.clip(0, 255).astype(np.uint8))
    assert "shadow" in [finding.name for finding in examine(clip, segment(clip))]


def test_grey_legs_are_no_shadow():
    pictures = np.full((4, 160, 200, 3), 255, np.uint8)
    for index, frame in enumerate(pictures):
        frame[30:90, 60 + index : 120 + index] = (180, 60, 40)
        frame[90:140, 62 + index : 80 + index] = frame[90:140, 100 + index : 118 + index] = 120
    clip = clip_of(pictures)
    assert "shadow" not in [finding.name for finding in examine(clip, segment(clip))]


# --- the model of this package ---------------------------------------------------------------------------------------


def test_a_busy_background_is_removed_without_being_asked(tmp_path):
    """A ball that rolls over a brick wall (from the photographs of scikit-image)."""
    import skimage.data

    wall = np.asarray(Image.fromarray(skimage.data.brick()).convert("RGB").resize((192, 144)), np.uint8)
    exact = ball(3, 192, 144, radius=34.0)
    video = write_video(tmp_path / "wall.mkv", over(exact, wall), "ffv1", "bgr0")
    found = load_object_video(video, 64)
    assert any("found by the matting model" in message for message in found.messages)
    assert "cut-out" not in [finding.name for finding in found.findings] and found.confidence > 0.6
    box = exact[..., 3].any(axis=0)
    true_side = max(np.ptp(np.flatnonzero(box.any(axis=axis))) for axis in (0, 1)) / 0.9
    assert found.framing.side == pytest.approx(true_side, rel=0.12)


def test_a_thing_that_never_moves_is_not_believed_while_another_moves():
    """A model that finds a still thing is asked again about where something moves, and doubted if that fails."""
    exact = ball(5, 480, 144, radius=30.0)
    noise = np.random.default_rng(0).integers(60, 200, (144, 480, 3))
    pictures = over(exact, noise)
    pictures[:, 8:40, :20] = (10, 240, 10)

    def strikes_the_eye(picture):
        green = (picture[..., 1] > 230) & (picture[..., 0] < 30)
        red = (picture[..., 0].astype(int) - picture[..., 2] > 60) & (picture[..., 1] < 90)
        return (255 * (green if green.any() else red)).astype(np.uint8)

    found = segment(clip_of(pictures), matting=strikes_the_eye)
    inside, true = found.alpha >= 128, exact[..., 3] >= 128
    assert (inside & true).sum() / true.sum() > 0.6 and not found.alpha[:, 8:40, :20].any()
    doubted = segment(
        clip_of(pictures),
        matting=lambda picture: 255 * ((picture[..., 1] > 230) & (picture[..., 0] < 30)).astype(np.uint8),
    )
    assert doubted.confidence < 0.2
    assert examine(clip_of(pictures), doubted)[0].name == "cut-out"


def test_a_part_the_model_half_sees_is_reported():
    """It lost the lower leg of a knight before bricks, sure of the rest (confidence 0.81)."""
    noise = np.random.default_rng(0).integers(60, 200, (160, 160, 3))
    pictures = np.repeat(noise[None], 4, axis=0)
    for index, frame in enumerate(pictures):
        frame[30:90, 50 + index : 110 + index] = (220, 20, 20)
        frame[90:140, 60 + index : 75 + index] = frame[90:140, 85 + index : 100 + index] = (220, 20, 20)

    def model(picture, leg=60):
        found = (255 * ((picture[..., 0] == 220) & (picture[..., 1] == 20))).astype(np.uint8)
        found[110:, 80:] = np.minimum(found[110:, 80:], leg)
        return found

    clip = clip_of(pictures.astype(np.uint8))
    (found,) = (finding for finding in examine(clip, segment(clip, matting=model)) if finding.name == "undecided")
    assert "1 patch (frames 0 to 3 at (9" in found.sentence and "may lack a part" in found.sentence
    assert found.where[0, 125, 92] and not found.where[:, :105].any()
    whole = segment(clip, matting=lambda picture: model(picture, leg=255))
    assert "undecided" not in [finding.name for finding in examine(clip, whole)]


def test_the_network_has_the_published_shape():
    """Its parameters are as many as the paper's table of layers has without batch normalisation."""
    from sv4d_ns.video.u2netp import load_u2netp

    assert sum(value.numel() for value in load_u2netp().parameters()) == 1_125_485


# --- compiled functions ----------------------------------------------------------------------------------------------


def test_compiled_functions_work_where_nothing_can_be_kept(monkeypatch):
    from numba.core import caching

    from sv4d_ns.utils.compiled import njit

    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])

    @njit(cache=True, nogil=True)
    def twice(x):
        return 2 * x

    assert twice(3) == 6


def test_no_module_asks_numba_for_a_cache_by_itself():
    package = Path(__file__).parents[1] / "sv4d_ns"
    direct = [
        path.name
        for path in package.rglob("*.py")
        if path.name != "compiled.py" and ("numba.njit" in path.read_text() or "from numba import" in path.read_text())
    ]
    assert direct == []


def test_a_find_much_larger_than_what_moves_is_doubted():
    """The model takes a large still thing together with the object before it."""
    exact = ball(5, 240, 180, radius=12.0)
    noise = np.random.default_rng(0).integers(60, 200, (180, 240, 3))
    pictures = over(exact, noise)
    everything = np.zeros((180, 240), np.uint8)
    everything[20:170, 10:230] = 255
    found = segment(clip_of(pictures), matting=lambda picture: everything)
    assert found.confidence < 0.6
    assert "cut-out" in [finding.name for finding in examine(clip_of(pictures), found)]
