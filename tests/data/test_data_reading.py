# SPDX-License-Identifier: Apache-2.0
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from spade_fast.data import DataError
from spade_fast.data.reading import list_files, read_image, read_instances, read_labels


def gray_png(path, values, bits):
    """A gray PNG of 2 or 4 bits a pixel, written by hand: Pillow writes none."""
    height, width = values.shape
    rows = b""
    for row in values:
        padded = list(row) + [0] * (-width % (8 // bits))
        packed = [
            sum(v << (8 - bits * (k + 1)) for k, v in enumerate(padded[i : i + 8 // bits]))
            for i in range(0, len(padded), 8 // bits)
        ]
        rows += b"\0" + bytes(packed)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def test_label_depths(tmp_path):
    path = tmp_path / "a.png"
    eight = np.array([[0, 7, 255]], np.uint8)
    Image.fromarray(eight).save(path)
    np.testing.assert_array_equal(read_labels(path), eight)

    sixteen = np.array([[0, 300, 65535]], np.uint16)
    Image.fromarray(sixteen).save(path)
    np.testing.assert_array_equal(read_labels(path), sixteen)

    Image.fromarray(np.array([[True, False, True]])).save(path)
    np.testing.assert_array_equal(read_labels(path), [[1, 0, 1]])


@pytest.mark.parametrize("bits", [2, 4])
def test_low_bit_gray_is_not_stretched(tmp_path, bits):
    values = np.arange(15).reshape(3, 5) % 2**bits
    gray_png(tmp_path / "a.png", values, bits)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.png"), values)


def test_palette_image_is_read_as_indices(tmp_path):
    values = np.array([[0, 1, 2, 1]], np.uint8)
    image = Image.new("P", (4, 1))
    image.putdata(values.ravel().tolist())
    image.putpalette([200, 10, 10, 5, 5, 5, 90, 200, 30])
    image.save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == "P"
    np.testing.assert_array_equal(read_labels(tmp_path / "a.png"), values)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_colors_are_not_labels(tmp_path, mode):
    path = tmp_path / "a.png"
    Image.new(mode, (3, 2)).save(path)
    with pytest.raises(DataError, match=rf"{path.name}: the label map has mode '{mode}'.*Convert each color"):
        read_labels(path)


def test_jpeg_is_no_label_map(tmp_path):
    path = tmp_path / "a.png"
    Image.new("L", (8, 8)).save(path, format="JPEG")
    with pytest.raises(DataError, match=r"a\.png: the label map is a JPEG"):
        read_labels(path)
    with pytest.raises(DataError, match=r"a\.png: the instance map is a JPEG"):
        read_instances(path)


def test_instances(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.array([[26001, 26002, 7]], np.uint16)).save(path)
    np.testing.assert_array_equal(read_instances(path), [[26001, 26002, 7]])
    Image.fromarray(np.array([[[0, 0, 1], [0, 1, 0], [1, 0, 0]]], np.uint8)).save(path)
    np.testing.assert_array_equal(read_instances(path), [[1, 256, 65536]])
    Image.new("RGBA", (2, 2)).save(path)
    with pytest.raises(DataError, match=r"a\.png: the instance map has mode 'RGBA'"):
        read_instances(path)


@pytest.mark.parametrize("reader, what", [(read_image, "image"), (read_labels, "label map"), (read_instances, "inst")])
def test_unreadable(tmp_path, reader, what):
    noise = np.random.default_rng(0).integers(0, 255, (40, 40)).astype(np.uint8)
    path = tmp_path / "cut.png"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:700])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not an image")
    flipped = tmp_path / "damaged.png"
    Image.fromarray(noise).save(flipped)
    data = bytearray(flipped.read_bytes())
    data[300] ^= 0xFF  # the checksum no longer fits
    flipped.write_bytes(bytes(data))
    for name in ("cut.png", "empty.png", "text.png", "damaged.png", "missing.png"):
        with pytest.raises(DataError, match=rf"{name}: cannot read this {what}"):
            reader(tmp_path / name)


def test_truncated_jpeg(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"a\.jpg: cannot read this image: OSError"):
        read_image(path)


def test_images_become_8_bit_rgb(tmp_path):
    path = tmp_path / "a.png"
    Image.new("L", (2, 1), 9).save(path)
    np.testing.assert_array_equal(np.asarray(read_image(path)), np.full((1, 2, 3), 9))
    Image.fromarray(np.array([[40000]], np.uint16)).save(path)
    with pytest.raises(DataError, match=r"a\.png: the image has pixels of mode 'I;?(16)?'; expected 8 bits"):
        read_image(path)


def test_list_files(tmp_path):
    for name in ("b/2.PNG", "a/1.png", ".hidden/3.png", "a/.4.png", "a/5.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list_files(tmp_path, frozenset({".png"})) == ["a/1.png", "b/2.PNG"]
    with pytest.raises(DataError, match="nowhere: no such folder"):
        list_files(tmp_path / "nowhere", frozenset())
