"""Many tasks on one machine or many, by Dask.

A task is a function of plain values. A worker that dies in the middle of one loses nothing: Dask gives the task to
another, and the task itself goes on from what the first one had finished.
"""

import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sv4d_ns import __version__
from sv4d_ns.utils.errors import InputError, install_extra

if TYPE_CHECKING:
    from distributed import Client

CONNECT_SECONDS = 10
"""How long a scheduler may take to answer."""
ENDING = {
    "distributed.nanny": "Worker process still alive after",
    "distributed.worker.state_machine": "Async instruction for",
}
"""What Dask logs, and how it begins, where workers are ended in the middle of a task, as by Ctrl-C."""
TRIES = 4
"""Workers that may die at one task before it counts as failed, so that no task ends them all."""


def installed_version() -> str:
    """This package's version, as a worker sees it."""
    return __version__


@contextmanager
def open_cluster(cluster: str | None) -> Iterator["Client"]:
    """A Dask client; its own workers end with the block, those of a running scheduler stay.

    Args:
        cluster: "local:N" for N processes of this machine (None: one), "tcp://HOST:PORT" of a running scheduler, or a
            YAML file of dask-jobqueue settings (one kind of queue, for example `slurm`, with its `workers`).

    Raises:
        InputError: Dask is missing, the name means nothing, no scheduler answers, or workers have another version.
    """
    try:
        import dask
        from distributed import Client
    except ImportError as error:
        raise InputError(f"Work in processes of its own needs Dask: {install_extra('cluster')}.") from error
    # a dead worker is not the task's fault, up to a limit
    with dask.config.set({"distributed.scheduler.allowed-failures": TRIES, "distributed.comm.timeouts.connect": "10s"}):
        own = None if cluster and cluster.startswith(("tcp://", "tls://")) else _own_workers(cluster)
        try:
            client = Client(own if own is not None else cluster, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, TimeoutError, ValueError) as error:
            raise InputError(
                f"--cluster {cluster}: no Dask scheduler answers there; start one with 'dask scheduler', or use "
                "--cluster local:2 for processes of this machine."
            ) from error
        try:
            if own is None:
                _check_workers(client, str(cluster))
            yield client
        finally:
            client.close()
            if own is not None:
                own.close()


def _own_workers(cluster: str | None) -> Any:
    """A Dask cluster of processes of this machine, or of jobs in a queue."""
    from distributed import LocalCluster

    kind, _, number = (cluster or "local:1").partition(":")
    if kind == "local" and number.isdigit() and int(number) > 0:
        _leave_out_endings()
        return LocalCluster(
            n_workers=int(number), threads_per_worker=1, processes=True, dashboard_address=None, preload=[__name__]
        )
    path = Path(cluster or "")
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return _queue(path)
    raise InputError(
        f"--cluster {cluster} is none of local:N (N processes of this machine), tcp://HOST:PORT (a Dask scheduler), "
        "and no YAML file of dask-jobqueue settings."
    )


def dask_setup(worker: object) -> None:
    """Dask calls this in each of this machine's workers: Ctrl-C in their terminal is the business of the process that
    started them, which ends them.

    A worker that ends by itself leaves tracebacks of Dask's. A handler instead of `SIG_IGN`, because a program that the
    task starts would inherit the latter, and it is to hear of the interrupt and keep what it has done.
    """
    signal.signal(signal.SIGINT, lambda *_: None)
    _leave_out_endings()


def _leave_out_endings() -> None:
    for name in ENDING:
        logging.getLogger(name).addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(ENDING[record.name])


def _queue(path: Path) -> Any:
    """A dask-jobqueue cluster from settings such as {slurm: {cores: 8, memory: 24GB, workers: 4}}."""
    import yaml

    try:
        import dask_jobqueue
    except ImportError as error:
        raise InputError(f"--cluster {path} needs dask-jobqueue: pip install dask-jobqueue.") from error
    kinds = {"slurm": "SLURMCluster", "pbs": "PBSCluster", "sge": "SGECluster", "lsf": "LSFCluster"}
    try:
        values = yaml.safe_load(path.read_text())
        ((kind, settings),) = values.items()
        workers = int(settings.pop("workers"))
        made = getattr(dask_jobqueue, kinds[kind])(**settings)
    except (OSError, yaml.YAMLError, AttributeError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--cluster {path} is not one kind of queue ({', '.join(kinds)}) with its settings and 'workers': N "
            f"({' '.join(str(error).split())})."
        ) from error
    made.scale(workers)
    return made


def _check_workers(client: "Client", cluster: str) -> None:
    """Raise InputError where a running scheduler has no worker, or one without this version of the package."""
    if not client.scheduler_info()["workers"]:
        raise InputError(f"--cluster {cluster}: the scheduler has no worker; start some with 'dask worker {cluster}'.")
    answers = client.run(installed_version, on_error="return")
    for worker, version in answers.items():
        if version != __version__:
            found = "does not have sv4d-ns" if isinstance(version, BaseException) else f"has sv4d-ns {version}"
            raise InputError(f"The worker {worker} {found}, and this is {__version__}: install the same everywhere.")


def run_all(
    client: "Client",
    task: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    on_result: Callable[[int, Any], None],
) -> None:
    """Run a task for each tuple of arguments on any workers, and hand over results as they come.

    Args:
        client: from `open_cluster`.
        task: a function of a module that workers can import.
        arguments: of each call.
        on_result: called with the number of a call and what it returned; a call that ended every worker it was given
            to, or raised, hands over the exception.
    """
    from distributed import as_completed

    futures = {client.submit(task, *values, pure=False): number for number, values in enumerate(arguments)}
    for future in as_completed(list(futures), loop=client.loop):
        on_result(futures[future], future.exception() if future.status == "error" else future.result())
