"""A config from a stranger builds nothing but settings."""

import importlib
from pathlib import Path

import pytest
import yaml
from sv4d_ns.method_configs.four_diffusion import method as four_diffusion
from sv4d_ns.method_configs.sv4d import method as sv4d

from sv4d_ns.runs.safe_config import check_config
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.moved import MOVED


def test_our_own_config_passes(tmp_path: Path) -> None:
    path = tmp_path / "config.yml"
    path.write_text(yaml.dump(sv4d.config))
    check_config(path)


OLD_RUNS = sorted((Path(__file__).parent / "data" / "old_runs").glob("*.yml"))


@pytest.mark.parametrize("path", OLD_RUNS, ids=lambda path: path.stem)
def test_the_config_of_an_older_run_opens(path: Path) -> None:
    """Written before the modules moved into their rooms; read as nerfstudio's own commands read it."""
    check_config(path)
    config = yaml.load(path.read_text(), Loader=yaml.Loader)
    current = {"sv4d": sv4d, "4diffusion": four_diffusion}[path.stem].config
    assert type(config) is type(current)
    assert type(config.pipeline) is type(current.pipeline)
    assert type(config.pipeline.model) is type(current.pipeline.model)
    assert config.pipeline.model._target is current.pipeline.model._target
    assert config.optimizers.keys() >= current.optimizers.keys()
    for name, parts in current.optimizers.items():
        assert {k: type(v) for k, v in config.optimizers[name].items()} == {k: type(v) for k, v in parts.items()}


def test_moved_names_give_the_modules_of_today() -> None:
    for old, new in MOVED.items():
        module = importlib.import_module(old)
        assert module is importlib.import_module(new)
        assert module.__name__ == new
        assert module.__spec__ is not None and module.__spec__.name == new


MARK = "harmed"


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch {mark}']",
        "!!python/object/apply:subprocess.check_output [['touch', '{mark}']]",
        "!!python/object/new:subprocess.Popen [['touch', '{mark}']]",
        "!!python/object/apply:builtins.exec [\"open('{mark}', 'w')\"]",
        "!!python/object/apply:nerfstudio.utils.scripts.run_command ['touch {mark}']",
        "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.PosixPath ['{mark}']]",
        "a: !!python/name:os.system ''",
        "a: !!python/name:sv4d_ns.utils.files.atomic_path ''",
        "a: !!python/module:os ''",
        "!!python/object/apply:torch.load ['{mark}']",
        "!!python/object:sv4d_ns.plugin.trainer.SV4DTrainer {{}}",
    ],
)
def test_what_could_do_harm_is_named_and_not_run(tmp_path: Path, text: str) -> None:
    path, mark = tmp_path / "config.yml", tmp_path / MARK
    path.write_text(text.format(mark=mark))
    with pytest.raises(InputError, match=r"config.yml (names .*, which no run writes|is not a nerfstudio config)"):
        check_config(path)
    assert not mark.exists()


@pytest.mark.parametrize("text", ["", "a: 1", "- x", "{", "\x00", "!!python/object:sv4d_ns.plugin.trainer.NoSuch {}"])
def test_what_is_no_config_is_said(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"is not a nerfstudio config|cannot be read"):
        check_config(path)
    with pytest.raises(InputError, match="cannot be read"):
        check_config(tmp_path / "missing.yml")
