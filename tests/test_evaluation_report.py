"""Cases, the world of a run against the world of its truth, the protocols, and `sv4d evaluate` from end to end."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from evaluation_fixture import FRAMES, RING, SIZE, ball_radius, centre, picture, write_case
from PIL import Image
from test_evaluation_metrics import random_lpips, saved_i3d, tiny_clip

from sv4d_ns.cli.main import main
from sv4d_ns.evaluation import backbones, candidates, command, geometry, protocols, scores
from sv4d_ns.evaluation.alignment import Alignment, Similarity, run_to_source, whole_picture
from sv4d_ns.evaluation.cases import Case, find_cases
from sv4d_ns.evaluation.report import _best
from sv4d_ns.geometry.cameras import ViewPlan, look_at_cameras
from sv4d_ns.metrics import lpips
from sv4d_ns.metrics.images import silhouette_iou
from sv4d_ns.utils.errors import InputError
from sv4d_ns.video.crop import Framing, fixed_framing
from sv4d_ns.video.stabilised import StabilisedFraming
from sv4d_ns.views.grid import ViewGrid


@pytest.fixture(scope="module")
def case_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_case(tmp_path_factory.mktemp("cases") / "ball")


@pytest.fixture(scope="module")
def case(case_folder: Path) -> Case:
    return Case.load(case_folder)


@pytest.fixture(scope="module")
def grid_folder(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The true views as a grid."""
    return case.grid(case.with_role("nv8"), SIZE).save(tmp_path_factory.mktemp("grids") / "true")


@pytest.fixture(scope="module")
def worse_folder(grid_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with one flickering view, and half the views."""
    grid = ViewGrid.load(grid_folder)
    views = grid.novel_views[:, ::2].copy()
    views[1::2, 1, ..., :3] //= 2
    plan = ViewPlan.ring(RING[::2])
    worse = replace(grid, novel_views=views, plan=plan)
    return worse.save(tmp_path_factory.mktemp("grids") / "worse")


# ---------------------------------------------------------------------------------------------------------------- cases


def test_a_case_is_read_as_its_cameras_say(case: Case) -> None:
    assert (case.num_frames, case.size, len(case.views)) == (FRAMES, SIZE, 11)
    assert [view.name for view in case.with_role("elev")] == ["az045_el+30"]
    frames = case.frames(case.with_role("elev")[0], SIZE)
    assert (frames[2] == picture(look_at_cameras(np.array([45.0]), np.array([30.0]))[0], 0.5)).all()
    truth = case.geometry()
    assert truth is not None and truth.points.shape == (3, 500, 3) and truth.frame_indices == (0, 2, 4)
    assert np.linalg.norm(truth.normals, axis=-1) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: d["views"][1]["frames"].pop(), "4 images for 5 times"),
        (lambda d: d["views"][1]["frames"].__setitem__(0, "../../secret.webp"), "outside the case"),
        (lambda d: d.pop("times"), "lacks or garbles"),
        (lambda d: d.update(h=20), "only square"),
        (lambda d: d["views"][0].update(roles=["nv8"]), "exactly one view"),
        (lambda d: d.update(times=[0.0, 0.5, 0.4, 0.7, 1.0]), "increasing times"),
        (lambda d: d["views"][1].update(c2w=[1, 2, 3]), "c2w"),
    ],
)
def test_bad_descriptions_are_one_sentence(case_folder: Path, tmp_path: Path, change, sentence: str) -> None:  # type: ignore[no-untyped-def]
    description = json.loads((case_folder / "cameras.json").read_text())
    change(description)
    (tmp_path / "cameras.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match=sentence):
        Case.load(tmp_path)


def test_a_case_with_other_cameras_than_its_angles_makes_no_grid(case: Case) -> None:
    view = case.with_role("nv8")[0]
    crooked = replace(view, azimuth_deg=view.azimuth_deg + 3)
    with pytest.raises(InputError, match="not those of their azimuths"):
        case.plan((crooked,))
    with pytest.raises(InputError, match="no view with the wanted role"):
        case.grid(case.with_role("nv4"), SIZE)


def test_cases_are_found_by_name(case_folder: Path, tmp_path: Path) -> None:
    assert find_cases(case_folder.parent) == [case_folder] == find_cases(case_folder, ("ball",))
    with pytest.raises(InputError, match="no case fox"):
        find_cases(case_folder.parent, ("fox",))
    with pytest.raises(InputError, match="holds no case"):
        find_cases(tmp_path)


# ------------------------------------------------------------------------------------------------------------ alignment


def test_similarities_compose_and_invert() -> None:
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    first = Similarity(1.7, rotation * np.sign(np.linalg.det(rotation)), rng.normal(size=3))
    second = Similarity(0.4, np.eye(3)[[1, 2, 0]], rng.normal(size=3))
    x = rng.normal(size=(5, 3))
    assert second.after(first).points(x) == pytest.approx(second.points(first.points(x)))
    assert first.inverse().points(first.points(x)) == pytest.approx(x)
    camera = look_at_cameras(np.array([30.0]), np.array([20.0]))[0]
    seen = (x - camera[:3, 3]) @ camera[:3, :3]
    moved = first.camera(camera)
    again = (first.points(x) - moved[:3, 3]) @ moved[:3, :3]
    assert again == pytest.approx(first.scale * seen), "a similarity changes no picture"


def test_a_run_of_the_whole_picture_has_the_world_of_its_source(case: Case) -> None:
    plan = ViewPlan.ring(RING)
    same = run_to_source(whole_picture(SIZE), plan, case.input_view.c2w, case.focal_px, case.radius)
    x = np.random.default_rng(0).normal(size=(4, 3))
    assert same.points(x) == pytest.approx(x, abs=1e-9)


@pytest.mark.parametrize("elevation", [0.0, 15.0])
def test_a_crop_is_undone_from_its_framing_alone(elevation: float) -> None:
    """Points on the plane through the run's origin appear in the source picture where the crop says they are."""
    source = look_at_cameras(np.array([0.0]), np.array([elevation]))[0]
    focal, size = 400.0, 256
    framing = Framing(center_x=100.0, center_y=150.0, side=90.0, source_width=size, source_height=size, size=64)
    plan = ViewPlan.ring((90.0,))
    moved = run_to_source(framing, plan, source, focal, 2.0)
    camera = plan.c2w()[0]
    crop_xy = np.array([[32.0, 32.0], [10.0, 50.0], [60.0, 5.0]])
    local = np.stack(
        [
            (crop_xy[:, 0] - 32) / plan.focal_px(64) * plan.radius,
            -(crop_xy[:, 1] - 32) / plan.focal_px(64) * plan.radius,
            np.full(3, -plan.radius),
        ],
        -1,
    )
    world = local @ camera[:3, :3].T + camera[:3, 3]
    seen = (moved.points(world) - source[:3, 3]) @ source[:3, :3]
    assert -seen[:, 2] == pytest.approx(2.0), "the plane stays at the source's distance"
    pixels = np.stack([size / 2 - focal * seen[:, 0] / seen[:, 2], size / 2 + focal * seen[:, 1] / seen[:, 2]], -1)
    assert pixels == pytest.approx(framing.to_source(crop_xy))


def test_views_of_a_framed_grid_are_brought_back_to_the_uncropped_cameras(case: Case) -> None:
    """A small, decentred ball is cropped as a run would crop it; its views uncrop to the truth."""
    alpha = np.stack([picture(case.input_view.c2w, t)[..., 3] for t in case.times])
    framing = fixed_framing(alpha, SIZE)
    to_source = run_to_source(framing, case.plan(case.with_role("nv8")), case.input_view.c2w, case.focal_px, 2.0)
    made = []
    for view in case.with_role("nv8"):
        shifted = to_source.camera(case.plan(case.with_role("nv8")).c2w()[0])  # the run's input camera in the source
        assert np.isfinite(shifted).all()
        camera = to_source.camera(view.c2w)  # what the run's camera at this angle sees, in the source's world
        made.append(np.stack([picture(camera, t) for t in case.times]))
    grid = ViewGrid(
        input_frames=framing.apply(case.frames(case.input_view, SIZE)),
        novel_views=np.stack(made, 1),
        plan=case.plan(case.with_role("nv8")),
        fps=10.0,
        framing=framing.to_dict(),
    )
    truth = np.stack([case.frames(view, SIZE) for view in case.with_role("nv8")], 1)
    back = candidates.uncropped(grid, case, SIZE)
    following = replace(grid, framing=StabilisedFraming((framing,) * FRAMES).to_dict())
    assert (candidates.uncropped(following, case, SIZE) == back).all()
    before = silhouette_iou(grid.novel_views[..., 3].reshape(-1, SIZE, SIZE), truth[..., 3].reshape(-1, SIZE, SIZE))
    after = silhouette_iou(back[..., 3].reshape(-1, SIZE, SIZE), truth[..., 3].reshape(-1, SIZE, SIZE))
    assert before.mean() < 0.8 < 0.95 < after.mean()


# ------------------------------------------------------------------------------------------------------------- evaluate


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> scores.Backbones:
    """Small random networks through the code of the real ones."""
    folder = tmp_path_factory.mktemp("networks")
    i3d = saved_i3d(folder / "i3d.pt")
    return scores.Backbones(
        lpips={"alex": random_lpips("alex")},
        clip=backbones.open_clip(tiny_clip(folder / "clip"), "CLIP tiny", "test"),
        videos=[backbones.load_i3d(i3d, lpips.sha256(i3d)), backbones.RandomVideoFeatures()],
    )


def test_two_grids_are_compared_with_every_network(
    grid_folder: Path,
    worse_folder: Path,
    case_folder: Path,
    networks: scores.Backbones,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "load_backbones", lambda *_: networks)
    arguments = [str(grid_folder), str(worse_folder), "--truth", str(case_folder), "--out", str(tmp_path)]
    assert main(["evaluate", *arguments]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    first, second = report["candidates"]
    perfect = {name: first["summary"][name]["value"] for name in first["summary"]}
    assert perfect["psnr"] == 100.0 and perfect["ssim"] == pytest.approx(1.0, abs=1e-4) and perfect["iou"] == 1.0
    assert perfect["lpips_alex"] == pytest.approx(0.0, abs=1e-6) and perfect["clip_s"] == pytest.approx(1.0)
    assert perfect["flicker"] == pytest.approx(perfect["flicker_truth"])
    for order in ("f", "v", "diag", "4d"):
        assert perfect[f"rfd_{order}"] == pytest.approx(0.0, abs=1e-9)
    # 5 frames are too few for I3D along time, 9 views too few across; all 45 in one video are enough
    assert perfect["fvd_4d"] == pytest.approx(0.0, abs=1e-9) and "fvd_f" not in perfect
    assert "shorter than the 10 images" in report["left_out"]["fvd_f"]
    assert second["summary"]["psnr"]["value"] < 99 and second["summary"]["rfd_f"]["value"] > 1e-4
    assert "one video a side" in second["summary"]["fvd_4d"]["note"]
    assert "tiny sample" in second["summary"]["rfd_f"]["note"]
    assert first["objects"][0]["views_of_the_truth_it_lacks"] == ["az045_el+30"]
    assert len(second["objects"][0]["views"]) == 5
    # paired over the five views both have: only one of them is worse
    assert report["difference"]["psnr"]["units"] == 5 and report["difference"]["psnr"]["value"] < 0
    figures = np.array(second["objects"][0]["figures"]["psnr"])
    assert figures.shape == (FRAMES, 5) and (figures[1::2, 1] < 60).all() and (figures[::2] == 100).all()
    assert report["truth"][0]["geometry"] == lpips.sha256(case_folder / "geometry.npz")
    assert {"package", "torch", "python"} <= report["code"].keys() and report["settings"]["protocol"] == "benchmark"
    assert any("i3d.pt" in network["files"] for network in report["networks"])
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"(?:src|href)=['\"](?!data:|#)", page), "the page needs nothing but itself"
    assert page.count("data:image/png") == 5 and page.count("<svg") >= 3 and "FV4D" in page
    assert "Left out" in page and "psnr" in capsys.readouterr().out


def test_without_networks_and_truth_the_remaining_metrics_are_given(
    worse_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nothing(*_: object) -> None:
        raise lpips.BackboneMissing("NETWORK is not here: give --fetch.")

    for module, name in ((lpips, "load_lpips"), (backbones, "load_clip"), (backbones, "load_i3d")):
        monkeypatch.setattr(module, name, nothing)
    assert main(["evaluate", str(worse_folder), "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["candidates"][0]["summary"]) == {"flicker", "hull"}
    assert {"lpips_alex", "lpips_vgg"} <= report["left_out"].keys()
    per_view = np.array(report["candidates"][0]["objects"][0]["figures"]["flicker"])[0]
    assert per_view[1] > 3 * np.delete(per_view, 1).max(), "the view that flickers"
    assert "NETWORK is not here" in capsys.readouterr().out
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize("travel", [0.0, 2.0], ids=["fixed crop", "crop that follows"])
def test_a_run_is_judged_in_pictures_surface_and_tracks(
    case: Case, monkeypatch: pytest.MonkeyPatch, travel: float
) -> None:
    """A run whose field is the true ball, in a world that its framing says is scaled and shifted, evenly or not."""
    plan = case.plan(case.with_role("nv8"))
    squares = [
        Framing(center_x=22.0 + travel * t, center_y=20.0, side=34.0, source_width=SIZE, source_height=SIZE, size=SIZE)
        for t in case.times
    ]
    framing = StabilisedFraming(tuple(squares)) if travel else squares[0]
    first, last = (
        run_to_source(square, plan, case.input_view.c2w, case.focal_px, case.radius)
        for square in (squares[0], squares[-1])
    )
    to_source = Alignment((first, last))
    origin, way = (torch.from_numpy(x).float() for x in (first.translation, last.translation - first.translation))

    class TrueBall:
        aabb = torch.tensor([[-0.57] * 3, [0.57] * 3])

        def in_ball(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            """Source coordinates in the ball at time 0."""
            source = first.scale * x + origin + t * way
            middle = t * torch.from_numpy(centre(1.0)).float()
            return (source - middle) * (ball_radius(0.0) / (0.3 + 0.06 * t))

        def deformation(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return (self.in_ball(x, t) - origin) / first.scale - x

        def density(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return 150 * torch.sigmoid((ball_radius(0.0) - self.in_ball(x, t).norm(dim=-1)) / 0.001)

    class Occupied:
        def is_occupied(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return torch.ones(len(x), dtype=torch.bool)

    assert first.rotation == pytest.approx(np.eye(3)) and last.scale == pytest.approx(first.scale)
    grid = SimpleNamespace(
        plan=plan, framing=framing.to_dict(), times=case.times, content_id="0", provenance={}, num_frames=FRAMES,
        input_frames=np.concatenate([
            square.apply(frame[None])
            for square, frame in zip(squares, case.frames(case.input_view, SIZE), strict=True)
        ]),
    )  # fmt: skip
    run = SimpleNamespace(field=TrueBall(), occupancy=Occupied(), views=grid, name="run")
    monkeypatch.setattr("sv4d_ns.runs.open.load_run", lambda path: run)
    monkeypatch.setattr(candidates, "_run_facts", lambda folder: {})

    def exact(field, occupancy, c2w, focal, size, time):  # type: ignore[no-untyped-def]
        assert focal == pytest.approx(case.focal_px)
        return picture(to_source.at(time).camera(c2w), time, size)

    monkeypatch.setattr("sv4d_ns.field.images.render_rgba", exact)
    opened = candidates.open_candidate(candidates.Candidate(Path("x"), "run"), case, None, lambda done, total: None)
    # the run's cameras, brought to the source, are the truth's
    assert (opened.pictures.made == opened.pictures.truth).mean() > 0.999
    truth = case.geometry()
    assert truth is not None
    figures = geometry.evaluate_geometry(run.field, run.occupancy, truth, case.times, to_source, resolution=64)  # type: ignore[arg-type]
    assert figures["track"] < 2e-3 < 0.05 < figures["track_if_static"]
    assert figures["completeness"] < 0.01 and figures["chamfer"] < 2 * figures["chamfer_floor"]
    assert figures["normal_consistency"] > 0.95 and len(figures["per_frame"]) == 3


def test_a_run_of_another_film_is_not_judged(grid_folder: Path, case: Case, tmp_path: Path) -> None:
    """Cases share their size: a figure came out for a wolf's truth beside a creature's run."""
    grid = ViewGrid.load(grid_folder)
    assert candidates.alignment_to(grid, case).frames
    alpha = grid.input_frames.copy()
    alpha[..., 3] = 0
    alpha[:, 2:-2, SIZE // 2 : SIZE // 2 + 3, 3] = 255
    other = replace(grid, input_frames=alpha)
    with pytest.raises(InputError, match="evaluate against its own case"):
        candidates.alignment_to(other, case)
    with pytest.raises(InputError, match="evaluate against its own case"):
        candidates._open_grid(other.save(tmp_path / "views"), case, None)


def test_the_better_side_is_the_one_that_is_better_where_both_have_pictures() -> None:
    def estimate(value: float, units: int) -> dict[str, object]:
        return {"value": value, "units": units}

    pair = [estimate(0.127, 13), estimate(0.114, 2)]
    assert _best(pair, estimate(0.006, 2), "lpips_alex") == 0
    assert _best(pair, None, "lpips_alex") is None
    assert _best([estimate(20.0, 5), estimate(21.0, 5)], None, "psnr") == 1


def with_cameras_of_its_own(case: Case) -> Case:
    """As many views, elsewhere."""
    first, *others = case.views
    return replace(case, views=(first, *(replace(view, azimuth_deg=view.azimuth_deg + 30) for view in others)))


def test_consistent4d_pictures_are_read_in_its_layout(tmp_path: Path, networks: scores.Backbones) -> None:
    truth, made = tmp_path / "gt" / "rose", tmp_path / "pred" / "rose"
    for number, azimuth in enumerate(protocols.CONSISTENT4D_AZIMUTHS):
        camera = look_at_cameras(np.array([azimuth]), np.zeros(1))[0]
        for frame in range(11):  # 10.png must come after 9.png
            for folder, size in ((truth, 40), (made, 20)):
                path = folder / f"eval_{number}" / f"{frame}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture(camera, frame / 10, size)).save(path)
    protocol = protocols.PROTOCOLS["consistent4d"]
    [object_] = protocols.load_truth(tmp_path / "gt", protocol)
    found = candidates.find_candidate(tmp_path / "pred", object_.name)
    opened = candidates.open_candidate(found, object_, 32, lambda done, total: None)
    assert opened.pictures.made.shape == (11, 4, 32, 32, 4) == opened.pictures.truth.shape  # type: ignore[union-attr]
    figures = scores.picture_figures(opened.pictures, scores.Backbones())
    assert figures["psnr"].min() > 20 and figures["iou"].min() > 0.9
    video = scores.video_figures([opened.pictures], networks, protocol)
    assert video["fvd_f"].units == 4 and "one video a side at a time" in video["fvd_f"].note
    with pytest.raises(InputError, match="judge them with --protocol consistent4d"):
        candidates.open_candidate(found, with_cameras_of_its_own(object_), 32, lambda done, total: None)
    shutil.rmtree(made / "eval_3")
    with pytest.raises(InputError, match="eval_3"):
        candidates.open_candidate(found, object_, 32, lambda done, total: None)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{nowhere}"], "does not exist"),
        (["{grid}", "{grid}", "{grid}"], "one or two"),
        (["{grid}", "--size", "4"], "--size is 4: give 16"),
        (["{empty}"], "neither a run"),
        (["{grid}", "--truth", "{empty}"], "holds no case"),
        (["{grid}", "--truth", "{empty}", "--protocol", "consistent4d"], "no object of Consistent4D's layout"),
    ],
)
def test_what_cannot_be_judged_is_one_sentence_and_writes_nothing(
    arguments: list[str], sentence: str, grid_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"grid": grid_folder, "empty": tmp_path / "empty", "nowhere": tmp_path / "nowhere"}
    with pytest.raises(SystemExit, match=sentence):
        main(["evaluate", *(word.format(**places) for word in arguments), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
