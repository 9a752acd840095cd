"""Glow's conditioner against its three convolutions, written out."""

import pytest
import torch
import torch.nn.functional as F

from flowkernels import _extension, backend
from flowkernels.flows.networks import ConvNet
from flowkernels.ops import conv_net
from python_tests.battery import IMAGE_LAYOUTS, LAYOUTS, Example, OpBattery, assert_as_exact_as_eager, assert_same_bits, detached, with_grad

COMPILED = _extension.has_kernel("conv_net", "CPU")


def definition(x, weight_in, bias_in, weight_mid, bias_mid, weight_out, bias_out, log_gain):
    h = torch.relu(F.conv2d(x, weight_in, bias_in, padding=1))
    h = torch.relu(F.conv2d(h, weight_mid, bias_mid))
    return F.conv2d(h, weight_out, bias_out, padding=1) * torch.exp(3 * log_gain)[:, None, None]


def tensors(batch, channels, height, width, hidden, outputs, dtype=torch.float32):
    g = torch.Generator().manual_seed(hidden)
    shapes = [(hidden, channels, 3, 3), (hidden,), (hidden, hidden, 1, 1), (hidden,), (outputs, hidden, 3, 3), (outputs,), (outputs,)]
    x, *parameters = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in [(batch, channels, height, width), *shapes])
    return x, [p if p.dim() == 1 else p / p[0].numel() ** 0.5 for p in parameters[:-1]] + [parameters[-1] / 10]


def example(channels, height, width, hidden, outputs):
    def make(batch, dtype):
        x, parameters = tensors(batch, channels, height, width, hidden, outputs, dtype)
        op = lambda rows, p: (conv_net(*rows, *p),)
        oracle = lambda rows, p: (definition(*rows, *p),)
        return Example([x], parameters, op, oracle, lambda rows, p: (rows[0].permute(0, 2, 3, 1).contiguous(), *p))

    return make


class TestConvNet(OpBattery):
    bare_op = torch.ops.flowkernels.conv_net.default
    layouts = LAYOUTS | IMAGE_LAYOUTS
    row_bits = COMPILED
    cases = {
        "small": example(3, 5, 3, 5, 4),
        "vectors and what is left": example(2, 4, 4, 34, 18),
        "a pixel": example(1, 1, 1, 16, 2),
    }

    def test_opcheck(self, case):
        rows, parameters, *_, schema, _ = case(3, torch.float32)
        x, *given = schema(rows, parameters)
        ops = torch.ops.flowkernels
        for op in (ops.conv_net, ops.conv_net_training):
            torch.library.opcheck(op.default, (x, *given))
        y, first, second = ops.conv_net_training(x, *given)
        weight_in, _, weight_mid, _, weight_out, bias_out, log_gain = given
        for wanted in (True, False):
            arguments = y, x, first, second, weight_in, weight_mid, weight_out, bias_out, log_gain, wanted
            torch.library.opcheck(ops.conv_net_backward.default, arguments)


# 1 to 5 vectors of hidden channels, and 8; chains of one, three and more chunks; every width of the last panel
SIZES = [
    (1, 8, 1),
    (6, 16, 12),
    (12, 32, 24),
    (24, 48, 48),
    (30, 64, 60),
    (2, 65, 100),
    (29, 80, 7),
    (3, 100, 33),
    (8, 128, 16),
    (300, 16, 5),
    (4, 256, 6),
    (5, 512, 7),
]


@pytest.mark.parametrize(("channels", "hidden", "outputs"), SIZES)
def test_every_size(channels, hidden, outputs):
    for height, width in ((1, 7), (6, 1), (4, 4), (3, 6), (9, 13)):
        for dtype in (torch.float64, torch.float32):
            x, parameters = tensors(2, channels, height, width, hidden, outputs, dtype)
            inputs = with_grad([x, *parameters])
            exact = with_grad([t.double() for t in inputs])
            want = definition(*exact)
            with torch.no_grad():
                got = conv_net(*inputs)
            trained = conv_net(*inputs)
            assert got.dtype == dtype and torch.equal(got, trained)
            cotangent = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            gradients = torch.autograd.grad(trained, inputs, cotangent.to(dtype))
            for g, w in zip((got, *gradients), (want, *torch.autograd.grad(want, exact, cotangent)), strict=True):
                assert g.dtype == dtype and g.shape == w.shape
                assert (g - w).abs().max() <= 60 * torch.finfo(dtype).eps * w.abs().max()


@pytest.mark.skipif(not COMPILED, reason="torch's convolutions promise no bits")
@pytest.mark.parametrize("height", [23, 24])
def test_bands_and_threads_do_not_change_bits(height):
    """Images too large for a thread's cache go through in bands, a single image in one for each thread."""
    before, found = torch.get_num_threads(), []
    x, parameters = tensors(3, 3, height, 150, 128, 6)
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            inputs = with_grad([x, *parameters])
            with torch.no_grad():
                alone = torch.cat([conv_net(row[None], *parameters) for row in x])
            y = conv_net(*inputs)
            found.append((alone, y.detach(), *torch.autograd.grad(y.sin().sum(), inputs)))
    finally:
        torch.set_num_threads(before)
    for one in found:
        assert_same_bits(one, found[0])
        assert_same_bits(one[:1], one[1:2])
    exact = with_grad([x.double(), *(p.double() for p in parameters)])
    y = definition(*exact)
    for g, w in zip(found[0][1:], (y, *torch.autograd.grad(y.sin().sum(), exact)), strict=True):
        assert (g - w).abs().max() <= 1e-4 * w.abs().max()


@pytest.mark.parametrize("wanted", [(0,), (1,), (2, 7), (0, 3), (1, 2, 3, 4, 5, 6, 7)])
def test_what_is_frozen_asks_for_nothing(wanted):
    x, parameters = tensors(2, 3, 4, 5, 9, 4, torch.float64)
    found = []
    for f in (conv_net, definition):
        inputs = [t.clone().requires_grad_(i in wanted) for i, t in enumerate((x, *parameters))]
        leaves = [inputs[i] for i in wanted]
        first = torch.autograd.grad(f(*inputs).sin().sum(), leaves, create_graph=True)
        found.append((*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)))
        with torch.no_grad():
            assert f(*inputs).shape == (2, 4, 4, 5)
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)
    plain = [t.clone().requires_grad_(i in wanted) for i, t in enumerate((x, *parameters))]
    once = torch.autograd.grad(conv_net(*plain).sin().sum(), [plain[i] for i in wanted])
    torch.testing.assert_close(once, found[0][: len(wanted)], rtol=1e-9, atol=1e-9)


def test_parameters_of_a_conditioner_are_vectors_to_an_optimizer():
    net = ConvNet(3, 8, 6)
    with torch.no_grad():
        net.conv_out.weight.normal_()
    x = torch.randn(4, 3, 5, 5)
    before = torch.nn.utils.parameters_to_vector(net.parameters()).clone()
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        return loss

    start = closure().item()
    optimizer.step(closure)
    assert closure().item() < start
    assert not torch.equal(before, torch.nn.utils.parameters_to_vector(net.parameters()))
    assert all(p.is_contiguous() and p.grad.is_contiguous() for p in net.parameters())


def test_no_images_give_gradients_of_zero():
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4)):
        x, parameters = tensors(1, 3, 4, 4, 16, 5)
        inputs = with_grad([x.new_zeros(shape), *parameters])
        y = conv_net(*inputs)
        assert y.shape == (shape[0], 5, *shape[2:])
        assert not any(g.any() for g in torch.autograd.grad(y.sum(), inputs))


def test_wide_networks_and_half_precision_are_torchs():
    for hidden, dtype in ((513, torch.float32), (8, torch.bfloat16)):
        x, parameters = tensors(2, 4, 5, 5, hidden, 8, dtype)
        with torch.no_grad():
            got = conv_net(x, *parameters)
            with backend("reference"):
                assert torch.equal(got, conv_net(x, *parameters))
        assert got.dtype == dtype


def test_autocast():
    x, parameters = tensors(2, 4, 5, 5, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got = conv_net(x, *parameters)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), definition(x, *parameters), rtol=0.05, atol=0.05)


def test_what_does_not_fit_is_named():
    x, parameters = tensors(2, 4, 5, 5, 8, 6)
    with pytest.raises(ValueError, match=r"x must be floating point, \[batch, channels, H, W\]; got torch.float32, \[4, 5, 5\]"):
        conv_net(x[0], *parameters)
    for i, size in ((0, 0), (4, 0)):
        empty = [*parameters[:i], parameters[i][:size], *parameters[i + 1 :]]
        with pytest.raises(ValueError, match="x, weight_in and weight_out must have channels; got"):
            conv_net(x, *empty)
    names = ("weight_in", "bias_in", "weight_mid", "bias_mid", "weight_out", "bias_out", "log_gain")
    for i, name in enumerate(names):
        for wrong in (parameters[i].double(), parameters[i][..., :-1]):
            changed = [*detached(parameters[:i]), wrong, *detached(parameters[i + 1 :])]
            with pytest.raises(ValueError, match=rf"{name} must be \[.*\], torch.float32 on cpu, to fit x; got"):
                conv_net(x, *changed)


def test_error_in_float32_is_that_of_eager_float32():
    assert_as_exact_as_eager(example(12, 16, 16, 64, 24)(32, torch.float32))
