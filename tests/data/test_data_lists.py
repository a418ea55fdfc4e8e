# SPDX-License-Identifier: Apache-2.0
"""Which files a dataset finds, which ones a file list names, and what is said of the others."""

import os

import numpy as np
import pytest
from PIL import Image

from spade_fast.data import IGNORE, DataError, make_dataset
from spade_fast.data.__main__ import main as check


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Writes images (img/NAME.jpg) and label maps (lab/NAME.png); returns a function that opens them."""
    monkeypatch.chdir(tmp_path)

    def files(*names, labels=None, suffix=".png"):
        for folder, mode, ending, those in (("img", "RGB", ".jpg", names), ("lab", "L", suffix, labels or names)):
            os.makedirs(folder, exist_ok=True)
            for name in those:
                os.makedirs(os.path.dirname(f"{folder}/{name}"), exist_ok=True)
                Image.new(mode, (64, 64)).save(f"{folder}/{name}{ending}")
        return opened

    def opened(**options):
        dataset = make_dataset("folder", image_dir="img", label_dir="lab", num_classes=2, **options)
        return [sample.label for sample in dataset.samples]

    return files


ARGUMENTS = "--dataset folder --image-dir img --label-dir lab --num-classes 2 --workers 0".split()


@pytest.mark.parametrize(
    "line, found",
    [
        ("scene.001", ["scene.001"]),
        ("scene.001.jpg", ["scene.001"]),
        ("scene.001.PNG", ["scene.001"]),
        ("a", ["a", "x/a", "y/a"]),
        ("x/a", ["x/a"]),
        ("x\\a.jpg", ["x/a"]),
        ("photos/b.jpg", ["b"]),
        ("./b", ["b"]),
        ("b ", ["b "]),
        (" b  ", ["b"]),
        ("/data/img/y/a.png", ["y/a"]),
        ("two words", ["two words"]),
        ("caf\u00e9", ["cafe\u0301"]),
    ],
)
def test_what_a_line_of_a_list_names(make, line, found):
    opened = make("scene.001", "scene.002", "a", "x/a", "y/a", "b", "b ", "two words", "cafe\u0301")
    with open("list.txt", "w", encoding="utf-8") as file:
        file.write(f"{line}\n")
    assert opened(file_list="list.txt") == [f"lab/{name}.png" for name in sorted(found)]


@pytest.mark.parametrize("data", [b"\xef\xbb\xbfa\nb\n", b"a\r\nb\r\n", b"\n a \n\n\tb", b"a\rb", b"a\nb\na\n"])
def test_marks_and_ends_of_lines(make, data):
    opened = make("a", "b", "c")
    with open("list.txt", "wb") as file:
        file.write(data)
    assert opened(file_list="list.txt") == ["lab/a.png", "lab/b.png"]


@pytest.mark.parametrize(
    "data, message",
    [
        (b"a\n\nnowhere\n", "list.txt, line 3: there is no sample named 'nowhere'"),
        (b"a.jpg a.png\n", r"line 1: there is no sample named 'a.jpg a.png' \(expected one name a line\)"),
        (b"z/b\n", "line 1: there is no sample named 'z/b'"),
        ("a\n".encode("utf-16"), "list.txt: cannot read the file list: it is not UTF-8"),
        (b" \n\n", "list.txt: the file list names no sample"),
        (None, "list.txt: cannot read the file list: No such file"),
    ],
)
def test_a_wrong_list_is_refused_by_line(make, data, message):
    opened = make("a", "x/b")
    if data is not None:
        with open("list.txt", "wb") as file:
            file.write(data)
    with pytest.raises(DataError, match=message):
        opened(file_list="list.txt")


def test_check_counts_an_absent_name_once(make, capsys):
    make("a")
    with open("list.txt", "w") as file:
        file.write("a\nnowhere\n")
    assert check([*ARGUMENTS, "--file-list", "list.txt"]) == 1
    out = capsys.readouterr().out
    assert "fault: list.txt, line 2: there is no sample named 'nowhere'" in out and out.endswith("1 fault\n")


def test_a_list_may_be_of_both_phases(tmp_path):
    for phase, name in (("train", "a"), ("val", "b")):
        for kind, mode in (("img", "RGB"), ("label", "L")):
            (tmp_path / f"{phase}_{kind}").mkdir()
            Image.new(mode, (64, 64)).save(tmp_path / f"{phase}_{kind}/{name}.png")
    listing = tmp_path / "list.txt"
    listing.write_text("a\nb\n")
    options = dict(dataroot=tmp_path, num_classes=1, file_list=listing)
    assert [len(make_dataset("folder", phase, **options)) for phase in ("train", "val")] == [1, 1]
    listing.write_text("a\nb\nc\n")
    with pytest.raises(DataError, match=r"1 samples of the list are not there:\n.*line 3: .*'c'"):
        make_dataset("folder", **options)


@pytest.mark.parametrize(
    "images, labels, suffix, message",
    [
        ("ab", "ab", ".jpg", r"lab/a.jpg is a JPEG, whose compression changes values: save label maps as PNG"),
        ("ab", "ab", ".webp", r"lab/a.webp is a WebP"),
        ("ab", "ab", ".ppm", r"lab/a.ppm has another ending \(.ppm\) than label maps have \(.bmp"),
        ("ab", ("a_seg", "b_seg"), ".png", "label maps have '_seg' at the end of their names, images do not"),
        ("a", ("a_seg",), ".png", "label maps have '_seg' at the end of their names"),
        (
            ("a_img", "b_img"),
            ("a_ids", "b_ids"),
            ".png",
            "have 'ds' at the end of their names, images have 'mg'",
        ),
        (("img_1", "img_2"), ("seg_1", "seg_2"), ".png", "label maps have 'se' at the start of their names"),
        (("A1", "B1"), ("a1", "b1"), ".png", "differ in upper and lower case"),
    ],
)
def test_label_maps_of_another_ending_are_told_apart(make, images, labels, suffix, message):
    with pytest.raises(DataError, match=message):
        make(*images, labels=labels, suffix=suffix)()


def test_names_that_merely_begin_alike_get_no_advice(make):
    with pytest.raises(DataError) as caught:
        make("nolabel", labels=["noimage"])()
    assert "rename" not in str(caught.value)


def test_labels_only_says_what_a_folder_holds_instead(make):
    make("a", "b", suffix=".jpg")
    with pytest.raises(DataError, match=r"no label maps in this folder \(it holds 2 × \.jpg, whose compression"):
        make_dataset("folder", label_dir="lab", num_classes=2, need_images=False)


def test_minus_one_is_ignored(make):
    opened = make("a")
    values = np.full((64, 64), -1, np.int32)
    values[:32] = 1
    os.remove("lab/a.png")
    Image.fromarray(values).save("lab/a.tif")
    with pytest.raises(DataError, match=r"label value -1 \(2048 pixels\).*pass --ignore-value -1"):
        make_dataset("folder", "val", image_dir="img", label_dir="lab", num_classes=2)[0]
    options = dict(image_dir="img", label_dir="lab", num_classes=2, ignore_value=-1, crop_size=64)
    label = make_dataset("folder", "val", **options)[0]["label"]
    assert (label[:32] == 1).all() and (label[32:] == IGNORE).all()
    assert len(opened()) == 1


@pytest.mark.parametrize("value", [0, 255, 70000, 2**31 - 1, -(2**31)])
def test_any_value_can_be_the_ignored_one(make, value):
    make("a")
    os.remove("lab/a.png")
    Image.fromarray(np.full((64, 64), value, np.int32)).save("lab/a.tif")
    options = dict(image_dir="img", label_dir="lab", num_classes=2, ignore_value=value, crop_size=64)
    assert (make_dataset("folder", "val", **options)[0]["label"] == IGNORE).all()


def _palette(path, colors, index):
    image = Image.new("P", (64, 64), index)
    image.putpalette(colors)
    image.save(path)


def test_palettes_that_differ_are_a_warning(make, capsys):
    make("a", "b")
    _palette("lab/a.png", [0, 0, 0, 128, 0, 0], 0)
    _palette("lab/b.png", [128, 0, 0, 0, 0, 0], 0)
    assert check(ARGUMENTS) == 0
    out = capsys.readouterr().out
    assert "warning: palettes differ: label 0 has color (128, 0, 0) in the palette of lab/b.png, (0, 0, 0) in" in out
    assert "0 faults, 1 warning\n" in out
    _palette("lab/b.png", [0, 0, 0, 9, 9, 9], 0)  # differs in a color that no pixel has
    check(ARGUMENTS)
    assert "warning" not in capsys.readouterr().out


def test_hidden_files_pipes_and_loops_of_links(make):
    opened = make("a", "x/b")
    for name in ("lab/.DS_Store", "lab/._a.png", "img/Thumbs.db", "lab/c.txt"):
        open(name, "w").close()
    os.mkfifo("lab/pipe.png")
    os.symlink("../x", "lab/x/loop")
    os.symlink("..", "lab/x/up")
    assert opened() == ["lab/a.png", "lab/x/b.png"]
    os.symlink("nowhere.png", "lab/broken.png")
    with pytest.raises(DataError, match=r"lab/broken\.png: this label map has no image named broken"):
        opened()


def test_a_folder_that_is_a_file_is_told(make):
    make("a")
    open("file", "w").close()
    with pytest.raises(DataError, match="file: this is no folder; it should hold the label maps of folder"):
        make_dataset("folder", image_dir="img", label_dir="file", num_classes=2)
    with pytest.raises(DataError, match="~nobody_at_all/x: no such folder"):
        make_dataset("folder", image_dir="img", label_dir="~nobody_at_all/x", num_classes=2)
