"""Many videos on many workers: what is found, named, skipped and said, and what a killed worker costs."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from sv4d_ns.cli import batch as batch_module
from sv4d_ns.cli.batch import BatchConfig, Outcome, batch, find_videos, names_of, write_report
from sv4d_ns.runs.cluster import open_cluster, run_all
from sv4d_ns.utils.errors import InputError


def touch(folder: Path, *names: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"x")
    return [folder / name for name in names]


def test_videos_are_found_in_folders_patterns_and_lists_once_each(tmp_path: Path) -> None:
    a, b, _ = touch(tmp_path / "films", "a.mp4", "b.MOV", "notes.doc")
    listed = tmp_path / "list.txt"
    listed.write_text("films/b.MOV\n\nfilms/a.mp4\n")
    assert find_videos([str(tmp_path / "films")]) == [a, b]
    assert find_videos([str(listed), str(a)]) == [b, a]
    assert find_videos([str(tmp_path / "films" / "*.mp4")]) == [a]
    listed.write_text("films/none.mp4\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    for name, word in ((listed, "none.mp4"), (empty, "no video"), (tmp_path / "x.mp4", "does not exist")):
        with pytest.raises(InputError, match=word):
            find_videos([str(name)])
    with pytest.raises(InputError, match="no video is given"):
        find_videos([])


def test_runs_of_videos_of_the_same_name_have_names_of_their_own() -> None:
    videos = [Path("/one/cat.mp4"), Path("/two/cat.mp4"), Path("/two/dog.mp4"), Path("/one/cat.gif")]
    names = names_of(videos)
    assert names[2] == "dog" and len(set(names)) == 4 and names[0] == "one-cat-mp4"


def test_a_killed_worker_loses_nothing_and_another_does_its_work(tmp_path: Path) -> None:
    folder = str(tmp_path)

    def once_fatal(number: int) -> int:
        mark = Path(folder) / f"{number}.tried"
        if number == 1 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return 10 * number

    results: dict[int, object] = {}
    with open_cluster("local:2") as client:
        run_all(client, once_fatal, [(0,), (1,), (2,)], results.__setitem__)
    assert (tmp_path / "1.tried").exists() and results == {0: 0, 1: 10, 2: 20}


INTERRUPTED = """
import signal, time
from pathlib import Path
from sv4d_ns.runs.cluster import open_cluster, run_all
from sv4d_ns.utils.errors import one_sentence_errors

def long(folder):
    Path(folder, "begun").touch()
    time.sleep(60)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background have it ignored
    with one_sentence_errors(), open_cluster("local:1") as client:
        run_all(client, long, [(".",), (".",)], print)
"""


def test_ctrl_c_ends_workers_with_one_sentence(tmp_path: Path) -> None:
    """Ctrl-C reaches all processes of a terminal; Dask's told of it with two warnings and two tracebacks."""
    script = tmp_path / "script.py"
    script.write_text(INTERRUPTED)
    with subprocess.Popen(
        [sys.executable, script], cwd=tmp_path, stderr=subprocess.PIPE, start_new_session=True, text=True
    ) as process:
        try:
            while not (tmp_path / "begun").exists():
                assert process.poll() is None
                time.sleep(0.1)
            os.killpg(process.pid, signal.SIGINT)
            assert process.communicate(timeout=240)[1] == "Stopped. The same command goes on from what is finished.\n"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130


def test_a_task_that_fails_is_handed_over_and_the_others_go_on() -> None:
    def fussy(number: int) -> int:
        if number == 0:
            raise ValueError("zero")
        return number

    results: dict[int, object] = {}
    with open_cluster(None) as client:
        run_all(client, fussy, [(0,), (1,)], results.__setitem__)
    assert isinstance(results[0], ValueError) and results[1] == 1


@pytest.mark.parametrize(
    ("cluster", "word"), [("local:0", "local:N"), ("nowhere", "local:N"), ("tcp://127.0.0.1:9", "no Dask scheduler")]
)
def test_clusters_that_are_not_there_are_named(cluster: str, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sv4d_ns.runs.cluster.CONNECT_SECONDS", 1)
    with pytest.raises(InputError, match=word), open_cluster(cluster):
        pass


def test_a_queue_file_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "queue.yaml"
    path.write_text("slurm: {cores: 2}\n")
    with pytest.raises(InputError, match=r"queue\.yaml"), open_cluster(str(path)):
        pass


def test_one_folder_belongs_to_one_batch_and_finished_videos_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (video,) = touch(tmp_path / "films", "a.mp4")
    run = tmp_path / "out" / "a" / "sv4d" / "first"
    run.mkdir(parents=True)
    (run / "summary.json").write_text('{"input_view_psnr": 28.0}')
    config = BatchConfig((str(video),), tmp_path / "out")
    key = batch_module.content_hash("a.mp4", batch_module._size_and_time(video), "sv4d", [])
    batch_module._write_state(config.out, [Outcome(str(video), key, str(run))])
    monkeypatch.setattr(batch_module, "open_cluster", lambda name: pytest.fail("nothing is to be done"))
    assert [outcome.run for outcome in batch(config, [])] == [str(run)]
    lock = FileLock(config.out / ".batch.lock")
    with lock, pytest.raises(InputError, match="Another 'sv4d batch'"):
        batch(config, [])


def test_a_run_that_is_found_finished_is_the_one_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one of other settings whose summary is newer: `ns-train` leaves the summary of a finished run as it is."""
    wanted, other = (tmp_path / "a" / "sv4d" / name for name in ("wanted", "other"))
    for age, run in enumerate((other, wanted)):
        touch(run, "run.json", "summary.json")
        os.utime(run / "run.json", (age, age))
    os.utime(wanted / "summary.json", (0, 0))
    done = subprocess.CompletedProcess[bytes]([], 0)
    monkeypatch.setattr(batch_module.subprocess, "run", lambda *_, **__: done)
    assert batch_module.run_training("a.mp4", "a", str(tmp_path), "sv4d", []) == (str(wanted), "")
    (wanted / "summary.json").unlink()
    assert batch_module.run_training("a.mp4", "a", str(tmp_path), "sv4d", [])[0] == ""


def test_the_report_lists_failures_and_shows_what_was_finished(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "summary.json").write_text('{"input_view_psnr": 28.04}')
    Image.fromarray(np.full((100, 300, 3), 7, np.uint8)).save(run / "contact_sheet.png")
    outcomes = [Outcome("a.mp4", "k", str(run)), Outcome("b.mp4", "l", error="b.mp4 is empty: give a film.")]
    table, sheet = write_report(tmp_path, outcomes)
    assert "28.0 dB" in table.read_text() and "b.mp4 is empty" in table.read_text()
    assert Image.open(sheet).size == (768, 256)


def test_a_video_that_cannot_be_read_is_listed_with_its_sentence(tmp_path: Path) -> None:
    (video,) = touch(tmp_path / "films", "broken.mp4")
    (outcome,) = batch(BatchConfig((str(video),), tmp_path / "out"), ["--max-num-iterations", "2"])
    assert not outcome.run and "broken.mp4" in outcome.error
