# SPDX-License-Identifier: Apache-2.0
"""What a pixel of a label map, an instance map or a photograph means, whatever file holds it."""

import struct

import numpy as np
import pytest
from PIL import Image

from spade_fast.data import DataError, make_dataset
from spade_fast.data.reading import MAX_PIXELS, read_image, read_instances, read_labels

IDS = np.array([[0, 1, 2, 3], [3, 2, 1, 0]])


def tiff(path, values, photometric=1, order="<", bits=None, data=None):
    """A TIFF of one strip, as its specification says; Pillow writes only some of these kinds."""
    height, width = values.shape
    data = values.astype(values.dtype.newbyteorder(order)).tobytes() if data is None else data
    data += b"\0" * (len(data) % 2)
    sample_format = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    tags = [(256, 3, width), (257, 3, height), (258, 3, bits or values.dtype.itemsize * 8), (259, 3, 1)]
    tags += [(262, 3, photometric), (273, 4, 8), (277, 3, 1), (278, 3, height), (279, 4, len(data))]
    tags += [(339, 3, sample_format)]
    out = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8 + len(data)) + data
    out += struct.pack(order + "H", len(tags))
    for tag, kind, value in tags:
        packed = struct.pack(order + "HH", value, 0) if kind == 3 else struct.pack(order + "I", value)
        out += struct.pack(order + "HHI", tag, kind, 1) + packed
    path.write_bytes(out + struct.pack(order + "I", 0))
    return path


@pytest.mark.parametrize(
    "data",
    [
        b"P5\n4 2\n3\n" + bytes(IDS.ravel().tolist()),
        b"P5\n4 2\n255\n" + bytes(IDS.ravel().tolist()),
        b"P5 # made by\n# someone\n4 2 3\n" + bytes(IDS.ravel().tolist()),
        b"P5\n4 2\n300\n" + IDS.astype(">u2").tobytes(),
        b"P5\n4 2\n65535\n" + IDS.astype(">u2").tobytes(),
        b"P2\n4 2\n3\n0 1 2 3\n3 2 1 0\n",
        b"P2\n4 2\n1000\n0 1 2 3 # half\n3 2 1 0",
    ],
    ids=["3", "255", "comments", "300", "65535", "text", "text-1000"],
)
def test_pgm_is_read_as_stored(tmp_path, data):
    (tmp_path / "a.pgm").write_bytes(data)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.pgm"), IDS)


def test_pbm_is_read_as_stored(tmp_path):
    bits = np.array([[1, 0, 0, 1, 1, 0, 0, 0, 1], [0, 1, 1, 0, 0, 1, 1, 1, 0]])
    (tmp_path / "a.pbm").write_bytes(b"P4\n9 2\n" + np.packbits(bits, axis=1).tobytes())
    (tmp_path / "b.pbm").write_bytes(b"P1\n9 2\n" + "".join(map(str, bits.ravel())).encode())
    for name in ("a.pbm", "b.pbm"):
        np.testing.assert_array_equal(read_labels(tmp_path / name), bits)


@pytest.mark.parametrize(
    "data",
    [b"P5\n4 2\n3\n\0\0", b"P5\n4 2\n", b"P5\n4 x\n3\n", b"P2\n4 2\n3\n0 1", b"P2\n2 1\n3\n0 -1", b"P5\n4 2\n70000\n"],
)
def test_a_broken_pgm_is_refused(tmp_path, data):
    (tmp_path / "a.pgm").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.pgm: cannot read this label map"):
        read_labels(tmp_path / "a.pgm")


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", ["u1", "i1", "u2", "i2", "u4", "i4", "f4"])
def test_tiff_is_read_as_stored_or_refused(tmp_path, kind, order):
    values = IDS.astype(kind)
    values[0, 0] = np.iinfo(kind).max if kind[0] == "u" else -1
    path = tiff(tmp_path / "a.tif", values, order=order)
    if (kind, order) == ("u4", ">"):  # Pillow knows no such file
        with pytest.raises(DataError, match=r"a\.tif: cannot read this label map"):
            read_labels(path)
    else:
        np.testing.assert_array_equal(read_labels(path), values.astype(np.int64))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("photometric", [0, 1])
def test_tiff_of_few_bits_and_with_white_as_zero_is_read_as_stored(tmp_path, bits, photometric):
    values = (IDS % 2**bits).astype(np.uint8)
    rows = [sum(int(v) << 8 * 4 - bits * (i + 1) for i, v in enumerate(row)) for row in values]
    data = b"".join(row.to_bytes(4, "big")[: max(1, bits // 2)] for row in rows)
    path = tiff(tmp_path / "a.tif", values, photometric, bits=bits, data=data)
    np.testing.assert_array_equal(read_labels(path), values)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(
    ("kind", "photometric", "words"),
    [
        ("f8", 1, "64-bit floating-point, which"),
        ("f2", 1, "16-bit floating-point, which"),
        ("i8", 1, "64-bit signed integers, which"),
        ("u8", 1, "64-bit unsigned integers, which"),
        ("i1", 0, "8-bit signed integers, white being 0, which"),
        ("i4", 0, "32-bit signed integers, white being 0, which"),
    ],
)
def test_a_tiff_that_cannot_be_read_is_refused_by_its_pixels(tmp_path, order, kind, photometric, words):
    path = tiff(tmp_path / "a.tif", IDS.astype(kind), photometric, order)
    for reader, what in ((read_labels, "label map"), (read_instances, "instance map"), (read_image, "image")):
        with pytest.raises(DataError, match=rf"a\.tif: cannot read this {what}: it is a TIFF whose pixels are {words}"):
            reader(path)


def test_floating_point_that_is_no_whole_number_is_called_so(tmp_path):
    for value in (0.5, np.nan, np.inf, 1e12):
        with pytest.raises(DataError, match=r"a\.tif: the label map has floating-point pixels"):
            read_labels(tiff(tmp_path / "a.tif", np.array([[1, value]], "f4")))


def test_a_label_map_of_several_pages_is_refused_by_name(tmp_path):
    pages = [Image.fromarray(np.full((4, 4), i, np.uint8)) for i in range(3)]
    for name in ("a.tif", "a.gif", "a.png"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
        with pytest.raises(DataError, match=rf"{name}: the label map holds 3 pictures"):
            read_labels(tmp_path / name)


def test_a_tiff_compressed_as_jpeg_is_refused_by_name(tmp_path):
    Image.new("L", (16, 16)).save(tmp_path / "a.tif", compression="jpeg")
    with pytest.raises(DataError, match=r"a\.tif: the label map is a TIFF compressed as JPEG"):
        read_labels(tmp_path / "a.tif")


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colors_that_are_grays_are_told(tmp_path, mode):
    Image.new(mode, (3, 2), (7, 7, 7, 255)[: len(mode)]).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="its red, green and blue are equal"):
        read_labels(tmp_path / "a.png")


def test_palette_indices_are_labels_with_transparency_too(tmp_path):
    image = Image.fromarray(IDS.astype(np.uint8), "L")
    image = image.convert("P")
    image.putdata(IDS.ravel().tolist())
    image.putpalette([9, 9, 9] * 4)
    for name, options in (("a.png", {"transparency": 0}), ("b.png", {"bits": 2}), ("a.gif", {}), ("a.bmp", {})):
        image.save(tmp_path / name, **options)
        got = read_labels(tmp_path / name)
        if name == "a.gif":  # Pillow writes each color once
            assert got.shape == IDS.shape
        else:
            np.testing.assert_array_equal(got, IDS)


SEEN = np.arange(6).reshape(2, 3)
STORED = {  # EXIF orientation -> the array whose row 0 and column 0 the standard puts at the named sides
    1: SEEN,
    2: SEEN[:, ::-1],  # row 0 top, column 0 right
    3: SEEN[::-1, ::-1],  # bottom, right
    4: SEEN[::-1],  # bottom, left
    5: SEEN.T,  # left, top
    6: SEEN.T[::-1],  # right, top
    7: SEEN.T[::-1, ::-1],  # right, bottom
    8: SEEN.T[:, ::-1],  # left, bottom
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_exif_orientation_of_labels_and_photos(tmp_path, orientation, name):
    path = tmp_path / name
    stored = np.ascontiguousarray(STORED[orientation].astype(np.uint8))
    image = Image.fromarray(stored)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(path, exif=exif)
    np.testing.assert_array_equal(read_labels(path), SEEN)
    np.testing.assert_array_equal(read_instances(path), SEEN)
    np.testing.assert_array_equal(np.asarray(read_image(path))[..., 0], SEEN)


def test_a_photo_is_labeled_as_people_see_it(tmp_path):
    (tmp_path / "img").mkdir()
    (tmp_path / "lab").mkdir()
    seen = np.zeros((64, 64, 3), np.uint8)
    seen[:32, :, 0] = 255
    label = np.zeros((64, 64), np.uint8)
    label[32:] = 1
    photo = Image.fromarray(seen[::-1, ::-1].copy())
    exif = photo.getexif()
    exif[0x0112] = 3
    photo.save(tmp_path / "img/p.jpg", exif=exif, quality=95)
    Image.fromarray(label).save(tmp_path / "lab/p.png")
    options = dict(image_dir=tmp_path / "img", label_dir=tmp_path / "lab", num_classes=2, crop_size=64)
    item = make_dataset("folder", "val", **options)[0]
    assert ((item["image"][0] > 0) == (item["label"] == 0)).all()


def test_a_panorama_is_allowed_by_the_variable_that_the_error_names(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.fromarray(np.ones((40, 40), np.uint8)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    for read in (read_labels, read_image):
        with pytest.raises(DataError, match=rf"a\.png: cannot read this .*set the environment variable {MAX_PIXELS}"):
            read(path)
    monkeypatch.setenv(MAX_PIXELS, "1600")
    assert (read_labels(path) == 1).all()
    monkeypatch.setenv(MAX_PIXELS, "many")
    with pytest.raises(DataError, match=f"{MAX_PIXELS} must be a number of pixels, got 'many'"):
        read_labels(path)
