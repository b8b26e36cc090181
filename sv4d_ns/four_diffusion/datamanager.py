"""The data manager of 4Diffusion runs: SV4D's, which makes the views or opens those it is given."""

from dataclasses import dataclass, field

from sv4d_ns.datamanager import SV4DDataManager, SV4DDataManagerConfig


@dataclass
class FourDiffusionDataManagerConfig(SV4DDataManagerConfig):
    """Where the views come from."""

    _target: type = field(default_factory=lambda: FourDiffusionDataManager)


class FourDiffusionDataManager(SV4DDataManager):
    """As SV4D's; where a 4DM checkpoint is given, `auto` takes 4DM."""

    config: FourDiffusionDataManagerConfig
