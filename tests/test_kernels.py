"""Back ends of encodings and ray marching: which one runs where, that none changes what a table means, and that the
package works where numba cannot be imported."""

import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from pretend_card import Card
from tiny_run import tiny_config

from sv4d_ns.field import hash_grid, kernels
from sv4d_ns.field import volume_rendering as rendering
from sv4d_ns.field.deformable import DeformableField, DeformableFieldConfig
from sv4d_ns.field.hash_grid import HashEncoding, HashGrid
from sv4d_ns.field.occupancy import OccupancyGrid
from sv4d_ns.utils.errors import InputError

FIT = """
import sys, torch
from sv4d_ns.field.deformable import DeformableField, DeformableFieldConfig
from sv4d_ns.field.occupancy import OccupancyGrid
from sv4d_ns.field.volume_rendering import render_rays

torch.manual_seed(0)
field = DeformableField(DeformableFieldConfig(keyframes=3, log2_table_size=10, motion_resolutions=(2, 3)))
with torch.no_grad():
    field.encoding.table.uniform_(-1, 1)
    for grid in field.motion.keyframes:
        grid.uniform_(-0.1, 0.1)
occupancy = OccupancyGrid(3, resolution=12)
occupancy.density.uniform_(0, 60)
occupancy.occupied.copy_(torch.rand(occupancy.occupied.shape) < 0.6)
origins = 2 * torch.nn.functional.normalize(torch.randn(60, 3), dim=-1)
directions = torch.nn.functional.normalize(torch.rand(60, 3) * 0.4 - 0.2 - origins, dim=-1)
times = torch.linspace(0, 1, 60)[:, None]
out = render_rays(field, occupancy, origins, directions, times, 48, jitter=torch.rand(60))
(out.rgb.square().sum() + out.depth.clamp(max=3).sum()).backward()
slopes = [field.encoding.table.grad, field.motion.keyframes[1].grad]
torch.save([out.rgb.detach(), out.alpha.detach(), *slopes], sys.argv[1])
"""


def test_without_numba_everything_works_and_one_warning_says_it_is_slower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "fit.py"
    script.write_text(FIT)
    monkeypatch.setattr(sys, "argv", ["fit.py", str(tmp_path / "fast")])
    runpy.run_path(str(script))
    hidden = f"import sys; sys.modules['numba'] = None; sys.argv[1:] = [{str(tmp_path / 'slow')!r}]\n"
    done = subprocess.run([sys.executable, "-c", hidden + FIT], capture_output=True, text=True, check=True)
    assert done.stderr.count("numba cannot be imported") == 1, done.stderr
    for fast, slow in zip(*(torch.load(tmp_path / name) for name in ("fast", "slow")), strict=True):
        assert fast.abs().sum() > 0
        torch.testing.assert_close(fast, slow, atol=2e-4, rtol=2e-3)


def test_points_go_to_the_kernel_that_can_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    here, elsewhere = torch.zeros(1, 3), torch.zeros(1, 3, device="meta")
    assert kernels.fused("numba", here)
    assert not kernels.fused("torch", here) and not kernels.fused("numba", elsewhere)
    monkeypatch.setattr(kernels, "AVAILABLE", False)
    assert not kernels.fused("numba", here)


@pytest.mark.parametrize(
    ("nerfacc", "training", "expected"),
    [(True, False, "nerfacc"), (True, True, "torch"), (False, False, "torch"), (False, True, "torch")],
)
def test_pictures_on_cuda_are_walked_by_nerfacc_where_it_works(
    nerfacc: bool, training: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OnCuda:
        device = torch.device("cuda")

    monkeypatch.setattr(rendering, "nerfacc_works", lambda: nerfacc)
    with torch.set_grad_enabled(training):
        assert rendering.marcher(OnCuda()) == expected  # type: ignore[arg-type]
        assert rendering.marcher(torch.zeros(1, 3)) == "numba", "whatever is installed, the CPU has its own loop"


def test_samples_behind_an_opaque_surface_are_cut_alike() -> None:
    """What the nerfacc path does after nerfacc: the packed rule against that of the torch march."""
    torch.manual_seed(1)
    occupancy = OccupancyGrid(2, resolution=10)
    occupancy.density.uniform_(0, 80)
    origins = 2 * torch.nn.functional.normalize(torch.randn(40, 3), dim=-1)
    directions = torch.nn.functional.normalize(torch.rand(40, 3) * 0.4 - 0.2 - origins, dim=-1)
    near, far = rendering.intersect_box(origins, directions, occupancy.half_extent)
    low, high = occupancy.bins_around(torch.rand(40))
    step, jitter = 0.02, torch.rand(40)
    arguments = (occupancy, origins, directions, near, far, low, high, step, jitter)
    everything, cut = rendering._march_torch(*arguments, 10**6), rendering._march_torch(*arguments, 5)
    keep = rendering._before_opaque(
        occupancy, origins, directions, low, high, everything.ray_indices, everything.distances, step, 5
    )
    assert 0 < len(cut.distances) < len(everything.distances)
    torch.testing.assert_close(everything.distances[keep], cut.distances)
    torch.testing.assert_close(everything.ray_indices[keep], cut.ray_indices)


def test_tinycudann_gets_the_same_levels_and_a_flat_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """tiny-cuda-nn counts, level by level, min(corners rounded up to 8, table size) entries of two features."""
    grid = HashGrid(3, levels=4, log2_table_size=9, base_resolution=4, growth=1.5, backend="tinycudann")
    sides = [4, 6, 9, 14]  # ceil(4 * 1.5^l - 1) + 1
    counts = [min(-(-(side**3) // 8) * 8, 512) for side in sides]
    assert grid.levels.entries.tolist() == counts and grid.table.shape == (sum(counts), 2)

    class Encoding(torch.nn.Module):
        def __init__(self, dimensions: int, config: dict, dtype: torch.dtype) -> None:
            super().__init__()
            assert (dimensions, dtype) == (3, torch.float32)
            assert config["otype"] == "HashGrid" and config["n_levels"] == 4 and config["log2_hashmap_size"] == 9
            self.params = torch.nn.Parameter(torch.zeros(2 * sum(counts)))

    monkeypatch.setattr(hash_grid, "_make_tcnn_encoding", lambda d, c: Encoding(d, c, torch.float32))
    assert grid._tcnn_encoding() is grid._tcnn_encoding(), "made once"
    assert list(grid.state_dict()) == ["table"], "and in no checkpoint"
    larger = HashGrid(3, levels=5, log2_table_size=9, base_resolution=4, growth=1.5, backend="tinycudann")
    larger.tcnn_config["n_levels"] = 4
    with pytest.raises(InputError, match="layout has changed"):
        larger._tcnn_encoding()


def test_a_table_of_tinycudann_opens_on_the_cpu() -> None:
    torch.manual_seed(0)
    trained = HashGrid(3, levels=3, log2_table_size=8, base_resolution=4, backend="tinycudann")
    twin = HashGrid(3, levels=3, log2_table_size=8, base_resolution=4, backend="torch")
    twin.load_state_dict(trained.state_dict())
    x = torch.rand(100, 3)
    torch.testing.assert_close(trained(x), twin(x), atol=1e-6, rtol=1e-4)
    field = DeformableField(DeformableFieldConfig(encoding_backend="tinycudann", keyframes=2, motion_resolutions=(2,)))
    assert field.density(x - 0.5, torch.ones(100, 1)).shape == (100,)


def test_a_run_s_configuration_names_the_layout_of_its_table() -> None:
    from sv4d_ns.plugin.datamanager import object_box
    from sv4d_ns.plugin.model import SV4DModelConfig

    metadata = {"num_frames": 2, "canonical_frame": 0, "num_views": 1}
    for encoding, layout in (("numba", HashEncoding), ("tinycudann", HashGrid)):
        model = SV4DModelConfig(encoding=encoding).setup(scene_box=object_box(), num_train_data=1, metadata=metadata)
        assert isinstance(model.field.encoding, layout)


@pytest.mark.parametrize(
    ("device", "installed", "chosen"),
    [("cuda", True, "tinycudann"), ("cuda", False, "numba"), ("cpu", True, "numba")],
)
def test_the_fast_kernels_are_taken_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, installed: bool, chosen: str
) -> None:
    monkeypatch.setattr("sv4d_ns.plugin.trainer.choose_device", lambda _: (device, ""))
    monkeypatch.setattr(hash_grid, "tinycudann_works", lambda: installed)
    config = tiny_config("sv4d", tmp_path)
    assert config.pipeline.model.encoding == "auto"
    config.set_timestamp()
    assert config.pipeline.model.encoding == chosen

    # a run that goes on from another has that one's table, whatever is here
    run = config.get_base_dir()
    run.mkdir(parents=True)
    (run / "config.yml").write_text(yaml.dump(config))
    monkeypatch.setattr("sv4d_ns.plugin.trainer.choose_device", lambda _: ("cuda", ""))
    monkeypatch.setattr(hash_grid, "tinycudann_works", lambda: chosen == "numba")
    following = tiny_config("sv4d", tmp_path / "following")
    following.load_dir = run / "nerfstudio_models"
    following.set_timestamp()
    assert following.pipeline.model.encoding == chosen


def test_without_tinycudann_its_back_end_says_what_to_do() -> None:
    if hash_grid.tinycudann_works():
        pytest.skip("tiny-cuda-nn is installed")
    with pytest.raises(InputError, match="needs tiny-cuda-nn"):
        HashGrid(3, levels=2, log2_table_size=8, backend="tinycudann")._tcnn_encoding()


def traverse(origins, directions, cells, box, near, far, step, cone):  # type: ignore[no-untyped-def]
    """nerfacc's rule for one grid and a fixed step, over all candidates: steps begin at `near`; those stay whose
    middle lies in an occupied cell, before `far` and not behind the camera."""
    assert cells.shape[0] == len(box) == 1 and cone == 0.0
    low, high = box[0, :3], box[0, 3:]
    middles = near[:, None] + (torch.arange(400) + 0.5) * step
    positions = origins[:, None] + middles[..., None] * directions[:, None]
    sides = torch.tensor(cells.shape[1:])
    index = ((positions - low) / (high - low) * sides).floor().long()
    inside = ((index >= 0) & (index < sides)).all(-1) & (middles >= 0) & (middles < far[:, None])
    i, j, k = torch.minimum(index.clamp(min=0), sides - 1).unbind(-1)
    rays, columns = (cells[0, i, j, k] & inside).nonzero(as_tuple=True)
    return None, SimpleNamespace(ray_indices=rays, vals=middles[rays, columns])


@pytest.mark.parametrize("more", [(), (torch.zeros(1),)], ids=["0.5.2 returns two values", "0.5.3 three"])
@pytest.mark.parametrize("bins", [1, 2, 5])
def test_one_traversal_sees_each_ray_s_own_moment(
    bins: int, more: tuple[torch.Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The grids of all moments beside each other, the rays moved to theirs: the samples of the torch march."""
    from nerfacc import grid

    monkeypatch.setattr(grid, "traverse_grids", lambda *given: (*traverse(*given), *more))
    torch.manual_seed(2)
    occupancy = OccupancyGrid(bins, resolution=12)
    occupancy.occupied.copy_(torch.rand(occupancy.occupied.shape) < 0.4)
    occupancy.density.uniform_(0, 60)
    origins = 2 * torch.nn.functional.normalize(torch.randn(200, 3), dim=-1)
    origins[:20] *= 0.2  # from inside the box
    directions = torch.nn.functional.normalize(torch.rand(200, 3) * 0.6 - 0.3 - origins, dim=-1)
    near, far = rendering.intersect_box(origins, directions, occupancy.half_extent)
    times = torch.rand(200)
    times[::2] = (times[::2] * (bins - 1)).round() / max(bins - 1, 1)  # half of them at a moment, half between two
    low, high = occupancy.bins_around(times)
    arguments = (occupancy, origins, directions, near, far, low, high, 0.015, torch.rand(200), 6)
    made, twin = rendering._march_nerfacc(*arguments), rendering._march_torch(*arguments)
    counts = [torch.bincount(samples.ray_indices, minlength=200) for samples in (made, twin)]
    equal = counts[0] == counts[1]  # a sample on a cell's face may fall to either side
    assert equal.float().mean() > 0.97 and counts[1].sum() > 2000
    kept = [equal[samples.ray_indices] for samples in (made, twin)]
    assert torch.equal(made.ray_indices[kept[0]], twin.ray_indices[kept[1]])
    torch.testing.assert_close(made.distances[kept[0]], twin.distances[kept[1]], atol=1e-5, rtol=0)


def test_pictures_wait_once_beside_nerfacc_s_own_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    from nerfacc import grid

    def on_card(origins, directions, cells, box, near, far, step, cone):  # type: ignore[no-untyped-def]
        count = len(origins)
        rays = torch.arange(count, device=origins.device)
        return None, SimpleNamespace(ray_indices=rays, vals=near + step)

    monkeypatch.setattr(grid, "traverse_grids", on_card)
    monkeypatch.setattr(rendering, "nerfacc_works", lambda: True)
    with Card() as card, torch.no_grad():
        occupancy = OccupancyGrid(3, resolution=4).to("cuda")
        origins = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.1]]).to("cuda")
        times = torch.tensor([[0.0], [0.7]]).to("cuda")
        card.counts.clear()
        samples = rendering.march(occupancy, origins, -origins / 2, times, 0.1, torch.full_like(times[:, 0], 0.5))
        assert dict(card.counts) == {"compactions": 1}, card.places
        assert len(samples.distances) == 2 and samples.distances.device.type == "cuda"
