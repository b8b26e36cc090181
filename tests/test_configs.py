"""A config from a stranger builds nothing but settings."""

from pathlib import Path

import pytest
import yaml
from sv4d_ns.method_configs.sv4d import method

from sv4d_ns.configs import check_config
from sv4d_ns.errors import InputError


def test_our_own_config_passes(tmp_path: Path) -> None:
    path = tmp_path / "config.yml"
    path.write_text(yaml.dump(method.config))
    check_config(path)


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
        "a: !!python/name:sv4d_ns.files.atomic_path ''",
        "a: !!python/module:os ''",
        "!!python/object/apply:torch.load ['{mark}']",
        "!!python/object:sv4d_ns.trainer.SV4DTrainer {{}}",
    ],
)
def test_what_could_do_harm_is_named_and_not_run(tmp_path: Path, text: str) -> None:
    path, mark = tmp_path / "config.yml", tmp_path / MARK
    path.write_text(text.format(mark=mark))
    with pytest.raises(InputError, match=r"config.yml (names .*, which no run writes|is not a nerfstudio config)"):
        check_config(path)
    assert not mark.exists()


@pytest.mark.parametrize("text", ["", "a: 1", "- x", "{", "\x00", "!!python/object:sv4d_ns.trainer.NoSuch {}"])
def test_what_is_no_config_is_said(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"is not a nerfstudio config|cannot be read"):
        check_config(path)
    with pytest.raises(InputError, match="cannot be read"):
        check_config(tmp_path / "missing.yml")
