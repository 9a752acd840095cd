import pytest
import torch
from torch._subclasses import FakeTensorMode

from flowkernels import backend, flows, layers
from flowkernels.ops import conv_net, glow_step
from flowkernels.ops.glow_step import runs_in_triton, steps
from flowkernels.ops.glow_step.reference import glow_step_reference
from python_tests.battery import LAYOUTS, Example, OpBattery, assert_same_bits
from python_tests.triton.device import DEVICE, GPU, randn


def inputs(*shape, dtype=torch.float64):
    """x, raw, weight, bias."""
    channels = shape[-1]
    x, raw, weight, bias = randn(shape, shape, (channels, channels), (channels,), dtype=dtype)
    return x, raw, weight / channels**0.5, bias


def channels_first(t):
    return t.movedim(-1, 1).contiguous().movedim(1, -1)


def run(tensors, **options):
    """All outputs, and the gradients of a weighted sum of them."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    outputs = glow_step(*leaves, **options)
    followed = [o for o in outputs if o.requires_grad]
    weights = [(torch.arange(o.numel(), device=o.device) % 5 - 2).view(o.shape).to(o.dtype) for o in followed]
    return *(o.detach() for o in outputs), *torch.autograd.grad(followed, [t for t in leaves if t is not None], weights)


def assert_equals_reference(tensors, **options):
    got = run(tensors, **options)
    with backend("reference"):
        want = run(tensors, **options)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-11)


def example(channels, *sites, inverse=False):
    def make(batch, dtype):
        x, raw, *parameters = inputs(batch, *sites, channels, dtype=dtype)

        def with_convolution(f):  # the op's logabsdet is that of the coupling alone
            def call(rows, parameters):
                y, logabsdet, passing = f(*rows, *parameters)
                return y, logabsdet + torch.Size(sites).numel() * torch.linalg.slogdet(parameters[0].contiguous())[1], passing

            return call

        return Example(
            [x, raw],
            parameters,
            with_convolution(lambda *a: glow_step(*a, inverse=inverse)),
            with_convolution(lambda *a: glow_step_reference(*a, inverse)),
            lambda rows, p: (*rows, *p, inverse, True),
            transform=True,
        )

    return make


class TestGlowStep(OpBattery):
    bare_op = torch.ops.flowkernels.glow_step.default
    layouts = LAYOUTS
    row_bits = GPU  # the interpreter multiplies tiles with BLAS
    cases = {"images": example(6, 3, 5), "inverse, a vector": example(10, inverse=True)}


# tiles of 64 sites and 16 channels of h; 12 of 16, 16 + 16, 32 + 16, 64 + 64 and twice 96 channels of y
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape", [(3, 12), (130, 2), (2, 9, 9, 24), (3, 5, 48), (2, 2, 100), (2, 3, 130), (0, 4, 4), (0, 6)], ids=str)
def test_every_size_and_what_may_be_missing(shape, inverse):
    x, raw, weight, bias = inputs(*shape)
    for tensors in ((x, raw, weight, bias), (x, None, weight, bias), (x, raw, None, None)):
        for passes in (True, False):
            assert_equals_reference(tensors, inverse=inverse, passes=passes)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 6), (2, 3, 2, 3, 4), (2, 8, 16, 24)], ids=str)
def test_channels_may_lie_first(shape, inverse):
    x, raw, weight, bias = inputs(*shape)
    first, raw_first = channels_first(x), channels_first(raw)
    for tensors in (
        (first, raw_first, weight, bias),
        (first, None, weight, bias),
        (x, raw_first, weight, bias),
        (x, raw_first, None, None),
    ):
        assert_equals_reference(tensors, inverse=inverse)
        y, _, passing = glow_step(*tensors, inverse=inverse)
        assert y.stride() == tensors[0].stride() and passing.is_contiguous() == y.is_contiguous()


@pytest.mark.parametrize("last", [False, True])
def test_gradients_lie_as_what_they_belong_to(last):  # the fake kernel says so; dy may lie in the other way
    x, raw, weight, bias = inputs(2, 3, 5, 6)
    x, dy = (channels_first(x), x) if last else (x, channels_first(x))
    for parameters in ((weight, bias), (None, None)):
        dx, draw, *_ = torch.ops.flowkernels.glow_step_backward(dy, x.new_zeros(2), None, x, channels_first(raw), *parameters, False)
        assert dx.stride() == x.stride() and draw.stride() == channels_first(raw).stride()


def test_the_layer_keeps_the_memory_format():
    (x,) = randn((4, 12, 6, 5))
    layer = layers.ActNormConv1x1(6).to(DEVICE, torch.float64)
    with backend("auto"):
        layer(x[:, :6])
        folded = layers._fold.fold([layer])
    for images in (x[:, :6], x[:, ::2], x[:, :6, ::2], x[:1, :6].expand(4, -1, -1, -1)):
        assert layer(images, folded=folded)[0].is_contiguous()
        z, _ = layer(images.to(memory_format=torch.channels_last), folded=folded)
        assert z.is_contiguous(memory_format=torch.channels_last)


def test_layouts_give_the_same_bits():
    x, raw, weight, bias = inputs(2, 9, 9, 24, dtype=torch.float32)
    for one, other in zip(run((x, raw, weight, bias)), run((channels_first(x), raw, weight, bias)), strict=True):
        assert_same_bits([one], [other])


def test_sums_over_sites_are_made_in_parts(monkeypatch):
    from flowkernels.ops.glow_step import kernels

    tensors = inputs(3, 10, 10, 12)
    for programs in (1, 5, 100):
        monkeypatch.setattr(kernels, "_PROGRAMS", programs)
        assert_equals_reference(tensors)


def test_gradients_where_an_output_is_not_used():
    tensors = [t.requires_grad_() for t in inputs(3, 7, 6)]
    for unused in ((0,), (1,), (2,), (0, 2)):
        loss = lambda outputs, unused=unused: sum(o.square().sum() for i, o in enumerate(outputs) if i not in unused)
        got = torch.autograd.grad(loss(glow_step(*tensors)), tensors, allow_unused=True, materialize_grads=True)
        want = torch.autograd.grad(loss(glow_step_reference(*tensors, False)), tensors, allow_unused=True, materialize_grads=True)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "served"), [("auto", True), ("triton", True), ("reference", False), ("cuda", False)])
def test_layers_leave_it_where_it_was_not_chosen(name, served):
    with FakeTensorMode(), backend(name):
        assert runs_in_triton(torch.empty(2, 6, 4, 4, device="cuda")) == served


@pytest.mark.parametrize("sites", [(), (5,), (4, 3)])
def test_the_layer_is_one_launch(sites, monkeypatch):
    from flowkernels.ops.glow_step import kernels

    (x,) = randn((4, 6, *sites))
    layer = layers.ActNormConv1x1(6).to(DEVICE, torch.float64)
    with backend("auto"):
        layer(x)
        folded = layers._fold.fold([layer]), layers._fold.fold([layer], inverse=True)
    with backend("reference"):
        want = layer(x, folded=folded[0]), layer.inverse(x, folded=folded[1])
    calls = []
    monkeypatch.setattr(kernels.Launch, "__call__", lambda self, *a, run=kernels.Launch.__call__: (calls.append(1), run(self, *a)))
    got = layer(x, folded=folded[0]), layer.inverse(x, folded=folded[1])
    assert len(calls) == 2
    torch.testing.assert_close(got, want)


def test_the_steps_of_a_glow(monkeypatch):
    """The whole level as a GPU runs it: steps by this kernel, conditioners by torch."""
    for module in (steps, conv_net.__globals__):  # what the CPU's kernels would serve
        monkeypatch.setitem(module if isinstance(module, dict) else vars(module), "_COMPILED", False)
    torch.manual_seed(0)
    flow = flows.Glow((1, 8, 8), levels=1, steps=3, hidden_channels=8).to(DEVICE, torch.float64)
    (x,) = randn((3, 1, 8, 8))
    with backend("auto"):
        flow(x)
        for p in flow.parameters():
            torch.nn.init.normal_(p, std=0.1)
    (level,) = [m for m in flow.modules() if type(m).__name__ == "GlowSteps"]
    (x,) = randn((3, 4, 4, 4))
    with backend("auto"):
        folded = [layers._fold.fold(list(level.mixings), inverse=i) for i in (False, True)]
    monkeypatch.setattr("flowkernels.flows.glow_steps._fold", lambda mixings, inverse=False: folded[inverse])
    results = []
    for name in ("triton", "reference"):
        with backend(name):
            leaf = x.clone().requires_grad_()
            y, logabsdet = level(leaf)
            (dx,) = torch.autograd.grad(y.sin().sum() + logabsdet.sum(), leaf)
            results.append((y, logabsdet, dx, *level.inverse(y)))
    torch.testing.assert_close(*results)
    torch.testing.assert_close(results[0][3], x)
