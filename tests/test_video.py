"""Reading video of every kind, and telling the object from its background."""

import importlib.util
import json
import os
import shutil
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.progress import PROGRESS_VARIABLE
from sv4d_ns.video import Clip, load_object_video, read_clip, segment
from sv4d_ns.video.checks import examine
from sv4d_ns.video.matting import load_matting
from sv4d_ns.video.reader import Region, open_film, take

WIDTH, HEIGHT, FRAMES = 64, 48, 8


def ball(frames=FRAMES, width=WIDTH, height=HEIGHT, colour=(200, 60, 30), radius=12.0) -> np.ndarray:
    """A shaded ball rolling to the right: RGBA with exact soft alpha [t, h, w, 4]; a dark spot makes up from down."""
    y, x = np.mgrid[0:height, 0:width] + 0.5
    pictures = []
    for index in range(frames):
        centre_x = 0.3 * width + 0.4 * width * index / max(frames - 1, 1)
        distance = np.hypot(x - centre_x, y - 0.5 * height)
        shade = 1 - 0.4 * (distance / radius).clip(0, 1) ** 2
        rgb = np.asarray(colour) * shade[..., None]
        rgb[np.hypot(x - centre_x, y - 0.5 * height + 0.5 * radius) < 0.3 * radius] = (10, 10, 60)
        alpha = 255 * (radius + 0.5 - distance).clip(0, 1)
        pictures.append(np.dstack([rgb, alpha]))
    return np.stack(pictures).round().astype(np.uint8)


def over(rgba: np.ndarray, background) -> np.ndarray:
    alpha = rgba[..., 3:] / 255
    return (rgba[..., :3] * alpha + np.asarray(background) * (1 - alpha)).round().astype(np.uint8)


def write_video(path: Path, frames, codec="libx264", pixel="yuv420p", fps=10, container=None, metadata=None, **options):
    with av.open(str(path), "w", options=container or {}) as output:
        stream = output.add_stream(codec, rate=fps)
        stream.height, stream.width, stream.pix_fmt = frames[0].shape[0], frames[0].shape[1], pixel
        stream.options = {key.replace("_", "-"): value for key, value in options.items()}
        stream.metadata.update(metadata or {})
        for picture in frames:
            frame = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(picture), format="rgba" if picture.shape[-1] == 4 else "rgb24"
            )
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def rolling(tmp_path_factory) -> Path:
    """The ball on white as an ordinary H.264 file whose index comes first."""
    path = tmp_path_factory.mktemp("video") / "rolling.mp4"
    return write_video(path, over(ball(), (255, 255, 255)), crf="16", container={"movflags": "faststart"})


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "codec", "pixel", "options"),
    [
        (".mp4", "libx264", "yuv420p", {"crf": "10"}),
        (".mov", "libx264", "yuv444p", {"crf": "4"}),
        (".mkv", "ffv1", "bgr0", {}),
        (".avi", "mpeg4", "yuv420p", {"q": "2", "b": "4000000"}),
        (".webm", "libvpx-vp9", "yuv420p", {"crf": "8", "b": "0", "cpu_used": "8"}),
    ],
)
def test_video_containers(tmp_path, suffix, codec, pixel, options):
    expected = over(ball(), (255, 255, 255))
    clip = read_clip(write_video(tmp_path / f"clip{suffix}", expected, codec, pixel, **options))
    assert clip.frames.shape == (FRAMES, HEIGHT, WIDTH, 4) and clip.frames.dtype == np.uint8
    assert clip.fps == 10 and not clip.has_alpha and clip.source.endswith(suffix)
    error = np.abs(clip.frames[..., :3].astype(int) - expected)
    assert error.mean() < 2.5  # of 255; a wrong colour matrix or frame order gives more (the next test, or 5 and up)
    if codec == "ffv1":
        assert error.max() == 0


@pytest.mark.parametrize(
    ("width", "height", "matrix", "tagged", "pixel"),
    [
        (64, 48, "ITU709", True, "yuv444p"),
        (64, 48, "ITU601", True, "yuv444p"),
        (64, 48, "ITU601", False, "yuv444p"),
        (1280, 16, "ITU709", False, "yuv444p"),
        (1280, 16, "ITU709", False, "yuyv422"),
        (1280, 16, "ITU709", False, "uyvy422"),
    ],
)
def test_colour_matrix_is_the_tagged_one_or_the_usual_one_for_the_size(tmp_path, width, height, matrix, tagged, pixel):
    colour = (220, 40, 90)
    picture = np.full((height, width, 3), colour, np.uint8)
    path = tmp_path / "colour.mkv"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("ffv1" if pixel.startswith("yuv4") else "rawvideo", rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel
        number = {"ITU709": 1, "ITU601": 6}[matrix] if tagged else 2
        stream.codec_context.colorspace = number
        for index in range(2):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame = frame.reformat(format=pixel, dst_colorspace=matrix)
            frame.colorspace, frame.pts = number, index
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    clip = read_clip(path)
    assert np.abs(clip.frames[..., :3].astype(int) - colour).max() <= 2


@pytest.mark.parametrize(
    ("suffix", "codec", "pixel", "options"),
    [
        (".webm", "libvpx-vp9", "yuva420p", {"crf": "8", "b": "0", "cpu_used": "8", "auto_alt_ref": "0"}),
        (".mov", "prores_ks", "yuva444p10le", {"profile": "4444"}),
        (".mov", "png", "rgba", {}),
        (".mkv", "ffv1", "bgra", {}),
    ],
)
def test_video_alpha_survives(tmp_path, suffix, codec, pixel, options):
    expected = ball()
    metadata = {"alpha_mode": "1"} if suffix == ".webm" else {}
    clip = read_clip(write_video(tmp_path / f"a{suffix}", expected, codec, pixel, metadata=metadata, **options))
    assert clip.has_alpha
    error = np.abs(clip.frames[..., 3].astype(int) - expected[..., 3])
    assert error.mean() < 1 and error.max() < 60
    inside = expected[..., 3] == 255
    assert np.abs(clip.frames[..., :3].astype(int) - expected[..., :3])[inside].mean() < 6


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.webp", {"lossless": True, "exact": True}),
        ("a.png", {}),
        ("a.apng", {"format": "PNG"}),
        ("a.gif", {"disposal": 2}),
    ],
)
def test_animated_pictures_with_alpha(tmp_path, name, options):
    expected = ball()
    if name.endswith("gif"):  # one bit of alpha
        expected[..., 3] = np.where(expected[..., 3] >= 128, 255, 0)
    pictures = [Image.fromarray(frame) for frame in expected]
    pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:], duration=80, loop=0, **options)
    clip = read_clip(tmp_path / name)
    assert clip.fps == pytest.approx(12.5) and clip.has_alpha
    np.testing.assert_array_equal(clip.frames[..., 3], expected[..., 3])
    visible = expected[..., 3] > 0
    error = np.abs(clip.frames[..., :3].astype(int) - expected[..., :3])[visible]
    assert error.max() <= (40 if name.endswith("gif") else 0)  # 256 colours


def test_a_missing_delay_means_a_tenth_of_a_second(tmp_path):
    pictures = [Image.fromarray(frame) for frame in over(ball(), (255, 255, 255))]
    pictures[0].save(tmp_path / "fast.gif", save_all=True, append_images=pictures[1:], duration=0)
    assert read_clip(tmp_path / "fast.gif").fps == pytest.approx(10)


def test_folders_and_patterns_are_read_in_natural_order(tmp_path):
    expected = ball(frames=12)
    for index, frame in enumerate(expected):
        Image.fromarray(frame).save(tmp_path / f"shot{index}.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / ".hidden.png").write_text("not a picture either")
    for path in (tmp_path, tmp_path / "shot*.png"):
        clip = read_clip(path)
        np.testing.assert_array_equal(clip.frames, expected)
        assert clip.fps == 10 and "10 frames per second" in clip.messages[0]
        rated = read_clip(path, fps=24)
        assert rated.fps == 24 and len(rated.frames) == 12 and not rated.messages, (
            "pictures have the rate one gives them"
        )
    np.testing.assert_array_equal(read_clip(tmp_path / "shot1?.png").frames, expected[10:])
    for index in range(3):  # a suffix that films have, too
        Image.fromarray(expected[index]).save(tmp_path / f"f_{index:04d}.webp", lossless=True, exact=True)
    for name in ("*.webp", "f_%04d.webp"):
        np.testing.assert_array_equal(read_clip(tmp_path / name).frames, expected[:3])


def test_grey_16_bit_and_turned_pictures(tmp_path):
    grey = np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH) * 20
    for index in range(2):
        Image.fromarray(grey).save(tmp_path / f"{index}.png")
    np.testing.assert_array_equal(read_clip(tmp_path).frames[0, ..., 0], grey >> 8)
    (tmp_path / "phone").mkdir()
    picture = Image.fromarray(over(ball(), (255, 255, 255))[0])
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned clockwise by 90 degrees
    for index in range(2):
        picture.save(tmp_path / "phone" / f"{index}.png", exif=turned)
    np.testing.assert_array_equal(read_clip(tmp_path / "phone").frames[0, ..., :3], np.rot90(np.asarray(picture), -1))


@pytest.mark.parametrize(
    ("matrix", "turns"),
    [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)],  # x right, y down: ISO 14496-12, 6.2.2
)
def test_rotation_flag_of_the_container_is_honoured(tmp_path, rolling, matrix, turns):
    data = bytearray(rolling.read_bytes())
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    place = data.index(identity, data.index(b"tkhd"))
    a, b, c, d = (value << 16 for value in matrix)
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(data)
    turned, straight = read_clip(tmp_path / "turned.mp4").frames, read_clip(rolling).frames
    np.testing.assert_array_equal(turned, np.rot90(straight, turns, axes=(1, 2)))


def test_oblong_pixels_become_square(tmp_path):
    path = tmp_path / "anamorphic.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
        for picture in over(ball(3), (255, 255, 255)):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode())
    assert read_clip(path).frames.shape[1:3] == (HEIGHT, 2 * WIDTH)


def test_long_clips_are_thinned_evenly_and_say_so(tmp_path):
    pictures = [np.full((16, 16, 3), 10 * index, np.uint8) for index in range(21)]
    path = write_video(tmp_path / "long.mkv", pictures, "ffv1", "bgr0", fps=30)
    clip = read_clip(path, max_frames=6)
    assert clip.frames[:, 0, 0, 0].tolist() == [0, 40, 80, 120, 160, 200]
    assert clip.fps == pytest.approx(30 / 4, rel=0.01)
    assert clip.messages == ("Kept 6 of 21 frames of long.mkv, evenly spaced in time.",)
    assert len(read_clip(path, max_frames=21).frames) == len(read_clip(path, max_frames=500).frames) == 21
    assert len(read_clip(path, max_frames=1).frames) == 1
    (sparse,) = read_clip(path, max_frames=2).messages
    assert "only 1.5 a second" in sparse and "max-frames" in sparse
    with pytest.raises(InputError, match="ask for 1 or more"):
        read_clip(path, max_frames=0)


@pytest.mark.parametrize(("fps", "levels"), [(10, [0, 30, 60, 90, 120, 150, 180]), (200, list(range(0, 201, 10)))])
def test_frames_by_rate(tmp_path, fps, levels):
    pictures = [np.full((16, 16, 3), 10 * index, np.uint8) for index in range(21)]
    path = write_video(tmp_path / "long.mkv", pictures, "ffv1", "bgr0", fps=30)
    clip = read_clip(path, fps=fps)
    assert clip.frames[:, 0, 0, 0].tolist() == levels
    assert clip.fps == pytest.approx(min(fps, 30), rel=0.01)
    for wrong, says in (
        ({"fps": 0.5}, "lasts 0.67 s"),
        ({"fps": 0}, "above 0"),
        ({"fps": 5, "max_frames": 3}, "one of"),
    ):
        with pytest.raises(InputError, match=says):
            read_clip(path, **wrong)


def test_large_footage_is_scaled_down_as_it_is_read_and_the_object_read_again(tmp_path, monkeypatch):
    pictures = over(ball(frames=4, width=480, height=360, radius=30.0), (255, 255, 255))
    path = write_video(tmp_path / "large.mkv", pictures, "ffv1", "bgr0")
    exact = load_object_video(path, size=64)
    monkeypatch.setattr("sv4d_ns.video.reader.CLIP_PIXELS", 4 * 120 * 90)
    small = read_clip(path)
    assert small.frames.shape == (4, 90, 120, 4) and small.region.scale == 0.25
    # the union of the ball's places is 250 pixels wide: at a quarter it would fill 57 pixels of the crop from 62
    monkeypatch.setattr("sv4d_ns.video.reader.CLIP_PIXELS", 4 * 60 * 45)
    tiny = load_object_video(path, size=64)
    assert (tiny.framing.source_width, tiny.framing.source_height) == (480, 360)
    assert tiny.framing.side == pytest.approx(exact.framing.side, rel=0.04)
    assert tiny.framing.center_x == pytest.approx(exact.framing.center_x, abs=4)
    # one framing or the other, the pictures are the same up to the shift by a part of a pixel
    difference = np.abs(tiny.frames.astype(float) - exact.frames)[..., 3].mean()
    assert difference < 4


def test_a_region_shows_the_source_where_it_says(tmp_path):
    y, x = np.mgrid[0:40, 0:60]
    pictures = np.stack([np.dstack([4 * x, 6 * y, 0 * x])] * 2).astype(np.uint8)
    film = open_film(write_video(tmp_path / "ramp.mkv", pictures, "ffv1", "bgr0"))
    region = Region(left=10, top=8, width=32, height=24, source_width=60, source_height=40, scale=0.5)
    frames = take(film, [0, 1], region).frames
    assert frames.shape == (2, 12, 16, 4)
    columns, rows = (np.arange(16) + 0.5) / 0.5 + 10, (np.arange(12) + 0.5) / 0.5 + 8
    np.testing.assert_allclose(frames[0, 0, :, 0], 4 * (columns - 0.5), atol=1)
    np.testing.assert_allclose(frames[0, :, 0, 1], 6 * (rows - 0.5), atol=1)


@pytest.mark.parametrize(("transfer", "number"), [("PQ", 16), ("HLG", 18)])
def test_hdr_is_brought_to_ordinary_colours(tmp_path, transfer, number):
    """A grey ramp encoded by the standards' own formulas (the inverse of what is under test)."""
    light = np.linspace(0.02, 0.75, 64)[None].repeat(48, axis=0)  # of diffuse white
    if transfer == "PQ":
        m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
        power = (203 * light / 10000) ** m1
        encoded = ((c1 + c2 * power) / (1 + c3 * power)) ** m2
    else:
        scene = (203 * light / 1000) ** (1 / 1.2)
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        encoded = np.where(scene <= 1 / 12, np.sqrt(3 * scene), a * np.log(np.maximum(12 * scene - b, 1e-9)) + c)
    picture = np.repeat((65535 * encoded)[..., None], 3, axis=-1).round().astype(np.uint16)
    path = tmp_path / "hdr.mkv"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx265", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv444p10le"
        stream.options = {"x265-params": f"lossless=1:colorprim=9:transfer={number}:colormatrix=9:log-level=none"}
        for _ in range(2):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb48le").reformat(
                format="yuv444p10le", dst_colorspace=9
            )
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    clip = read_clip(path)
    assert f"is HDR ({transfer})" in clip.messages[0]
    expected = 255 * (1.055 * light[0] ** (1 / 2.4) - 0.055)
    np.testing.assert_allclose(clip.frames[0, 20, :, 1], expected, atol=3)


@pytest.mark.parametrize(
    ("gamut", "number", "red"),
    [("BT.2020", 9, (0.627404, 0.069097, 0.016391)), ("Display P3", 12, (0.822462, 0.033194, 0.017083))],
)
def test_wide_gamuts_are_brought_to_srgb(tmp_path, gamut, number, red):
    """sRGB's red, as light of the wider primaries (the inverse of what is under test), and a grey."""
    wide = np.asarray(red)
    levels = 255 * np.where(wide > 0.0031308, 1.055 * wide ** (1 / 2.4) - 0.055, 12.92 * wide)
    picture = np.full((48, 64, 4), 130, np.uint8)
    picture[:24, :, :3] = levels.round()
    path = tmp_path / "wide.mkv"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("ffv1", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "bgra"
        stream.codec_context.color_primaries = number
        for _ in range(2):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgba")))
        output.mux(stream.encode())
    clip = read_clip(path)
    assert f"has the wide colours of {gamut}" in clip.messages[0]
    np.testing.assert_allclose(clip.frames[0, 5, 5], (255, 0, 0, 130), atol=4)
    np.testing.assert_array_equal(clip.frames[0, 40, 5], (130, 130, 130, 130))


def test_variable_frame_rate_is_thinned_by_time_and_otherwise_announced(tmp_path):
    delays = [50] * 10 + [500] * 4
    pictures = [Image.fromarray(np.full((8, 8), 10 * index, np.uint8)) for index in range(len(delays) + 1)]
    path = tmp_path / "varying.webp"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=[*delays, 50], lossless=True)
    assert "variable frame rate" in read_clip(path).messages[0]
    levels = read_clip(path, max_frames=5).frames[:, 0, 0, 0]
    # 2.5 s in quarters: 0, 0.625, 1.25, 1.875, 2.5 s; frames lie at 0, 0.05 ... 0.5, 1.0, 1.5, 2.0, 2.5 s
    assert levels.tolist() == [0, 100, 110, 130, 140]
    # what is kept lies 0.05 and 0.5 s apart: that must not be called even
    uneven = " ".join(read_clip(path, fps=10).messages)
    assert "Kept 10 of 15 frames of varying.webp:" in uneven and "-vf fps=20 even.mp4" in uneven


# --- files that cannot be used ---------------------------------------------------------------------------------------


def cut(share):
    """Keep so much of the pictures, after the whole index (which this file has in front)."""

    def write(path, good):
        data = good.read_bytes()
        start = data.index(b"mdat") + 4
        path.write_bytes(data[: start + int(share * (len(data) - start))])

    return write


def cut_index(path, good):
    data = good.read_bytes()
    path.write_bytes(data[: data.index(b"mdat") // 2])


def without_index(path, good):
    data = good.read_bytes()
    start = data.index(b"moov") - 4
    path.write_bytes(data[:start] + data[start + struct.unpack(">I", data[start : start + 4])[0] :])


def flipped(path, good):
    data = bytearray(good.read_bytes())
    for place in np.random.default_rng(0).integers(data.index(b"mdat") + 8, len(data), 20):
        data[place] ^= 0x55
    path.write_bytes(data)


def sound_only(path, good):
    with av.open(str(path), "w") as output:
        stream = output.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        output.mux(stream.encode(frame))
        output.mux(stream.encode())


def playlist(path, good):
    path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{good}\n#EXT-X-ENDLIST\n")


def of_sizes(*sizes):
    def write(path, good):
        path.mkdir()
        for index, size in enumerate(sizes):
            Image.new("RGB", size, (9, 9, 9)).save(path / f"{index}.png")

    return write


def folder_with_broken_picture(path, good):
    of_sizes((8, 8), (8, 8))(path, good)
    (path / "1.png").write_bytes((path / "1.png").read_bytes()[:40])


def truncated_gif(path, good):
    pictures = [Image.fromarray(frame) for frame in over(ball(), (255, 255, 255))]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def short_webm(path, good):
    write_video(path, over(ball(30), (255, 255, 255)), "libvpx-vp9", crf="30", b="0", cpu_used="8", g="5")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BAD = {
    "missing.mp4": (lambda path, good: None, "missing.mp4 does not exist: check the path"),
    "missing*.png": (lambda path, good: None, "No file matches"),
    "film*.mp4": (
        lambda path, good: shutil.copy(good, path.parent / "film1.mp4"),
        "a film: give the film itself, .*1.mp4",
    ),
    "empty.mp4": (lambda path, good: path.write_bytes(b""), "empty.mp4 is an empty file"),
    "text.mp4": (lambda path, good: path.write_text("a letter\n" * 100), "text.mp4 is not a video"),
    "noise.mp4": (lambda path, good: path.write_bytes(bytes(range(256)) * 40), "noise.mp4 is not a video"),
    "text.gif": (lambda path, good: path.write_text("a letter"), "text.gif is not a video"),
    "list.m3u8": (playlist, "list.m3u8 is not a video"),
    "list.mp4": (playlist, "list.mp4 is not a video"),
    "concat.txt": (lambda path, good: path.write_text(f"ffconcat version 1.0\nfile {good}\n"), "is not a video"),
    "no index.mp4": (without_index, "no index.mp4 is an incomplete MP4"),
    "cut index.mp4": (cut_index, "cut index.mp4 is an incomplete MP4"),
    "cut 2 %.mp4": (cut(0.02), "damaged or cut off after frame 0: download"),
    "cut 40 %.mp4": (cut(0.4), r"damaged or cut off after frame \d"),
    "cut 95 %.mp4": (cut(0.95), r"damaged or cut off after frame \d.*ffmpeg -i .cut 95 %.mp4. -frames:v \d"),
    "cut 99 %.mp4": (cut(0.99), r"damaged or cut off after frame \d"),
    "flipped.mp4": (flipped, r"damaged or cut off after frame \d"),
    "short.webm": (short_webm, r"damaged or cut off after frame \d"),
    "short.gif": (truncated_gif, r"short.gif is damaged after frame \d"),
    "sound.m4a": (sound_only, "sound.m4a has no picture track"),
    "still.png": (lambda path, good: Image.new("RGB", (8, 8)).save(path), "still.png has only one frame"),
    "one frame.mp4": (lambda path, good: write_video(path, over(ball(1), 255)), "one frame.mp4 has only one frame"),
    "no pictures": (lambda path, good: path.mkdir(), "folder .*no pictures has no pictures"),
    "one picture": (of_sizes((8, 8)), "one picture has only one frame"),
    "sizes": (of_sizes((8, 8), (8, 9)), "1.png is 8x9 but 0.png is 8x8"),
    "broken": (folder_with_broken_picture, "1.png cannot be read as a picture"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named_in_one_sentence(tmp_path, rolling, name):
    make, says = BAD[name]
    make(tmp_path / name, rolling)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=says) as caught:
        read_clip(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.filterwarnings("ignore:Invalid APNG")
def test_random_damage_gives_a_clip_or_a_sentence(tmp_path, rolling):
    pictures = [Image.fromarray(frame) for frame in ball()]
    for name in ("a.gif", "a.webp", "a.png"):
        pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:], duration=100)
    originals = [rolling, *(tmp_path / name for name in ("a.gif", "a.webp", "a.png"))]
    draw = np.random.default_rng(0)
    sentences = 0
    for index in range(120):
        original = originals[index % len(originals)]
        data = bytearray(original.read_bytes())
        for place in draw.integers(0, min(len(data), 800), 5):
            data[place] = draw.integers(256)
        path = tmp_path / f"damaged{original.suffix}"
        path.write_bytes(data)
        try:
            clip = read_clip(path)
            assert clip.frames.dtype == np.uint8 and len(clip.frames) >= 2 and clip.fps > 0
        except InputError as error:
            assert path.name in str(error) and "\n" not in str(error)
            sentences += 1
    assert sentences > 40


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path, rolling):
    path = tmp_path / "secret.mp4"
    path.write_bytes(rolling.read_bytes())
    path.chmod(0)
    with pytest.raises(InputError, match=r"secret\.mp4 cannot be read"):
        read_clip(path)


# --- foreground ------------------------------------------------------------------------------------------------------


def iou(alpha: np.ndarray, exact: np.ndarray) -> float:
    return ((alpha >= 128) & (exact >= 128)).sum() / ((alpha >= 128) | (exact >= 128)).sum()


def clip_of(pictures: np.ndarray) -> Clip:
    if pictures.shape[-1] == 3:
        pictures = np.concatenate([pictures, np.full_like(pictures[..., :1], 255)], axis=-1)
    return Clip(pictures, 10.0, "memory.mp4", bool((pictures[..., 3] < 255).any()))


def test_alpha_of_the_file_is_kept_untouched():
    exact = ball()
    foreground = segment(clip_of(exact))
    np.testing.assert_array_equal(foreground.frames, exact)
    assert foreground.method == "alpha" and foreground.confidence == 1


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (30, 200, 60), (128, 128, 128)])
@pytest.mark.parametrize("noise", [0, 3])
def test_plain_background_of_any_colour_gives_soft_edges(background, noise):
    exact = ball()
    pictures = over(exact, background) + np.random.default_rng(0).normal(0, noise, (*exact.shape[:3], 3))
    foreground = segment(clip_of(pictures.clip(0, 255).round().astype(np.uint8)))
    assert foreground.method == "plain background" and foreground.confidence > 0.9
    assert iou(foreground.alpha, exact[..., 3]) > 0.97  # the shading towards the rim is not in the edge model
    edge = (exact[..., 3] > 0) & (exact[..., 3] < 255)
    assert np.abs(foreground.alpha.astype(int) - exact[..., 3])[edge].mean() < 32  # a hard one is 64 off
    assert foreground.alpha[exact[..., 3] == 0].mean() < 1
    # on the opposite colour the old background must not show as a fringe, as it does when merely masked
    opposite = 255 - np.asarray(background)
    masked = np.where(exact[..., 3:] > 0, over(exact, background), opposite)
    fringe, naive = (
        np.abs(picture.astype(int) - over(exact, opposite))[edge].mean()
        for picture in (over(foreground.frames, opposite), masked)
    )
    assert fringe < 28 and (fringe < 0.5 * naive or background == (128, 128, 128))  # grey: opposite is the same


def test_h264_on_white(rolling):
    foreground = segment(read_clip(rolling))
    assert iou(foreground.alpha, ball()[..., 3]) > 0.97
    assert not foreground.alpha[:, 0].any()


def test_a_white_patch_inside_stays_part_of_the_object():
    exact = ball(radius=18.0)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH] + 0.5
    centres = [(0.3 + 0.4 * index / (FRAMES - 1)) * WIDTH for index in range(FRAMES)]
    for frame, centre in zip(exact, centres, strict=True):
        frame[np.hypot(x - centre, y - 28) < 7, :3] = 255
    foreground = segment(clip_of(over(exact, (255, 255, 255))))
    for frame, centre in zip(foreground.frames, centres, strict=True):
        assert (frame[np.hypot(x - centre, y - 28) < 6] == 255).all()
    clip = clip_of(over(exact, (255, 255, 255)))
    assert any("taken as part of it" in finding.sentence for finding in examine(clip, foreground))


def test_an_opening_that_is_seen_open_stays_open():
    exact = np.zeros((6, 48, 48, 4), np.uint8)
    exact[..., :3] = (40, 90, 160)
    exact[:, 8:40, 8:40, 3] = 255
    exact[:, 18:30, 18:30, 3] = 0
    exact[4:, 22:26, 30:40, 3] = 0  # the ring opens in the last frames
    foreground = segment(clip_of(over(exact, (255, 255, 255))))
    assert iou(foreground.alpha, exact[..., 3]) > 0.99
    closed = segment(clip_of(over(exact[:4], (255, 255, 255))))
    assert (closed.alpha[:, 18:30, 18:30] == 255).all()


def test_an_opening_before_a_green_screen_needs_no_frame_that_shows_it_open():
    exact = np.zeros((4, 48, 48, 4), np.uint8)
    exact[..., :3] = (200, 90, 60)
    exact[:, 8:40, 8:40, 3] = 255
    exact[:, 18:30, 18:30, 3] = 0
    foreground = segment(clip_of(over(exact, (0, 177, 64))))
    assert iou(foreground.alpha, exact[..., 3]) > 0.99


def test_an_opening_that_comes_and_goes_is_one_and_a_white_belly_is_not():
    exact = np.zeros((8, 64, 64, 4), np.uint8)
    exact[..., :3] = (40, 90, 160)
    exact[:, 8:56, 8:56, 3] = 255
    exact[3:5, 14:24, 14:24, 3] = 0  # two legs cross
    exact[:, 36:46, 36:46, :3] = 255  # the belly stays
    foreground = segment(clip_of(over(exact, (255, 255, 255))))
    assert iou(foreground.alpha, exact[..., 3]) > 0.99


def test_specks_are_dropped():
    pictures = over(ball(), (255, 255, 255))
    pictures[:, 3:6, 3:6] = 0
    foreground = segment(clip_of(pictures))
    assert not foreground.alpha[:, :8, :8].any()


def test_what_cannot_be_cut_out_is_refused():
    draw = np.random.default_rng(0)
    white = np.full((4, 32, 32, 3), 255, np.uint8)
    opaque = np.full((4, 32, 32, 4), 255, np.uint8)
    hardly = opaque.copy()
    hardly[0, 0, 0, 3] = 0
    clear = np.zeros((4, 32, 32, 4), np.uint8)
    street = draw.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    gradient = np.broadcast_to(np.linspace(0, 255, 32).astype(np.uint8)[None, None, :, None], (4, 32, 32, 3))
    noisy_white = (255 - draw.integers(0, 6, white.shape)).astype(np.uint8)
    for pictures, says in [
        (white, "no visible object"),
        (noisy_white, "no visible object"),
        (opaque, "no visible object"),
        (clear, "no visible object"),
        (hardly, "covers all of"),
        (street, "no plain background"),
        (gradient.copy(), "no plain background"),
    ]:
        with pytest.raises(InputError, match=f"(?s){says}") as caught:
            segment(clip_of(pictures))
        assert "memory.mp4" in str(caught.value)


def test_warnings_name_the_frames():
    exact = ball(frames=5, width=96)
    exact[2] = 0
    exact[3:] = np.roll(exact[3:], 30, axis=2)
    exact[3:, :, :48] = 0
    clip = clip_of(exact)
    messages = [finding.sentence for finding in examine(clip, segment(clip))]
    assert any("touches the border of the picture in 2 of 5 frames (first: 3)" in message for message in messages)
    assert any("not visible in 1 of 5 frames (first: 2)" in message for message in messages)


def test_a_good_clip_is_not_flagged():
    clip = clip_of(ball(frames=9, width=300, height=220, radius=70.0))
    assert examine(clip, segment(clip)) == []


def _names(rgba: np.ndarray, **settings) -> list[str]:
    clip = clip_of(rgba)
    return [finding.name for finding in examine(clip, segment(clip, **settings))]


def test_the_doctor_finds_what_spoils_a_clip():
    good = ball(frames=6, width=300, height=220, radius=70.0)
    still = np.repeat(good[:1], 6, axis=0)
    assert _names(still) == ["motion"]
    two = good.copy()
    two[:, 5:45, 250:295] = (20, 200, 20, 255)
    assert _names(two) == ["several objects"]
    jumping = good.copy()
    jumping[1::2] = np.rot90(np.pad(good[1::2, 90:130], ((0, 0), (90, 90), (0, 0), (0, 0))), 2, (1, 2))
    jumping[0::2] = np.where((np.arange(300) % 300 > 130)[None, None, :, None] & True, 0, good[0::2])
    jumping[0::2, :, 100:125] = (200, 60, 30, 255)
    jumping[0::2, [0, -1]] = 0
    assert "motion" in _names(jumping)
    blurred = good.copy()
    texture = np.random.default_rng(0).integers(0, 255, (*good.shape[1:3], 3))
    blurred[..., :3] = np.where(good[..., 3:] > 0, texture, good[..., :3])
    blurred[3, ..., :3] = np.stack([ndimage.gaussian_filter(texture[..., i].astype(float), 4) for i in range(3)], -1)
    assert _names(blurred) == ["blur"]


def test_an_object_that_travels_is_told_of_the_crop_that_follows_it():
    exact = ball(frames=6, width=400, height=200, radius=80.0)
    assert _names(exact) == []
    far = ball(frames=6, width=900, height=200, radius=50.0)
    clip = clip_of(far)
    assert [finding.name for finding in examine(clip, segment(clip))] == ["travel"]


def test_a_moving_camera_shows_in_the_background():
    scenery = ndimage.gaussian_filter(np.random.default_rng(0).uniform(0, 255, (220, 400, 3)), (4, 4, 0)) * 3 % 255
    exact = ball(frames=6, width=300, height=220, radius=60.0)
    masks = exact[..., 3]
    for shift, expected in ((0, []), (6, ["camera motion"])):
        behind = np.stack([scenery[:, shift * index : shift * index + 300] for index in range(6)])
        picture = exact[..., :3] * (masks[..., None] / 255) + behind * (1 - masks[..., None] / 255)
        opaque = np.dstack([picture.reshape(-1, 300, 3), np.full((6 * 220, 300, 1), 255)]).reshape(6, 220, 300, 4)
        assert _names(opaque.astype(np.uint8), masks=masks) == expected


# --- masks and matting -----------------------------------------------------------------------------------------------


def _busy(exact: np.ndarray) -> np.ndarray:
    """The object before noise, opaque."""
    noise = np.random.default_rng(1).integers(0, 255, (*exact.shape[:3], 3))
    share = exact[..., 3:] / 255
    colours = exact[..., :3] * share + noise * (1 - share)
    return np.concatenate([colours, np.full_like(exact[..., 3:], 255)], axis=-1).astype(np.uint8)


def test_a_busy_background_needs_a_model_or_masks(monkeypatch, tmp_path):
    monkeypatch.setenv(PROGRESS_VARIABLE, str(tmp_path / "progress.json"))
    exact = ball()
    clip = clip_of(_busy(exact))
    with pytest.raises(InputError, match=r"no plain background.*masks.*matting"):
        segment(clip)
    calls = []

    def red_things(picture):
        """A real, if simple, matting model: what is as red as the ball; it loses the ball in the fourth picture."""
        calls.append(picture.shape)
        rough = (picture[..., 0].astype(int) - picture[..., 2] > 60) & (picture[..., 1] < 90)
        mask = ndimage.binary_fill_holes(ndimage.binary_opening(rough, np.ones((5, 5))))
        return 255 * mask.astype(np.uint8) * (len(calls) != 4)

    foreground = segment(clip, matting=red_things)
    assert foreground.method == "matting" and len(calls) == FRAMES and 0.9 < foreground.confidence <= 1
    shown = json.loads((tmp_path / "progress.json").read_text())
    assert shown["done"] == shown["total"] == FRAMES, "a model takes a second a picture or more: a bar shows it"
    assert foreground.alpha[3].any(), "the median over time bridges a frame the model lost"
    with_masks = segment(clip, masks=exact[..., 3])
    assert with_masks.method == "masks" and (with_masks.alpha == exact[..., 3]).all()
    soft = (exact[..., 3] > 30) & (exact[..., 3] < 220)
    error = np.abs(with_masks.frames[..., :3].astype(int) - exact[..., :3])[soft].mean()
    assert error < 0.5 * np.abs(clip.frames[..., :3].astype(int) - exact[..., :3])[soft].mean()


def test_masks_from_a_folder(tmp_path):
    exact = ball()
    video = write_video(tmp_path / "busy.mkv", _busy(exact)[..., :3], "ffv1", "bgr0")
    for name, count in (("masks", FRAMES), ("few", 3)):
        (tmp_path / name).mkdir()
        for index in range(count):
            Image.fromarray(exact[index, ..., 3]).save(tmp_path / name / f"{index}.png")
    found = load_object_video(video, size=48, max_frames=4, masks=tmp_path / "masks")
    assert "cut out with the masks" in " ".join(found.messages) and found.confidence == 1
    with pytest.raises(InputError, match=r"No masks \(--pipeline.datamanager.masks\): .*none does not exist"):
        load_object_video(video, size=48, masks=tmp_path / "none")
    with pytest.raises(InputError, match=r"few holds 3 masks but .*busy.mkv has 8 frames"):
        load_object_video(video, size=48, masks=tmp_path / "few")


def test_matting_models_are_named_and_optional():
    with pytest.raises(InputError, match="no matting model 'rmbg'"):
        load_matting("rmbg")
    if importlib.util.find_spec("rembg") is None:
        with pytest.raises(InputError, match=r"pip install '\.\[matting\]'"):
            load_matting("u2net")


# --- all together ----------------------------------------------------------------------------------------------------


def test_load_object_video(rolling):
    video = load_object_video(rolling, size=40, max_frames=4)
    assert video.frames.shape == (4, 40, 40, 4) and video.source == str(rolling)
    assert video.fps == pytest.approx(10 * 3 / 7, rel=0.01) and 0.9 < video.confidence <= 1
    assert [message.split()[0] for message in video.messages] == ["Kept", "A"]
    assert [finding.name for finding in video.findings] == ["resolution"]
    assert "only 49 pixels large" in video.findings[0].sentence
    columns = np.flatnonzero((video.frames[..., 3] >= 128).any(axis=(0, 1)))
    assert columns[-1] - columns[0] + 1 == pytest.approx(0.9 * 40, abs=1.5)


def test_the_doctor_reports(tmp_path, rolling, capsys):
    from sv4d_ns.cli.doctor import write_sheet
    from sv4d_ns.cli.main import main

    assert main(["doctor", str(rolling), "--max-frames", "4", "--picture", str(tmp_path / "sheet.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("rolling.mp4: 4 frames at 4.28571 per second.")
    assert any("only 4" in line and line.startswith("- The object is only") for line in lines)
    assert Image.open(tmp_path / "sheet.png").size == (4 * 256, 256)
    write_sheet(np.zeros((16, 8, 8, 4), np.uint8), tmp_path / "rows.png", [], 7)
    assert Image.open(tmp_path / "rows.png").size == (7 * 8, 3 * 8)
    with pytest.raises(SystemExit, match=r"Error: .*nothing.mp4 does not exist"):
        main(["doctor", str(tmp_path / "nothing.mp4")])


def test_a_large_square_film_that_frames_its_object_is_read_at_the_wanted_size(tmp_path):
    y, x = np.mgrid[:400, :400]
    disc = ((x - 215) ** 2 + (y - 200) ** 2 < 150**2)[..., None]
    picture = np.where(disc, np.uint8([200, 30, 40]), np.uint8([255, 255, 255]))
    for name, count in (("a.mp4", 2), ("b.mp4", 3)):
        write_video(tmp_path / name, np.repeat(picture[None], count, 0))
        video = load_object_video(tmp_path / name, size=80)
        assert (video.framing.side, video.framing.center_x) == (400, 200)
        columns = np.flatnonzero((video.frames[..., 3] >= 128).any(axis=(0, 1)))
        assert columns[0] == pytest.approx(13, abs=1) and columns[-1] == pytest.approx(72, abs=1)
