# SPDX-License-Identifier: Apache-2.0
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from maps import SAMPLES as COCO
from PIL import Image
from torch.utils.data import DataLoader

from spade_fast.data import DATASETS, IGNORE, DataError, default_options, make_dataset

needs_coco = pytest.mark.skipif(not COCO.is_dir(), reason="the COCO-Stuff sample is not at ../shared/coco_stuff_sample")


def save(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values)).save(path)


def as_stored(**options):
    """Options under which an item equals the stored maps of 32×32 pixels."""
    return {"preprocess": "none", "flip": False, **options}


def blocks(values, dtype=np.uint8, side=32):
    """A label map of side×side pixels whose columns hold the values in turn."""
    return np.resize(np.repeat(np.array(values, dtype), 2), (side, side))


@pytest.fixture
def folder(tmp_path):
    """Three samples of 40×32 pixels with five classes and instances."""
    rng = np.random.default_rng(0)
    for k in range(3):
        labels = rng.integers(0, 5, (4, 5)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
        save(tmp_path / f"img/{k}.jpg", rng.integers(0, 255, (32, 40, 3)).astype(np.uint8))
        save(tmp_path / f"label/{k}.png", labels)
        save(tmp_path / f"inst/{k}.png", labels.astype(np.uint16) * 1000)
    return tmp_path


def open_folder(root, **options):
    defaults = {"image_dir": root / "img", "label_dir": root / "label", "num_classes": 5, "crop_size": 16}
    return make_dataset("folder", **{**defaults, **options})


# What an item holds


def test_folder_item(folder):
    dataset = open_folder(folder, instance_dir=folder / "inst", **as_stored())
    item = dataset[1]
    stored = np.asarray(Image.open(folder / "label/1.png"))
    photo = np.asarray(Image.open(folder / "img/1.jpg").resize((32, 32), Image.Resampling.BICUBIC))
    columns = [int((j + 0.5) * 40 / 32) for j in range(32)]  # mode none: 40 -> 32 = round(40 / 32) * 32
    assert item["label"].dtype == torch.int64 and item["image"].dtype == torch.float32
    np.testing.assert_array_equal(item["label"], stored[:, columns])
    np.testing.assert_allclose(item["image"], photo.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
    assert item["edges"].dtype == torch.bool
    assert item["path"] == str(folder / "label/1.png")
    assert (dataset.num_classes, dataset.has_edges, dataset.label_nc, len(dataset)) == (5, True, 6, 3)


def test_edges_follow_the_crop_and_flip(folder):
    """The instance map repeats the label map, so the edges of an item are where its labels change."""
    dataset = open_folder(folder, instance_dir=folder / "inst")
    for epoch in range(5):
        dataset.set_epoch(epoch)
        for item in dataset:
            ids = item["label"].numpy()
            expected = np.zeros(ids.shape, bool)
            for (i, j), here in np.ndenumerate(ids):
                around = [(i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)]
                expected[i, j] = any(ids[a, b] != here for a, b in around if 0 <= a < 16 and 0 <= b < 16)
            np.testing.assert_array_equal(item["edges"], expected)


def test_without_instances_or_images(folder):
    dataset = open_folder(folder)
    assert not dataset.has_edges and dataset.label_nc == 5 and "edges" not in dataset[0]
    assert not open_folder(folder, instance_dir=folder / "inst", use_edges=False).has_edges
    shutil.rmtree(folder / "img")
    assert set(open_folder(folder, image_dir=None, need_images=False)[0]) == {"label", "path"}


def test_folder_by_dataroot(folder):
    for kind in ("img", "label", "inst"):
        (folder / kind).rename(folder / f"val_{kind}")
    dataset = make_dataset("folder", "val", dataroot=folder, num_classes=5)
    assert len(dataset) == 3 and dataset.has_edges


def test_ignore_value_and_many_classes(tmp_path):
    save(tmp_path / "img/a.png", np.zeros((32, 32, 3), np.uint8))
    save(tmp_path / "label/a.png", blocks([0, 999, 65535], np.uint16))
    dataset = open_folder(tmp_path, num_classes=1000, ignore_value=65535, **as_stored())
    np.testing.assert_array_equal(dataset[0]["label"], blocks([0, 999, IGNORE], np.int64))
    assert dataset.palette.shape == (1000, 3)


def test_batches_collate(folder):
    dataset = open_folder(folder, instance_dir=folder / "inst")
    batch = next(iter(DataLoader(dataset, batch_size=3)))
    assert batch["image"].shape == (3, 3, 16, 16) and batch["label"].shape == batch["edges"].shape == (3, 16, 16)
    for k in range(3):
        torch.testing.assert_close(batch["image"][k], dataset[k]["image"], rtol=0, atol=0)


def test_augmentation_depends_on_seed_epoch_and_index_alone(folder):
    dataset = open_folder(folder)

    def epoch_of(dataset, number, loader=None):
        dataset.set_epoch(number)
        images = [batch["image"] for batch in loader] if loader else [dataset[k]["image"][None] for k in range(3)]
        return torch.cat(images)

    first, second = epoch_of(dataset, 0), epoch_of(dataset, 1)
    assert not torch.equal(first, second)
    assert not torch.equal(first, epoch_of(open_folder(folder, seed=1), 0))
    # Workers that live on between epochs see the epoch change, and another order of reading changes nothing.
    loader = DataLoader(dataset, batch_size=2, num_workers=2, persistent_workers=True)
    assert torch.equal(epoch_of(dataset, 0, loader), first)
    assert torch.equal(epoch_of(dataset, 1, loader), second)
    dataset.set_epoch(0)
    assert torch.equal(dataset[2]["image"], first[2]) and torch.equal(dataset[0]["image"], first[0])
    val = open_folder(folder, phase="val")
    assert torch.equal(epoch_of(val, 0), epoch_of(val, 1))


# The datasets


@needs_coco
def test_coco_sample():
    train, val = (make_dataset("coco", phase, dataroot=COCO) for phase in ("train", "val"))
    assert (len(train), len(val), val.num_classes, val.label_nc) == (13, 4, 183, 184)
    item = val[0]
    assert item["path"].endswith("000000000139.png") and item["image"].shape == (3, 256, 256)
    # By hand: nearest resize of the stored map, 255 moved to 182.
    stored = np.asarray(Image.open(COCO / "val_label/000000000139.png")).astype(int)
    rows = [int((i + 0.5) * stored.shape[0] / 256) for i in range(256)]
    columns = [int((i + 0.5) * stored.shape[1] / 256) for i in range(256)]
    expected = stored[np.ix_(rows, columns)]
    assert (expected == 255).any()
    expected[expected == 255] = 182
    np.testing.assert_array_equal(item["label"], expected)
    ids = np.asarray(Image.open(COCO / "val_inst/000000000139.png"))[np.ix_(rows, columns)]
    padded = np.pad(ids, 1, mode="edge")
    around = [padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]
    np.testing.assert_array_equal(item["edges"], np.any([ids != side for side in around], axis=0))
    for dataset in (train, val):
        for item in dataset:
            assert item["label"].min() >= 0 and item["label"].max() <= 182
    # 139 shows a living room.
    names = {val.class_names[number] for number in np.unique(expected)}
    assert {"person", "tv", "chair", "potted plant", "unknown"} <= names


@needs_coco
def test_coco_ignored_instead_of_unknown():
    item = make_dataset("coco", "val", dataroot=COCO, ignore_value=255)[0]
    assert item["label"].min() == IGNORE and item["label"].max() < 182


def test_coco_names():
    names = make_dataset_names("coco")
    assert len(names) == 183 and len(set(names)) == 183
    # From COCO-Stuff's list, whose ids are one higher.
    for number, name in {
        0: "person",
        63: "potted plant",
        91: "banner",
        123: "grass",
        156: "sky-other",
        181: "wood",
    }.items():
        assert names[number] == name


def make_dataset_names(name):
    from spade_fast.data import cityscapes, coco

    return {"coco": coco, "cityscapes": cityscapes}[name].CLASS_NAMES


@pytest.fixture
def ade(tmp_path):
    for folder, phase in (("training", "train"), ("validation", "val")):
        for number, values in ((1, [0, 1, 150]), (2, [7])):
            stem = f"ADE_{phase}_{number:08d}"
            save(tmp_path / f"images/{folder}/{stem}.jpg", np.zeros((32, 32, 3), np.uint8))
            save(tmp_path / f"annotations/{folder}/{stem}.png", blocks(values))
    (tmp_path / "sceneCategories.txt").write_text(
        "".join(f"ADE_{p}_00000001 bedroom\nADE_{p}_00000002 street\n" for p in ("train", "val"))
    )
    return tmp_path


@pytest.mark.parametrize("phase", ["train", "val"])
def test_ade20k(ade, phase):
    dataset = make_dataset("ade20k", phase, dataroot=ade, **as_stored())
    assert (len(dataset), dataset.num_classes, dataset.label_nc) == (2, 151, 151)
    np.testing.assert_array_equal(dataset[0]["label"], blocks([0, 1, 150]))
    shifted = make_dataset("ade20k", phase, dataroot=ade, shift_labels=True, **as_stored())
    assert shifted.label_nc == 151
    np.testing.assert_array_equal(shifted[0]["label"], blocks([150, 0, 149]))


def test_ade20k_outdoor(ade, tmp_path):
    for options, label in (({}, 7), ({"shift_labels": True}, 6)):
        dataset = make_dataset("ade20k-outdoor", dataroot=ade, **options, **as_stored())
        assert [Path(sample.label).stem for sample in dataset.samples] == ["ADE_train_00000002"]
        assert (dataset.label_nc, dataset[0]["label"].unique().tolist()) == (151, [label])
    listing = tmp_path / "list.txt"
    listing.write_text("\nADE_train_00000001.jpg\n")
    dataset = make_dataset("ade20k-outdoor", dataroot=ade, file_list=listing)
    assert [Path(sample.label).stem for sample in dataset.samples] == ["ADE_train_00000001"]
    listing.write_text("nothing\n")
    with pytest.raises(DataError, match=r"none of the samples chosen by the file list"):
        make_dataset("ade20k-outdoor", dataroot=ade, file_list=listing)
    (ade / "sceneCategories.txt").unlink()
    with pytest.raises(DataError, match=r"sceneCategories\.txt: cannot read .* file list"):
        make_dataset("ade20k-outdoor", dataroot=ade)


def test_cityscapes(tmp_path):
    labels = np.full((64, 128), 7, np.uint8)
    labels[:, 32:96] = 26
    ids = labels.astype(np.uint16)
    ids[:, 32:64], ids[:, 64:96] = 26000, 26001  # two cars side by side
    stem = "aachen/aachen_000000_000019"
    save(tmp_path / f"leftImg8bit/train/{stem}_leftImg8bit.png", np.zeros((64, 128, 3), np.uint8))
    save(tmp_path / f"gtFine/train/{stem}_gtFine_labelIds.png", labels)
    save(tmp_path / f"gtFine/train/{stem}_gtFine_instanceIds.png", ids)
    save(tmp_path / f"gtFine/train/{stem}_gtFine_color.png", np.zeros((64, 128, 3), np.uint8))
    dataset = make_dataset("cityscapes", dataroot=tmp_path, flip=False)
    assert (len(dataset), dataset.num_classes, dataset.label_nc, dataset.output_size) == (1, 35, 36, (256, 512))
    item = dataset[0]
    np.testing.assert_array_equal(item["label"], labels.repeat(4, 0).repeat(4, 1))
    columns = np.flatnonzero(item["edges"][0])
    assert columns.tolist() == [127, 128, 255, 256, 383, 384]  # road | car, car | car, car | road
    assert item["edges"].all(0).sum() == 6
    assert make_dataset_names("cityscapes")[26] == "car"


def test_flickr_is_coco_without_instances(tmp_path):
    save(tmp_path / "train_img/a.jpg", np.zeros((32, 32, 3), np.uint8))
    save(tmp_path / "train_label/a.png", blocks([0, 255, 181]))
    dataset = make_dataset("flickr", dataroot=tmp_path, **as_stored())
    assert dataset.label_nc == 183
    np.testing.assert_array_equal(dataset[0]["label"], blocks([0, 182, 181]))


@pytest.mark.parametrize("name", DATASETS)
def test_defaults_make_a_geometry(name):
    options = default_options(name)
    assert options["load_size"] >= options["crop_size"]
    assert options["num_classes"] == {
        "folder": None,
        "synthetic": 12,
        "cityscapes": 35,
        "coco": 183,
        "flickr": 183,
    }.get(name, 151)


def test_an_unknown_option_is_named():
    with pytest.raises(TypeError, match="make_dataset has no option 'labeldir'; did you mean label_dir"):
        make_dataset("folder", labeldir="x")
    with pytest.raises(TypeError, match="make_dataset has no option 'dataset'"):
        make_dataset("folder", dataset="coco")


def test_palettes_are_distinct(folder, ade):
    from spade_fast.data import cityscapes, coco
    from spade_fast.data.palettes import distinct_colors

    palettes = [distinct_colors(70000), cityscapes.palette(), coco.distinct_colors(183)]
    palettes += [make_dataset("ade20k", dataroot=ade).palette, make_dataset("synthetic").palette]
    for palette in palettes:
        assert palette.dtype == np.uint8 and len(np.unique(palette, axis=0)) == len(palette)


# Bad data


def test_value_out_of_range_is_named(folder):
    values = blocks([0, 1, 9])
    save(folder / "label/1.png", np.pad(values, ((0, 0), (0, 8))))
    dataset = open_folder(folder)
    count = int((values == 9).sum())
    with pytest.raises(
        DataError, match=rf"1\.png: label value 9 \({count} pixels\) .* folder has 5 classes, .* 0\.\.4"
    ):
        dataset[1]
    with pytest.raises(DataError, match=r"label value 9 .* 5 classes"):  # also from a worker
        list(DataLoader(dataset, num_workers=1))
    dataset[0]  # the others are usable


@pytest.mark.parametrize(
    "values, dtype, classes, hint",
    [
        ([0, 255], np.uint8, 2, r"255 \(\d+ pixels\).* 2 classes.*0/255 mask: store 0 and 1 .*--ignore-value 255"),
        ([0, 1, 255], np.uint8, 2, r"If 255 marks unlabeled pixels, pass --ignore-value 255"),
        ([1, 2, 3], np.uint8, 3, r"label value 3 .* 3 classes.*start at 1"),
        ([0, 60000], np.uint16, 1000, r"label value 60000 .* 1000 classes, expected values 0\.\.999"),
        (list(range(20, 40)), np.uint8, 20, r"20 \(.* and 12 more values is out of range"),
    ],
)
def test_hints(tmp_path, values, dtype, classes, hint):
    save(tmp_path / "img/a.png", np.zeros((32, 32, 3), np.uint8))
    save(tmp_path / "label/a.png", blocks(values, dtype))
    with pytest.raises(DataError, match=hint):
        open_folder(tmp_path, num_classes=classes)[0]


def test_value_lost_by_the_crop_is_still_found(folder):
    """Whether a fault is found must not hang on the crop that is drawn."""
    labels = np.zeros((32, 40), np.uint8)
    labels[31, 39] = 77
    save(folder / "label/0.png", labels)
    for epoch in range(5):
        dataset = open_folder(folder, preprocess="crop")
        dataset.set_epoch(epoch)
        with pytest.raises(DataError, match=r"0\.png: label value 77 \(1 pixels\)"):
            dataset[0]


def test_size_mismatch_is_named(folder):
    save(folder / "img/2.jpg", np.zeros((40, 32, 3), np.uint8))
    match = r"2\.jpg: the image is 32×40 pixels .* label map .*2\.png is 40×32; expected the same size$"
    with pytest.raises(DataError, match=match):
        open_folder(folder)[2]
    save(folder / "inst/1.png", np.zeros((32, 39), np.uint8))
    with pytest.raises(DataError, match=r"inst/1\.png: the instance map is 39×32"):
        open_folder(folder, instance_dir=folder / "inst")[1]


def test_exif_rotation_is_blamed(folder):
    image = Image.new("RGB", (40, 32))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(folder / "img/2.jpg", exif=exif)
    with pytest.raises(DataError, match=r"EXIF rotation"):
        open_folder(folder)[2]


def test_truncated_file_is_named(folder):
    path = folder / "img/0.jpg"
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(DataError, match=r"img/0\.jpg: cannot read this image"):
        open_folder(folder)[0]


def test_missing_partners_are_named(folder):
    (folder / "img/1.jpg").unlink()
    (folder / "label/2.png").unlink()
    with pytest.raises(DataError) as error:
        open_folder(folder, instance_dir=folder / "inst")
    lines = str(error.value).splitlines()
    assert lines[0] == "folder: 3 files cannot be matched:"
    assert any("label/1.png: this label map has no image named 1 in" in line for line in lines)
    assert any("img/2.jpg: this image has no label map named 2 in" in line for line in lines)
    assert any("inst/2.png: this instance map has no label map named 2 in" in line for line in lines)


def test_one_name_twice(folder):
    shutil.copy(folder / "label/0.png", folder / "label/0.bmp")
    with pytest.raises(DataError, match=r"label/0\.png: .*label/0\.bmp has the same name; expected one of them"):
        open_folder(folder)


def test_folders_missing_or_empty(folder, tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no such folder"):
        open_folder(folder, label_dir=folder / "nowhere")
    with pytest.raises(
        DataError, match=r"nowhere: no such folder, .* instance maps of folder; to go without, turn edges off"
    ):
        open_folder(folder, instance_dir=folder / "nowhere")
    (tmp_path / "e").mkdir()
    with pytest.raises(DataError, match=r"/e: no label maps in this folder"):
        open_folder(folder, label_dir=tmp_path / "e", need_images=False)
    with pytest.raises(DataError, match=r"train_label: no such folder"):
        make_dataset("coco", dataroot=tmp_path / "e")


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("cocoa", {}, "dataset 'cocoa' is unknown; expected one of coco, ade20k"),
        ("coco", {"phase": "test"}, "phase 'test' is unknown; expected one of train, val"),
        ("coco", {}, r"dataset coco: its folder is not given \(--dataroot\)"),
        ("coco", {"dataroot": "x", "num_classes": 20}, "coco has 183 classes, got num_classes 20"),
        ("coco", {"dataroot": "x", "shift_labels": True}, "shift_labels is an option of ade20k"),
        ("folder", {"label_dir": "x"}, r"number of classes is not given \(--num-classes\)"),
        ("folder", {"num_classes": 3}, "no folder of label maps is given"),
        ("folder", {"label_dir": "x", "num_classes": 0}, r"num_classes must be 1\.\.65536, got 0"),
        ("synthetic", {"size": 0}, "size must be at least 1, got 0"),
        ("synthetic", {"seed": -1}, "seed must not be negative, got -1"),
    ],
)
def test_impossible_options(name, options, message):
    with pytest.raises(DataError, match=message):
        make_dataset(name, **options)


def test_index_out_of_range(folder):
    dataset = open_folder(folder)
    assert dataset[-1]["path"] == dataset[2]["path"]
    with pytest.raises(IndexError, match="index 3 is outside of folder, which has 3 samples"):
        dataset[3]
