"""Settings of the 4D optimisation that appear on the command line. Plain data: every ns-* command imports this file."""

from dataclasses import dataclass

DEFAULT_FRAMES = 21
"""Frames taken where the user names neither a number nor a rate (as in the SV4D papers)."""
INPUT_SIZE = 256
"""Pixels along the side of the cropped frames of a run, where the user names no other."""


def frames_taken(max_frames: int | None, fps: float | None) -> int | None:
    """The number of frames a run takes at most, from what the user says of number and rate; None for no limit."""
    return DEFAULT_FRAMES if max_frames is None and fps is None else max_frames


@dataclass(frozen=True)
class LossWeights:
    """Factors of the losses (`losses.py` names the source of each loss); 0 switches one off and saves its cost.

    SV4D publishes no weights: all values are our own, from short fits with `benchmarks/field_fit.py`.
    """

    photometric: float = 1.0
    """Mean squared error of colours (SV4D L_mse)."""
    mask: float = 0.2
    """Mean squared error of opacity (SV4D L_mask)."""
    structure: float = 0.1
    """D-SSIM on patches: it forgives what a fit would otherwise bend the surface for. Judged by whole runs."""
    perceptual: float = 0.0
    """LPIPS (VGG16) on patches (SV4D L_lpips); the run says whether its weights are on this machine. Off: 0.05 made two
    whole jobs worse in every figure. Kept for views of the released model, for which the paper has it."""
    normal: float = 0.02
    """Against estimated normals on patches (SV4D L_normal), with --pipeline.datamanager.normals. Not measured."""
    bilateral_normal: float = 0.02
    """Smoothness of rendered normals on patches except at edges of the picture (SV4D L_bilateral); measured on two
    cases."""
    sparsity: float = 0.05
    """Matter that rays see, of views that contradict each other: what they do not need goes, what lies behind a surface
    is spared. Not asked of true views, whose thin limbs it eats."""
    distortion: float = 0.03
    """How spread out along its ray what is seen is."""
    normal_smoothness: float = 0.002
    """Of canonical normals at surface points."""
    registration: float = 0.05
    """Of each frame's visual hull to the canonical one, through the deformation."""
    scene_flow: float = 0.02
    """Of the motion to the surface's flow from frame to frame, as the optical flow of true views shows it."""
    density_residual: float = 0.0005
    """Keeps what motion can explain out of the density residual."""
    deformation: float = 0.001
    """Of two motions that explain the pictures, the smaller."""
    deformation_rigidity: float = 0.1
    """Rigidity of the motion at surface points; 0.3 of it where the flow of true views says how they move."""
    band_rigidity: float = 0.1
    """Rigidity around the hulls, rendered or not; 0.3 of it likewise."""


def __getattr__(name: str) -> type:
    if name == "CorrectionConfig":  # older runs' config.yml names it
        from sv4d_ns.utils.moved import Gone

        return Gone
    raise AttributeError(name)
