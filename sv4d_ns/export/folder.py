"""The folder an export writes to."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sv4d_ns.utils.errors import InputError


@contextmanager
def output_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """Make `folder` and prove that it can be written to; folders made here go again if the block fails.

    Raises:
        InputError: it has files in it and `overwrite` is off, it is a file, or it cannot be written to.
    """
    made: list[Path] = []
    try:
        if folder.is_dir() and not overwrite and any(folder.iterdir()):
            raise InputError(
                f"--output-dir {folder} exists and has files in it: give a new folder, or add --overwrite to replace "
                "files of the same name."
            )
        for part in [*reversed(folder.absolute().parents), folder.absolute()]:
            if not part.is_dir():
                part.mkdir()
                made.append(part)
        probe = folder / ".sv4d-write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        _remove_empty(made)
        raise InputError(
            f"--output-dir {folder} cannot be written to ({error.strerror}): give a folder you own."
        ) from error
    try:
        yield folder
    except BaseException:
        _remove_empty(made)
        raise


@contextmanager
def no_folder_left(folder: Path) -> Iterator[None]:
    """For what makes its output folder before it looks whether it can work: where it fails, folders that were not
    there before and are empty go again."""
    missing = [part for part in [*reversed(folder.absolute().parents), folder.absolute()] if not part.exists()]
    try:
        yield
    except BaseException:
        _remove_empty(missing)
        raise


def _remove_empty(folders: list[Path]) -> None:
    for folder in reversed(folders):
        with suppress(OSError):  # someone has put a file there meanwhile, or it was not made at all
            folder.rmdir()
