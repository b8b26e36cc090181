"""`sv4d app`: the page and what it asks for. One process, one event loop; all heavy work is in other processes.

Visitors are taken for strangers: they name jobs by number and files by our names for them, never by paths. What changes
anything must come from this very page: browsers state the page a request is from, and no other page may set our header.
"""

import asyncio
import ipaddress
import json
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, cast, get_args
from urllib.parse import quote, unquote

import tyro

from sv4d_ns.app.jobs import Crop, Store, title_of
from sv4d_ns.app.runner import Runner, Settings
from sv4d_ns.app.seen import brief, described, download_name, files
from sv4d_ns.app.work import PAGE_FILE
from sv4d_ns.runs.layout import APP_LOCK
from sv4d_ns.utils.errors import InputError, install_extra
from sv4d_ns.utils.files import sole_use
from sv4d_ns.video.matting import BUNDLED
from sv4d_ns.video.sources import FILM_SUFFIXES

try:
    from tornado import httputil, iostream
    from tornado.httpserver import HTTPServer
    from tornado.web import Application, HTTPError, RequestHandler, StaticFileHandler, stream_request_body
except ImportError as error:
    raise InputError(f"'sv4d app' needs tornado, which is not installed: {install_extra('app')}.") from error

PAGE = {"": "index.html", "app.js": "app.js", "style.css": "style.css"}
OURS = "X-Sv4d-App"
"""Header of every request that changes something: another site's page cannot send it without being allowed to."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; media-src 'self'; "
    "connect-src 'self'; frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
RESULT_POLICY = (
    "sandbox allow-scripts allow-downloads; default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)
"""Of the exported page, which holds its own script and nothing of ours."""
BODY_BYTES = 10_000
"""Of a request that is no upload."""


@dataclass(frozen=True)
class App:
    """A page on this machine: drop a video, see what will be made of it, watch the run, play and download the result.

    Settings of `ns-train sv4d` go behind `--`, for example `sv4d app -- --max-num-iterations 1800`.
    """

    out: Path = Path("outputs/app")
    """Uploads, runs and results of this page; earlier ones are listed again."""
    host: str = "127.0.0.1"
    """Address to listen on. By default only this machine can open the page; 0.0.0.0 is every network it is in."""
    port: int = 7014
    """Port to listen on; 0 takes a free one."""
    max_upload_mb: float = 500.0
    """Largest video that is taken, in millions of bytes."""
    resolution: int = 128
    """Of the exported mesh, as for ns-export."""
    max_faces: int = 20_000
    """Of the exported mesh, as for ns-export."""
    texture_size: int | None = None
    """Of the exported mesh, as for ns-export."""


@dataclass(frozen=True)
class Place:
    """What the handlers know."""

    store: Store
    runner: Runner
    max_bytes: int


class _Guarded(RequestHandler):
    """Refuses what does not come from this page, and answers in JSON."""

    def initialize(self, place: Place) -> None:
        self.place = place

    def set_default_headers(self) -> None:
        for name, value in HEADERS.items():
            self.set_header(name, value)

    def prepare(self) -> Any:
        check_origin(self.request)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """One sentence; nothing of our insides."""
        error = kwargs.get("exc_info", (None, None))[1]
        if isinstance(error, InputError):
            self.set_status(400)
            sentence = str(error)
        elif isinstance(error, HTTPError) and error.log_message:
            sentence = error.log_message
        else:
            sentence = "The server could not answer; its terminal says more."
        self.finish({"error": sentence})

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        if not isinstance(value, InputError | HTTPError | iostream.StreamClosedError):
            super().log_exception(typ, value, tb)


class _Page(_Guarded):
    """The page itself."""

    def get(self, name: str | None = None) -> None:
        if name not in PAGE:
            raise HTTPError(404, "There is no such page here.")
        kind = {"html": "text/html", "js": "text/javascript", "css": "text/css"}[PAGE[name].rpartition(".")[2]]
        self.set_header("Content-Type", f"{kind}; charset=utf-8")
        self.finish(resources.files(__package__).joinpath("page", PAGE[name]).read_bytes())


@stream_request_body
class _Jobs(_Guarded):
    """All jobs (GET), and a new one (POST: the video is the body, its name a header)."""

    upload: Path | None = None

    def prepare(self) -> None:
        super().prepare()
        if self.request.method != "POST":
            return
        size = self.request.headers.get("Content-Length", "")
        if not size.isdecimal():
            raise HTTPError(411, "The size of the video is not stated: use the page to upload it.")
        self.title = title_of(unquote(self.request.headers.get("X-File-Name", "")))
        self.place.store.check_upload(self.title, int(size), self.place.max_bytes)
        cast(Any, self.request.connection).set_max_body_size(self.place.max_bytes)
        self.upload = self.place.store.new_upload()
        self.file = self.upload.open("xb")

    def data_received(self, chunk: bytes) -> None:
        if self.upload is not None:
            self.file.write(chunk)

    def get(self) -> None:
        import importlib.util

        known = [BUNDLED, *(["isnet-general-use"] if importlib.util.find_spec("rembg") else [])]
        jobs = [brief(job) for job in self.place.store.all()]
        limits = {"max_bytes": self.place.max_bytes, "suffixes": sorted(FILM_SUFFIXES), "mattings": known}
        self.finish({"jobs": jobs, **limits})

    def post(self) -> None:
        assert self.upload is not None
        self.file.close()
        job = self.place.store.add(self.upload, self.title)
        self.place.runner.wake()
        self.finish(brief(job))

    def on_connection_close(self) -> None:
        self.on_finish()

    def on_finish(self) -> None:
        if self.upload is not None:
            self.file.close()
            self.upload.unlink(missing_ok=True)


class _Job(_Guarded):
    """One job."""

    def get(self, id: str) -> None:
        place = self.place
        self.finish(described(place.store, place.runner, place.store.get(id)))


class _Action(_Guarded):
    """Something to do with a job."""

    def post(self, id: str, action: str) -> None:
        place = self.place
        job = place.store.get(id)
        if action == "look":
            place.runner.look(job, *_choices(self.request.body))
        elif action == "start":
            place.runner.start(job)
        elif action == "cancel":
            place.runner.cancel(job)
        else:
            job.allow("delete")
            place.store.delete(job)
        self.finish({})


class _File(StaticFileHandler):
    """A file of a job by our name for it (StaticFileHandler brings ranges, which video elements ask for)."""

    def initialize(self, place: Place) -> None:  # type: ignore[override]
        super().initialize(str(place.store.root))
        self.place = place

    def prepare(self) -> None:
        check_origin(self.request)

    def set_default_headers(self) -> None:
        for name, value in HEADERS.items():
            self.set_header(name, value)

    def parse_url_path(self, url_path: str) -> str:
        id, _, key = url_path.partition("/")
        try:
            job = self.place.store.get(id)
        except InputError as error:
            raise HTTPError(404) from error
        path = files(self.place.store, job).get(key)
        if path is None:
            raise HTTPError(404)
        saved = self.get_argument("save", None) is not None
        if key == PAGE_FILE and not saved:
            self.set_header("Content-Security-Policy", RESULT_POLICY)
            self.set_header("X-Frame-Options", "SAMEORIGIN")
        if saved:
            self.set_header("Content-Disposition", f"attachment; filename*=UTF-8''{quote(download_name(job, path))}")
        return str(path)

    def compute_etag(self) -> str | None:
        """tornado's own remembers what a path held first; ours change."""
        assert self.absolute_path is not None
        stat = Path(self.absolute_path).stat()
        return f'"{stat.st_mtime_ns:x}-{stat.st_size:x}"'


HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
    "Server": "sv4d",
}


def check_origin(request: httputil.HTTPServerRequest) -> None:
    """Refuse a request under a name that is not this machine's, or that changes something from another site's page.

    A page elsewhere can let a name of its own stand for 127.0.0.1; addresses cannot be made to lie.

    Raises:
        HTTPError: 403.
    """
    if not is_own_name(httputil.split_host_and_port(request.host.lower())[0]):
        raise HTTPError(403, "This page does not answer to that name: use the address the server printed.")
    if request.method in ("GET", "HEAD"):
        return
    origin = request.headers.get("Origin")
    if origin not in (None, f"{request.protocol}://{request.host}") or OURS not in request.headers:
        raise HTTPError(403, "This request does not come from the page of this server.")


def is_own_name(name: str) -> bool:
    """Whether a host name in a request stands for this machine beyond doubt."""
    with suppress(ValueError):
        ipaddress.ip_address(name.strip("[]"))
        return True
    own = socket.gethostname().lower()
    return name in ("localhost", own, f"{own}.local", socket.getfqdn().lower())


def _choices(body: bytes) -> tuple[str, str]:
    """Background model and crop, of what there is.

    Raises:
        InputError: something else is asked for.
    """
    try:
        asked = json.loads(body)
        matting, crop = asked["matting"], asked["crop"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError("The choice of background and crop cannot be read: reload the page.") from error
    if matting not in (BUNDLED, "isnet-general-use") or crop not in get_args(Crop):
        raise InputError("There is no such choice of background or crop: reload the page.")
    return matting, crop


def application(place: Place) -> Application:
    """The addresses of the page."""
    given = {"place": place}
    return Application(
        [
            (r"/(|app\.js|style\.css)", _Page, given),
            (r"/api/jobs", _Jobs, given),
            (r"/api/jobs/([0-9a-f]+)", _Job, given),
            (r"/api/jobs/([0-9a-f]+)/(look|start|cancel|delete)", _Action, given),
            (r"/files/([0-9a-f]+/[A-Za-z0-9_.-]+)", _File, given),
        ],
        default_handler_class=_Page,
        default_handler_args=given,
        log_function=lambda handler: None,
    )


async def serve(config: App, train: Sequence[str]) -> None:
    """Answer until Ctrl-C or the end of the process is asked for.

    Raises:
        InputError: the address cannot be had.
    """
    store = Store(config.out)
    store.recover()
    settings = Settings(tuple(train), config.resolution, config.max_faces, config.texture_size)
    runner = Runner(store, settings)
    place = Place(store, runner, int(config.max_upload_mb * 1e6))
    server = HTTPServer(application(place), max_body_size=BODY_BYTES, max_buffer_size=4_000_000)
    try:
        server.listen(config.port, config.host)
    except OSError as error:
        raise InputError(
            f"--host {config.host} --port {config.port} cannot be had ({error}): choose another port, or 0 for any."
        ) from error
    announce(config, next(iter(server._sockets.values())).getsockname()[1])
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for sign in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(sign, ended.set)
    work = asyncio.create_task(runner.serve())
    await asyncio.wait({work, asyncio.create_task(ended.wait())}, return_when=asyncio.FIRST_COMPLETED)
    server.stop()
    if not work.done():
        print("Stopping; a run that is under way is saved and can go on later.", flush=True)
        await runner.close()
    await work


def announce(config: App, port: int) -> None:
    """Where the page is, and who can open it."""
    shown = config.host if config.host not in ("0.0.0.0", "::", "") else socket.gethostname()
    print(f"Open http://{f'[{shown}]' if ':' in shown else shown}:{port}/ in a browser; Ctrl-C ends the server.")
    if config.host not in ("127.0.0.1", "localhost", "::1"):
        print(
            f"Note: with --host {config.host} everyone who reaches this machine at port {port} can upload videos, use "
            "its processor and see and delete all runs of this page; there is no password."
        )
    print(f"Uploads, runs and results: {config.out.absolute()}", flush=True)


def command(arguments: Sequence[str]) -> None:
    """`sv4d app`.

    Raises:
        InputError: the folder is another server's, or the address cannot be had.
    """
    words = list(arguments)
    split = words.index("--") if "--" in words else len(words)
    config = tyro.cli(App, prog="sv4d app", args=words[:split])
    if config.max_upload_mb <= 0:
        raise InputError(f"--max-upload-mb {config.max_upload_mb:g} lets nothing in: give a number above 0.")
    if not 0 <= config.port < 1 << 16:  # tornado would take the lower 16 bits
        raise InputError(f"--port {config.port} is no port: give one up to 65535, or 0 for any that is free.")
    taken = f"Another 'sv4d app' works in {config.out}: open its page, or give another --out."
    with sole_use(config.out, APP_LOCK, taken):
        asyncio.run(serve(config, words[split + 1 :]))
