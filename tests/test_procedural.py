"""The creatures and the exact pictures of them."""

from pathlib import Path

import av
import numpy as np
import pytest

from sv4d_ns.diffusion_training.evaluate import FIRST_EVALUATED
from sv4d_ns.geometry.cameras import CAMERA_RADIUS, FIELD_OF_VIEW_DEG, OBJECT_BOX, look_at_cameras
from sv4d_ns.training_data.procedural import HELD_OUT_SEEDS, TRAINING_SEEDS, creature, render
from sv4d_ns.training_data.procedural.creatures import frame_along
from sv4d_ns.training_data.procedural.renderer import Shape, bounding_balls, draw
from sv4d_ns.training_data.procedural.sample import SAMPLE_SEED

SIZE = 96
LIGHTS = np.array([[1.0, 0.0, 0.0]])
SAMPLE = Path(__file__).parents[1] / "assets" / "sample.mp4"


def picture(azimuth_deg, shapes, dims, positions, rotations=None, colours=None):
    """A picture of plain parts from a camera at elevation 0, lit evenly."""
    shapes, dims = np.array(shapes), np.array(dims, dtype=np.float64)
    count = len(shapes)
    rotations = np.stack([np.eye(3)] * count) if rotations is None else np.asarray(rotations)
    colours = np.zeros((count, 3)) if colours is None else np.asarray(colours, dtype=np.float64)
    surface = {
        "shapes": shapes,
        "dims": dims,
        "bounds": bounding_balls(shapes, dims),
        "textures": np.zeros(count, dtype=np.int64),
        "axes": np.zeros((count, 3)),
        "scales": np.ones(count),
        "phases": np.zeros(count),
        "colours": np.stack([colours, colours], axis=1),
    }
    camera = look_at_cameras(np.array([float(azimuth_deg)]), np.zeros(1))[0]
    out = np.empty((SIZE, SIZE, 4), dtype=np.uint8)
    draw(camera, FIELD_OF_VIEW_DEG, SIZE, rotations, np.asarray(positions, dtype=np.float64), surface, LIGHTS, out)
    return out


def coverage(image):
    return image[..., 3].astype(np.float64) / 255.0


def test_a_creature_depends_on_its_seed_alone():
    cameras = look_at_cameras(np.array([0.0, 120.0]), np.zeros(2))
    first, again, other = (render(creature(seed), np.array([0.0, 0.4]), cameras, 32) for seed in (7, 7, 8))
    assert first.shape == (2, 2, 32, 32, 4)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("seed", range(0, 24))
def test_every_creature_stays_inside_the_box_and_the_frame_and_moves(seed):
    subject = creature(seed)
    times = np.linspace(0.0, 1.0, 41)
    assert np.abs(subject.surface_points(times)).max() <= OBJECT_BOX
    cameras = look_at_cameras(np.array([0.0, 50.0, 170.0, 290.0]), np.array([0.0, 30.0, -10.0, 0.0]))
    pictures = render(subject, times[::8], cameras, 48)
    alpha = pictures[..., 3]
    assert not alpha[..., [0, -1], :].any() and not alpha[..., :, [0, -1]].any()
    assert (alpha == 255).sum(axis=(-2, -1)).min() > 10, "something opaque in every picture"
    change = np.abs(np.diff(pictures.astype(np.float64), axis=0)).mean(axis=(1, 2, 3, 4))
    assert change.max() > 0.3, "the motion is visible"


def test_body_plans_vary():
    assert len({creature(seed).kind for seed in range(60)}) >= 7


def test_a_ball_covers_its_exact_disk():
    radius = 0.4
    alpha = coverage(picture(30, [Shape.ELLIPSOID], [[radius, radius, radius, 0]], [[0, 0, 0]]))
    focal = 0.5 * SIZE / np.tan(np.deg2rad(FIELD_OF_VIEW_DEG) / 2)
    disk = np.pi * (focal * radius) ** 2 / (CAMERA_RADIUS**2 - radius**2)
    assert alpha.sum() == pytest.approx(disk, rel=2e-3)
    fractions = np.unique(np.round(alpha * 9, 1))
    assert set(fractions) <= set(range(10)) and len(fractions) == 10, "edges are ninths of a pixel"


def test_a_box_seen_from_the_front_covers_its_exact_front_face():
    half = np.array([0.2, 0.3, 0.25])
    alpha = coverage(picture(0, [Shape.BOX], [[*half, 0]], [[0, 0, 0]]))
    focal = 0.5 * SIZE / np.tan(np.deg2rad(FIELD_OF_VIEW_DEG) / 2)
    face = 4 * half[1] * half[2] * (focal / (CAMERA_RADIUS - half[0])) ** 2
    assert alpha.sum() == pytest.approx(face, rel=1e-2)


@pytest.mark.parametrize("radii", [(0.2, 0.05), (0.05, 0.2), (0.1, 0.1), (0.3, 0.02)])
@pytest.mark.parametrize("azimuth", [0, 75, 200])
def test_a_round_cone_is_the_union_of_its_balls(radii, azimuth):
    start, end = np.array([-0.2, -0.1, -0.15]), np.array([0.15, 0.2, 0.2])
    rotation, length = frame_along(end - start), np.linalg.norm(end - start)
    cone = picture(azimuth, [Shape.CONE], [[length, *radii, 0]], [start], [rotation])
    share = np.linspace(0.0, 1.0, 200)[:, None]
    sizes = radii[0] + share * (radii[1] - radii[0])
    balls = picture(
        azimuth, [Shape.ELLIPSOID] * 200, np.hstack([sizes, sizes, sizes, sizes]), start + share * (end - start)
    )
    assert coverage(cone).sum() > 100
    assert np.abs(coverage(cone) - coverage(balls)).sum() < 0.005 * coverage(cone).sum()


def test_azimuth_grows_counter_clockwise_and_pictures_are_not_mirrored():
    ball, at_y = [[0.1, 0.1, 0.1, 0]], [[0, 0.4, 0]]
    columns = np.arange(SIZE) + 0.5 - SIZE / 2
    front, side = (coverage(picture(azimuth, [Shape.ELLIPSOID], ball, at_y)) for azimuth in (0, 90))
    assert (front.sum(axis=0) * columns).sum() > 0, "+y is image-right from azimuth 0"
    assert (side.sum(axis=0) * columns).sum() == pytest.approx(0, abs=1), "+y is straight ahead from azimuth 90"
    assert side.sum() > front.sum(), "and nearer than from azimuth 0"
    above = coverage(picture(0, [Shape.ELLIPSOID], ball, [[0, 0, 0.4]]))
    assert above[: SIZE // 2].sum() == pytest.approx(above.sum()), "+z is up"


def test_nearer_parts_hide_farther_ones():
    red, blue = [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]
    dims, positions = [[0.2, 0.2, 0.2, 0]] * 2, [[0.3, 0, 0], [-0.3, 0, 0]]
    for azimuth, shown in ((0, red), (180, blue)):
        image = picture(azimuth, [Shape.ELLIPSOID] * 2, dims, positions, colours=[red, blue])
        np.testing.assert_array_equal(image[SIZE // 2, SIZE // 2, :3], 255 * np.array(shown))


def test_the_bundled_sample_is_the_creature_it_claims_to_be_and_is_held_out():
    assert TRAINING_SEEDS.stop <= HELD_OUT_SEEDS.start
    assert SAMPLE_SEED in HELD_OUT_SEEDS and SAMPLE_SEED not in TRAINING_SEEDS
    assert SAMPLE_SEED > FIRST_EVALUATED + 10_000
    with av.open(str(SAMPLE)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.average_rate == 10
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    assert frames.shape == (21, 256, 256, 3)
    truth = render(creature(SAMPLE_SEED), np.array([0.5]), look_at_cameras(np.zeros(1), np.zeros(1)), 256)[0, 0]
    values = truth.astype(np.float64)
    alpha = values[..., 3:] / 255.0
    assert np.abs(frames[10] - (values[..., :3] * alpha + 255 * (1 - alpha))).mean() < 1.5
