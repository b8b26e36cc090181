"""Bars and sentences in real terminals of several widths, seen through a terminal emulator."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pyte
import pytest

SCRIPT = """
import time
from sv4d_ns.utils.progress import TrainingBar, bar, bytes_bar, say, say_whole
with bar("Stage 2, round 1: noising and denoising the renders") as show:
    for done in range(9):
        show(done, 8)
        time.sleep(0.06)
training = TrainingBar()
for step in range(40):
    training.update("Fitting the 4D field", step + 1, 40, "17.6 dB", 0.0, 245.0 - step)
    time.sleep(0.03)
    if step == 20:
        say("A sentence said while a bar is open names /a/path/that/is/longer/than/the/narrowest/terminal/is/wide.")
training.close()
with bytes_bar("Checking a file", 10) as more:
    more(10)
say_whole("ns-viewer --load-config outputs/clip/sv4d/2026-11-25_212631/config.yml --viewer.websocket-port 7007")
"""


def in_terminal(columns: int, rows: int, *command: str) -> bytes:
    """What a command writes to a pseudo-terminal of this size."""
    terminal, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment | {"TERM": "xterm-256color"}
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            block = os.read(terminal, 65536)
        except OSError:  # Linux's end of a terminal
            break
        if not block:
            break
        written += block
    os.close(terminal)
    assert process.wait(60) == 0, written.decode()
    return written


def seen(written: bytes, columns: int, rows: int) -> list[str]:
    """Lines a user of a terminal has before them at the end, those scrolled away included; empty ones are left out."""
    screen = pyte.HistoryScreen(columns, rows, history=10_000, ratio=1)
    pyte.ByteStream(screen).feed(written)
    scrolled = ["".join(line[column].data for column in range(columns)) for line in screen.history.top]
    return [line.rstrip() for line in [*scrolled, *screen.display] if line.strip()]


@pytest.mark.parametrize("columns", [24, 40, 80, 132])
def test_a_bar_leaves_one_line_in_a_terminal_of_any_width(columns: int) -> None:
    lines = seen(in_terminal(columns, 24, sys.executable, "-c", SCRIPT), columns, 24)
    assert sum("100%" in line for line in lines) == 3
    for beginning in ("Stage 2", "Fitting", "Checking"):
        assert sum(line.startswith(beginning) for line in lines) == 1
    text = "".join(lines)
    assert "/a/path/that/is/longer/than/the/narrowest/terminal/is/wide." in text, "a path is never broken by us"
    assert "outputs/clip/sv4d/2026-11-25_212631/config.yml" in text


def test_sentences_are_broken_between_words() -> None:
    lines = seen(in_terminal(80, 24, sys.executable, "-c", SCRIPT), 80, 24)
    place = next(number for number, line in enumerate(lines) if line.startswith("A sentence"))
    assert lines[place + 1].startswith("/a/path/")


def test_nothing_is_drawn_over_and_over_into_a_file(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert len([line for line in done.stdout.splitlines() if line.strip()]) == 5


def test_the_first_step_of_a_phase_is_no_measure_of_the_others() -> None:
    from sv4d_ns.utils.progress import Pace

    seconds = 0.0
    pace = Pace(lambda: seconds)
    assert pace.left(10) is None
    seconds = 30.0  # the first step compiles
    pace.tick(1)
    assert pace.left(10) == pytest.approx(270)
    seconds = 35.0
    assert pace.left(10) == pytest.approx(265), "it counts down while nothing comes"
    seconds = 40.0
    pace.tick(3)
    pace.tick(3)
    assert pace.left(10) == pytest.approx(35)


def test_durations_are_read_at_a_glance() -> None:
    from sv4d_ns.utils.progress import clock

    assert [clock(value) for value in (None, 0.4, 59.4, 61, 3599, 3725)] == [
        *("-", "0 s", "59 s", "1:01 min", "59:59 min", "1:02 h"),
    ]


def test_nerfstudios_table_becomes_figures_behind_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own table is as wide as it has figures, and steps back over lines a narrow terminal has broken."""
    from sv4d_ns.plugin.bar_writer import BarWriterConfig, writer
    from sv4d_ns.utils.progress import TrainingBar

    events = [("Train Iter (time)", 0.1234), ("Train Rays / Sec", 21_500.0), ("ETA (time)", 90.0), ("other", 1.0)]
    monkeypatch.setattr(writer, "EVENT_STORAGE", [{"name": name, "event": value, "step": 10} for name, value in events])
    monkeypatch.setattr(writer, "GLOBAL_BUFFER", {"steps_per_log": 10, "step": 10, "max_iter": 100, "events": {}})
    shown: list[str] = []
    one = BarWriterConfig(enable=True).setup()
    one.bar = TrainingBar()
    monkeypatch.setattr(TrainingBar, "also", lambda self, text: shown.append(text))
    one.write_stats_log(10)
    one.write_stats_log(11)
    assert shown == ["Train Iter 123 ms, Train Rays / Sec 21.50 K"]


@pytest.mark.parametrize("slow", [False, True])
def test_work_that_is_done_at_once_shows_no_bar(
    slow: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sv4d_ns.utils import progress

    monkeypatch.setattr(progress, "SLOW_SECONDS", -1.0 if slow else 60.0)
    with progress.bar_if_slow("Cutting the object out") as show:
        for done in range(1, 4):
            show(done, 3)
    assert ("Cutting the object out" in capsys.readouterr().out) is slow
