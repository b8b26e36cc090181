"""How a command finds its run again, and who may work in a run's folder."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from sv4d_ns.runs.layout import (
    RUN_FILE,
    STAGE_2,
    SUMMARY_FILE,
    checkpoint_steps,
    claim_run,
    fingerprint,
    keep_stage,
    record_run,
    recorded_rounds,
    release_run,
    stage_folder,
)
from sv4d_ns.utils.errors import InputError


@dataclass
class Inner:
    rate: float = 0.1
    levels: tuple[int, ...] = (1, 2)
    run_dir: Path | None = None


@dataclass
class Settings:
    inner: Inner = field(default_factory=Inner)
    kinds: dict[str, type] = field(default_factory=lambda: {"a": Inner})
    data: Path | None = None


def test_the_fingerprint_follows_what_decides_the_result(tmp_path: Path) -> None:
    video, copy, other = tmp_path / "a.mp4", tmp_path / "sub" / "a.mp4", tmp_path / "b.mp4"
    copy.parent.mkdir()
    for path, content in ((video, b"same"), (copy, b"same"), (other, b"else")):
        path.write_bytes(content)
    base = fingerprint(Settings(), video)
    assert base == fingerprint(Settings(), copy), "where the file lies does not matter"
    assert base == fingerprint(Settings(inner=Inner(run_dir=tmp_path), data=copy), video)
    assert base != fingerprint(Settings(), other)
    assert base != fingerprint(Settings(inner=Inner(rate=0.2)), video)
    assert base != fingerprint(Settings(inner=Inner(levels=(1,))), video)
    assert base != fingerprint(Settings(), video, other)


@pytest.mark.parametrize("kind", ["folder", "pattern"])
def test_the_fingerprint_follows_every_picture(tmp_path: Path, kind: str) -> None:
    (tmp_path / "shots").mkdir()
    for index in range(3):
        (tmp_path / "shots" / f"{index}.png").write_bytes(bytes([index]))
    path = tmp_path / "shots" if kind == "folder" else tmp_path / "shots" / "*.png"
    before = fingerprint(None, path)
    assert before == fingerprint(None, path)
    for name in (".DS_Store", "._1.png", "Thumbs.db"):
        (tmp_path / "shots" / name).write_bytes(b"of the file manager")
    assert fingerprint(None, path) == before, "no pictures"
    (tmp_path / "shots" / "1.png").write_bytes(b"changed")
    assert fingerprint(None, path) != before


def test_the_fingerprint_follows_every_file_of_a_view_grid(tmp_path: Path) -> None:
    from tiny_run import tiny_grid

    folder = tiny_grid().save(tmp_path / "grid")
    known = {fingerprint(None, folder)}
    for name in ("grid.json", "transforms.json", "images/view00_frame0000.png"):
        (folder / name).write_bytes(b"changed")
        known.add(fingerprint(None, folder))
    assert len(known) == 4


def test_the_fingerprint_is_the_same_in_another_process(tmp_path: Path) -> None:
    from sv4d_ns.method_configs.sv4d import method

    pipeline = method.config.pipeline
    code = (
        "from sv4d_ns.method_configs.sv4d import method; from sv4d_ns.runs.layout import fingerprint; "
        "print(fingerprint(method.config.pipeline))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip().splitlines()[-1] == fingerprint(pipeline)


def test_a_run_is_found_by_its_fingerprint(tmp_path: Path) -> None:
    assert claim_run(tmp_path, "monday", "x") == ("monday", "")
    record_run(tmp_path / "monday", "x")
    name, sentence = claim_run(tmp_path, "tuesday", "x")
    assert name == "monday" and sentence.startswith("Continuing the unfinished run")
    (tmp_path / "monday" / SUMMARY_FILE).write_text("{}")
    name, sentence = claim_run(tmp_path, "tuesday", "x")
    assert name == "monday" and "finished: nothing is made again" in sentence
    assert claim_run(tmp_path, "tuesday", "y") == ("tuesday", ""), "other settings"
    assert claim_run(tmp_path, "tuesday", None) == ("tuesday", "")
    assert claim_run(tmp_path, "monday", "y") == ("monday-2", ""), "two commands of the same second"
    (tmp_path / "monday" / RUN_FILE).write_text("half a fi")
    assert claim_run(tmp_path, "tuesday", "x") == ("tuesday", ""), "a damaged record is nobody's run"
    release_run(tmp_path / "monday")


def test_when_views_are_refined_is_written_down(tmp_path: Path) -> None:
    assert recorded_rounds(tmp_path / "nothing") is None
    record_run(tmp_path / "monday", "x", (2304,))
    record_run(tmp_path / "tuesday", "x")
    assert recorded_rounds(tmp_path / "monday") == (2304,) and recorded_rounds(tmp_path / "tuesday") is None


def test_stage_1_is_what_stage_2_does_not_decide() -> None:
    from sv4d_ns.method_configs.sv4d import method

    def key(without: frozenset[str] = frozenset(), **changes: object) -> str:
        return fingerprint(replace(method.config.pipeline, **changes), without=without)  # type: ignore[type-var]

    assert key(refine_strength=0.1) != key() != key(refine_steps=())
    assert key(STAGE_2, refine_strength=0.1) == key(STAGE_2) == key(STAGE_2, refine_steps=())
    assert key(STAGE_2, visibility_every=1) != key(STAGE_2)
    assert key(movies=(), movie_size=64) == key(), "movies are made from the finished field"


def test_a_kept_stage_outlives_the_runs_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "step-000000007.ckpt"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(b"field")
    folder = stage_folder(tmp_path / "run", "key")
    keep_stage(checkpoint, folder)
    keep_stage(checkpoint, folder)
    checkpoint.unlink()
    assert checkpoint_steps(folder) == [7] and [path.read_bytes() for path in folder.iterdir()] == [b"field"]


@contextmanager
def held_elsewhere(folder: Path) -> Iterator[None]:
    """Another process is at work in the run."""
    code = (
        "import sys; from pathlib import Path; from sv4d_ns.runs.layout import record_run; "
        f"record_run(Path({str(folder)!r}), 'x'); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        yield
        process.kill()
        process.wait()


def test_two_commands_of_the_same_second_get_a_folder_each(tmp_path: Path) -> None:
    """Both have chosen the same name before either has made its folder."""
    from test_run import object_frames, short_config, write_video

    config = short_config(tmp_path / "outputs", data=None)
    config.pipeline.datamanager.data = write_video(tmp_path / "good.mp4", object_frames())
    config.set_timestamp()
    taken = config.get_base_dir()
    with held_elsewhere(taken):
        config.save_config()
    assert config.get_base_dir() == taken.with_name(f"{taken.name}-2")
    assert config.pipeline.datamanager.run_dir == config.get_base_dir()
    release_run(config.get_base_dir())


def test_a_run_belongs_to_one_process_at_a_time(tmp_path: Path) -> None:
    """Another process holds the run: the same command becomes a run of its own; when the process dies it is free."""
    with held_elsewhere(tmp_path / "monday"):
        name, sentence = claim_run(tmp_path, "tuesday", "x")
        assert name == "tuesday" and "Another process is at work" in sentence
        with pytest.raises(RuntimeError, match="in use by another process"):
            record_run(tmp_path / "monday", "x")
    assert claim_run(tmp_path, "tuesday", "x")[0] == "monday"
    release_run(tmp_path / "monday")


@pytest.mark.parametrize("moved", [False, True], ids=["in its place", "moved"])
def test_a_run_in_use_is_not_begun_a_second_time_by_its_config(tmp_path: Path, moved: bool) -> None:
    from tiny_run import tiny_config, tiny_grid

    tiny_grid().save(tmp_path / "grid")
    config = tiny_config("sv4d", tmp_path / "outputs")
    config.pipeline.datamanager.data, config.timestamp = tmp_path / "grid", "2026-01-02_030405"
    if moved:
        config.move_to(tmp_path / "elsewhere")
    with held_elsewhere(config.get_base_dir()), pytest.raises(SystemExit, match="is in use by another process"):
        config.save_config()
    assert len(list(tmp_path.rglob("run.json"))) == 1


def continued_run(folder: Path, *own: int, **changes: Any) -> Any:
    """A trainer of a run that began from checkpoint 1999 of another one and has some checkpoints of its own."""
    from tiny_run import tiny_config

    config = tiny_config("sv4d", folder, experiment_name="later", max_num_iterations=3000, **changes)
    places = [(config.get_checkpoint_dir(), own), (folder / "source" / "nerfstudio_models", (1999,))]
    for place, steps in places:
        place.mkdir(parents=True)
        for step in steps:
            (place / f"step-{step:09d}.ckpt").touch()
    config.load_dir = folder / "source" / "nerfstudio_models"
    return config._target(yaml.unsafe_load(yaml.dump(config)))


def test_a_continued_run_goes_on_from_its_own_newest_checkpoint(tmp_path: Path) -> None:
    trainer = continued_run(tmp_path / "a", 2500)
    assert trainer.config.steps_done() == 2501
    trainer._resume_in_place()
    assert trainer._checkpoint_to_load() == trainer.checkpoint_dir / "step-000002500.ckpt"
    trainer = continued_run(tmp_path / "b")
    assert trainer.config.steps_done() == 2000
    trainer._resume_in_place()
    assert trainer._checkpoint_to_load() == tmp_path / "b" / "source" / "nerfstudio_models" / "step-000001999.ckpt"
    (trainer.config.load_dir / "step-000001999.ckpt").unlink()
    continued_run(tmp_path / "c", 2500).config._check_resume()


def test_the_command_that_goes_on_is_the_one_that_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command with --load-dir would make yet another run."""
    trainer = continued_run(tmp_path, 2500, timestamp="{timestamp}")
    trainer.config.set_timestamp()
    assert not trainer.config.is_found_again()
    assert yaml.unsafe_load(yaml.dump(trainer.config)).is_found_again(), "its config.yml does"
    trainer._is_found_again = False
    with pytest.raises(SystemExit):
        trainer._stop(3000)
    said = capsys.readouterr().err
    assert "the same command, or" not in said and "--load-config" in said


def test_stage_1_alone_stays_so_where_it_is_continued(tmp_path: Path) -> None:
    for folder, rounds, wanted in (("a", (), ()), ("b", (1280,), (1280,)), ("c", None, (1920,))):
        config = continued_run(tmp_path / folder).config
        record_run(tmp_path / folder / "source", None, rounds)
        release_run(tmp_path / folder / "source")
        config._spread_schedules()
        assert config.pipeline.refine_steps == wanted


@pytest.mark.parametrize("step", [1280, 2000])
def test_views_of_a_round_that_is_still_to_come_are_not_taken_over(tmp_path: Path, step: int) -> None:
    trainer = continued_run(tmp_path)
    trainer.config.pipeline.refine_steps = (step,)
    for name in ("views", "views_refined_1"):
        (tmp_path / "source" / name).mkdir()
    trainer._adopt_views()
    assert (trainer.base_dir / "views").is_dir()
    assert (trainer.base_dir / "views_refined_1").is_dir() == (step < 2000)


def test_a_round_before_the_checkpoint_must_have_been_made(tmp_path: Path) -> None:
    trainer = continued_run(tmp_path)
    trainer.config.pipeline.refine_steps = (1000,)
    with pytest.raises(InputError, match=r"--pipeline.refine-steps 1000 lies before the checkpoint of 2000 steps"):
        trainer._adopt_views()
