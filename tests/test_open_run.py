"""A whole run of sv4d is opened without nerfstudio, and is the run that nerfstudio opens."""

import subprocess
import sys

import pytest
import torch
from tiny_run import write_tiny_run

from sv4d_ns.runs import open as opened
from sv4d_ns.runs.safe_config import config_outline
from sv4d_ns.utils.errors import InputError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_tiny_run("sv4d", tmp_path_factory.mktemp("open"))


def test_both_ways_open_the_same_run(run):
    plain = opened._open_plainly(run / "config.yml")
    through = opened._open_through_nerfstudio(run / "config.yml")
    assert plain is not None
    for name in ("field", "occupancy"):
        ours, theirs = getattr(plain, name).state_dict(), getattr(through, name).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert (plain.name, plain.extras, plain.canonical_frame) == (through.name, through.extras, through.canonical_frame)
    assert plain.views.content_id == through.views.content_id


def test_names_of_before_a_move_are_read_as_todays(run, tmp_path):
    text = (run / "config.yml").read_text()
    (tmp_path / "config.yml").write_text(text.replace("sv4d_ns.plugin.trainer", "sv4d_ns.trainer"))
    outline = config_outline(tmp_path / "config.yml")
    assert outline is not None
    assert outline.name == "sv4d_ns.plugin.trainer.SV4DTrainerConfig"


def test_what_no_run_names_is_left_to_the_check_that_refuses_it(run, tmp_path):
    text = (run / "config.yml").read_text() + "harm: !!python/object/apply:os.system ['true']\n"
    (tmp_path / "config.yml").write_text(text)
    assert config_outline(tmp_path / "config.yml") is None
    with pytest.raises(InputError, match="made to do harm"):
        opened.load_run(tmp_path / "config.yml")


def test_a_run_of_another_method_or_without_its_views_is_nerfstudios(run, tmp_path):
    (tmp_path / "config.yml").write_text((run / "config.yml").read_text())
    assert opened._open_plainly(tmp_path / "config.yml") is None
    other = write_tiny_run("4diffusion", tmp_path)
    assert opened._open_plainly(other / "config.yml") is None


def test_nerfstudio_is_not_imported(run):
    code = (
        "import sys; from pathlib import Path; from sv4d_ns.runs.open import load_run;"
        "load_run(Path(sys.argv[1])); sys.exit('nerfstudio' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(run / "config.yml")], check=False).returncode == 0
