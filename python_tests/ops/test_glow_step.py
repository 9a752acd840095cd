"""The joined Glow step against the layers that it joins, written out."""

import pytest
import torch

from flowkernels import backend
from flowkernels.ops import glow_step
from python_tests.battery import LAYOUTS, Example, OpBattery, assert_as_exact_as_eager, assert_same_bits


def definition(x, raw, weight, bias, inverse):
    h, log = x, x.new_zeros(x.shape)
    if raw is not None:
        first, second = x.chunk(2, -1)
        shift, s = raw[..., 0::2], raw[..., 1::2]
        log = torch.nn.functional.logsigmoid(s + 2)
        second = second * torch.exp(-log) - shift if inverse else (second + shift) * torch.exp(log)
        h = torch.cat([first, second], -1)
    if weight is None:
        y = h
    else:
        y = torch.einsum("oc,...c->...o", weight, h) - bias if inverse else torch.einsum("oc,...c->...o", weight, h + bias)
    logabsdet = log.flatten(1).sum(1)
    return y, -logabsdet if inverse else logabsdet, y[..., : y.shape[-1] // 2]


def tensors(batch, sites, channels, dtype=torch.float32):
    g = torch.Generator().manual_seed(channels)
    shapes = ((batch, *sites, channels), (batch, *sites, channels), (channels, channels), (channels,))
    x, raw, weight, bias = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes)
    return x, raw, weight / channels**0.5, bias


def example(channels, *sites, inverse=False):
    def make(batch, dtype):
        x, raw, weight, bias = tensors(batch, sites, channels, dtype)

        def with_convolution(f):  # the op's logabsdet is that of the coupling alone
            def run(rows, parameters):
                y, logabsdet, passing = f(*rows, *parameters)
                log = torch.linalg.slogdet(parameters[0].contiguous())[1]  # LAPACK's bits depend on strides
                return y, logabsdet + torch.Size(sites).numel() * log, passing

            return run

        op = with_convolution(lambda *a: glow_step(*a, inverse=inverse))
        oracle = with_convolution(lambda *a: definition(*a, inverse))
        return Example([x, raw], [weight, bias], op, oracle, lambda rows, p: (*rows, *p, inverse, True), transform=True)

    return make


class TestGlowStep(OpBattery):
    bare_op = torch.ops.flowkernels.glow_step.default
    layouts = LAYOUTS
    cases = {
        "images": example(6, 3, 5),
        "inverse": example(4, 2, 3, inverse=True),
        "a vector": example(10),
    }


# blocks of 3, 2 and 1 vectors and their remainders; tiles of 64 sites, several parts
SIZES = [(2, (1,)), (2, (70,)), (4, (65,)), (12, (16, 16)), (20, (9,)), (24, (8, 8)), (34, (70,)), (48, (4, 4)), (56, (3,)), (98, (11,))]


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("channels", "sites"), SIZES)
def test_gradients_of_every_size(channels, sites, inverse):
    for dtype in (torch.float64, torch.float32):
        inputs = [t.requires_grad_() for t in tensors(5, sites, channels, dtype)]
        exact = [t.detach().double().requires_grad_() for t in inputs]
        weigh = lambda outputs: sum((o * torch.linspace(-1, 2, o.numel(), dtype=o.dtype).view_as(o)).sum() for o in outputs)
        got, want = glow_step(*inputs, inverse=inverse), definition(*exact, inverse)
        got = [*got, *torch.autograd.grad(weigh(got), inputs)]
        want = [*want, *torch.autograd.grad(weigh(want), exact)]
        for g, w in zip(got, want, strict=True):
            assert (g - w).abs().max() <= 40 * torch.finfo(dtype).eps * w.abs().max()


def _agree(got_from, want_from, inputs):
    """Outputs and gradients; an input may be None."""
    leaves = [t for t in inputs if t is not None]
    found = []
    for f in (got_from, want_from):
        outputs = f(*inputs)
        weighted = sum((o * torch.linspace(-1, 2, o.numel(), dtype=o.dtype).view_as(o)).sum() for o in outputs)
        found.append([*outputs, *torch.autograd.grad(weighted, leaves, allow_unused=True, materialize_grads=True)])
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("missing", ["raw", "weight"])
@pytest.mark.parametrize(("channels", "sites"), [(2, (1,)), (6, (3, 5)), (24, (13, 11)), (48, (70,))])
def test_coupling_or_convolution_may_be_missing(channels, sites, missing, inverse):
    x, raw, weight, bias = (t.requires_grad_() for t in tensors(3, sites, channels, torch.float64))
    raw = None if missing == "raw" else raw
    weight, bias = (None, None) if missing == "weight" else (weight, bias)
    run = lambda *a: glow_step(*a, inverse=inverse)
    _agree(run, lambda *a: definition(*a, inverse), (x, raw, weight, bias))
    given = [t if t is None else t.detach() for t in (x, raw, weight, bias)]
    for passes in (True, False):
        torch.library.opcheck(torch.ops.flowkernels.glow_step.default, (*given, inverse, passes))
    y, logabsdet, passing = glow_step(*given, inverse=inverse)
    torch.library.opcheck(torch.ops.flowkernels.glow_step_backward.default, (y, logabsdet, passing, *given, inverse))
    with backend("reference"):
        _agree(run, lambda *a: definition(*a, inverse), (x, raw, weight, bias))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("channels", "sites"), [(2, (1,)), (6, (3, 5)), (24, (8, 16)), (34, (70,)), (48, (4, 4))])
def test_channels_first_gives_the_same_bits(channels, sites, inverse):
    x, raw, weight, bias = tensors(3, sites, channels)
    found = []
    for turned in (x, x.movedim(-1, 1).contiguous().movedim(1, -1)):
        for given in (raw, None):
            leaves = [t.detach().requires_grad_() for t in (turned, weight, bias)]
            outputs = glow_step(leaves[0], given, *leaves[1:], inverse=inverse)
            found.append((*outputs, *torch.autograd.grad(sum(o.square().sum() for o in outputs), leaves)))
    assert_same_bits(found[0], found[2])
    assert_same_bits(found[1], found[3])


@pytest.mark.parametrize("unused", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_gradients_where_an_output_is_not_used(unused):
    inputs = [t.requires_grad_() for t in tensors(3, (7,), 6, torch.float64)]
    loss = lambda outputs: sum(o.square().sum() for i, o in enumerate(outputs) if i not in unused)
    got = torch.autograd.grad(loss(glow_step(*inputs)), inputs, allow_unused=True, materialize_grads=True)
    want = torch.autograd.grad(loss(definition(*inputs, False)), inputs, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("inverse", [False, True])
def test_bits_do_not_depend_on_threads(inverse):
    inputs = [t.requires_grad_() for t in tensors(40, (10, 10), 24)]
    threads, found = torch.get_num_threads(), []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        y, logabsdet, passing = glow_step(*inputs, inverse=inverse)
        found.append((y, logabsdet, passing, *torch.autograd.grad(y.square().sum() + logabsdet.sum() + passing.sum(), inputs)))
    torch.set_num_threads(threads)
    assert_same_bits(found[0], found[1])
    assert_same_bits(found[0], found[2])


def test_one_undoes_the_other():
    x, raw, weight, bias = tensors(3, (4, 4), 12, torch.float64)
    y, logabsdet, _ = glow_step(x, raw, weight, bias)
    h = torch.linalg.solve(weight, y.mT).mT - bias
    # the inverse's own order: coupling undone first, so with an identity in the place of the convolution
    back, opposite, _ = glow_step(h, raw, torch.eye(12, dtype=torch.float64), torch.zeros(12, dtype=torch.float64), inverse=True)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(opposite, -logabsdet)


@pytest.mark.parametrize("inverse", [False, True])
def test_backends_agree(inverse):
    inputs = [t.requires_grad_() for t in tensors(3, (5, 5), 8, torch.float64)]
    found = []
    for name in ("cpp", "reference"):
        with backend(name):
            outputs = glow_step(*inputs, inverse=inverse)
            found.append((*outputs, *torch.autograd.grad(sum(o.square().sum() for o in outputs), inputs)))
    torch.testing.assert_close(*found)
    op = torch.ops.flowkernels.glow_step_backward.default
    y, logabsdet, passing = (torch.randn_like(o) for o in outputs)
    for dpassing in (None, passing):
        torch.library.opcheck(op, (y, logabsdet, dpassing, *(t.detach() for t in inputs), inverse))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, raw, w, b: (x[..., :5], raw, w, b), r"even number of channels; got torch.float32, \[2, 3, 5\]"),
        (lambda x, raw, w, b: (x.half(), raw, w, b), "x must be float32 or float64.*got torch.float16"),
        (lambda x, raw, w, b: (x, raw[:1], w, b), r"raw must be \[2, 3, 6\].*to fit x; got \[1, 3, 6\]"),
        (lambda x, raw, w, b: (x, raw, w[1:], b), r"weight must be \[6, 6\]"),
        (lambda x, raw, w, b: (x, None, None, b), "weight and bias must both be given or both be None; got bias without weight"),
        (lambda x, raw, w, b: (x, None, None, None), "raw or weight must be given; got None for both"),
        (lambda x, raw, w, b: (x, raw, w, b.double()), "bias must be .*float32.*got .*float64"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        glow_step(*change(*tensors(2, (3,), 6)))


def test_log_determinant_alone_of_a_channels_first_view():
    x = torch.randn(2, 4, 3).movedim(1, -1).requires_grad_()
    raw = torch.randn(2, 3, 4, requires_grad=True)
    got = torch.autograd.grad(glow_step(x, raw, None, None)[1].sum(), raw)
    with backend("reference"):
        want = torch.autograd.grad(glow_step(x, raw, None, None)[1].sum(), raw)
    torch.testing.assert_close(got, want)


def test_empty_batch_has_gradients():
    shapes = (0, 2, 2, 4), (0, 2, 2, 4), (4, 4), (4,)
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    y, logabsdet, passing = glow_step(*tensors)
    gradients = torch.autograd.grad(y.sum() + logabsdet.sum() + passing.sum(), tensors)
    assert [g.shape for g in gradients] == [t.shape for t in tensors] and all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("inverse", [False, True])
def test_error_in_float32_is_that_of_eager_float32(inverse):
    assert_as_exact_as_eager(example(48, 8, 8, inverse=inverse)(64, torch.float32))
