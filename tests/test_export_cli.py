"""`ns-export` and `sv4d`: the superset of nerfstudio's commands, one-sentence errors, and a run on disk exported."""

import copy
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
import tyro
import yaml
from export_reader import read_glb

from sv4d_ns.cli.main import main
from sv4d_ns.export import command as cli
from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.views.grid import ViewGrid

FRAMES, FPS, RADIUS, SHIFT = 4, 12.0, 0.3, 0.12


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def refused(capsys, arguments: list[str]) -> str:
    """The single line on stderr of a command that must fail."""
    with pytest.raises(SystemExit) as stop:
        main(["export", *arguments])
    assert isinstance(stop.value.code, str), "sys.exit prints it and exits with code 1"
    assert "\n" not in stop.value.code
    return stop.value.code


# ------------------------------------------------------------------------------------------------- without a run


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_help_is_quick_and_imports_nothing_heavy(word):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_python(
        f"import sys; from sv4d_ns.cli.main import main; code = main(['{word}'])\n"
        "heavy = {'torch', 'nerfstudio', 'numpy', 'tyro'} & set(sys.modules)\n"
        "assert not heavy, heavy\nsys.exit(code)"
    )
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5  # seconds of processor time
    assert ("ns-train sv4d" if word == "--help" else "sv4d_ns 0.") in done.stdout


def test_help_of_mesh_explains_every_flag_without_torch():
    flags = (
        "--load-config --output-dir --overwrite --resolution --max-faces --faces --texture --texture-size --fps "
        "--root-motion --mode --animation --max-bones --watertight --usd --sequence"
    )
    done = run_python(
        "import sys; sys.argv = ['ns-export', 'mesh', '--help']\nfrom sv4d_ns.export.command import entrypoint\n"
        "try:\n    entrypoint()\nfinally:\n    assert 'torch' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr
    for flag in flags.split():
        assert flag in done.stdout


def test_unknown_command_is_named(capsys):
    assert main(["fly"]) == 2
    assert "no command 'fly'" in capsys.readouterr().err


def test_missing_config_and_bad_folder_stop_before_anything_is_loaded(capsys, tmp_path):
    missing = ["mesh", "--load-config", str(tmp_path / "no.yml"), "--output-dir", str(tmp_path / "out" / "deep")]
    assert "no.yml does not exist" in refused(capsys, missing)
    (tmp_path / "config.yml").touch()
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "below", Path("/proc/sv4d")):
        sentence = refused(capsys, ["mesh", "--load-config", str(tmp_path / "config.yml"), "--output-dir", str(folder)])
        assert re.search("--output-dir .* cannot be written to", sentence)
    new = ["--load-config", str(tmp_path / "config.yml"), "--output-dir", str(tmp_path / "new")]
    for command, flag, value in (
        ("mesh", "--fps", "0"),
        ("mesh", "--max-faces", "99"),
        ("mesh", "--faces", "0"),
        ("mesh", "--resolution", "4"),
        ("mesh", "--texture-size", "3"),
        ("mesh", "--max-bones", "0"),
        ("point-cloud-sequence", "--num-points", "0"),
        ("splats", "--num-splats", "-5"),
    ):
        said = "--max-faces" if flag == "--faces" else flag
        assert f"{said} {value} " in refused(capsys, [command, *new, flag, value])
    assert {path.name for path in tmp_path.iterdir()} == {"config.yml", "file"}


def test_a_folder_with_files_is_not_written_to_unasked(capsys, tmp_path):
    (tmp_path / "config.yml").write_text("just: text")
    (tmp_path / "mine.txt").touch()
    arguments = ["mesh", "--load-config", str(tmp_path / "config.yml"), "--output-dir", str(tmp_path)]
    sentence = refused(capsys, arguments)
    assert f"--output-dir {tmp_path} exists and has files in it" in sentence and "--overwrite" in sentence
    assert "is not a nerfstudio config" in refused(capsys, [*arguments, "--overwrite"])  # one step further
    (tmp_path / "empty").mkdir()
    arguments[-1] = str(tmp_path / "empty")
    assert "is not a nerfstudio config" in refused(capsys, arguments)
    assert (tmp_path / "empty").is_dir()


@pytest.mark.parametrize(
    ("script", "command"),
    [
        ("from sv4d_ns.export.command import entrypoint", "ns-export"),
        ("from nerfstudio.scripts.exporter import entrypoint", "sv4d export"),
        (None, "sv4d export"),
    ],
)
def test_the_advised_command_is_the_one_that_works(script, command, tmp_path, monkeypatch):
    if script is not None:
        (tmp_path / "ns-export").write_text(f"#!/usr/bin/python\n{script}\n")
        (tmp_path / "ns-export").chmod(0o755)
    monkeypatch.setattr(cli.sysconfig, "get_path", lambda name: str(tmp_path))
    assert cli.installed_command() == command


# ------------------------------------------------------------------------------------- nerfstudio's own commands


def test_every_command_of_nerfstudio_keeps_its_name_and_flags(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yml").touch()
    union = cli.commands()
    from nerfstudio.scripts import exporter

    cases = {
        "pointcloud": (exporter.ExportPointCloud, ["--num-points", "5", "--remove-outliers", "False"]),
        "tsdf": (exporter.ExportTSDFMesh, ["--resolution", "16"]),
        "poisson": (exporter.ExportPoissonMesh, ["--normal-method", "open3d"]),
        "marching-cubes": (exporter.ExportMarchingCubesMesh, ["--isosurface-threshold", "0.1"]),
        "cameras": (exporter.ExportCameraPoses, []),
        "gaussian-splat": (exporter.ExportGaussianSplat, []),
        "mesh": (cli.ExportMesh, ["--max-faces", "None"]),
        "point-cloud-sequence": (cli.ExportPointCloudSequence, ["--num-points", "7"]),
        "splats": (cli.ExportSplats, ["--refine", "never"]),
        "web": (cli.ExportWeb, ["--texture", "views"]),
    }
    for name, (kind, flags) in cases.items():
        arguments = [name, "--load-config", "c.yml", "--output-dir", "o", *flags]
        command = tyro.cli(union, args=arguments, config=(tyro.conf.FlagConversionOff,))
        assert type(command) is kind
    theirs = {re.search(r"name='([^']+)'", str(member)).group(1) for member in members_of(exporter.Commands)}
    assert theirs | set(cli.COMMANDS) == set(cases), "nerfstudio has commands this test does not know"
    called = []
    monkeypatch.setattr(exporter.ExportCameraPoses, "main", lambda self: called.append(self.output_dir))
    assert main(["export", "cameras", "--load-config", "c.yml", "--output-dir", "o"]) == 0
    assert called == [Path("o")]


def members_of(commands) -> tuple:
    from typing import get_args

    return get_args(get_args(commands)[0])


def test_missing_exporters_of_nerfstudio_are_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "nerfstudio.scripts.exporter", None)
    monkeypatch.delattr("nerfstudio.scripts.exporter", raising=False)
    assert "mesh, point-cloud-sequence, splats, web work without" in refused(capsys, ["cameras", "--help"])


# --------------------------------------------------------------------------------------------------- a run on disk


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    from sv4d_ns.export import make

    monkeypatch.setattr(make, "FIELD_PICTURE_SIZE", 64)


def fit_moving_ball(field) -> None:
    """Teach the field a red ball at rest that is displaced by SHIFT along +y at the last frame's time."""
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(field.parameters(), lr=5e-3)
    for _ in range(250):
        canonical, moving, t = torch.rand(4096, 3) * 1.14 - 0.57, torch.rand(512, 3) * 1.14 - 0.57, torch.rand(512, 1)
        inside = (canonical.norm(dim=-1) < RADIUS).float()
        logit, geometry = field._canonical(canonical)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logit, inside)
        red = torch.tensor([0.8, 0.2, 0.1])
        loss = loss + ((torch.sigmoid(field.color_head(geometry)) - red) * inside[:, None]).square().mean()
        back = torch.tensor([0.0, -SHIFT, 0.0]) * (t > 1 / 6)
        loss = loss + 100 * (field.deformation(moving, t) - back).square().mean() * (t > 0.3).float().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


PICTURE = 64


def ball_picture(plan: ViewPlan, right: float, grown: float = 0.0) -> np.ndarray:
    """uint8 RGBA [s, s, 4] of the ball so far to the right of the middle, `grown` pixels too large; its edge's alpha is
    its coverage."""
    focal, centres = plan.focal_px(PICTURE), np.arange(PICTURE) + 0.5 - PICTURE / 2
    away = np.hypot(centres[None] - focal * right / plan.radius, centres[:, None])
    radius = focal * RADIUS / np.sqrt(plan.radius**2 - RADIUS**2)
    picture = np.zeros((PICTURE, PICTURE, 4), np.uint8)
    picture[..., :3] = [204, 51, 26]
    picture[..., 3] = np.round(255 * np.clip(radius + grown - away + 0.5, 0, 1))
    return picture


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    """A run folder as ns-train leaves it, with a fitted ball instead of a trained video; returns its config.yml."""
    from nerfstudio.configs.method_configs import all_methods

    run = tmp_path_factory.mktemp("outputs") / "ball" / "sv4d" / "now"
    plan = ViewPlan.ring((90.0,))
    # the first frame shows most of the object, so that it is the canonical one, at rest
    pictures = np.stack([ball_picture(plan, SHIFT * (frame > 0), 0.2 * (frame == 0)) for frame in range(FRAMES)])
    sideways = np.stack([ball_picture(plan, 0.0)] * FRAMES)
    square = {"side": 300.0, "source_width": 640, "source_height": 360, "size": PICTURE}
    framing = {"center_x": [200.0, 220.0, 240.0, 260.0], "center_y": [180.0] * FRAMES, **square}
    provenance = {"source": "ball.mp4", "model": "sv4d_ns bundled"}
    framing["side"] = [300.0] * FRAMES
    grid = ViewGrid(pictures, sideways[:, None], plan, FPS, framing=framing, provenance=provenance)
    grid.save(run / "views")
    config = copy.deepcopy(all_methods["sv4d"])  # tests share it
    config.output_dir, config.experiment_name, config.timestamp = run.parents[2], "ball", "now"
    config.pipeline.datamanager.run_dir = run
    (run / "config.yml").write_text(yaml.dump(config))
    pipeline = config.pipeline.setup(device="cpu", test_mode="inference")
    fit_moving_ball(pipeline.model.field)
    pipeline.model.occupancy.density.zero_()
    for moment in range(FRAMES):  # what a trained run knows: where it is empty
        pipeline.model.occupancy.update(pipeline.model.field, moment)
    checkpoints = run / "nerfstudio_models"
    checkpoints.mkdir()
    torch.save({"step": 7, "pipeline": pipeline.state_dict()}, checkpoints / "step-000000007.ckpt")
    return run / "config.yml"


COARSE = ["--resolution", "48", "--max-faces", "1500"]
QUICK = [*COARSE, "--texture-size", "128"]


def test_a_run_becomes_a_playing_file(finished_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [
        "ns-export", "mesh", "--load-config", str(finished_run), "--output-dir", str(tmp_path / "asset"),
        *QUICK, "--sequence", "ply",
    ])  # fmt: skip
    cli.entrypoint()
    glb = tmp_path / "asset" / "mesh.glb"
    raw = read_glb(glb)
    seconds, positions = raw.posed("POSITION")
    np.testing.assert_allclose(seconds, np.arange(FRAMES) / FPS, atol=1e-6)
    # world y is glTF x; the ball has its radius and moves by SHIFT
    extent = np.ptp(positions[0], axis=0)
    np.testing.assert_allclose(extent, 2 * RADIUS, atol=0.06)
    moved = (positions[-1] - positions[0]).mean(axis=0)
    np.testing.assert_allclose(moved, [SHIFT, 0, 0], atol=0.02)
    extras = raw.json["asset"]["extras"]["sv4d"]
    assert extras["provenance"]["source"] == "ball.mp4"
    assert extras["licences"]["novel views"] == "sv4d_ns bundled, Apache-2.0"
    assert extras["confidence"] == {"1": "seen by the input camera", "0.5": "by generated views only", "0": "by none"}
    offsets, scales = raw.texture_moves()
    side = len(raw.image())
    assert len(offsets) == FRAMES and (scales == 0.5).all() and side == 64 * np.ceil(np.sqrt(FRAMES + 4))
    cells = [raw.image()[:128, :128], *(raw.image()[y : y + 64, x : x + 64] for x, y in (offsets * side).astype(int))]
    for picture in cells:
        np.testing.assert_allclose(np.median(picture.reshape(-1, 3), axis=0), [204, 51, 26], atol=20)
    color = np.median(trimesh.load(tmp_path / "asset" / "frames_ply" / "frame_0000.ply").visual.vertex_colors, axis=0)
    np.testing.assert_allclose(color[:3], [204, 51, 26], atol=20)
    assert len(list((tmp_path / "asset" / "frames_ply").iterdir())) == FRAMES
    said = capsys.readouterr().out
    assert "residual of the inverse deformation: mean" in said and "observed" in said
    assert str(glb) in said and "frames_ply" in said and "Blender" in said
    # the input camera stands on +x: what faces it is observed, what only the camera at 90 degrees sees is generated
    front, side = raw.attribute("NORMAL")[:, 2] > 0.7, raw.attribute("NORMAL")[:, 0] > 0.9
    sure = raw.attribute("_CONFIDENCE")[:, 0]
    assert np.median(sure[front]) == 1 and np.median(sure[side]) == 0.5
    assert np.median(sure[raw.attribute("NORMAL")[:, 0] < -0.9]) == 0


def test_flags_and_a_run_opened_from_elsewhere(finished_run, tmp_path, monkeypatch, capsys):
    import shutil

    moved = tmp_path / "brought"
    shutil.copytree(finished_run.parent, moved)
    text = (moved / "config.yml").read_text().replace(str(finished_run.parents[3].name), "gone")
    (moved / "config.yml").write_text(text)
    arguments = ["mesh", "--load-config", str(moved / "config.yml"), "--output-dir", str(tmp_path / "asset"), *QUICK]
    flags = ["--fps", "5", "--texture", "none", "--animation", "skin", "--root-motion", "restore", "--usd", "usdz"]
    assert main(["export", *arguments, *flags, "--watertight"]) == 0
    raw = read_glb(tmp_path / "asset" / "mesh.glb")
    seconds, positions = raw.skinned()
    np.testing.assert_allclose(seconds, np.arange(FRAMES) / 5, atol=1e-6)
    assert "COLOR_0" in raw.primitive["attributes"]
    # the crop went 60 source pixels to the right, at a focal length of 300 pixels' worth of field of view
    way = 60 / ViewPlan.ring((90.0,)).focal_px(300) * 2.0
    np.testing.assert_allclose((positions[-1] - positions[0]).mean(axis=0), [SHIFT + way, 0, 0], atol=0.02)
    assert trimesh.Trimesh(positions[0], raw.accessor(raw.primitive["indices"]).reshape(-1, 3)).is_watertight
    assert {path.name for path in (tmp_path / "asset").iterdir()} == {"mesh.glb", "mesh.usdz"}
    said = capsys.readouterr().out
    assert "bones" in said and "root mean square error" in said
    assert main(["export", "web", *arguments[1:], "--overwrite"]) == 0
    assert (tmp_path / "asset" / "index.html").stat().st_size > 50_000


def test_other_forms_of_the_run(finished_run, tmp_path, capsys):
    def export(name: str, *flags: str) -> Path:
        out = tmp_path / name / "-".join(flags).strip("-")
        run = ["--load-config", str(finished_run), "--output-dir", str(out), *COARSE, "--texture", "none"]
        assert main(["export", name, *run, *flags]) == 0
        return out

    def sequence(*flags: str) -> list[trimesh.Trimesh]:
        folder = export("mesh", "--mode", "sequence", *flags) / "frames_ply"
        return [trimesh.load(frame) for frame in sorted(folder.iterdir())]

    centres = [mesh.vertices.mean(axis=0) for mesh in sequence()]
    np.testing.assert_allclose(centres[-1] - centres[0], [SHIFT, 0, 0], atol=0.03)
    tall = np.array([mesh.bounds[:, 1] for mesh in sequence("--height", "2")])
    assert tall.min() == pytest.approx(0, abs=1e-5) and np.ptp(tall, axis=1).max() == pytest.approx(2, abs=1e-5)
    clouds = sorted((export("point-cloud-sequence", "--num-points", "300") / "points").iterdir())
    assert len(clouds) == FRAMES and len(trimesh.load(clouds[2]).vertices) == 300
    splats = sorted((export("splats", "--num-splats", "300") / "splats").iterdir())
    assert len(splats) == FRAMES and b"property float f_dc_0" in splats[0].read_bytes()
    assert "need" in capsys.readouterr().out  # refinement asks for a CUDA device


@pytest.mark.parametrize(
    "flags", [("--animation", "skin"), ("--texture-size", "512"), ("--texture", "film"), ("--remesh", "quad")]
)
def test_frames_with_meshes_of_their_own_refuse_what_only_one_mesh_can_have(finished_run, tmp_path, capsys, flags):
    arguments = [
        "mesh",
        "--load-config",
        str(finished_run),
        "--output-dir",
        str(tmp_path / "new"),
        "--mode",
        "sequence",
    ]
    sentence = refused(capsys, [*arguments, *flags])
    assert flags[0] in sentence and "--mode sequence" in sentence and not (tmp_path / "new").exists()


def test_a_config_without_its_run_is_said(finished_run, tmp_path, capsys):
    alone = tmp_path / "config.yml"
    alone.write_text(finished_run.read_text().replace(str(finished_run.parents[3].name), "gone"))
    sentence = refused(capsys, ["mesh", "--load-config", str(alone), "--output-dir", str(tmp_path / "new")])
    assert "was moved without its run" in sentence and "gone" in sentence and "views/" in sentence


def other_config(name: str, path: Path) -> Path:
    from nerfstudio.configs.method_configs import all_methods

    path.write_text(yaml.dump(all_methods[name]))
    return path


def test_other_runs_are_refused_by_name_and_leave_nothing(finished_run, tmp_path, capsys):
    out = ["--output-dir", str(tmp_path / "new" / "folder")]
    nerfacto = other_config("nerfacto", tmp_path / "nerfacto.yml")
    assert "a run of nerfacto, which has no deformable field" in refused(
        capsys, ["mesh", "--load-config", str(nerfacto), *out]
    )
    (tmp_path / "text.yml").write_text("just: text")
    assert "text.yml is not a nerfstudio config.yml" in refused(
        capsys, ["mesh", "--load-config", str(tmp_path / "text.yml"), *out]
    )
    unfinished = tmp_path / "unfinished" / "config.yml"
    unfinished.parent.mkdir()
    unfinished.write_text(finished_run.read_text().replace("timestamp: now", "timestamp: never"))
    (unfinished.parent / "nerfstudio_models").mkdir()
    assert "unfinished run" in refused(capsys, ["mesh", "--load-config", str(unfinished), *out])
    assert not (tmp_path / "new").exists()


def test_an_empty_field_is_said_and_leaves_nothing(finished_run, tmp_path, capsys):
    import shutil

    empty = tmp_path / "empty"
    shutil.copytree(finished_run.parent, empty)
    checkpoint = next((empty / "nerfstudio_models").iterdir())
    state = torch.load(checkpoint)
    for name, value in state["pipeline"].items():
        if "density_head" in name or "encoding" in name:
            value.zero_()
    torch.save(state, checkpoint)
    (empty / "config.yml").write_text((empty / "config.yml").read_text().replace(finished_run.parents[3].name, "gone"))
    out = tmp_path / "out"
    arguments = ["mesh", "--load-config", str(empty / "config.yml"), "--output-dir", str(out), "--resolution", "32"]
    assert "the field is empty" in refused(capsys, arguments)
    assert not out.exists()
