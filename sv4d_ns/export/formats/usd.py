"""An animated mesh as USD (.usdc, .usdz): points and normals with a time sample per frame, one preview surface.

Unlike glTF, USD also carries a mesh whose topology changes. Needs the extra `usd` (Pixar's usd-core).
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sv4d_ns.export.formats.gltf import encoded_image, linear_from_srgb, to_gltf_axes
from sv4d_ns.export.formats.sequence import Still
from sv4d_ns.utils.errors import InputError, install_extra
from sv4d_ns.utils.files import atomic_path


def require_usd() -> None:
    """Raises `InputError` where usd-core is not installed."""
    try:
        import pxr  # noqa: F401
    except ImportError as error:
        raise InputError(f"--usd needs usd-core, which is not installed: {install_extra('usd')}.") from error


def write_usd(
    frames: Sequence[Still],
    path: Path,
    name: str,
    fps: float,
    extras: dict[str, Any],
    root: np.ndarray | None = None,
) -> list[Path]:
    """Write frames as `path` (.usdc, with its image beside it, or .usdz, which holds the image).

    +Y up, metres, frame i at time code i, `fps` time codes per second. Where all frames share one topology it is
    written once; else topology, colours and texture coordinates have time samples too.

    Args:
        root: offsets [t, 3] of the object at each frame, world units, as a translation of the prim; the frames'
            positions are then without it.

    Returns:
        The files written.

    Raises:
        InputError: usd-core is not installed.
    """
    require_usd()
    from pxr import Sdf, UsdUtils

    textured = frames[0].texture is not None
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}-", dir=path.parent) as scratch:
        image = f"{path.stem}_base_color.jpg"
        layer = Path(scratch) / f"{path.stem}.usdc"
        if frames[0].texture is not None:
            (Path(scratch) / image).write_bytes(encoded_image(frames[0].texture.image))
        _write_layer(frames, layer, name, fps, extras, root, f"./{image}" if textured else None)
        with atomic_path(path) as temporary:
            if path.suffix == ".usdz":
                UsdUtils.CreateNewUsdzPackage(Sdf.AssetPath(str(layer)), str(temporary))
            else:
                temporary.write_bytes(layer.read_bytes())
        if path.suffix == ".usdz" or not textured:
            return [path]
        with atomic_path(path.parent / image) as temporary:
            temporary.write_bytes((Path(scratch) / image).read_bytes())
        return [path, path.parent / image]


def _write_layer(
    frames: Sequence[Still],
    layer: Path,
    name: str,
    fps: float,
    extras: dict[str, Any],
    root: np.ndarray | None,
    image: str | None,
) -> None:
    import json

    from pxr import Gf, Tf, Usd, UsdGeom

    stage = Usd.Stage.CreateNew(str(layer))
    UsdGeom.SetStageUpAxis(stage, UsdGeom.Tokens.y)
    UsdGeom.SetStageMetersPerUnit(stage, 1.0)
    stage.SetStartTimeCode(0)
    stage.SetEndTimeCode(len(frames) - 1)
    stage.SetTimeCodesPerSecond(fps)
    stage.SetFramesPerSecond(fps)
    # nested values of any kind survive as JSON; a USD dictionary has no null and no mixed lists
    stage.GetRootLayer().customLayerData = {key: json.dumps(value) for key, value in extras.items()}
    prim = UsdGeom.Xform.Define(stage, f"/{Tf.MakeValidIdentifier(name)}")
    stage.SetDefaultPrim(prim.GetPrim())
    if root is not None:
        move = prim.AddTranslateOp()
        for frame, offset in enumerate(to_gltf_axes(root)):
            move.Set(Gf.Vec3d(*offset.tolist()), frame)
    mesh = UsdGeom.Mesh.Define(stage, prim.GetPath().AppendChild("mesh"))
    mesh.CreateSubdivisionSchemeAttr(UsdGeom.Tokens.none)
    mesh.CreateDoubleSidedAttr(True)
    _write_samples(mesh, frames, image is not None)
    _bind_surface(stage, prim.GetPath().AppendChild("surface"), mesh, image)
    stage.GetRootLayer().Save()


def _write_samples(mesh: Any, frames: Sequence[Still], textured: bool) -> None:
    """Everything that varies with time, and what does not once."""
    from pxr import Sdf, Usd, UsdGeom, Vt

    primvars = UsdGeom.PrimvarsAPI(mesh)
    colors = mesh.CreateDisplayColorPrimvar(UsdGeom.Tokens.vertex)
    confidence = primvars.CreatePrimvar("confidence", Sdf.ValueTypeNames.FloatArray, UsdGeom.Tokens.vertex)
    st = primvars.CreatePrimvar("st", Sdf.ValueTypeNames.TexCoord2fArray, UsdGeom.Tokens.vertex) if textured else None
    mesh.SetNormalsInterpolation(UsdGeom.Tokens.vertex)
    fixed = all(frame.faces is frames[0].faces for frame in frames)
    for index, frame in enumerate(frames):
        at = Usd.TimeCode(index)
        positions = to_gltf_axes(frame.positions).astype(np.float32)
        mesh.CreatePointsAttr().Set(Vt.Vec3fArray.FromNumpy(positions), at)
        mesh.CreateNormalsAttr().Set(Vt.Vec3fArray.FromNumpy(to_gltf_axes(frame.normals).astype(np.float32)), at)
        mesh.CreateExtentAttr().Set(
            Vt.Vec3fArray.FromNumpy(np.stack([positions.min(axis=0), positions.max(axis=0)])), at
        )
        if fixed and index > 0:
            continue
        when = Usd.TimeCode.Default() if fixed else at
        mesh.CreateFaceVertexCountsAttr().Set(Vt.IntArray.FromNumpy(np.full(len(frame.faces), 3, np.int32)), when)
        mesh.CreateFaceVertexIndicesAttr().Set(Vt.IntArray.FromNumpy(frame.faces.astype(np.int32).ravel()), when)
        colors.Set(Vt.Vec3fArray.FromNumpy(linear_from_srgb(frame.colors).astype(np.float32)), when)
        confidence.Set(Vt.FloatArray.FromNumpy(frame.confidence.astype(np.float32)), when)
        if st is not None and frame.texture is not None:
            up = (frame.texture.uv * [1, -1] + [0, 1]).astype(np.float32)  # USD's v runs up
            st.Set(Vt.Vec2fArray.FromNumpy(up), when)


def _bind_surface(stage: Any, path: Any, mesh: Any, image: str | None) -> None:
    """A rough UsdPreviewSurface that shows the image, or displayColor where there is none."""
    from pxr import Sdf, UsdShade

    material = UsdShade.Material.Define(stage, path)
    surface = UsdShade.Shader.Define(stage, path.AppendChild("preview"))
    surface.CreateIdAttr("UsdPreviewSurface")
    surface.CreateInput("roughness", Sdf.ValueTypeNames.Float).Set(1.0)
    surface.CreateInput("metallic", Sdf.ValueTypeNames.Float).Set(0.0)
    reader = UsdShade.Shader.Define(stage, path.AppendChild("reader"))
    color: Any
    if image is None:
        reader.CreateIdAttr("UsdPrimvarReader_float3")
        reader.CreateInput("varname", Sdf.ValueTypeNames.String).Set("displayColor")
        color = reader.CreateOutput("result", Sdf.ValueTypeNames.Float3)
    else:
        reader.CreateIdAttr("UsdPrimvarReader_float2")
        reader.CreateInput("varname", Sdf.ValueTypeNames.String).Set("st")
        texture = UsdShade.Shader.Define(stage, path.AppendChild("texture"))
        texture.CreateIdAttr("UsdUVTexture")
        texture.CreateInput("file", Sdf.ValueTypeNames.Asset).Set(image)
        texture.CreateInput("sourceColorSpace", Sdf.ValueTypeNames.Token).Set("sRGB")
        for wrap in ("wrapS", "wrapT"):
            texture.CreateInput(wrap, Sdf.ValueTypeNames.Token).Set("clamp")
        st = reader.CreateOutput("result", Sdf.ValueTypeNames.Float2)
        texture.CreateInput("st", Sdf.ValueTypeNames.Float2).ConnectToSource(st)
        color = texture.CreateOutput("rgb", Sdf.ValueTypeNames.Float3)
    surface.CreateInput("diffuseColor", Sdf.ValueTypeNames.Color3f).ConnectToSource(color)
    output = surface.CreateOutput("surface", Sdf.ValueTypeNames.Token)
    material.CreateSurfaceOutput().ConnectToSource(output)
    UsdShade.MaterialBindingAPI.Apply(mesh.GetPrim()).Bind(material)
