# SPDX-License-Identifier: Apache-2.0
"""The layer, the networks and a training step on a GPU, on every backend; on the CPU too: this file can't rot."""

import pytest
import torch

from spade_fast import FusedSPADE, LabelMap
from spade_fast.models import MultiscaleDiscriminator, SPADEGenerator
from spade_fast.native.toolchain import find_nvcc
from spade_fast.ops import _backend as backends
from spade_fast.ops.patterns import patterns
from spade_fast.ops.segments import segments
from spade_fast.ops.statistics import statistics
from spade_fast.reference import SPADE
from spade_fast.train.losses import GANLoss, feature_matching_loss

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = ["cpu", CUDA]
ON_GPU = ("torch", "triton", "cuda")
BACKENDS = [("cpu", "torch"), *(pytest.param("cuda", name, marks=pytest.mark.gpu) for name in ON_GPU)]


@pytest.fixture(autouse=True)
def needs_its_device(request):
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no GPU")
    callspec = getattr(request.node, "callspec", None)
    if callspec and callspec.params.get("name") == "cuda" and find_nvcc() is None:
        pytest.skip("backend cuda: nvcc was not found")


def label_map(n: int = 2, size: tuple[int, int] = (24, 40)) -> LabelMap:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, (n, -(-size[0] // 4), -(-size[1] // 4)), generator=generator)
    ids = ids.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, : size[0], : size[1]]
    return LabelMap(ids, 5, torch.rand(ids.shape, generator=generator) < 0.05)


def run(layer, x, labels, gradient, **options):
    layer.zero_grad()
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = layer(leaf, labels, **options)
    out.backward(gradient.to(out.dtype))
    return [out.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters())]


@pytest.mark.parametrize(("device", "name"), BACKENDS)
@pytest.mark.parametrize("norm", ["syncbatch", "instance", "none"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize(("channels", "upsample"), [(37, 1), (64, 2)])
def test_layer_against_float64(device, name, norm, layout, dtype, bound, channels, upsample):
    """Relative errors in the norm: a few roundings of the activation's type (parameters stay float32)."""
    torch.manual_seed(0)
    labels, h, w = label_map(), 24 // upsample, 40 // upsample
    plain = SPADE(channels, 6, norm=norm).double()
    fused = FusedSPADE(channels, 6, norm=norm)
    fused.load_state_dict(plain.state_dict())
    fused.to(device)
    x = (torch.randn(2, channels, h, w) * 2 + 0.5).to(dtype).contiguous(memory_format=layout)
    gradient = torch.randn(2, channels, 24, 40).to(dtype)
    large = x.double().repeat_interleave(upsample, 2).repeat_interleave(upsample, 3)
    expected = run(plain, large, labels.one_hot(torch.float64), gradient)
    expected[1] = expected[1].unflatten(3, (-1, upsample)).unflatten(2, (-1, upsample)).sum((3, 5))
    with backends.use(name):
        actual = run(fused, x.to(device), labels.to(device), gradient.to(device), upsample=upsample)
        again = run(fused, x.to(device), labels.to(device), gradient.to(device), upsample=upsample)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert (a.double().cpu() - e).norm() <= bound * e.norm(), i
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))  # bitwise, from run to run
    assert actual[0].is_contiguous(memory_format=layout)


@pytest.mark.parametrize(("device", "name"), BACKENDS)
def test_label_map_and_discriminator(device, name):
    torch.manual_seed(0)
    labels = label_map()
    net = MultiscaleDiscriminator(6, ndf=8).eval()
    image = torch.randn(4, 3, *labels.size)
    exact = net.double()(labels.one_hot(torch.float64), image.double())
    net.float().to(device)
    with backends.use(name), torch.no_grad():
        actual = net(labels.to(device), image.to(device))
    for a, e in zip(actual, exact, strict=True):
        for i, (f, g) in enumerate(zip(a, e, strict=True)):
            assert (f.double().cpu() - g).norm() <= 1e-4 * g.norm(), i


def training_step(generator, discriminator, labels, image):
    fake = generator(labels)
    features = discriminator(labels, torch.cat([fake, image]))
    fakes, reals = ([[f.chunk(2)[i] for f in scale] for scale in features] for i in range(2))
    loss = GANLoss("hinge").generator(fakes) + 10 * feature_matching_loss(fakes, reals)
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("device", DEVICES)
def test_training_step_does_not_wait_for_the_device(device):
    """With patterns found by a worker, nothing between the batch's arrival and the losses synchronizes the host."""
    torch.manual_seed(0)
    worker = label_map(size=(64, 64)).build([(64 >> i, 64 >> i) for i in range(6)], backward=True)
    found = {key: patterns.pattern_of_pixel.clone() for key, patterns in worker._patterns.items()}
    generator = SPADEGenerator(6, ngf=4, crop_size=64).to(device)
    discriminator = MultiscaleDiscriminator(6, ndf=8).to(device)
    image = torch.randn(2, 3, 64, 64, device=device)
    labels = (worker.pin_memory() if device == "cuda" else worker).to(device, non_blocking=True)
    first = training_step(generator, discriminator, labels, image)  # compiles and tunes kernels
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        second = training_step(generator, discriminator, labels, image)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(first) and torch.isfinite(second)
    assert labels._patterns.keys() == found.keys()  # the step needed no resolution that was not built
    assert all(torch.equal(labels._patterns[key].pattern_of_pixel.cpu(), ids) for key, ids in found.items())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda"])
def test_stream_and_graph(name):
    """The kernels go to the current stream, and what does not wait for the host can be captured in a graph."""
    torch.manual_seed(0)
    x = torch.randn(2, 64, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)
    ids, taps, _ = patterns(label_map(size=(32, 32)).codes.cuda(), 3)
    params = torch.randn(len(taps), 128, device="cuda")

    def work():
        order, offsets = segments(ids, len(taps))
        mean, m2 = statistics(x, False)
        rstd = torch.rsqrt(m2 / 2048 + 1e-5)
        arguments = (x, mean, rstd, [params], ids, order, offsets, [0.2], 1, True)
        (out,) = torch.ops.spade_fast.modulation(*arguments)
        return [out, *torch.ops.spade_fast.modulation_backward([out], *arguments)]

    with backends.use(name):
        expected = work()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(10_000_000)  # work on another stream would not wait for this
            x.mul_(2)
            doubled = work()
        torch.cuda.synchronize()
        assert not torch.equal(doubled[1], expected[1])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = work()
        x.mul_(0.5)
        graph.replay()
        torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.gpu
def test_labels_out_of_range_do_not_break_the_gpu():
    ids = torch.full((1, 4, 4), 200, device="cuda")
    with pytest.raises(ValueError, match=r"200.*num_classes|num_classes.*200"):
        LabelMap(ids, 182)
    assert torch.ones(2, device="cuda").sum().item() == 2  # no device assert poisoned the context
