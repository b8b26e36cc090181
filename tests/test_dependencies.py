"""What the package imports it also declares: a dependency's dependency may drop it any day."""

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sv4d_ns"
NOT_DECLARED = {
    "framing": "the Blender worker's own neighbour",
    "mathutils": "comes with bpy",
    "bpy": "the extra `render`, in a process of its own",
    "gsplat": "refines splats where it is installed (CUDA only)",
    "tinycudann": "has no release on PyPI; asked for by a flag",
    "dask_jobqueue": "asked for by a file of its settings",
    "comet_ml": "nerfstudio's, looked at where --vis names it",
}
"""Imported, and not ours to declare, with the reason."""


def imported() -> set[str]:
    """First parts of the names of all modules the package imports, wherever in a file it does so."""
    found = set()
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "method_configs").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                found.add(node.module.partition(".")[0])
    return found - {"sv4d_ns"} - set(sys.stdlib_module_names)


def declared() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    return {normal(re.split(r"[\s\[<>=!~;]", line)[0]) for line in [*project["dependencies"], *extras]}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_import_is_declared() -> None:
    distributions, known = packages_distributions(), declared()
    missing = {
        module
        for module in imported() - set(NOT_DECLARED)
        if not {normal(name) for name in distributions.get(module, [module])} & known
    }
    assert not missing


def test_extras_that_users_are_told_to_install_exist() -> None:
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    texts = [path.read_text() for path in [*PACKAGE.rglob("*.py"), *(ROOT / "docs").glob("*.md"), ROOT / "README.md"]]
    # the package is on no index, so its name with an extra leads nowhere
    assert not [text[at.start() : at.end() + 20] for text in texts for at in re.finditer(r"sv4d[-_]ns\[", text)]
    named = {name for text in texts for name in re.findall(r"pip install '\.\[(\w+)\]'|install_extra\('(\w+)'\)", text)}
    assert {name or other for name, other in named} <= extras and len(named) > 5
