"""Every command line of README.md and docs/ runs as it stands there, with flags appended that make it short.

In the ordinary suite those that are short anyway; `scripts/commands` runs all that can run on a machine like this, each
in a process of its own.
"""

import os
from pathlib import Path

import pytest
from documents import RULES, Command, code_lines, commands, rule_for, words
from workplace import Workplace

ALL = bool(os.environ.get("SV4D_ALL_COMMANDS"))
RUNNING = [command for command in commands() if (rule := rule_for(command)) and rule.where in ("quick", "long")]


def train(place: Workplace, method: str) -> None:
    """The run that other commands open: by the README's own line."""
    line = next(command for command in RUNNING if command.text == f"ns-train {method} --data video.mp4")
    run(place, line)


def run(place: Workplace, command: Command) -> None:
    rule = rule_for(command)
    assert rule is not None
    asked = words(command, rule)
    filled = tuple(place.filled_in(word) for word in asked)
    if filled in place.done:  # another document has the same command
        return
    place.done.add(filled)
    if asked[0] == "ns-viewer":
        place.serve(asked)
    elif ALL:
        place.shell(asked)
    else:
        place.call(asked)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("commands"), train)


def test_every_command_line_has_a_rule() -> None:
    without = [str(command) for command in commands() if rule_for(command) is None]
    assert not without, "give these a rule in tests/commands/documents.py: " + "\n".join(without)


def test_every_rule_has_a_command_line_and_a_reason_where_it_needs_one() -> None:
    used = {rule_for(command) for command in commands()}
    assert [rule.pattern for rule in RULES if rule not in used] == []
    assert [rule.pattern for rule in RULES if bool(rule.why) != (rule.where == "elsewhere")] == []


def test_scripts_named_in_commands_that_do_not_run_here_exist() -> None:
    root = Path(__file__).parents[2]
    named = {
        word for command in commands() for word in command.text.split() if word.startswith(("benchmarks/", "scripts/"))
    }
    assert named and [word for word in sorted(named) if not (root / word).is_file()] == []


def test_commands_are_found_in_both_kinds_of_code_blocks() -> None:
    text = "Text ns-train no\n\n    ns-eval a \\\n        --b c   # why\n\n```sh\nsv4d plan\n```\n"
    assert list(code_lines(text)) == [(3, "ns-eval a --b c   # why"), (7, "sv4d plan")]


QUICK = [command for command in RUNNING if ALL or rule_for(command).where == "quick"]  # type: ignore[union-attr]


@pytest.mark.parametrize("command", QUICK, ids=str)
def test_it_runs_as_it_stands(place: Workplace, command: Command) -> None:
    if command.text.startswith(("ns-export", "ns-render")):
        # two documents may name one place for their results
        for name in ("out", "page", "exports"):
            if (place.folder / name).exists():
                (place.folder / name).rename(place.folder / f"{name} of {command.line}")
    run(place, command)
    if command.text.startswith("ns-train"):
        method = command.text.split()[1]
        assert (place.folder / place.run_of(method) / "summary.json").is_file()


def test_the_second_methods_runs_open_in_the_viewer(place: Workplace) -> None:
    place.serve(["ns-viewer", "--load-config", str(place.run_of("4diffusion") / "config.yml")])
