"""The web page holds everything it needs: its asset, its pictures, its viewer; driven by benchmarks/web_check.py."""

import base64
import io
import json
import re

import numpy as np
import pytest
from export_fixture import SwingingLimb, exported
from PIL import Image

from sv4d_ns.export.formats.gltf import write_animated_glb
from sv4d_ns.export.formats.web import write_page
from sv4d_ns.geometry.cameras import ViewPlan


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


def test_the_video_is_inside_on_white_and_not_too_large(page):
    settings = json.loads(script((page / "index.html").read_text(), "settings"))
    assert len(settings["frames"]) == 3 and settings["fps"] == 10.0
    assert settings["elevation"] == pytest.approx(np.radians(15))
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(settings["frames"][1].split(",", 1)[1]))))
    assert image.shape == (512, 512, 3)
    np.testing.assert_allclose(image[256, 100], 255, atol=3)
    np.testing.assert_allclose(image[256, 400], [200, 0, 0], atol=6)


def test_nothing_is_asked_of_the_network_and_no_place_is_left_open(page):
    text = (page / "index.html").read_text()
    assert not re.search(r"https?://|//cdn|@import|{{", re.sub(r"<script type=.*?</script>", "", text, flags=re.S))
    assert "<title>a &lt;b&gt; &amp; c</title>" in text
    assert text.count("<script") == text.count("</script>") == 3
