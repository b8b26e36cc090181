"""Estimated normals: from a folder of maps, from a tiny random Marigold pipeline, and what can be wrong with either."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_fitting import ball_grid

from sv4d_ns.field.deformable import DeformableField, DeformableFieldConfig
from sv4d_ns.field.occupancy import OccupancyGrid
from sv4d_ns.field.volume_rendering import render_rays
from sv4d_ns.fitting.batch_sampler import BatchConfig, BatchSampler
from sv4d_ns.fitting.objective import loss_terms
from sv4d_ns.fitting.schedule import ScheduleConfig, Window
from sv4d_ns.fitting.settings import LossWeights
from sv4d_ns.fitting.train_views import hull_views, train_views, with_normals
from sv4d_ns.utils.errors import InputError
from sv4d_ns.views.grid import ViewGrid, image_name
from sv4d_ns.views.normals import estimated_normals


def quiet(done: int, total: int) -> None:
    pass


@pytest.fixture
def grid() -> ViewGrid:
    return ball_grid(2)


def ball_normals(grid: ViewGrid, view: int, frame: int) -> np.ndarray:
    """World normals of `ball_grid`'s ball where a view sees it, from geometry."""
    size, c2w = grid.input_frames.shape[1], grid.plan.c2w()[view]
    axis = (np.arange(size) + 0.5 - size / 2) / grid.plan.focal_px(size)
    d = np.stack(np.broadcast_arrays(axis[None, :], -axis[:, None], -1.0), -1) @ c2w[:3, :3].T
    d /= np.linalg.norm(d, axis=-1, keepdims=True)
    middle = np.array([0.0, 0.0, 0.1 * frame - 0.15]) - c2w[:3, 3]
    along = d @ middle
    depth = along - np.sqrt(np.maximum(0.25**2 - (middle @ middle - along**2), 0))
    return (depth[..., None] * d - middle) / 0.25


def write_maps(folder: Path, grid: ViewGrid) -> Path:
    """The ball's maps in camera axes, as a user's estimator would leave them."""
    folder.mkdir()
    for view in range(grid.num_views + 1):
        for frame in range(grid.num_frames):
            in_camera = ball_normals(grid, view, frame) @ grid.plan.c2w()[view, :3, :3]
            picture = (127.5 * (in_camera + 1)).round().clip(0, 255).astype(np.uint8)
            Image.fromarray(picture).save(folder / Path(image_name("images", view, frame)).name)
    return folder


def test_a_folder_of_maps_becomes_world_normals_on_the_object(tmp_path: Path, grid: ViewGrid) -> None:
    normals = estimated_normals(grid, str(write_maps(tmp_path / "maps", grid)), tmp_path, "cpu", quiet)
    assert len(normals) == grid.num_views + 1
    for view in (0, 2):
        on_object = (grid.input_frames if view == 0 else grid.novel_views[:, view - 1])[1, ..., 3] > 0
        assert (normals[view][1][~on_object] == 0).all()
        np.testing.assert_allclose(normals[view][1][on_object], ball_normals(grid, view, 1)[on_object], atol=0.02)
    # all cameras see the same top of the ball pointing up
    top = [np.argwhere(one[0, ..., 2] > 0)[0] for one in normals]
    assert all(one[0][tuple(at)][2] > 0.5 for one, at in zip(normals, top, strict=True))


def test_the_normal_loss_turns_the_surface_towards_the_estimate(tmp_path: Path, grid: ViewGrid) -> None:
    torch.manual_seed(0)
    normals = estimated_normals(grid, str(write_maps(tmp_path / "maps", grid)), tmp_path, "cpu", quiet)
    views = with_normals(train_views(grid, "cpu"), normals)
    field = DeformableField(
        DeformableFieldConfig(keyframes=2, levels=4, max_resolution=64, motion_resolutions=(2,), density_resolutions=())
    )
    occupancy = OccupancyGrid(2, resolution=32)
    occupancy.carve(hull_views(views))
    sampler = BatchSampler(views, BatchConfig(rays=32, patches=3), ScheduleConfig(), 0)
    only = LossWeights(photometric=0.1, structure=0, distortion=0, normal_smoothness=0, normal=1.0)
    optimizer = torch.optim.Adam(field.parameters(), lr=1e-2)
    values = []
    for step in range(80):
        batch = sampler.draw(step, Window.whole(1), 0)
        out = render_rays(field, occupancy, batch.origins, batch.directions, batch.times, 48, batch.background)
        terms = loss_terms(field, occupancy, None, out, batch, only, 0, step)
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        if "normal" in terms:
            values.append(terms["normal"].item())
    assert len(values) > 20  # it is asked every other step
    assert np.mean(values[-5:]) < 0.5 * np.mean(values[:3])


def tiny_marigold(folder: Path, prediction_type: str = "normals") -> Path:
    """Marigold's parts at the smallest sizes, with random weights."""
    from diffusers import AutoencoderKL, DDIMScheduler, MarigoldNormalsPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    folder.mkdir()
    tokens = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}
    (folder / "vocab.json").write_text(json.dumps(tokens))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    pipeline = MarigoldNormalsPipeline(
        unet=UNet2DConditionModel(
            in_channels=8, out_channels=4, block_out_channels=(8,), layers_per_block=1, cross_attention_dim=8,
            attention_head_dim=4, norm_num_groups=4, mid_block_type=None, **blocks,
        ),
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4),
        scheduler=DDIMScheduler(clip_sample=False),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(vocab_size=3, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        ),
        tokenizer=CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8),
        prediction_type=prediction_type,
        default_denoising_steps=1,
        default_processing_resolution=0,
    )  # fmt: skip
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def test_a_pipeline_estimates_once_and_its_normals_are_unit_vectors(
    tmp_path: Path, grid: ViewGrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = ViewGrid(
        grid.input_frames,
        grid.novel_views[:, :1],
        replace(grid.plan, azimuths_deg=(60.0,), elevations_deg=(0.0,)),
        10.0,
    )
    source, seen = str(tiny_marigold(tmp_path / "tiny")), []
    normals = estimated_normals(one, source, tmp_path / "kept", "cpu", lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    on_object = one.novel_views[..., 3][:, 0] > 0
    length = np.linalg.norm(normals[1], axis=-1)
    np.testing.assert_allclose(length[on_object], 1, atol=1e-3)
    assert (length[~on_object] == 0).all()
    monkeypatch.setattr("sv4d_ns.views.normals.load_estimator", lambda *_: pytest.fail("estimated twice"))
    again = estimated_normals(one, source, tmp_path / "kept", "cpu", quiet)
    np.testing.assert_array_equal(again[1], normals[1])


def test_what_is_wrong_with_a_source_is_said_in_one_sentence(tmp_path: Path, grid: ViewGrid) -> None:
    maps = write_maps(tmp_path / "maps", grid)
    (maps / "view01_frame0001.png").write_bytes(b"no picture")
    (maps / "view02_frame0001.png").unlink()
    cases = {
        str(maps): "view01_frame0001.png is no normal map",
        "nobody/normals-not-on-this-machine": "neither a folder of normal maps nor a diffusers pipeline",
    }
    for source, says in cases.items():
        with pytest.raises(InputError, match=says) as raised:
            estimated_normals(grid, source, tmp_path / "kept", "cpu", quiet)
        assert "\n" not in str(raised.value)
    write_maps(tmp_path / "fewer", grid)
    (tmp_path / "fewer" / "view02_frame0001.png").unlink()
    with pytest.raises(InputError, match=r"lacks .*view02_frame0001.png"):
        estimated_normals(grid, str(tmp_path / "fewer"), tmp_path / "kept", "cpu", quiet)
    with pytest.raises(InputError, match="something other than normals"):
        estimated_normals(grid, str(tiny_marigold(tmp_path / "depth", "depth")), tmp_path / "kept", "cpu", quiet)
