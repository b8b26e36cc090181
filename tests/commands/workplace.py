"""A folder in which the documents' command lines find what they name, and the ways to run them there."""

import http.client
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
from evaluation_fixture import FRAMES, write_case
from glb_fixture import waving
from test_run import write_video

BIN = Path(sys.executable).parent
READY_S, ENDS_S = 240, 60
"""Seconds a viewer may take to answer, and to end when it is asked to (on a busy machine)."""


class Workplace:
    """video.mp4, CASE, GRID, grid, assets ...; RUN and every `...` are the run that the documents' ns-train makes."""

    def __init__(self, folder: Path, train: Callable[["Workplace", str], None]) -> None:
        self.folder, self._train = folder, train
        self.done: set[tuple[str, ...]] = set()
        """Commands that have run."""
        case = write_case(folder / "CASE")
        shutil.copytree(case, folder / "CASES" / "CASE")
        self._write_grids()
        for name in ("assets", "SOURCE"):
            (folder / name).mkdir()
            waving(folder / name / "fish.glb")
        from sv4d_ns.evaluation.cases import Case

        read = Case.load(case)
        rgba = read.frames(read.input_view, read.size).astype(float) / 255
        white = rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]
        write_video(folder / "video.mp4", np.round(255 * white).astype(np.uint8), fps=10)
        assert len(white) == FRAMES

    def _write_grids(self) -> None:
        from sv4d_ns.evaluation.cases import Case

        case = Case.load(self.folder / "CASE")
        for name in ("GRID", "grid", "A", "B"):
            case.grid(case.with_role("nv8"), 32).save(self.folder / name)

    def run_of(self, method: str) -> Path:
        """The newest run of a method; made if there is none."""
        found = sorted((self.folder / "outputs" / "video" / method).glob("*/config.yml"))
        if not found:
            self._train(self, method)
            found = sorted((self.folder / "outputs" / "video" / method).glob("*/config.yml"))
        return found[-1].parent.relative_to(self.folder)

    def filled_in(self, word: str) -> str:
        """A word of a command with the run's place for what the documents leave open."""
        if word == "...":
            return str(self.run_of("sv4d") / "config.yml")
        if word.endswith("/.../config.yml"):
            return str(self.run_of("sv4d") / "config.yml")
        if word in ("RUN", "outputs/video/sv4d/TIMESTAMP"):
            return str(self.run_of("sv4d"))
        return word.replace("RUN/", f"{self.run_of('sv4d')}/") if word.startswith("RUN/") else word

    def call(self, words: Sequence[str]) -> None:
        """Run a command in this process, as its script would: without the seconds that importing everything takes."""
        program, *arguments = (self.filled_in(word) for word in words)
        # nerfstudio has a script called ns-export, too (docs/export.md)
        scripts = [script for script in entry_points(group="console_scripts") if script.name == program]
        script = next((one for one in scripts if one.value.startswith("sv4d_ns.")), scripts[0])
        before, place = (sys.argv, sys.excepthook), Path.cwd()
        sys.argv = [program, *arguments]
        os.chdir(self.folder)
        try:
            code = script.load()()
        except SystemExit as ended:
            code = ended.code
        finally:
            os.chdir(place)
            sys.argv, sys.excepthook = before
        assert not code, f"{shlex.join([program, *arguments])} ended with {code}"

    def shell(self, words: Sequence[str]) -> None:
        """Run a command in a process of its own."""
        line = shlex.join(self.filled_in(word) for word in words)
        environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(line, shell=True, cwd=self.folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and "Traceback" not in done.stderr, f"{line}\n{done.stdout}{done.stderr}"

    def serve(self, words: Sequence[str]) -> None:
        """Run a viewer until it answers a browser, and end it."""
        with closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        line = [str(BIN / words[0]), *(self.filled_in(word) for word in words[1:])]
        log = self.folder / f"{words[0]}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [*line, "--viewer.websocket-port", str(port)], cwd=self.folder, stdout=output, stderr=output
            )
            try:
                assert until(lambda: answers(port) or process.poll() is not None, READY_S)
                assert process.poll() is None, f"{shlex.join(line)} ended:\n{log.read_text()}"
                assert answers(port)
                time.sleep(1)  # a client's camera and the first render are set up by then
                assert process.poll() is None and "Traceback" not in log.read_text(), log.read_text()
            finally:
                process.terminate()
                process.wait(ENDS_S)


def answers(port: int) -> bool:
    """Whether a page is served."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def until(holds: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.2)
    return False
