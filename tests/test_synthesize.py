# SPDX-License-Identifier: Apache-2.0
"""The synthesis command: which files it writes, what is in them, and what it says when checkpoint and data differ."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from spade_fast import LabelMap, load_generator, models, synthesize
from spade_fast.models.checkpoint import FORMAT
from spade_fast.pictures import to_uint8
from spade_fast.synthesize import choose_z, draw_z, main, parser, recall, unique_name

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of three 32×32 label maps of 3 classes with photos, and checkpoints without and with z and encoder."""
    root = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    for kind in ("label", "img"):
        (root / kind).mkdir()
    for name in ("a", "b", "c"):
        Image.fromarray(rng.integers(0, 3, (32, 32)).astype(np.uint8)).save(root / f"label/{name}.png")
        Image.fromarray(rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)).save(root / f"img/{name}.png")
    torch.manual_seed(0)
    options = {"label_nc": 3, "ngf": 4, "crop_size": 32}
    for name, z_dim in (("plain", None), ("vae", 6)):
        generator = models.SPADEGenerator(**options, z_dim=z_dim)
        models.init_weights(generator, "glorot", gain=1.0)  # strong enough for images to differ visibly
        generator.eval()
        state = {"format": FORMAT, "generator": entry(generator)}
        if z_dim:
            encoder = models.ConvEncoder(ngf=4, z_dim=z_dim)
            models.init_weights(encoder, "glorot", gain=1.0)
            state["encoder"] = entry(encoder)
        torch.save(state, root / f"{name}.pt")
    return root


def entry(net):
    return {"options": net.options, "state_dict": net.state_dict()}


def run(files, out, checkpoint, *options, code=0):
    argv = ["--checkpoint", str(files / f"{checkpoint}.pt"), "--out", str(out), "--label-dir", str(files / "label")]
    assert main([*argv, "--num-classes", "3", *options]) == code
    return {p.name: np.asarray(Image.open(p)) for p in out.glob("*.png")} if out.exists() else {}


def test_an_image_a_map_named_after_it_is_the_generators(files, tmp_path):
    made = run(files, tmp_path / "out", "plain", "--image-dir", str(files / "img"))
    assert set(made) == {"a.png", "b.png", "c.png", "contact_sheet.png"}
    state = torch.load(files / "plain.pt", weights_only=True)["generator"]
    generator = models.SPADEGenerator(**state["options"])
    generator.load_state_dict(state["state_dict"])
    for name in "abc":
        ids = torch.from_numpy(np.array(Image.open(files / f"label/{name}.png"))).long()[None]
        with torch.no_grad():
            expected = to_uint8(generator.eval()(LabelMap(ids, 3))[0])
        # one gray level: a value next to a rounding boundary may fall on either side
        assert np.abs(made[f"{name}.png"].astype(int) - expected).max() <= 1
        assert expected.std() > 5
    assert not np.array_equal(made["a.png"], made["b.png"])


def enlarged(cell):
    return cell.repeat(5, axis=0).repeat(5, axis=1)  # the sheet shows small cells 5 times as large


def contains(sheet, cell):
    cell = enlarged(cell)
    height, width = cell.shape[:2]
    starts = np.argwhere((sheet == cell[0, 0]).all(-1))
    return any(np.array_equal(sheet[y : y + height, x : x + width], cell) for y, x in starts)


def test_the_contact_sheet_shows_every_result_and_the_photos_only_when_given(files, tmp_path):
    with_photos = run(files, tmp_path / "a", "plain", "--image-dir", str(files / "img"))
    without = run(files, tmp_path / "b", "plain")
    for name in "abc":
        photo = np.asarray(Image.open(files / f"img/{name}.png"))
        assert contains(with_photos["contact_sheet.png"], with_photos[f"{name}.png"])
        assert contains(with_photos["contact_sheet.png"], photo)
        assert contains(without["contact_sheet.png"], without[f"{name}.png"])
        assert not contains(without["contact_sheet.png"], photo)


def test_several_samples_differ_and_the_seed_brings_them_back(files, tmp_path):
    first = run(files, tmp_path / "a", "vae", "--samples", "3", "--seed", "5")
    again = run(files, tmp_path / "b", "vae", "--samples", "3", "--seed", "5")
    other = run(files, tmp_path / "c", "vae", "--samples", "3", "--seed", "6")
    assert set(first) == {f"{m}_{k}.png" for m in "abc" for k in range(3)} | {"contact_sheet.png"}
    for name, image in first.items():
        assert np.array_equal(image, again[name]), name
        assert not np.array_equal(image, other[name]), name
    images = [first[f"a_{k}.png"].tobytes() for k in range(3)]
    assert len(set(images)) == 3


def test_z_depends_on_seed_and_map_and_is_standard_normal():
    assert torch.equal(draw_z(2, 5, 0, "a"), draw_z(2, 5, 0, "a"))
    assert torch.equal(draw_z(1, 5, 0, "a")[0], draw_z(2, 5, 0, "a")[0])  # asking for more keeps the first
    for seed, name in ((1, "a"), (0, "b")):
        assert not torch.equal(draw_z(2, 5, seed, name), draw_z(2, 5, 0, "a"))
    z = draw_z(100, 100, 3, "x")  # 10,000 values: standard errors of mean and variance are 0.01 and 0.014
    assert abs(z.mean()) < 0.05
    assert abs(z.var() - 1) < 0.07


def test_style_is_the_posteriors_mean_or_draws_from_it():
    noise = torch.tensor([[1.0, -2.0], [0.5, 0.0]])
    style = torch.tensor([[10.0, 20.0]]), torch.tensor([[4.0, 9.0]]).log()
    assert choose_z(2, noise, None) is noise
    assert choose_z(1, noise[:1], style).tolist() == [[10.0, 20.0]]
    assert torch.allclose(choose_z(2, noise, style), torch.tensor([[12.0, 14.0], [11.0, 20.0]]))


def test_the_style_of_a_photo_changes_the_images(files, tmp_path):
    dark, light = (np.full((40, 40, 3), v, np.uint8) for v in (10, 240))
    dark[::2], light[:, ::3] = 90, 130  # instance norm sees structure, not a constant
    for name, photo in (("dark", dark), ("light", light)):
        Image.fromarray(photo).save(tmp_path / f"{name}.png")
    a = run(files, tmp_path / "a", "vae", "--style-image", str(tmp_path / "dark.png"))
    b = run(files, tmp_path / "b", "vae", "--style-image", str(tmp_path / "light.png"))
    c = run(files, tmp_path / "c", "vae", "--style-image", str(tmp_path / "dark.png"), "--seed", "9")
    assert not np.array_equal(a["a.png"], b["a.png"])
    assert np.array_equal(a["a.png"], c["a.png"])  # the mean: no seed in it


def test_what_a_checkpoint_lacks_is_said(files, tmp_path, capsys):
    run(files, tmp_path / "out", "plain", "--samples", "2", code=1)
    assert "--samples 2: the generator" in capsys.readouterr().err
    run(files, tmp_path / "out", "plain", "--style-image", str(files / "img/a.png"), code=1)
    assert "--style-image: the generator" in capsys.readouterr().err
    run(files, tmp_path / "out", "vae", "--style-image", "x.png", "--encoder-checkpoint", "nowhere.pt", code=1)
    assert "nowhere.pt" in capsys.readouterr().err
    run(files, tmp_path / "out", "vae", "--style-image", "x.png", code=1)
    assert "x.png: cannot read this image" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_classes_that_differ_from_the_checkpoints_name_both(files, tmp_path, capsys):
    argv = ["--checkpoint", str(files / "plain.pt"), "--out", str(tmp_path / "out")]
    assert main([*argv, "--label-dir", str(files / "label"), "--num-classes", "5"]) == 1
    error = capsys.readouterr().err
    assert "the dataset folder has 5 channels (5 classes and no instance edges)" in error
    assert "was trained with 3 (label_nc)" in error
    assert main([*argv, "--dataset", "synthetic"]) == 1
    assert "+ 1 instance-edge channel" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_source_or_checkpoint_is_named(files, tmp_path, capsys):
    assert main(["--checkpoint", str(files / "plain.pt"), "--out", str(tmp_path / "o")]) == 1
    assert "--dataset with --dataroot, or --label-dir" in capsys.readouterr().err
    assert main(["--checkpoint", str(tmp_path / "none"), "--out", str(tmp_path / "o")]) == 1
    assert "no checkpoint at" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--checkpoint", "x", "--out", "y", "--sampels", "2"])
    assert "unknown option --sampels; did you mean --samples" in capsys.readouterr().err


def test_a_bare_state_dict_needs_only_what_its_tensors_do_not_tell(files, tmp_path, capsys):
    torch.save(torch.load(files / "plain.pt", weights_only=True)["generator"]["state_dict"], tmp_path / "net_G.pth")
    argv = ["--checkpoint", str(tmp_path / "net_G.pth"), "--label-dir", str(files / "label"), "--num-classes", "3"]
    assert main([*argv, "--out", str(tmp_path / "bare")]) == 1
    assert "crop_size" in capsys.readouterr().err
    told = ["--crop-size", "32", "--num-upsampling-layers", "normal"]
    assert main([*argv, *told, "--out", str(tmp_path / "bare")]) == 0
    expected = run(files, tmp_path / "own", "plain")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "bare/b.png")), expected["b.png"])


def test_a_run_remembers_its_data(tmp_path, capsys):
    from spade_fast.train.__main__ import main as train

    options = (
        "--dataset synthetic --crop-size 32 --ngf 4 --ndf 4 --batch-size 2 --synthetic-size 4 --steps 1 --workers 0"
    )
    run_directory = str(tmp_path / "run")
    assert train([*options.split(), "--no-use-edges", "--no-tensorboard", "--out", run_directory]) == 0
    assert main(["--checkpoint", run_directory, "--out", str(tmp_path / "out"), "--sheet-rows", "2"]) == 0
    assert len(list((tmp_path / "out").glob("0*.png"))) == 64  # the validation scenes


@pytest.mark.parametrize(
    ("config", "argv", "shifted"),
    [
        ({"raw_labels": False}, [], True),  # of an earlier version
        ({"raw_labels": True}, [], False),
        ({"shift_labels": True}, [], True),
        ({"shift_labels": True}, ["--no-shift-labels"], False),
        ({"shift_labels": False}, ["--shift-labels"], True),
        ({}, [], None),
    ],
)
def test_ade20k_labels_are_what_the_checkpoint_was_trained_on(tmp_path, config, argv, shifted):
    torch.save({"format": FORMAT, "training": {"config": {"dataset": "ade20k", **config}}}, tmp_path / "a.pt")
    args = parser().parse_args(["--checkpoint", str(tmp_path / "a.pt"), "--out", "x", *argv])
    recall(args)
    assert (args.dataset, args.shift_labels) == ("ade20k", shifted)


def test_names_that_meet_stay_apart():
    taken = set()
    for path, name in (("x/a.png", "a"), ("y/a.png", "y_a"), ("z/y/a.png", "a_2"), ("w/y/a.png", "a_3")):
        assert unique_name(path, taken) == name
        taken.add(name)
    assert unique_name("x/contact_sheet.png", {"contact_sheet"}) == "x_contact_sheet"


# The size of the images


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    """Label maps of 64×96, 60×40 and 32×32 pixels (height×width)."""
    folder = tmp_path_factory.mktemp("sizes") / "label"
    folder.mkdir()
    rng = np.random.default_rng(1)
    for name, size in (("a", (64, 96)), ("b", (60, 40)), ("c", (32, 32))):
        Image.fromarray(rng.integers(0, 3, size).astype(np.uint8)).save(folder / f"{name}.png")
    return folder


def shapes(made):
    return {name: image.shape[:2] for name, image in made.items() if name != "contact_sheet.png"}


def test_a_folders_images_have_the_size_of_their_maps_or_a_line_says_why_not(files, sizes, tmp_path, capsys, recwarn):
    made = run(files, tmp_path / "out", "plain", "--label-dir", str(sizes))
    assert shapes(made) == {"a.png": (64, 96), "b.png": (32, 32), "c.png": (32, 32)}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert re.match(r".*/b\.png is resized from 40×60 to 32×32 pixels \(width×height\): ", lines[0])
    assert "(1 of 3 label maps resized)" in lines[1]
    assert "multiples of 32" in lines[0] and "--preprocess none" in lines[0]
    assert not [w for w in recwarn if "label map" in str(w.message)]
    generator = load_generator(files / "plain.pt")
    for name, size in (("a", None), ("b", (32, 32))):
        stored = Image.open(sizes / f"{name}.png")
        ids = np.array(stored if size is None else stored.resize(size, Image.Resampling.NEAREST))
        with torch.no_grad():
            expected = to_uint8(generator(LabelMap(torch.from_numpy(ids).long()[None], 3))[0])
        assert np.abs(made[f"{name}.png"].astype(int) - expected).max() <= 1  # a gray level: rounding


@pytest.mark.parametrize(
    ("checkpoint", "options", "b", "why", "count"),
    [
        ("plain", ["--crop-size", "64"], (64, 64), "a.png is .* to 64×64 .*: the command line gives the size", 3),
        ("plain", ["--preprocess", "none"], (64, 32), None, 0),
        ("plain", ["--preprocess", "fixed"], (32, 32), None, 0),
        ("plain", ["--preprocess", "scale_width"], (32, 32), "a.png is .*from 32×21 .*no multiples of 32", 2),
        ("vae", [], (32, 32), "a.png is .* to 32×32.*starts from z", 2),
    ],
)
def test_options_that_set_the_size(files, sizes, tmp_path, capsys, checkpoint, options, b, why, count):
    made = run(files, tmp_path / "out", checkpoint, "--label-dir", str(sizes), *options)
    assert shapes(made)["b.png"] == b
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == (why is not None)
    assert why is None or re.search(why, lines[0])
    assert (f"({count} of 3 label maps resized)" in last) == (count > 0) == ("resized" in last)


def test_a_dataset_of_the_paper_is_made_at_the_papers_size(tmp_path, capsys):
    net = models.SPADEGenerator(183, ngf=1, crop_size=32)
    torch.save({"format": FORMAT, "generator": entry(net)}, tmp_path / "net.pt")
    (tmp_path / "val_label").mkdir()
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "val_label/a.png")
    argv = ["--checkpoint", str(tmp_path / "net.pt"), "--dataset", "flickr", "--dataroot", str(tmp_path)]
    for more, size in (([], 32), (["--preprocess", "none"], 64)):
        assert main([*argv, *more, "--labels-only", "--out", str(tmp_path / "out")]) == 0
        said = "the paper tests flickr at one size; --preprocess none" in capsys.readouterr().out
        assert (Image.open(tmp_path / "out/a.png").size, said) == ((size, size), not more)


def test_a_preset_names_released_weights_and_their_dataset(tmp_path, capsys):
    torch.manual_seed(0)
    net = models.SPADEGenerator(183, ngf=1).eval()
    models.init_weights(net, "glorot", gain=1.0)
    torch.save(net.state_dict(), tmp_path / "latest_net_G.pth")
    (tmp_path / "val_label").mkdir()
    values = np.random.default_rng(0).choice([0, 181, 255], (256, 256)).astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "val_label/a.png")
    argv = ["--checkpoint", str(tmp_path / "latest_net_G.pth"), "--dataroot", str(tmp_path), "--labels-only"]
    argv += ["--no-use-edges", "--out", str(tmp_path / "out")]
    assert main([*argv, "--preset", "coco"]) == 0
    classes = torch.from_numpy(np.where(values == 255, 182, values)).long()
    with torch.no_grad():
        expected = to_uint8(net(LabelMap(classes[None], 183))[0])
    assert np.abs(np.asarray(Image.open(tmp_path / "out/a.png")).astype(int) - expected).max() <= 1
    assert expected.std() > 5
    capsys.readouterr()
    assert main([*argv, "--preset", "coco", "--num-upsampling-layers", "more"]) == 1
    assert "preset 'coco', which is for num_upsampling_layers 'normal'" in capsys.readouterr().err
    assert main([*argv, "--dataset", "coco"]) == 1
    assert "--preset coco" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--label-dir", "nowhere"], "nowhere: no such folder"),
        (["--image-dir", "nowhere"], "nowhere: no such folder"),
        (["--file-list", "nowhere"], "nowhere: cannot read the file list"),
        (["--style-image", "nowhere"], "nowhere: cannot read this image"),
        (["--encoder-checkpoint", "nowhere"], "no checkpoint at nowhere"),
        (["--device", "nowhere"], "--device nowhere"),
    ],
)
def test_paths_are_checked_before_weights_are_loaded(files, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.setattr(synthesize, "load_generator", lambda *_: pytest.fail("weights were loaded"))
    run(files, tmp_path / "out", "vae", *options, code=1)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
