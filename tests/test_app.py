"""`sv4d app`: uploads, queue, restart and what strangers may not do; and once through it all in a browser."""

import asyncio
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import requests
from browser import Page, browser, executable, until
from tornado.httpclient import AsyncHTTPClient, HTTPResponse
from tornado.httpserver import HTTPServer

from sv4d_ns.app import jobs as jobs_module
from sv4d_ns.app import runner as runner_module
from sv4d_ns.app.jobs import MAX_OPEN, Crop, Job, Store, plain_name, title_of
from sv4d_ns.app.runner import Runner, Settings
from sv4d_ns.app.seen import PHASES, _phase, described, files
from sv4d_ns.app.server import BODY_BYTES, OURS, App, Place, announce, application, command, is_own_name
from sv4d_ns.cli.doctor import Doctor
from sv4d_ns.plugin.datamanager import SV4DDataManagerConfig
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.progress import PROGRESS_VARIABLE

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "sv4d_ns" / "app" / "page"
HEADERS = {OURS: "1", "X-File-Name": "fox.mp4"}

FAKE = """
import json, os, signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
kind, words = sys.argv[1], sys.argv[2:]
value = lambda flag: Path(words[words.index(flag) + 1])
if kind == "look":
    text = Path(words[0]).read_text()
    time.sleep({"slow": 0.5, "endless": 60}.get(text, 0))
    if text == "bad":
        sys.exit(f"Error: {words[0]} is no video: give another one.")
    (Path(words[0]).parent / "look.json").write_text(json.dumps({"frames": 3, "words": words[1:]}))
elif kind == "train":
    run = value("--output-dir") / value("--experiment-name") / "sv4d" / "now"
    run.mkdir(parents=True, exist_ok=True)
    again = (run / "run.json").exists()
    (run / "run.json").write_text("{}")
    text = value("--data").read_text()
    with open(os.environ["FAKE_LOG"], "a") as log:
        log.write(f"begin {text}\\n")
    Path(os.environ["SV4D_PROGRESS"]).write_text('{"phase": "Fitting the 4D field", "done": 1, "total": 2}')
    if text == "stubborn":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    time.sleep(60 if text in ("long", "stubborn") and not again else 0.1)
    if text == "fails":
        sys.exit("Error: the disk is full: free some space.")
    (run / "summary.json").write_text("{}")
    with open(os.environ["FAKE_LOG"], "a") as log:
        log.write(f"end {text}\\n")
else:
    value("--folder").mkdir()
    for name in ("index.html", "mesh.glb"):
        (value("--folder") / name).write_text(name)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs that do nothing stand in for the doctor, ns-train and the export; the log of what they did."""
    script, log = tmp_path / "fake.py", tmp_path / "fake.log"
    script.write_text(FAKE)
    monkeypatch.setattr(runner_module, "PROGRAM", ("-S", "-E", str(script)))
    monkeypatch.setattr(runner_module, "GRACE_SECONDS", 1.0)
    monkeypatch.setenv("FAKE_LOG", str(log))
    return log


def added(store: Store, content: str, title: str = "fox.mp4") -> Job:
    upload = store.new_upload()
    upload.write_text(content)
    return store.add(upload, title)


async def reached(store: Store, job: Job, state: str) -> Job:
    for _ in range(400):
        if store.get(job.id).state == state:
            return store.get(job.id)
        await asyncio.sleep(0.05)
    raise AssertionError(f"{store.get(job.id)} never was {state}")


def working(store: Store, test: Callable[[Runner], Awaitable[Any]], settings: Settings = Settings()) -> None:  # noqa: B008
    """Run a test beside a runner."""

    async def both() -> None:
        runner = Runner(store, settings)
        serving = asyncio.create_task(runner.serve())
        await test(runner)
        await runner.close()
        await asyncio.wait_for(serving, 30)

    asyncio.run(both())


# --------------------------------------------------------------------------------------------------- names and uploads


def test_names_of_strangers_are_text_and_never_paths() -> None:
    assert title_of("../../etc/fox run.MP4") == "fox run.MP4"
    assert title_of("C:\\films\\fox\u202e\x00\n.mp4") == "fox.mp4"
    assert len(title_of("x" * 500 + ".mp4")) <= 81 and title_of("x" * 500 + ".mp4").endswith(".mp4")
    assert [plain_name(name) for name in ("Füchse & Co.mp4", "狐.mp4", "--a.b--.mp4")] == ["Fuchse-Co", "video", "a-b"]
    for empty in ("", "/", "a/..", " .mp4"):
        with pytest.raises(InputError):
            title_of(empty)


def test_uploads_are_refused_before_their_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.check_upload("fox.mp4", 10, 10)
    for title, size, word in (("fox.exe", 1, "does not end"), ("fox.mp4", 0, "empty"), ("fox.mp4", 11, "--max-upload")):
        with pytest.raises(InputError, match=word):
            store.check_upload(title, size, 10)
    for _ in range(MAX_OPEN):
        added(store, "good")
    with pytest.raises(InputError, match="waiting"):
        store.check_upload("fox.mp4", 1, 10)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5))
    with pytest.raises(InputError, match="no room"):
        store.check_upload("fox.mp4", 10, 10)


# ------------------------------------------------------------------------------------------------------ queue and runs


def test_one_run_at_a_time_in_the_order_they_were_started(tmp_path: Path, fake: Path) -> None:
    store = Store(tmp_path / "out")
    first, second = added(store, "first"), added(store, "second")

    async def test(runner: Runner) -> None:
        runner.start(await reached(store, second, "ready"))
        runner.start(await reached(store, first, "ready"))
        assert described(store, runner, store.get(first.id))["before"] == 1
        await reached(store, second, "finished")
        await reached(store, first, "finished")
        seen = described(store, runner, store.get(first.id))
        assert [(one["file"], one["bytes"]) for one in seen["downloads"]] == [("mesh.glb", 8), ("index.html", 10)]
        with pytest.raises(InputError, match="finished"):
            runner.start(store.get(first.id))

    working(store, test)
    assert fake.read_text().split() == ["begin", "second", "end", "second", "begin", "first", "end", "first"]


async def begun(runner: Runner, job: Job) -> Job:
    """Start a job once the doctor has seen it, and wait until it runs."""
    runner.start(await reached(runner.store, job, "ready"))
    return await reached(runner.store, job, "running")


def test_a_cancelled_run_is_stopped_and_goes_on_with_the_same_command(tmp_path: Path, fake: Path) -> None:
    store = Store(tmp_path / "out")
    job, waiting = added(store, "long"), added(store, "other")
    words = []

    async def test(runner: Runner) -> None:
        runner.start(await reached(store, job, "ready"))
        runner.start(await reached(store, waiting, "ready"))
        running = await reached(store, job, "running")
        assert runner.cancel(store.get(waiting.id)).state == "ready", "it had not begun"
        while not (seen := described(store, runner, running))["progress"]:
            await asyncio.sleep(0.05)
        assert seen["phases"][seen["phase"]] == "Fit the 4D object"
        words.append(runner.train_words(running))
        runner.cancel(running)
        assert described(store, runner, running)["stopping"]
        stopped = await reached(store, job, "stopped")
        words.append(runner.train_words(stopped))
        runner.start(stopped)
        await reached(store, job, "finished")

    working(store, test)
    assert words[0] == words[1] and words[0][:2] == ["train", "sv4d"]


def test_the_page_names_no_flags() -> None:
    from sv4d_ns.app.jobs import without_flags

    assert without_flags("It may be cut; look at it (sv4d doctor --picture), and give masks (--pipeline.x.masks).") == (
        "It may be cut, and give masks."
    )
    assert without_flags("By the model, confidence 0.90; look at it with sv4d doctor --picture.") == (
        "By the model, confidence 0.90."
    )
    assert without_flags("Keep more of it (--pipeline.a or --pipeline.b), or (as it is) film anew.") == (
        "Keep more of it, or (as it is) film anew."
    )
    sources = "".join(path.read_text() for path in (ROOT / "sv4d_ns" / "video").glob("*.py"))
    assert "(sv4d doctor --picture)" in sources and "with sv4d doctor --picture" in sources


def test_looking_can_be_cancelled_and_the_next_video_has_its_turn(tmp_path: Path, fake: Path) -> None:
    store = Store(tmp_path / "out")
    job, behind = added(store, "endless"), added(store, "other")

    async def test(runner: Runner) -> None:
        while not runner._processes:
            await asyncio.sleep(0.05)
        assert [described(store, runner, store.get(each.id))["before"] for each in (job, behind)] == [0, 1]
        runner.cancel(store.get(job.id))
        await reached(store, behind, "ready")
        cancelled = store.get(job.id)
        assert cancelled.state == "refused" and "cancelled" in cancelled.error
        store.delete(cancelled)

    working(store, test)


def test_every_bar_of_a_run_belongs_to_a_phase_after_the_first() -> None:
    plugin = ROOT / "sv4d_ns" / "plugin"
    sources = "".join(path.read_text() for path in plugin.glob("*.py"))
    titles = re.findall(r'\bbar(?:\.update)?\(f?"([^"]+)"', sources)
    assert {"Fitting the 4D field", "Making the mesh that the movies show", "Estimating normals"} <= set(titles)
    assert {title: _phase(title, 1) for title in titles if not _phase(title, 1)} == {}
    assert PHASES[_phase("Making the mesh that the movies show", 2)] == "Pictures and movies"


def test_a_run_that_does_not_listen_is_ended(tmp_path: Path, fake: Path) -> None:
    store = Store(tmp_path / "out")
    job = added(store, "stubborn")

    async def test(runner: Runner) -> None:
        await begun(runner, job)
        while not fake.exists():
            await asyncio.sleep(0.05)
        runner.cancel(store.get(job.id))
        await reached(store, job, "stopped")

    working(store, test)


def test_a_full_disk_ends_a_jobs_turn_and_not_the_server(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "out")
    first, second = added(store, "first"), added(store, "second")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def test(runner: Runner) -> None:
        runner.start(await reached(store, first, "ready"))
        runner.look(store.get(second.id), "u2netp", "fixed")
        with monkeypatch.context() as disk:
            disk.setattr(jobs_module, "_write", full)
            for job, state in ((first, "failed"), (second, "refused")):
                assert "No space left on device" in (await reached(store, job, state)).error
        runner.look(store.get(second.id), "u2netp", "fixed")
        await reached(store, second, "ready")
        runner.start(store.get(first.id))
        await reached(store, first, "finished")

    working(store, test)


def test_a_choice_made_during_a_look_is_looked_at(tmp_path: Path, fake: Path) -> None:
    store = Store(tmp_path / "out")
    job = added(store, "slow")

    async def test(runner: Runner) -> None:
        while not runner._processes:
            await asyncio.sleep(0.01)
        runner.look(store.get(job.id), "u2netp", "stabilised")
        assert (await reached(store, job, "ready")).crop == "stabilised"
        words = json.loads((store.folder(job) / "look.json").read_text())["words"]
        assert words == ["--matting", "u2netp", "--crop", "stabilised"]

    working(store, test)


def test_what_goes_wrong_is_said_in_the_programs_own_sentence(tmp_path: Path, fake: Path) -> None:
    store = Store(tmp_path / "out")
    bad, fails = added(store, "bad", "my cat.gif"), added(store, "fails")

    async def test(runner: Runner) -> None:
        runner.start(await reached(store, fails, "ready"))
        assert (await reached(store, fails, "failed")).error == "the disk is full: free some space."
        refused = await reached(store, bad, "refused")
        assert refused.error == "my cat.gif is no video: give another one."
        with pytest.raises(InputError, match="refused"):
            runner.start(refused)

    working(store, test)


def test_the_doctor_is_asked_with_the_settings_of_the_run(tmp_path: Path, fake: Path) -> None:
    store = Store(tmp_path / "out")
    job = added(store, "good")
    flags = ("--max-num-iterations", "9", "--pipeline.datamanager.max-frames", "5")

    async def test(runner: Runner) -> None:
        runner.look(await reached(store, job, "ready"), "u2netp", "stabilised")
        ready = await reached(store, job, "ready")
        words = json.loads((store.folder(job) / "look.json").read_text())["words"]
        assert words == ["--matting", "u2netp", "--crop", "stabilised", *flags[2:]]
        assert runner.train_words(ready)[-6:] == ["--pipeline.datamanager.crop", "stabilised", *flags]

    working(store, test, Settings(flags))


@pytest.mark.parametrize(
    "words",
    [
        ("--pipeline.datamanager.fps", "8"),
        ("--pipeline.datamanager.fps=8",),
        ("--pipeline.datamanager.max_frames", "8"),
        ("--pipeline.datamanager.max_frames=8",),
    ],
)
def test_the_doctor_hears_of_frames_however_they_are_written(words: tuple[str, ...]) -> None:
    given = [word for flag in runner_module.DOCTORS_FLAGS for word in runner_module._flag(("--x", *words, "-y"), flag)]
    assert given == [words[0].partition("=")[0].replace("_", "-"), "8"]


def test_a_kill_while_a_job_is_made_leaves_nothing_and_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "0123456789ab").mkdir()
    (tmp_path / "0123456789ab" / "video.mp4").write_text("not of the page")
    killed = """
import os, sys
from pathlib import Path
from sv4d_ns.app import jobs
store = jobs.Store(Path(sys.argv[1]))
upload = store.new_upload()
upload.write_text("film")
jobs.json.dumps = lambda *_, **__: os._exit(9)
store.add(upload, "fox.mp4")
"""
    assert subprocess.run([sys.executable, "-c", killed, str(tmp_path)]).returncode == 9
    Store(tmp_path).recover()
    assert [path.name for path in tmp_path.iterdir()] == ["0123456789ab"]


def test_a_video_is_cropped_as_by_the_commands(tmp_path: Path, fake: Path) -> None:
    store = Store(tmp_path / "out")
    job = added(store, "good")

    async def test(runner: Runner) -> None:
        ready = await reached(store, job, "ready")
        words = json.loads((store.folder(job) / "look.json").read_text())["words"]
        assert words[-2:] == ["--crop", SV4DDataManagerConfig().crop]
        assert Doctor(Path("fox.mp4")).crop == SV4DDataManagerConfig().crop
        assert runner.train_words(ready)[-2:] == ["--pipeline.datamanager.crop", SV4DDataManagerConfig().crop]

    working(store, test)


def test_jobs_outlive_the_server(tmp_path: Path, fake: Path) -> None:
    store = Store(tmp_path / "out")
    running, waiting = added(store, "first"), added(store, "second")
    store.save(replace(running.to("running"), begun=True))
    store.save(waiting.to("waiting"))
    (store.folder(added(store, "x")) / "job.json").write_text("{")
    store.new_upload().write_text("half of a vid")
    again = Store(tmp_path / "out")
    again.recover()
    assert {job.id: job.state for job in again.all()} == {running.id: "stopped", waiting.id: "waiting"}
    assert "server ended" in again.get(running.id).error
    assert not [path for path in again.root.iterdir() if path.name.startswith(".")]

    async def test(runner: Runner) -> None:
        await reached(again, waiting, "finished")
        runner.start(again.get(running.id))
        await reached(again, running, "finished")

    working(again, test)
    again.delete(again.get(running.id))
    assert not again.folder(running).exists() and [job.id for job in again.all()] == [waiting.id]


def test_a_server_that_ends_stops_its_run(tmp_path: Path, fake: Path) -> None:
    store = Store(tmp_path / "out")
    job = added(store, "long")

    async def test(runner: Runner) -> None:
        await begun(runner, job)

    working(store, test)
    assert store.get(job.id).state == "stopped"


# ---------------------------------------------------------------------------------------------- what the server answers


def answering(tmp_path: Path, test: Callable[[Store, Callable[..., Awaitable[HTTPResponse]]], Awaitable[None]]) -> None:
    """Run a test beside a server that takes uploads of a hundred kilobytes."""

    async def both() -> None:
        store = Store(tmp_path / "out")
        place = Place(store, Runner(store, Settings()), 100_000)
        server = HTTPServer(application(place), max_body_size=BODY_BYTES)
        server.listen(0, "127.0.0.1")
        port = next(iter(server._sockets.values())).getsockname()[1]

        async def ask(path: str, method: str = "GET", **more: Any) -> HTTPResponse:
            if method == "POST":
                more.setdefault("body", b"")
                more.setdefault("headers", HEADERS)
            address = f"http://127.0.0.1:{port}{path}"
            return await AsyncHTTPClient().fetch(address, method=method, raise_error=False, **more)

        await test(store, ask)
        server.stop()

    asyncio.run(both())


def test_an_upload_becomes_a_job_under_names_of_ours(tmp_path: Path) -> None:
    async def test(store: Store, ask: Callable[..., Awaitable[HTTPResponse]]) -> None:
        film = os.urandom(50_000)
        name = {OURS: "1", "X-File-Name": "..%2F..%2Ff%C3%BCchse.MP4"}
        answer = json.loads((await ask("/api/jobs", "POST", body=film, headers=name)).body)
        (job,) = store.all()
        assert answer["title"] == job.title == "füchse.MP4" and re.fullmatch("[0-9a-f]{12}", job.id)
        assert store.video(job).read_bytes() == film and store.video(job).name == "video.mp4"
        assert (await ask(f"/files/{job.id}/input", headers={"Range": "bytes=2-4"})).body == film[2:5]
        saved = await ask(f"/files/{job.id}/input?save")
        assert "fuchse-video.mp4" in saved.headers["Content-Disposition"]
        for body, word in ((b"x" * 100_001, "--max-upload-mb"), (b"", "empty")):
            refused = await ask("/api/jobs", "POST", body=body)
            assert refused.code in (400, 599) and (refused.code == 599 or word in json.loads(refused.body)["error"])
        assert len(list(store.root.iterdir())) == 1

    answering(tmp_path, test)


def test_other_sites_and_other_names_are_refused(tmp_path: Path) -> None:
    async def test(store: Store, ask: Callable[..., Awaitable[HTTPResponse]]) -> None:
        job = added(store, "good")
        for headers in (
            {"X-File-Name": "fox.mp4"},
            HEADERS | {"Origin": "http://evil.example"},
            HEADERS | {"Origin": "null"},
            HEADERS | {"Host": "evil.example"},
        ):
            assert (await ask("/api/jobs", "POST", body=b"film", headers=headers)).code == 403
            assert (await ask(f"/api/jobs/{job.id}/cancel", "POST", headers=headers)).code == 403
        for path in ("/", "/api/jobs", f"/api/jobs/{job.id}", f"/files/{job.id}/input"):
            assert (await ask(path, headers={"Host": "evil.example:7014"})).code == 403
            assert (await ask(path)).code == 200
        assert store.all() == [job]
        assert (await ask("/api/jobs", "POST", body=b"film", headers=HEADERS | {"Host": "localhost"})).code == 200

    answering(tmp_path, test)
    assert is_own_name("192.168.0.7") and is_own_name("[::1]") and not is_own_name("1.2.3.4.evil.example")


def test_no_address_leads_to_another_file(tmp_path: Path) -> None:
    async def test(store: Store, ask: Callable[..., Awaitable[HTTPResponse]]) -> None:
        job = added(store, "good")
        (store.root / "secret").write_text("x")
        for path in ("job.json", "../secret", "..%2Fsecret", "%2e%2e/secret", "%2Fetc%2Fpasswd", "look.log", "view-1"):
            assert (await ask(f"/files/{job.id}/{path}")).code == 404
        assert (await ask("/files/000000000000/input")).code == 404 and (await ask("/jobs.py")).code == 404
        assert (await ask("/api/jobs/000000000000")).code == 400
        assert set(files(store, job)) == {"input"}

    answering(tmp_path, test)


def test_choices_that_do_not_exist_and_large_bodies_are_refused(tmp_path: Path) -> None:
    async def test(store: Store, ask: Callable[..., Awaitable[HTTPResponse]]) -> None:
        job = store.save(added(store, "good").to("ready"))
        path = f"/api/jobs/{job.id}/look"
        for body in (b"", b"[]", b'{"matting": "--help", "crop": "fixed"}', b'{"matting": ["u2netp"], "crop": []}'):
            assert (await ask(path, "POST", body=body)).code == 400
        assert (await ask(path, "POST", body=b" " * (BODY_BYTES + 1))).code in (400, 413, 599)
        assert store.get(job.id) == job
        assert (await ask(path, "POST", body=b'{"matting": "u2netp", "crop": "stabilised"}')).code == 200
        assert store.get(job.id).crop == "stabilised"

    answering(tmp_path, test)


def test_an_upload_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    async def test(store: Store, ask: Callable[..., Awaitable[HTTPResponse]]) -> None:
        port = int((await ask("/")).effective_url.split(":")[2].strip("/"))
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST /api/jobs HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{OURS}: 1\r\nX-File-Name: a.mp4\r\n"
        writer.write(f"{head}Content-Length: 5000\r\n\r\nhalf".encode())
        await writer.drain()
        while not list(store.root.iterdir()):
            await asyncio.sleep(0.02)
        writer.close()
        for _ in range(100):
            if not list(store.root.iterdir()):
                return
            await asyncio.sleep(0.05)
        raise AssertionError(list(store.root.iterdir()))

    answering(tmp_path, test)


def test_the_page_is_whole_and_asks_nobody_else() -> None:
    page, script, style = ((PAGE / name).read_text() for name in ("index.html", "app.js", "style.css"))
    assert not re.search(r"https?://|//cdn|@import|url\(\s*['\"]?http", page + script + style)
    ids = set(re.findall(r'id="([^"]+)"', page))
    assert set(re.findall(r'\$\("([^"]+)"\)', script)) <= ids
    assert set(re.findall(r'for="([^"]+)"', page)) <= ids
    assert tuple(re.findall(r'<option value="([^"]+)"', page)) == get_args(Crop)


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_command_says_who_can_open_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    announce(App(), 7014)
    assert "everyone" not in (said := capsys.readouterr().out) and "http://127.0.0.1:7014/" in said
    announce(App(host="0.0.0.0"), 7014)
    assert "no password" in capsys.readouterr().out


def test_the_command_refuses_what_cannot_be(tmp_path: Path) -> None:
    from filelock import FileLock

    out = ["--out", str(tmp_path / "out")]
    with pytest.raises(InputError, match="--max-upload-mb"):
        command([*out, "--max-upload-mb", "0"])
    with pytest.raises(InputError, match="--port 99999"):
        command([*out, "--port", "99999"])
    with pytest.raises(InputError, match=r"--host 203\.0\.113\.1 .*cannot be had"):
        command([*out, "--host", "203.0.113.1"])
    with FileLock(tmp_path / "out" / ".app.lock"), pytest.raises(InputError, match="Another"):
        command(out)


def test_an_open_bar_can_be_read_by_whoever_started_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sv4d_ns.utils.progress import TrainingBar, bar

    file = tmp_path / "progress.json"
    monkeypatch.setenv(PROGRESS_VARIABLE, str(file))
    with bar("Rendering") as show:
        assert json.loads(file.read_text())["phase"] == "Rendering"
        show(1, 4)
        show(4, 4)
        assert json.loads(file.read_text())["done"] == 4
    training = TrainingBar()
    training.update("Fitting", 1, 9, "20.1 dB", 3.0, 8.0)
    training.close()
    shown = {"phase": "Fitting", "done": 1, "total": 9, "note": "20.1 dB", "left": 3.0, "run_left": 8.0}
    assert json.loads(file.read_text()) == shown


# ------------------------------------------------------------------------------------------- from upload to download

SHORT = (
    *("--max-num-iterations", "60", "--pipeline.datamanager.max-frames", "3"),
    *("--pipeline.datamanager.synthesis-steps", "2", "--pipeline.movies", "time", "--pipeline.movie-size", "32"),
    *("--pipeline.datamanager.train-num-rays-per-batch", "512"),
)
COARSE = ("--resolution", "24", "--max-faces", "300", "--texture-size", "64")
PATIENCE = 600
SIZES = {"desktop": (1280, 800), "phone": (390, 844)}


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a server of its own, as a user starts it."""
    start = "import sys; from sv4d_ns.cli.main import main; sys.exit(main())"
    words = [sys.executable, "-c", start, "app", "--out", str(folder), "--port", "0", *COARSE, "--", *SHORT]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield re.findall(r"http://\S+", server.stdout.readline())[0]
    finally:
        server.terminate()
        server.wait(60)


def looked_at(page: Page, name: str) -> None:
    """Nothing is wider than the window, on a desk and on a phone; pictures where SV4D_PICTURES names a folder."""
    for kind, size in SIZES.items():
        page.size(*size)
        time.sleep(0.5)
        wide = page.run("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, f"{name} on a {kind} is {wide} pixels too wide"
        if folder := os.environ.get("SV4D_PICTURES"):
            page.picture(Path(folder) / f"{name}-{kind}.png", whole=kind == "phone")


def visible(id: str) -> str:
    return f"!document.getElementById('{id}').closest('[hidden]')"


@pytest.mark.skipif(executable() is None, reason="no Chromium on this machine (CHROMIUM names one)")
def test_from_upload_to_download_in_a_browser(tmp_path: Path) -> None:
    with served(tmp_path / "out") as address, browser() as page:
        page.go(address)
        page.until("document.getElementById('file').accept")
        looked_at(page, "empty")
        wrong = tmp_path / "notes.txt"
        wrong.write_text("no film")
        page.choose("#file", wrong)
        page.until(f"{visible('trouble')} && document.getElementById('trouble').textContent.includes('notes.txt')")
        looked_at(page, "error")

        page.choose("#file", ROOT / "assets" / "sample.mp4")
        page.until("location.hash.length > 3", 60)
        page.until(visible("look"), PATIENCE)
        assert page.until("document.getElementById('crop').naturalWidth") > 0
        assert page.run("document.getElementById('facts').textContent").startswith("3 frames")
        looked_at(page, "looked")

        page.size(*SIZES["desktop"])
        page.run("document.querySelector('#actions .main').focus()")
        page.key("Enter", 13, "\r")  # by keyboard alone
        page.until(visible("progress"), 60)
        looked_at(page, "running")
        page.until("document.querySelectorAll('#pictures img').length === 9", PATIENCE)
        looked_at(page, "views")
        page.until(
            f"{visible('result')} || ({visible('error')} && document.getElementById('error').textContent)", PATIENCE
        )
        assert page.run("document.getElementById('error').textContent") == ""

        page.size(*SIZES["desktop"])
        page.until("document.getElementById('clock').textContent.startsWith('frame 1 of 3')", 60, frame=True)
        page.until("!document.getElementById('clock').textContent.startsWith('frame 1 ')", 60, frame=True)
        looked_at(page, "finished")
        links = page.run("[...document.querySelectorAll('#downloads a')].map((link) => link.href)")
        kinds = {link.rpartition("/")[2].partition("?")[0] for link in links}
        assert {"mesh.glb", "frames_obj.zip", "index.html", "movie-time"} <= kinds
        for link in links:
            answer = requests.get(link, timeout=60)
            assert answer.ok and len(answer.content) > 500 and "sample" in answer.headers["Content-Disposition"]
        page.run("location.hash = ''")
        until(lambda: page.run("document.querySelectorAll('#runs .finished').length") == 1, "it is in the list", 30)
        looked_at(page, "list")
        assert page.complaints == []
        assert {url.split("/")[2] for url in page.asked if url.startswith("http")} == {address.split("/")[2]}
