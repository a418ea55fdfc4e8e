# SPDX-License-Identifier: Apache-2.0
"""Networks against the numbers of the authors' code: names, outputs, and the state after a training forward."""

import re

import authors
import pytest
import torch
from torch import nn

DTYPES = [torch.float64, torch.float32]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
PLAIN_PIXELS = 128 * 128  # up to so many a batch, the plain generator is quick enough


def check_buffers(net: nn.Module, fixture: dict, tolerance: float) -> None:
    authors.check_sums(dict(net.named_buffers()), fixture["outputs"].get("after_train", {}), tolerance)


@dtypes
@pytest.mark.parametrize("name", authors.names("spade_generator_*"))
@pytest.mark.parametrize("spade", ["fused", "reference"])
def test_generator(name, spade, dtype):
    fixture, tolerance = authors.load(name), authors.TOLERANCE[dtype]
    if spade == "reference" and (fixture["inputs"]["label"].numel() > PLAIN_PIXELS or dtype == torch.float32):
        pytest.skip("the plain generator takes seconds at this size")
    net = authors.prepared(authors.generator(fixture["options"], spade), name, dtype)
    labels = authors.label_map(fixture)
    z = fixture["inputs"]["z"].to(dtype) if "z" in fixture["inputs"] else None
    for phase in ("eval", "train"):
        if phase in fixture["outputs"]:
            want = fixture["outputs"][phase]["image"]
            count = want["shape"][0]  # some files keep only the first samples
            with torch.no_grad():
                image = net.train(phase == "train")(labels[:count], None if z is None else z[:count])
            authors.check(image, want, tolerance, phase)
    check_buffers(net, fixture, tolerance)


@dtypes
@pytest.mark.parametrize("how", ["label map", "one tensor"])
@pytest.mark.parametrize("name", authors.names("spade_discriminator_*"))
def test_discriminator(name, how, dtype):
    fixture, tolerance = authors.load(name), authors.TOLERANCE[dtype]
    net = authors.prepared(authors.discriminator(fixture["options"]), name, dtype)
    labels, image = authors.label_map(fixture), fixture["inputs"]["image"].to(dtype)
    inputs = (labels, image) if how == "label map" else (torch.cat([labels.one_hot(dtype), image], 1),)

    def check(phase: str) -> None:
        with torch.no_grad():
            features = net(*inputs)
        for key, want in fixture["outputs"][phase].items():
            scale, layer = re.fullmatch(r"d(\d+)_(?:f(\d+)|prediction)", key).groups()
            authors.check(features[int(scale)][-1 if layer is None else int(layer)], want, tolerance, f"{phase} {key}")

    net.eval()
    check("eval")
    net.train()
    check("train")
    check_buffers(net, fixture, tolerance)


@dtypes
@pytest.mark.parametrize("name", authors.names("spade_encoder_*"))
def test_encoder(name, dtype):
    fixture, tolerance = authors.load(name), authors.TOLERANCE[dtype]
    net = authors.prepared(authors.encoder(fixture["options"]), name, dtype)
    for phase in ("eval", "train"):
        net.train(phase == "train")
        wanted = fixture["outputs"][phase]
        for which in sorted({key.partition("_")[2] for key in wanted}):
            with torch.no_grad():
                mu, logvar = net(fixture["inputs"][f"image_{which}"].to(dtype))
            authors.check(mu, wanted[f"mu_{which}"], tolerance, f"{phase} mu {which}")
            authors.check(logvar, wanted[f"logvar_{which}"], tolerance, f"{phase} logvar {which}")
    check_buffers(net, fixture, tolerance)
