"""Rooms import downwards only: the order of docs/architecture.md, read from the sources."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "sv4d_ns"
FLOORS = (
    ("utils",),
    ("geometry",),
    ("video",),
    ("views", "metrics"),
    ("field", "diffusion"),
    ("synthesis",),
    ("fitting",),
    ("distillation",),
    ("runs",),
    ("movies", "export"),
    ("evaluation",),
    ("plugin",),
    ("training_data",),
    ("diffusion_training",),
    ("cli",),
    ("app",),
    ("method_configs",),
)
"""From the ground up. A room imports itself and lower floors, never its own floor's other room or a higher one."""
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}


def imported(path: Path) -> Iterator[str]:
    """Names of this package's modules (or of things in them) that a file imports, wherever it does so."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def upward() -> set[tuple[str, str]]:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        file = path.relative_to(PACKAGE)
        if len(file.parts) == 1:
            continue
        room = file.parts[0]
        for name in imported(path):
            other = name.split(".")[1] if name.startswith("sv4d_ns.") else None
            if other in FLOOR and other != room and FLOOR[other] >= FLOOR[room]:
                found.add((file.as_posix(), name.rpartition(".")[0]))
    return found


def test_every_folder_of_the_package_is_a_room() -> None:
    rooms = {path.parent.relative_to(PACKAGE).parts[0] for path in PACKAGE.glob("*/**/*.py")}
    assert rooms | {"method_configs"} == set(FLOOR)


def test_no_room_imports_a_higher_one() -> None:
    assert not upward()
