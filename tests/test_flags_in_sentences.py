"""No sentence names a flag that the command it speaks of does not have: read from the sources, nothing is imported."""

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sv4d_ns"
_SPEC = importlib.util.find_spec("nerfstudio")
assert _SPEC is not None and _SPEC.submodule_search_locations is not None
NERFSTUDIO = Path(next(iter(_SPEC.submodule_search_locations)))
FLAG = re.compile(r"(?<![\w-])(?<!var\()--([a-z][\w-]*(?:\.[a-z][\w-]*)*)(?![\w:.-]*:)")
"""But for CSS, whose variables look like flags."""
COMMAND = re.compile(r"\b(ns-[a-z]+|sv4d [a-z]+)\b")


def fields(path: Path, *classes: str) -> set[str]:
    """Flags of the fields of some data classes of a file (of all, where none is named), and the aliases they have."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef) and (not classes or node.name in classes):
            items = [item for item in node.body if isinstance(item, ast.AnnAssign)]
            names = {item.target.id.replace("_", "-"): ast.unparse(item.annotation) for item in items}  # type: ignore[union-attr]
            found |= {*names, *(f"no-{name}" for name, kind in names.items() if kind == "bool")}
            found |= {text[2:] for text in strings(node) if FLAG.fullmatch(text)}
    assert found, (path, classes)
    return found


def below(prefix: str, names: set[str]) -> set[str]:
    return {f"{prefix}.{name}" for name in names}


def strings(tree: ast.AST) -> Iterator[str]:
    """The texts of a tree, f-strings with a placeholder for what is filled in."""
    inside = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inside |= {id(part) for part in node.values}
            yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)  # type: ignore[misc]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.value


def training_flags() -> set[str]:
    ours, theirs = PACKAGE / "plugin", NERFSTUDIO / "configs" / "base_config.py"
    return (
        fields(ours / "base_trainer.py")
        | fields(ours / "trainer.py")
        | fields(ours / "distillation_trainer.py")
        | fields(NERFSTUDIO / "configs" / "experiment_config.py")
        | fields(NERFSTUDIO / "engine" / "trainer.py", "TrainerConfig")
        | below("machine", fields(theirs, "MachineConfig"))
        | below("viewer", fields(theirs, "ViewerConfig"))
        | below("logging", fields(theirs, "LoggingConfig"))
        | below("logging.local-writer", fields(theirs, "LocalWriterConfig"))
        | below("pipeline", fields(ours / "pipeline.py") | fields(ours / "distillation_pipeline.py"))
        | below("pipeline.datamanager", fields(ours / "datamanager.py", "SV4DDataManagerConfig"))
        | {"pipeline.synthesis"}
        | below("pipeline.model", fields(ours / "model.py") | fields(ours / "distillation_model.py"))
        | below("pipeline.model.losses", fields(PACKAGE / "fitting" / "settings.py", "LossWeights"))
        | {"optimizers", "optimizers.GROUP.optimizer.lr", "help"}
        | fields(ours / "dataparser.py")
    )


def command_flags() -> dict[str, set[str]]:
    scripts, doctor = NERFSTUDIO / "scripts", fields(PACKAGE / "cli" / "doctor.py", "Doctor")
    training = set().union(*(dataclasses_of(path) for path in (PACKAGE / "diffusion_training").rglob("*.py")))
    exporters = fields(PACKAGE / "export" / "command.py") | fields(scripts / "exporter.py")
    return {
        NERFSTUDIOS: exporters | fields(scripts / "render.py") | fields(scripts / "eval.py"),
        "sv4d batch": fields(PACKAGE / "cli" / "batch.py") | training_flags(),  # it hands on those of ns-train
        "sv4d app": dataclasses_of(PACKAGE / "app" / "server.py")
        | dataclasses_of(PACKAGE / "app" / "work.py")  # what it says to its own programs, as to the doctor
        | doctor
        | training_flags(),
        "ns-train": training_flags(),
        "ns-viewer": fields(scripts / "viewer" / "run_viewer.py")
        | below("viewer", fields(NERFSTUDIO / "configs" / "base_config.py", "ViewerConfig")),
        "ns-render": fields(scripts / "render.py"),
        "ns-eval": fields(scripts / "eval.py"),
        "ns-export": exporters,
        "sv4d export": exporters,
        "sv4d render": fields(PACKAGE / "movies" / "command.py"),
        "sv4d evaluate": fields(PACKAGE / "evaluation" / "command.py"),
        "sv4d doctor": doctor | below("pipeline.datamanager", doctor) | {"version"},
        "sv4d plan": fields(PACKAGE / "diffusion" / "planner" / "command.py"),
        "sv4d convert": fields(PACKAGE / "diffusion" / "weights" / "convert.py"),
        "sv4d cache": fields(PACKAGE / "runs" / "cache.py"),
        "sv4d train": training | below("model", training) | {"config"},
        "sv4d data": set().union(*(dataclasses_of(path) for path in (PACKAGE / "training_data").rglob("*.py"))),
    }


def dataclasses_of(path: Path) -> set[str]:
    try:
        return fields(path)
    except AssertionError:
        return set()


NERFSTUDIOS = "ns-viewer, ns-render, ns-eval or ns-export"
SPEAKERS = {
    "app": "sv4d app",
    "export": "ns-export",
    "movies": "sv4d render",
    "evaluation": "sv4d evaluate",
    "diffusion/planner": "sv4d plan",
    "diffusion/weights": "sv4d convert",
    "diffusion_training": "sv4d train",
    "training_data": "sv4d data",
    "runs/cache.py": "sv4d cache",
    "cli/doctor.py": "sv4d doctor",
    "cli/main.py": "sv4d doctor",
    "cli/batch.py": "sv4d batch",
    "runs/cluster.py": "sv4d batch",
    "plugin/nerfstudio_commands.py": NERFSTUDIOS,
}
"""Rooms and files whose sentences are those of one command; all others speak to the users of ns-train."""
FOREIGN = {
    "training_data/blender_worker.py": "Blender's own arguments",
    "training_data/blender.py": "Blender's own arguments",
}


def speaker(file: str) -> str:
    return next((command for place, command in SPEAKERS.items() if file.startswith(place)), "ns-train")


def unknown_flags() -> list[str]:
    known, found = command_flags(), []
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE).as_posix()
        if file in FOREIGN:
            continue
        for text in strings(ast.parse(path.read_text())):
            for match in FLAG.finditer(text):
                named = COMMAND.findall(text[: match.start()])
                possible = [named[-1]] if named and named[-1] in known else [speaker(file)]
                # a word in between may begin another sentence, in which the room speaks for itself
                possible.append(speaker(file))
                flag = match[1].rstrip(".").replace("_", "-")
                others = "pip install" in text[: match.start()] or flag == "help"
                if text[match.end() :].startswith(".{}"):  # one of a family, whose names are filled in
                    others = any(name.startswith(flag) for command in possible for name in known[command])
                if not others and not any(flag in known[command] for command in possible):
                    found.append(f"{file}: --{match[1]} is no flag of {' or '.join(possible)}: {text[:100]!r}")
    return found


def test_every_flag_in_a_sentence_exists() -> None:
    assert not unknown_flags(), "\n".join(unknown_flags())


@pytest.mark.parametrize("command", ["ns-train", "ns-export", "sv4d evaluate"])
def test_the_reading_finds_flags(command: str) -> None:
    expected = {"ns-train": "pipeline.datamanager.max-frames", "ns-export": "max-faces", "sv4d evaluate": "fetch"}
    assert expected[command] in command_flags()[command]
    assert "fetch" not in command_flags()["ns-train"]
