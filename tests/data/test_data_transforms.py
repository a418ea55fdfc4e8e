# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from PIL import Image

from spade_fast.data import DataError, Geometry, default_load_size, instances_to_edges
from spade_fast.data.transforms import image_to_tensor

# By hand for a 200×120 (width×height) image: mode, load size, aspect ratio, size after resize, (H, W) of the result.
GEOMETRIES = [
    ("resize_and_crop", 72, 1.0, (72, 72), (64, 64)),
    ("resize_and_crop", 72, 2.0, (72, 36), (32, 64)),
    ("crop", 64, 1.0, (200, 120), (64, 64)),
    ("scale_width", 90, 1.0, (90, 54), (54, 90)),
    ("scale_width_and_crop", 160, 1.0, (160, 96), (64, 64)),
    ("scale_shortside", 90, 1.0, (150, 90), (90, 150)),
    ("scale_shortside_and_crop", 90, 1.0, (150, 90), (64, 64)),
    ("fixed", 64, 2.0, (64, 32), (32, 64)),
    ("none", 64, 1.0, (192, 128), (128, 192)),  # 200/32 = 6.25 -> 6, 120/32 = 3.75 -> 4
]


@pytest.mark.parametrize("mode, load, aspect, resized, result", GEOMETRIES)
def test_sizes_in_training(mode, load, aspect, resized, result):
    geometry = Geometry(mode, 64, load, aspect)
    place = geometry.place(200, 120, np.random.default_rng(0), "a.png")
    assert place.size == resized
    assert place.indices(np.zeros((120, 200), np.int32)).shape == result
    fixed_size = mode not in ("scale_width", "scale_shortside", "none")
    assert geometry.output_size == (result if fixed_size else None)


@pytest.mark.parametrize(
    "mode, size, resized",
    [
        ("scale_shortside", (427, 640), (256, 383)),  # 640 * 256 / 427 = 383.7: truncated, as in the release
        ("scale_width", (640, 427), (256, 170)),  # 427 * 256 / 640 = 170.8
        ("none", (10, 47), (32, 32)),  # never to nothing
        ("none", (48, 80), (64, 64)),  # 1.5 and 2.5 both round to the even 2
    ],
)
def test_rounding(mode, size, resized):
    place = Geometry(mode, 256, 256, flip=False).place(*size, np.random.default_rng(0), "a.png")
    assert place.size == resized


@pytest.mark.parametrize(
    "mode, resized, box",
    [
        ("resize_and_crop", (64, 64), (0, 0, 64, 64)),
        ("scale_shortside_and_crop", (106, 64), (21, 0, 85, 64)),  # 64 * 200 / 120 = 106.7; (106 - 64) / 2 = 21
        ("crop", (200, 120), (68, 28, 132, 92)),
        ("scale_width_and_crop", (144, 86), (40, 11, 104, 75)),  # keeps its load size, or the height would be too small
    ],
)
def test_validation_is_centered_and_never_flipped(mode, resized, box):
    geometry = Geometry(mode, 64, 144, train=False)
    for seed in range(8):
        place = geometry.place(200, 120, np.random.default_rng(seed), "a.png")
        assert (place.size, place.box, place.flip) == (resized, box, False)


def test_crop_reaches_every_corner_and_flips_half():
    geometry = Geometry("crop", 4, 4)
    places = [geometry.place(6, 5, np.random.default_rng(seed), "a.png") for seed in range(300)]
    assert {place.box[:2] for place in places} == {(x, y) for x in range(3) for y in range(2)}
    flips = sum(place.flip for place in places)
    assert abs(flips - 150) < 5 * np.sqrt(300 / 4)  # five standard deviations of a fair coin
    assert not any(
        Geometry("crop", 4, 4, flip=False).place(6, 5, np.random.default_rng(s), "a.png").flip for s in range(20)
    )


@pytest.mark.parametrize("mode, load, aspect, resized, result", GEOMETRIES)
@pytest.mark.parametrize("train", [True, False])
def test_image_and_indices_move_together(mode, load, aspect, resized, result, train):
    """Both hold the position in the source; after every transform they must still agree on it."""
    width, height = 200, 120
    y, x = np.mgrid[:height, :width]
    ramp_x, ramp_y = np.rint(x * 255 / (width - 1)), np.rint(y * 255 / (height - 1))
    photo = Image.fromarray(np.stack([ramp_x, ramp_y, 0 * x], -1).astype(np.uint8))
    labels = (y * width + x).astype(np.int32)
    # Nearest is at most half a source pixel off. Bicubic keeps a ramp but for rounding: half a level in, half out, and
    # its negative weights amplify the first up to 1.5 times. Near a border its window is cut: left out, 3 pixels.
    tolerance_x, tolerance_y = 0.5 + 1.3 * (width - 1) / 255, 0.5 + 1.3 * (height - 1) / 255
    flipped = set()
    for seed in range(6):
        place = Geometry(mode, 64, load, aspect, train=train).place(width, height, np.random.default_rng(seed), "a")
        image = (place.image(photo).numpy() + 1) * 127.5
        at = place.indices(labels)
        assert image.shape == (3, *at.shape)
        seen_x, seen_y = image[0] * (width - 1) / 255, image[1] * (height - 1) / 255
        inner = (at % width > 8) & (at % width < width - 9) & (at // width > 8) & (at // width < height - 9)
        assert inner.sum() > 0.5 * at.size
        assert np.abs(seen_x - at % width)[inner].max() <= tolerance_x
        assert np.abs(seen_y - at // width)[inner].max() <= tolerance_y
        runs_left = bool(at[0, 0] % width > at[0, -1] % width)
        assert runs_left == place.flip
        flipped.add(place.flip)
    assert flipped == ({True, False} if train else {False})


def test_nearest_takes_the_pixel_below_the_center():
    place = Geometry("fixed", 5, 5, 1.0, train=False).place(13, 7, None, "a")
    values = np.arange(91, dtype=np.int32).reshape(7, 13)
    expected = [[values[int((i + 0.5) * 7 / 5), int((j + 0.5) * 13 / 5)] for j in range(5)] for i in range(5)]
    np.testing.assert_array_equal(place.indices(values), expected)


def test_indices_keep_large_and_negative_values():
    values = np.array([[-1, 70000], [65535, 3]], dtype=np.int32)
    place = Geometry("fixed", 4, 4, train=False).place(2, 2, None, "a")
    np.testing.assert_array_equal(place.indices(values), values.repeat(2, 0).repeat(2, 1))


def test_image_range():
    pixels = np.array([[[0, 255, 51]]], dtype=np.uint8)
    np.testing.assert_allclose(image_to_tensor(pixels).numpy().ravel(), [-1, 1, -0.6], atol=1e-7)


def test_edges_equal_a_loop():
    rng = np.random.default_rng(0)
    for shape in [(1, 1), (1, 7), (7, 1), (9, 11)]:  # single pixel, row, column, general
        ids = rng.integers(0, 3, shape)
        expected = np.zeros(shape, bool)
        for i in range(shape[0]):
            for j in range(shape[1]):
                for a, b in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
                    if 0 <= a < shape[0] and 0 <= b < shape[1]:
                        expected[i, j] |= ids[a, b] != ids[i, j]
        np.testing.assert_array_equal(instances_to_edges(ids), expected)


def test_an_image_smaller_than_the_crop_is_named():
    with pytest.raises(DataError, match=r"x/small\.png: 50×40 pixels .* smaller than the crop 64×64; take"):
        Geometry("crop", 64, 64).place(50, 40, np.random.default_rng(0), "x/small.png")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("resize", 64, 64), "preprocess 'resize' is unknown; expected one of resize_and_crop"),
        (("resize_and_crop", 64, 32), "load_size 32 is smaller than crop_size 64"),
        (("crop", 0, 64), "crop_size must be at least 1, got 0"),
        (("fixed", 64, 64, -1.0), r"aspect_ratio must be positive, got -1\.0"),
    ],
)
def test_impossible_geometry(arguments, message):
    with pytest.raises(DataError, match=message):
        Geometry(*arguments)


def test_default_load_size_is_the_release_s():
    assert default_load_size("resize_and_crop", 256) == 286
    assert default_load_size("resize_and_crop", 128) == 143
    assert default_load_size("fixed", 512) == 512
