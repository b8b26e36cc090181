"""What a user reads: the lines that matter first, nothing that is known to say nothing, help of one screen."""

import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tyro
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

SAMPLE = Path(__file__).parents[1] / "assets" / "sample.mp4"


def logged(message: str) -> Table:
    """As `Console.log` lays a message out."""
    table = Table.grid()
    table.add_row("[21:26:32]", message, "trainer.py:142")
    return table


def test_only_known_lines_of_nerfstudio_are_left_out() -> None:
    from sv4d_ns.plugin.quiet import is_chatter

    for said in (
        logged("Saving config to: /a/very/long/path/config.yml"),
        logged("disabled local writer"),
        Text("Disabled comet/tensorboard/wandb event writers"),
        Text("[NOTE] Not running eval iterations since only viewer is enabled.\nUse --vis ..."),
        Panel("Config File", title=":tada: Training Finished :tada:"),
    ):
        assert is_chatter(said)
    for said in (Text("Viewer failed. Continuing training."), logged("logging events to: folder"), Panel("viser")):
        assert not is_chatter(said)


def test_known_warnings_are_silenced_by_words_and_module() -> None:
    from sv4d_ns.plugin.quiet import silence_known_warnings

    known = "`torch.cuda.amp.custom_fwd(args...)` is deprecated."
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        silence_known_warnings()
        place = "nerfstudio.field_components.activations"
        warnings.warn_explicit(known, FutureWarning, "activations.py", 32, module=place)
        warnings.warn_explicit(known, FutureWarning, "mine.py", 1, module="users.own")
        warnings.warn_explicit("something new", FutureWarning, "activations.py", 33, module=place)
        indexing = "Using a non-tuple sequence for multidimensional indexing is deprecated and will be changed"
        warnings.warn_explicit(indexing, UserWarning, "cameras.py", 601, module="nerfstudio.cameras.cameras")
    assert [str(warning.message) for warning in heard] == [known, "something new"]


def test_nerfstudio_loads_our_filter_before_it_warns() -> None:
    """The data parser is what nerfstudio loads first of ours."""
    from importlib.metadata import entry_points

    (parser,) = [point for point in entry_points(group="nerfstudio.dataparser_configs") if "sv4d" in point.value]
    assert parser.value.startswith("sv4d_ns.plugin.dataparser:")
    source = (Path(__file__).parents[1] / "sv4d_ns" / "plugin" / "dataparser.py").read_text()
    assert "\nsilence_known_warnings()\n" in source


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (["sv4d", "--data", "x.mp4"], "none"),
        (["--help"], "none"),
        (["nerfacto", "--help"], "none"),
        (["sv4d", "--help"], "short"),
        (["4diffusion", "--data", "x.mp4", "-h"], "short"),
        (["sv4d", "--help", "all"], "all"),
    ],
)
def test_which_help_is_asked_for(words: list[str], asked: str) -> None:
    from sv4d_ns.plugin.help import asked_help

    assert asked_help(words) == asked


@pytest.mark.parametrize(("words", "shown"), [([], {"often", "rare"}), (["sv4d", "--help"], {"often"})])
def test_the_short_help_leaves_rare_settings_out_and_only_the_help(
    words: list[str], shown: set[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sv4d_ns.plugin.help import described, first_in_help

    monkeypatch.setattr(sys, "argv", ["ns-train", *words])

    @first_in_help("often")
    @dataclass
    class Settings:
        often: int = 1
        """Set in most runs."""
        rare: int = 2
        """Set in few."""

    with pytest.raises(SystemExit):
        tyro.cli(Settings, args=["--help"])
    text = capsys.readouterr().out
    assert {name for name in ("often", "rare") if f"--{name}" in text} == shown
    assert ("--help all" in described("sv4d", "A method.", ())) == bool(words)
    if not words:
        assert tyro.cli(Settings, args=["--rare", "5"]).rare == 5


def test_the_short_help_of_4diffusion_names_what_it_is_started_with() -> None:
    """A sibling's marks once hid --prompt."""
    code = (
        "import sys; sys.argv = ['ns-train', '4diffusion', '--help'];"
        "from nerfstudio.scripts.train import entrypoint; entrypoint()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for flag in ("--data", "--prompt", "--image", "--image-to-video-model", "--text-to-image-model"):
        assert f"{flag} {{" in done.stdout, flag
    assert "--steps-per-save" not in done.stdout


def test_the_doctor_answers_without_torch_and_nerfstudio() -> None:
    """Their import alone takes longer than the doctor may."""
    code = (
        "import sys; from sv4d_ns.cli.main import main; main(['doctor', sys.argv[1]]);"
        "print('heavy:', sorted({'torch', 'nerfstudio.engine', 'diffusers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(SAMPLE)], capture_output=True, text=True, check=True)
    assert "heavy: []" in done.stdout
    assert "How far the bundled model reaches" in done.stdout


def test_the_first_lines_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As `ns-train` calls them: nothing stands before the five lines, and the settings are in the run's folder."""
    from copy import deepcopy

    from nerfstudio.configs.method_configs import all_methods

    config: Any = deepcopy(all_methods["sv4d"])
    config.output_dir, config.pipeline.datamanager.data, config.device = tmp_path, SAMPLE, "cpu"
    config.pipeline.datamanager.max_frames = 3
    config.set_timestamp()
    config.print_to_terminal()
    config.save_config()
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:5]] == ["Device", "Model", "Object", "Time", "Run"]
    assert "3 frames" in lines[2] and "plain background" in lines[2]
    assert str(config.get_base_dir()) in lines[4] and (config.get_base_dir() / "config.yml").is_file()
    assert not any("SV4DTrainerConfig" in line for line in lines)


def test_a_run_that_goes_on_is_told_what_is_left(tmp_path: Path) -> None:
    from tiny_run import tiny_config

    config = tiny_config("sv4d", tmp_path, max_num_iterations=3600)
    whole = config._seconds_left(21)
    (config.get_base_dir() / "views").mkdir(parents=True)
    config.get_checkpoint_dir().mkdir()
    with_views = config._seconds_left(21)
    (config.get_checkpoint_dir() / "step-000003599.ckpt").touch()
    assert whole > with_views + 5 and config._seconds_left(21) < 0.2 * whole
    config.load_dir, config.load_step = config.get_checkpoint_dir(), 1799
    assert 0.2 * whole < config._seconds_left(21) < with_views


def test_data_on_the_command_line_is_the_datamanagers() -> None:
    """nerfstudio would say of `--data` that it is an alias, in a line of its own."""
    from sv4d_ns.plugin.pipeline import SV4DPipelineConfig
    from sv4d_ns.plugin.trainer import SV4DTrainerConfig

    config = SV4DTrainerConfig(data=SAMPLE, pipeline=SV4DPipelineConfig())
    assert config.data is None and config.pipeline.datamanager.data == SAMPLE
