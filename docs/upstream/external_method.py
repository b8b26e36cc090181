"""The entry for nerfstudio's list of methods that live elsewhere: goes into `nerfstudio/configs/external_methods.py`.

Without this package installed, `ns-train sv4d` then says how to install it instead of "invalid choice".
"""

from nerfstudio.configs.external_methods import ExternalMethod, external_methods

# SV4D
external_methods.append(
    ExternalMethod(
        """[bold yellow]SV4D[/bold yellow]
For more information visit: https://docs.nerf.studio/nerfology/methods/sv4d.html

To enable SV4D, you must install it first by running:
  [grey]pip install sv4d-ns[/grey]""",
        configurations=[
            ("sv4d", "SV4D 2.0, one video of an object becomes an animated 3D asset"),
            ("4diffusion", "4Diffusion, the same by 4D-aware score distillation"),
        ],
        pip_package="sv4d-ns",
    )
)
