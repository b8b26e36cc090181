"""How a command finds its run again, and who may work in a run's folder."""

import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

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


def test_two_commands_of_the_same_second_get_a_folder_each(tmp_path: Path) -> None:
    """Both have chosen the same name before either has made its folder."""
    from test_run import object_frames, short_config, write_video

    config = short_config(tmp_path / "outputs", data=None)
    config.pipeline.datamanager.data = write_video(tmp_path / "good.mp4", object_frames())
    config.timestamp = "2026-01-02_030405"
    taken = config.get_base_dir()
    code = (
        "import sys; from pathlib import Path; from sv4d_ns.runs.layout import record_run; "
        f"record_run(Path({str(taken)!r}), 'x'); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        config.save_config()
        process.kill()
    assert config.get_base_dir() == taken.with_name(f"{taken.name}-2")
    assert config.pipeline.datamanager.run_dir == config.get_base_dir()
    release_run(config.get_base_dir())


def test_a_run_belongs_to_one_process_at_a_time(tmp_path: Path) -> None:
    """Another process holds the run: the same command becomes a run of its own; when the process dies it is free."""
    code = (
        "import sys; from pathlib import Path; from sv4d_ns.runs.layout import record_run; "
        f"record_run(Path({str(tmp_path / 'monday')!r}), 'x'); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        name, sentence = claim_run(tmp_path, "tuesday", "x")
        assert name == "tuesday" and "Another process is at work" in sentence
        with pytest.raises(RuntimeError, match="in use by another process"):
            record_run(tmp_path / "monday", "x")
        process.kill()
        process.wait()
    assert claim_run(tmp_path, "tuesday", "x")[0] == "monday"
    release_run(tmp_path / "monday")
