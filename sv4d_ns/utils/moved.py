"""Where classes live that files on disk name by module: one table, old to new.

`config.yml` of a run and `model_index.json` of a saved pipeline name classes by their module. This package's modules
have moved since older ones were written, and so have the readers of such files: nerfstudio's yaml loader and diffusers
import what a file names. A finder makes the old names importable, as the same module objects, and nothing else. A
class that no longer exists is read as `Gone`.
"""

import dataclasses
import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    # run configurations
    "sv4d_ns.datamanager": "sv4d_ns.plugin.datamanager",
    "sv4d_ns.fit_settings": "sv4d_ns.fitting.settings",
    "sv4d_ns.four_diffusion": "sv4d_ns.distillation",
    "sv4d_ns.four_diffusion.model": "sv4d_ns.plugin.distillation_model",
    "sv4d_ns.four_diffusion.optimizer": "sv4d_ns.plugin.optimizers",
    "sv4d_ns.four_diffusion.pipeline": "sv4d_ns.plugin.distillation_pipeline",
    "sv4d_ns.four_diffusion.trainer": "sv4d_ns.plugin.distillation_trainer",
    "sv4d_ns.model": "sv4d_ns.plugin.model",
    "sv4d_ns.plugin.distillation_optimizer": "sv4d_ns.plugin.optimizers",
    "sv4d_ns.pipeline": "sv4d_ns.plugin.pipeline",
    "sv4d_ns.schedulers": "sv4d_ns.plugin.optimizers",
    "sv4d_ns.trainer": "sv4d_ns.plugin.trainer",
    # saved diffusion pipelines
    "sv4d_ns.diffusion.embedded": "sv4d_ns.diffusion.sv4d",
    "sv4d_ns.diffusion.embedded.modules": "sv4d_ns.diffusion.sv4d.small_components",
    "sv4d_ns.diffusion.unet": "sv4d_ns.diffusion.sv4d.unet",
    "sv4d_ns.diffusion.pipeline": "sv4d_ns.diffusion.sv4d.pipeline",
}


@dataclasses.dataclass
class Gone:
    """Settings of something that was taken out; nothing reads them."""


class _MovedModules(MetaPathFinder, Loader):
    """Imports of an old name give the module of the new one."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(MOVED[spec.name])
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # the import system has just put the old name's spec in its place
        if module.__spec__ is not None:
            module.__spec__ = module.__spec__.loader_state


def accept_moved_names() -> None:
    """Make the old names of `MOVED` importable in this process; calling it again changes nothing."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, _MovedModules())
