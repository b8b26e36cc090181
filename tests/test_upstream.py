"""What is ready to be sent to nerfstudio says what this package registers."""

import runpy
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_entry_of_nerfstudios_list_names_this_packages_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    from nerfstudio.configs import external_methods

    listed: list[external_methods.ExternalMethod] = []
    monkeypatch.setattr(external_methods, "external_methods", listed)
    runpy.run_path(str(ROOT / "docs" / "upstream" / "external_method.py"))
    (entry,) = listed
    ours = distribution(str(entry.pip_package))
    registered = {point.name for point in ours.entry_points if point.group == "nerfstudio.method_configs"}
    assert {name for name, _ in entry.configurations} == registered
    page = (ROOT / "docs" / "upstream" / "sv4d.md").read_text()
    assert all(f"`{name}`" in page for name, _ in entry.configurations) and f"pip install {ours.name}" in page
