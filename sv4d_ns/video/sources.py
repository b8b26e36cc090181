"""What a user names as the data: a file, a folder, a pattern, and what only looks like one of them."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote

from PIL import features

from sv4d_ns.utils.errors import InputError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}) | (
    {".avif"} if features.check("avif") else set()
)
FILM_SUFFIXES = frozenset({".mp4", ".mov", ".m4v", ".webm", ".mkv", ".avi", ".gif", ".apng", ".webp", ".avif"})

HEAD_BYTES = 512
"""So much of the beginning of a file tells what it is."""

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", re.DOTALL)
"""Two letters or more before the colon: `C:/` is a drive. One slash or more: a `Path` has lost the second."""
_NUMBER = re.compile(r"%0?(\d*)d")
"""The number of a picture in a pattern as FFmpeg and printf write it: %d, %04d."""

_FOREIGN = (
    (rb"version https://git-lfs", "a Git LFS pointer: fetch the file itself with `git lfs pull`"),
    (rb"(\.git/|\.\./|/)*annex/objects/", "a git-annex pointer: fetch the file itself with `git annex get`"),
    (
        rb"(?i)(\xef\xbb\xbf)?\s*(<!--.*?-->\s*)?<(!doctype html|html|head|body|script|title)",
        "a web page saved under this name: open its address in a browser and download the file itself",
    ),
    (rb"(\xef\xbb\xbf)?\s*<(\?xml|error)", "an XML file, perhaps a server's error message: download it again"),
    (rb"\s*\{\s*\"", "a JSON file, perhaps a server's error message: download it again"),
    (rb"PK\x03\x04|Rar!|7z\xbc\xaf|\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd", "a packed archive: unpack it first"),
    (
        rb"glTF|PXR-USDC|#usda|BLENDER|Kaydara FBX|ply\r?\n",
        "a 3D model already: a film of the object is wanted ('sv4d data render' makes training data of models)",
    ),
    (rb"!!python/object", "the config of a run: --load-config takes it"),
    (rb"%PDF", "a PDF: export its pictures or give the film itself"),
    (rb"\x00\x05\x16[\x00\x07]", "a side file of macOS: take the one of the same name without '._'"),
    (rb"#EXTM3U", "a play list: download the film itself"),
)
"""How files that are no pictures begin, what they are, and what to do."""


def local_path(path: Path) -> Path:
    """The place on this machine that is meant: `~` and `file://` are resolved, anything else is left as it is.

    Raises:
        InputError: it is the address of something on the network.
    """
    if os.path.lexists(path):
        return path
    address = _ADDRESS.fullmatch(str(path))
    if address is None:
        return _without_tilde(path)
    scheme, rest = address.groups()
    if scheme.lower() != "file":
        raise InputError(f"{scheme}://{rest} is an address on the network: download the video first and give the file.")
    return Path("/" + unquote(rest.removeprefix("localhost/")))


def _without_tilde(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise InputError(f"{path} names a home folder that does not exist: give the whole path.") from error


def is_pattern(path: Path) -> bool:
    """Whether the name of a path stands for several files: `shots/*.png`, `frame_%04d.png`."""
    return not os.path.lexists(path) and bool(any(letter in path.name for letter in "*?[") or _NUMBER.search(path.name))


def source_files(path: Path) -> list[Path]:
    """The pictures of a folder or pattern in natural order (2 before 10); any other path alone, whether it exists.

    Hidden files are no pictures.
    """
    if path.is_dir():
        return _natural_order(entry for entry in path.iterdir() if entry.suffix.lower() in IMAGE_SUFFIXES)
    if not is_pattern(path):
        return [path]
    if _NUMBER.search(path.name) is None:
        return _natural_order(path.parent.glob(path.name))
    parts = _NUMBER.split(path.name)  # literal, width, literal, width, ...
    name = re.escape(parts[0])
    for width, literal in zip(parts[1::2], parts[2::2], strict=True):
        name += rf"\d{{{int(width or 1)},}}" + re.escape(literal)
    return _natural_order(file for file in path.parent.glob("*") if re.fullmatch(name, file.name))


def source_name(path: Path) -> str:
    """What results made from `path` are called: a file by its stem, pictures by the folder they lie in."""
    path = local_path(path)
    if is_pattern(path):
        path = path.parent
        name = Path(os.path.abspath(path)).name  # noqa: PTH100  (`resolve` would follow links to another name)
    elif os.path.isdir(path):  # noqa: PTH112  (false for a name the system cannot hold)
        name = Path(os.path.abspath(path)).name  # noqa: PTH100
    else:
        name = path.stem
    return name.strip(". ") or "video"


def what_it_is(head: bytes) -> str | None:
    """What a file is that begins like this and is no picture, and what to do; None where that cannot be told."""
    for beginning, sentence in _FOREIGN:
        if re.match(beginning, head, re.DOTALL):
            return sentence
    return None


def check_no_run(folder: Path) -> None:
    """Raise `InputError` where a folder is that of a run, whose contact sheet is no film."""
    if (folder / "config.yml").is_file() and (folder / "nerfstudio_models").is_dir():
        raise InputError(
            f"{folder} is the folder of a run, not a video: its commands take --load-config {folder / 'config.yml'}, "
            f"and the views it was fitted to, {folder / 'views'}, can be given as data."
        )


def check_one_series(source: Path, pictures: list[Path]) -> None:
    """Raise `InputError` where pictures are of more than one series: with their masks, twice, of two cameras.

    Pictures of a series differ in their number only; a series without numbers (front.png, side.png) is one, too.
    """
    groups: dict[str, list[Path]] = defaultdict(list)
    for picture in pictures:
        groups[re.sub(r"[\d\s()_.-]+", " ", picture.stem.lower()).strip()].append(picture)
    numbered = [group for group in groups.values() if len(group) > 1]
    if numbered and len(groups) > 1:
        first, other = sorted(groups.values(), key=len)[-2:][::-1]
        what = "masks, another camera or a cover"
    else:
        first, other = next((pair for group in numbered if (pair := _split(group))), ([], []))
        what = "the same pictures again, or another camera"
    if other:
        raise InputError(
            f"{source} holds more than one series of pictures ({first[0].name} and {len(first) - 1} like it, "
            f"{other[0].name} and {len(other) - 1} like it: {what}?): keep one of them in a folder of its own."
        )


def _split(group: list[Path]) -> tuple[list[Path], list[Path]] | None:
    """Two series in one: pictures of the same number, or two numbers of which each goes with all of the other."""
    numbers = {picture: tuple(int(part) for part in re.findall(r"\d+", picture.stem)) for picture in group}
    repeated = [picture for picture in group if Counter(numbers.values())[numbers[picture]] > 1]
    if repeated:
        seen: set[tuple[int, ...]] = set()
        first: list[Path] = []
        again: list[Path] = []
        for picture in group:
            (again if numbers[picture] in seen else first).append(picture)
            seen.add(numbers[picture])
        return first, again
    if len({len(number) for number in numbers.values()}) > 1:
        return None
    columns = [set(column) for column in zip(*numbers.values(), strict=True)]
    varying = [index for index, column in enumerate(columns) if len(column) > 1]
    if len(varying) != 2 or len(columns[varying[0]]) * len(columns[varying[1]]) != len(group):
        return None
    camera = min(varying, key=lambda index: len(columns[index]))
    value = numbers[group[0]][camera]
    return (
        [picture for picture in group if numbers[picture][camera] == value],
        [picture for picture in group if numbers[picture][camera] != value],
    )


def _natural_order(paths: Iterable[Path]) -> list[Path]:
    def key(path: Path) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name.lower())]

    return sorted((path for path in paths if path.is_file() and not path.name.startswith(".")), key=key)
