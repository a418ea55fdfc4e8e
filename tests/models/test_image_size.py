# SPDX-License-Identifier: Apache-2.0
"""The size of an image follows its label map where the generator can make it; else a warning names both sizes."""

import warnings

import pytest
import torch

from spade_fast import LabelMap, SPADEGenerator

pytestmark = pytest.mark.usefixtures("one_thread")
both = pytest.mark.parametrize("spade", ["fused", "reference"])


def network(spade, **options):
    torch.manual_seed(0)
    net = SPADEGenerator(4, **{"ngf": 1, "crop_size": 64, "spade": spade, **options}).double().eval()
    for name, buffer in net.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 2)
    return net


def labels(height, width):
    return torch.randint(4, (2, height, width), generator=torch.Generator().manual_seed(1))


def image(net, ids, dense=False, **arguments):
    label_map = LabelMap(ids, 4)
    with torch.no_grad():
        return net(label_map.one_hot(torch.float64) if dense else label_map, **arguments)


@both
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(("layers", "size"), [("normal", (64, 96)), ("normal", (32, 32)), ("more", (128, 64))])
def test_a_map_that_fits_gives_what_a_network_of_its_size_gives(spade, layers, size, dense):
    net = network(spade, num_upsampling_layers=layers)
    height, width = size
    fixed = network(spade, num_upsampling_layers=layers, crop_size=width, aspect_ratio=width / height)
    assert fixed.output_size == size != net.output_size
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = image(net, labels(height, width), dense)
    assert torch.equal(made, image(fixed, labels(height, width), dense))
    assert made.shape[2:] == size == net.image_size(height, width)
    assert made.std() > 0.01


@both
@pytest.mark.parametrize(
    ("options", "arguments", "factor", "why"),
    [
        ({}, {}, 4, r"sides are no multiples of 32"),
        ({"z_dim": 3}, {"z": torch.ones(2, 3, dtype=torch.float64)}, 2, "starts from z"),
        ({"norm": "instance"}, {}, 2, "instance norm needs more than one pixel"),
    ],
)
def test_a_map_that_does_not_fit_is_resized_with_one_warning(spade, options, arguments, factor, why):
    """A map enlarged to the size of the network by repetition is the same map to each layer."""
    net = network(spade, **options)
    side = 64 // factor
    small = labels(side, side)
    with pytest.warns(UserWarning, match=rf"map of {side}×{side} pixels .* image of 64×64: .*{why}") as caught:
        made = image(net, small, **arguments)
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = image(net, small, **arguments)
        enlarged = image(net, small.repeat_interleave(factor, 1).repeat_interleave(factor, 2), **arguments)
    assert torch.equal(made, again) and torch.equal(made, enlarged)
    assert net.image_size(side, side) == (64, 64)


def test_export_with_any_size():
    net = network("fused")
    height, width = (32 * torch.export.Dim(name, min=2, max=8) for name in "hw")
    example = LabelMap(labels(64, 96), 4).one_hot(torch.float64)
    exported = torch.export.export(net, (example,), dynamic_shapes={"segmap": {2: height, 3: width}}).module()
    other = labels(128, 64)
    with torch.no_grad():
        made = exported(LabelMap(other, 4).one_hot(torch.float64))
    torch.testing.assert_close(made, image(network("reference"), other), rtol=1e-9, atol=1e-9)


def test_a_compiled_generator_takes_maps_of_several_sizes():
    net = network("fused")
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    with torch.no_grad():
        for size in ((64, 64), (64, 96)):
            label_map = LabelMap(labels(*size), 4).one_hot(torch.float64)
            assert torch.equal(compiled(label_map), net(label_map))
            assert compiled(label_map).shape[2:] == size
