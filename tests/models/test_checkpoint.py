# SPDX-License-Identifier: Apache-2.0
"""Atomic, safe checkpoints and the authors' released state dicts."""

import os
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn

from spade_fast.models import ConvEncoder, MultiscaleDiscriminator, SPADEGenerator, checkpoint
from spade_fast.models.checkpoint import CheckpointError, atomic_save, load_encoder, load_generator, safe_load


def small(**options) -> SPADEGenerator:
    torch.manual_seed(0)
    net = SPADEGenerator(**{"label_nc": 6, "ngf": 2, "crop_size": 64, **options})
    for name, buffer in net.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 2)
    return net.eval()


def save_ours(net, path, **more):
    atomic_save(
        {"format": checkpoint.FORMAT, "generator": {"options": net.options, "state_dict": net.state_dict()}, **more},
        path,
    )


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (dict(), dict(crop_size=64, num_upsampling_layers="normal")),
        (dict(kernel_size=5, z_dim=9, label_nc=3), dict(crop_size=64, num_upsampling_layers="normal")),
        (
            dict(num_upsampling_layers="more", aspect_ratio=2.0),
            dict(crop_size=64, num_upsampling_layers="more", aspect_ratio=2.0),
        ),
        (dict(num_upsampling_layers="most", crop_size=128, ngf=4), dict(crop_size=128)),
        (dict(norm="instance", kernel_size=1), dict(crop_size=64, num_upsampling_layers="normal", norm="instance")),
        (dict(spectral_norm=False), dict(crop_size=64, num_upsampling_layers="normal")),
        (
            dict(label_nc=36, num_upsampling_layers="more", aspect_ratio=2.0),
            dict(crop_size=64, num_upsampling_layers="more", aspect_ratio=2.0),
        ),
    ],
)
def test_bare_state_dict_is_recognized(tmp_path, options, told):
    net = small(**options)
    torch.save(net.state_dict(), tmp_path / "latest_net_G.pth")
    loaded = load_generator(tmp_path / "latest_net_G.pth", **told)
    assert loaded.options == net.options and not loaded.training
    segmap = torch.randn(1, net.options["label_nc"], *net.output_size)
    z = torch.randn(1, net.z_dim) if net.z_dim else None
    with torch.no_grad():
        assert torch.equal(loaded(segmap, z), net(segmap, z))
    with pytest.raises(CheckpointError, match=r"do not tell crop_size .*pass it as an argument"):
        load_generator(tmp_path / "latest_net_G.pth")


def test_what_tensors_cannot_tell_is_named(tmp_path):
    torch.save(small(norm="none").state_dict(), tmp_path / "g.pth")
    with pytest.raises(CheckpointError, match=r"crop_size .*, norm .'instance' or 'none'., num_upsampling_layers"):
        load_generator(tmp_path / "g.pth")
    torch.save(small().state_dict(), tmp_path / "g.pth")
    with pytest.raises(CheckpointError, match=r"do not tell num_upsampling_layers .'normal' or 'more'.: pass"):
        load_generator(tmp_path / "g.pth", crop_size=64)


@pytest.mark.parametrize("label_nc", [35, 36])
def test_the_aspect_of_cityscapes_weights_is_asked_for(tmp_path, label_nc):
    net = small(label_nc=label_nc)
    torch.save(net.state_dict(), tmp_path / "g.pth")
    told = dict(crop_size=64, num_upsampling_layers="normal")
    with pytest.raises(CheckpointError, match=r"do not tell aspect_ratio .*Cityscapes', which is 2.: pass it"):
        load_generator(tmp_path / "g.pth", **told)
    for ratio, size in ((2.0, (32, 64)), (1.0, (64, 64))):
        assert load_generator(tmp_path / "g.pth", aspect_ratio=ratio, **told).output_size == size
    save_ours(net, tmp_path / "ours.pt")
    assert load_generator(tmp_path / "ours.pt").output_size == (64, 64)  # it says its aspect


def test_a_mixture_of_spectral_norm_and_none_is_refused(tmp_path):
    state = small().state_dict()
    for end in ("_u", "_v"):
        del state["up_1.conv_s.weight" + end]
    state["up_1.conv_s.weight"] = state.pop("up_1.conv_s.weight_orig")
    torch.save(state, tmp_path / "g.pth")
    names = r"head_0.conv_0.weight_orig.*up_1.conv_s.weight\)"
    with pytest.raises(CheckpointError, match=rf"mixes convolutions with spectral norm \({names}"):
        load_generator(tmp_path / "g.pth", crop_size=64, num_upsampling_layers="normal")
    with pytest.raises(CheckpointError, match=r"does not fit .*spectral_norm=True.*weight"):
        torch.save(small(spectral_norm=False).state_dict(), tmp_path / "g.pth")
        load_generator(tmp_path / "g.pth", crop_size=64, num_upsampling_layers="normal", spectral_norm=True)


@pytest.mark.parametrize("norm", ["instance", "batch", "none"])
@pytest.mark.parametrize("spectral", ["spectral", ""])
def test_bare_encoders_tell_their_norm(tmp_path, spectral, norm):
    torch.manual_seed(0)
    net = ConvEncoder(ngf=2, z_dim=3, norm=spectral + norm).eval()
    torch.save(net.state_dict(), tmp_path / "latest_net_E.pth")
    loaded, image = load_encoder(tmp_path / "latest_net_E.pth"), torch.randn(1, 3, 256, 256)
    assert loaded.options == net.options
    assert torch.equal(loaded(image)[0], net(image)[0])


def old_style(net: nn.Module, with_weight: bool) -> OrderedDict:
    """As torch before 1.0 saved: no weight_v or num_batches_tracked, perhaps the divided weight; DataParallel names."""
    state = OrderedDict()
    for name, value in net.state_dict().items():
        if name.endswith("num_batches_tracked") or name.endswith("weight_v"):
            continue
        state["module." + name] = value
        if with_weight and name.endswith("weight_orig"):
            module = net.get_submodule(name.removesuffix(".weight_orig"))
            state["module." + name.removesuffix("_orig")] = module.normalized_weight().detach()
    return state


@pytest.mark.parametrize("with_weight", [False, True])
def test_old_files_without_weight_v(tmp_path, with_weight):
    net = small()
    # after training u and v are the singular vectors: the missing v follows from u
    for module in net.modules():
        if hasattr(module, "weight_u"):
            module.train()
            for _ in range(300):
                module.normalized_weight()
            module.eval()
    torch.save(old_style(net, with_weight), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    loaded = load_generator(tmp_path / "old.pth", crop_size=64, num_upsampling_layers="normal")
    segmap = torch.randn(1, 6, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(segmap), net(segmap), rtol=1e-4, atol=1e-5)


def test_old_files_with_a_saved_weight_keep_its_scale(tmp_path):
    """An unconverged u: the saved, divided weight tells what sigma was."""
    net = small()
    torch.save(old_style(net, with_weight=True), tmp_path / "old.pth")
    loaded = load_generator(tmp_path / "old.pth", crop_size=64, num_upsampling_layers="normal")
    segmap = torch.randn(1, 6, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(segmap), net(segmap), rtol=1e-3, atol=1e-4)


def test_own_checkpoint_run_directory_and_encoder(tmp_path):
    net, encoder = small(z_dim=4), ConvEncoder(ngf=2, z_dim=4).eval()
    parts = {"encoder": {"options": encoder.options, "state_dict": encoder.state_dict()}}
    old = small(z_dim=4)
    nn.init.zeros_(old.conv_img.weight)
    save_ours(old, checkpoint.checkpoint_path(tmp_path, 99), **parts)
    save_ours(net, checkpoint.checkpoint_path(tmp_path, 100), **parts)
    (tmp_path / "checkpoint_junk.pt").touch()
    loaded = load_generator(tmp_path)  # the newest
    assert loaded.options == net.options
    assert torch.equal(loaded.conv_img.weight, net.conv_img.weight)
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(load_encoder(tmp_path)(image)[0], encoder(image)[0])
    torch.save(encoder.state_dict(), tmp_path / "latest_net_E.pth")
    assert torch.equal(load_encoder(tmp_path / "latest_net_E.pth")(image)[1], encoder(image)[1])
    save_ours(net, tmp_path / "no_encoder.pt")
    with pytest.raises(CheckpointError, match="holds no encoder; train one with --use-vae"):
        load_encoder(tmp_path / "no_encoder.pt")


def test_bad_files(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*absent\.pt"):
        load_generator(tmp_path / "absent.pt")
    with pytest.raises(CheckpointError, match=r"no checkpoint_\*.pt in the directory"):
        load_generator(tmp_path)
    net = small()
    save_ours(net, tmp_path / "cut.pt")
    os.truncate(tmp_path / "cut.pt", (tmp_path / "cut.pt").stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"cut\.pt is not a readable checkpoint"):
        load_generator(tmp_path / "cut.pt")
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"not a SPADE generator's state dict: head_0.* is missing"):
        load_generator(tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="neither a checkpoint of this package"):
        load_generator(tmp_path / "list.pth")
    torch.save(net.state_dict(), tmp_path / "g.pth")
    with pytest.raises(CheckpointError, match=r"does not fit a SPADEGenerator\(.*ngf=2.*fc.weight"):
        load_generator(tmp_path / "g.pth", crop_size=64, num_upsampling_layers="normal", label_nc=7)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_pickled_code_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Evil()}, "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pt", "plain.pt"):
        with pytest.raises(CheckpointError, match=f"{name} is not a readable checkpoint"):
            safe_load(name)
    assert not (tmp_path / "pwned").exists()


def test_a_crash_while_saving_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint_00000001.pt"
    atomic_save({"step": 1}, path)

    def crash(obj, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(KeyboardInterrupt):
        atomic_save({"step": 2}, path)
    assert safe_load(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def stripped(net):
    for module in list(net.modules()):
        if hasattr(module, "weight_u"):
            nn.utils.remove_spectral_norm(module)
    return net


@pytest.mark.parametrize(
    "build",
    [
        lambda: small(z_dim=4),
        *(lambda n=n: ConvEncoder(ngf=2, z_dim=4, norm=n).eval() for n in ("spectralinstance", "spectral", "batch")),
        lambda: MultiscaleDiscriminator(6, ndf=2, norm="spectralbatch").eval(),
        lambda: MultiscaleDiscriminator(6, ndf=2, norm="spectral").eval(),
    ],
)
def test_options_after_spectral_norm_was_removed(build):
    """They build a network that the state dict fits, and that computes the same."""
    torch.manual_seed(0)
    net = build()
    before = dict(net.options)
    assert type(net)(**before).state_dict().keys() == net.state_dict().keys()
    stripped(net)
    again = type(net)(**net.options).eval()
    again.load_state_dict(net.state_dict())
    inputs = {
        SPADEGenerator: lambda: (torch.randn(1, 6, 64, 64), torch.randn(1, 4)),
        ConvEncoder: lambda: (torch.randn(1, 3, 64, 64),),
        MultiscaleDiscriminator: lambda: (torch.randn(1, 6, 64, 64), torch.randn(1, 3, 64, 64)),
    }[type(net)]()
    with torch.no_grad():
        torch.testing.assert_close(again(*inputs), net(*inputs), rtol=0, atol=0)
    assert {k: v for k, v in net.options.items() if k not in ("spectral_norm", "norm")} == {
        k: v for k, v in before.items() if k not in ("spectral_norm", "norm")
    }


@pytest.mark.parametrize("stale", [False, True])
def test_a_checkpoint_saved_after_spectral_norm_was_removed(tmp_path, stale):
    """stale: saved with the options that the network was built with."""
    net, encoder = small(z_dim=4), ConvEncoder(ngf=2, z_dim=4).eval()
    options = [dict(n.options) for n in (net, encoder)]
    for n in (net, encoder):
        stripped(n)
    options = options if stale else [n.options for n in (net, encoder)]
    parts = zip(("generator", "encoder"), (net, encoder), options, strict=True)
    saved = {name: {"options": o, "state_dict": n.state_dict()} for name, n, o in parts}
    atomic_save({"format": checkpoint.FORMAT, **saved}, tmp_path / "stripped.pt")
    segmap, z, image = torch.randn(1, 6, 64, 64), torch.randn(1, 4), torch.randn(1, 3, 64, 64)
    loaded = load_generator(tmp_path / "stripped.pt")
    assert loaded.options["spectral_norm"] is False
    with torch.no_grad():
        assert torch.equal(loaded(segmap, z), net(segmap, z))
        assert torch.equal(load_encoder(tmp_path / "stripped.pt")(image)[0], encoder(image)[0])


# Presets of the released weights


@pytest.mark.parametrize(
    ("preset", "label_nc", "layers", "size"),
    [
        ("coco", 184, "normal", (256, 256)),
        ("coco", 183, "normal", (256, 256)),
        ("ade20k", 151, "normal", (256, 256)),
        ("cityscapes", 36, "more", (256, 512)),
    ],
)
def test_a_preset_is_the_released_network(tmp_path, preset, label_nc, layers, size):
    """Sizes and upsampling as the paper and the authors' test options have them."""
    net = small(label_nc=label_nc, num_upsampling_layers=layers, crop_size=size[1], aspect_ratio=size[1] / size[0])
    torch.save(net.state_dict(), tmp_path / "latest_net_G.pth")
    loaded = load_generator(tmp_path / "latest_net_G.pth", preset=preset)
    assert loaded.options == net.options and loaded.output_size == size
    assert torch.equal(loaded.up_3.norm_0.mlp_gamma.weight, net.up_3.norm_0.mlp_gamma.weight)
    assert load_generator(tmp_path / "latest_net_G.pth", preset=preset, crop_size=size[1]).options == net.options
    with pytest.raises(CheckpointError, match=rf"do not tell .*the authors' weights, preset='{preset}' "):
        load_generator(tmp_path / "latest_net_G.pth")
    save_ours(net, tmp_path / "ours.pt")
    assert load_generator(tmp_path / "ours.pt", preset=preset).options == net.options


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize(
    ("options", "preset", "given", "message"),
    [
        ({"label_nc": 151}, "coco", {}, "preset 'coco': it is for label_nc 183 or 184, the file has 151"),
        ({"label_nc": 183, "kernel_size": 1}, "coco", {}, "is for kernel_size 3, the file has 1"),
        (
            {"label_nc": 151, "num_upsampling_layers": "most", "ngf": 4},
            "ade20k",
            {},
            "'ade20k': it is for num_upsampling_layers 'normal', the file has 'most'",
        ),
        (
            {"label_nc": 184},
            "coco",
            {"num_upsampling_layers": "more"},
            "both preset 'coco', .* for num_upsampling_layers 'normal', and num_upsampling_layers 'more'",
        ),
    ],
)
def test_a_preset_that_contradicts_is_refused(tmp_path, ours, options, preset, given, message):
    net = small(crop_size=256, **options)
    if ours:
        save_ours(net, tmp_path / "g.pth")
    else:
        torch.save(net.state_dict(), tmp_path / "g.pth")
    with pytest.raises(CheckpointError, match=rf"g\.pth .*{message}"):
        load_generator(tmp_path / "g.pth", preset=preset, **given)


def test_a_preset_without_batch_norm_does_not_fit(tmp_path):
    torch.save(small(label_nc=151, norm="instance").state_dict(), tmp_path / "g.pth")
    with pytest.raises(CheckpointError, match=r"does not fit a SPADEGenerator\(.*running_mean"):
        load_generator(tmp_path / "g.pth", preset="ade20k")


def test_unknown_presets_are_named():
    with pytest.raises(ValueError, match="preset must be one of coco, ade20k, cityscapes, got 'flickr'"):
        load_generator("nowhere.pth", preset="flickr")


def test_the_options_of_a_run_are_read(tmp_path):
    save_ours(small(), tmp_path / "run.pt", training={"config": {"dataset": "coco", "use_edges": False}})
    assert checkpoint.training_config(tmp_path / "run.pt") == {"dataset": "coco", "use_edges": False}
    torch.save(small().state_dict(), tmp_path / "bare.pth")
    assert checkpoint.training_config(tmp_path / "bare.pth") == {}
