"""The web page holds everything it needs: its asset, its pictures, its viewer; driven by benchmarks/web_check.py."""

import base64
import io
import json
import re

import numpy as np
import pytest
from export_fixture import SwingingLimb, exported
from PIL import Image

from sv4d_ns.export.colour.picture import draw
from sv4d_ns.export.formats.asset import AnimatedMesh, Flipbook, Texture
from sv4d_ns.export.formats.gltf import write_animated_glb
from sv4d_ns.export.formats.web import POSTER_NAME, write_page, write_poster
from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.utils.images import GENERATED_COLOR, OBSERVED_COLOR, UNSEEN_COLOR


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("web")
    mesh = exported(SwingingLimb(), np.linspace(0, 1, 3), 10.0, resolution=40, max_faces=500)
    write_animated_glb(mesh, folder / "limb.glb", "limb", {"sv4d": {"licences": "a </script> b"}})
    video = np.zeros((3, 700, 700, 4), np.uint8)
    video[..., 0], video[:, :, 350:, 3] = 200, 255
    write_page(folder / "limb.glb", video, ViewPlan.ring((90.0,), 15.0), 10.0, "a <b> & c", folder / "index.html")
    return folder


def script(text: str, name: str) -> str:
    (found,) = re.findall(rf'<script type="[^"]+" id="{name}">(.*?)</script>', text, re.S)
    return found


def test_the_asset_is_inside(page):
    text = (page / "index.html").read_text()
    assert base64.b64decode(script(text, "asset")) == (page / "limb.glb").read_bytes()


def test_the_video_is_inside_without_background_and_not_too_large(page):
    settings = json.loads(script((page / "index.html").read_text(), "settings"))
    assert len(settings["frames"]) == 3 and settings["fps"] == 10.0
    assert settings["elevation"] == pytest.approx(np.radians(15))
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(settings["frames"][1].split(",", 1)[1]))))
    assert image.shape == (512, 512, 4)
    assert image[256, 100, 3] == 0
    np.testing.assert_allclose(image[256, 400], [200, 0, 0, 255], atol=6)


def test_confidence_has_the_viewers_colours(page):
    from sv4d_ns.plugin.render_outputs import LEGENDS

    settings = json.loads(script((page / "index.html").read_text(), "settings"))
    assert [tuple(one["color"]) for one in settings["confidence"]] == [OBSERVED_COLOR, GENERATED_COLOR, UNSEEN_COLOR]
    assert [one["name"] for one in settings["confidence"]] == [
        "seen by the input video",
        "by generated views only",
        "by none",
    ]
    assert all(one["name"] in LEGENDS["confidence"] for one in settings["confidence"]), "nor other words"


def test_a_link_to_the_page_shows_the_poster(page):
    text = (page / "index.html").read_text()
    assert '<meta property="og:image" content="poster.jpg">' in text
    assert '<meta property="og:title" content="a &lt;b&gt; &amp; c">' in text
    frame, asset = np.zeros((2, 40, 40, 4), np.uint8)
    frame[..., 0], frame[..., 3], asset[..., 2], asset[..., 3] = 200, 255, 200, 255
    write_poster(frame, asset, page / POSTER_NAME)
    poster = np.asarray(Image.open(page / POSTER_NAME))
    assert poster.shape == (630, 1200, 3)
    np.testing.assert_allclose(poster[315, [300, 900]], [[200, 0, 0], [0, 0, 200]], atol=6)


@pytest.mark.parametrize("texture", ["film", "none", "animated"])
def test_a_drawn_mesh_lies_where_the_camera_sees_it_in_its_own_colours(texture):
    corners = np.array([[0, -0.5, -0.5], [0, 0.5, -0.5], [0, 0.5, 0.5], [0, -0.5, 0.5]], np.float32)
    image = np.full((8, 8, 3), (10, 200, 30), np.uint8)
    image[:, :4] = (200, 10, 30)  # the left half
    blank = np.stack([np.zeros_like(image[:4, :4]), image[::2, ::2]])
    moments = Flipbook(blank, np.array([1])) if texture == "animated" else None
    quad = AnimatedMesh(
        positions=corners[None],
        faces=np.array([[0, 1, 2], [0, 2, 3]]),
        colors=np.full((4, 3), (10, 200, 30), np.uint8),
        normals=np.tile(np.array([1.0, 0, 0]), (1, 4, 1)),
        fps=10.0,
        confidence=np.ones(4),
        texture=None if texture == "none" else Texture(np.array([[0.0, 1], [1, 1], [1, 0], [0, 0]]), image, moments),
    )
    plan = ViewPlan.ring((90.0,))
    made = draw(quad, 0, plan.c2w()[0], plan.focal_px(100), 100)
    half = 0.5 * plan.focal_px(100) / plan.radius
    inside = abs(np.arange(100) + 0.5 - 50) < half - 1
    assert (made[np.ix_(inside, inside)][..., 3] == 255).all() and made[..., 3].sum() / 255 == pytest.approx(
        4 * half**2, rel=0.02
    )
    np.testing.assert_allclose(made[50, 70, :3], (10, 200, 30), atol=1)
    np.testing.assert_allclose(made[50, 30, :3], (10, 200, 30) if texture == "none" else (200, 10, 30), atol=1)


def test_nothing_is_asked_of_the_network_and_no_place_is_left_open(page):
    text = (page / "index.html").read_text()
    assert not re.search(r"https?://|//cdn|@import|{{", re.sub(r"<script type=.*?</script>", "", text, flags=re.S))
    assert "<title>a &lt;b&gt; &amp; c</title>" in text
    assert text.count("<script") == text.count("</script>") == 3
