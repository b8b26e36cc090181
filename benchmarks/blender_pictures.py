"""Pictures of GLBs at given times from given cameras, by Blender's importer and Cycles, for `data_renderer.py`.

    PYTHON_WITH_BPY blender_pictures.py JOB.json

JOB.json: {"worker": .../blender_worker.py, "size", "samples", "fov_deg", "environment", "pictures": [{"asset",
"time_s" or null, "c2w" (asset space, z up), "path"}]}. Only numpy and bpy are needed.
"""

import importlib.util
import json
import sys
from itertools import groupby
from pathlib import Path

import bpy  # noqa: F401 - makes mathutils known
from mathutils import Matrix


def main() -> None:
    job = json.loads(Path(sys.argv[-1]).read_text())
    spec = importlib.util.spec_from_file_location("blender_worker", job["worker"])
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    for asset, pictures in groupby(job["pictures"], key=lambda picture: picture["asset"]):
        worker.open_asset(Path(asset))
        camera = worker.set_up_camera(job["fov_deg"])
        worker.set_up_light(job["environment"], 0.0)
        worker.set_up_cycles(job["size"], job["samples"], "cpu", 0)
        for picture in pictures:
            if picture["time_s"] is not None:
                worker.go_to(picture["time_s"] * worker.FPS)
            camera.matrix_world = Matrix(picture["c2w"])
            worker.render_to(picture["path"])


if __name__ == "__main__":
    main()
