"""The contact sheet of a run says what its rows and columns are."""

import numpy as np
from PIL import Image

from sv4d_ns.field import images
from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.utils.images import labelled, tiled
from sv4d_ns.views.grid import ViewGrid


def test_names_stand_beside_the_pictures_and_never_on_them():
    rows = [[np.full((40, 40, 3), 20 * (2 * row + column), np.uint8) for column in range(2)] for row in range(3)]
    sheet = labelled(rows, ["input", "render 0°", "render 135°"], ["0: 0.00 s", "20: 2.00 s"])
    left, top = sheet.shape[1] - 80, sheet.shape[0] - 120
    np.testing.assert_array_equal(sheet[top:, left:], tiled(rows))
    for row in range(3):
        assert sheet[top + 40 * row : top + 40 * (row + 1), :left].min() < 150
    for column in range(2):
        assert sheet[:top, left + 40 * column : left + 40 * (column + 1)].min() < 150
    assert (sheet[:, 0] == 255).all() and (sheet[0] == 255).all()  # nothing is cut off


def test_rows_are_named_by_their_cameras_and_columns_by_their_moments(monkeypatch):
    plan = ViewPlan((90.0, 225.0), (0.0, 30.0))
    frames = np.full((3, 8, 8, 4), 255, np.uint8)
    grid = ViewGrid(frames, np.full((3, 2, 8, 8, 4), 255, np.uint8), plan, fps=10.0, provenance={})
    named = {}

    def recorded(rows, row_names, column_names):
        named.update(rows=row_names, columns=column_names)
        return tiled(rows)

    monkeypatch.setattr(images, "SHEET_SIZE", 8)
    monkeypatch.setattr(images, "labelled", recorded)
    monkeypatch.setattr(images, "render_rgba", lambda *_: frames[0])
    sheet = images.result_sheet(None, None, grid, lambda *_: None)
    assert named["rows"] == ["input", "render 0°", "render 90°", "render 225°, +30° up"]
    assert named["columns"] == ["0: 0.00 s", "1: 0.10 s", "2: 0.20 s"]
    assert isinstance(sheet.picture, Image.Image)
