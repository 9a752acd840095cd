"""All steps of a level of Glow in one call against its parts in turn, written out."""

import sys

import pytest
import torch
import torch.nn.functional as F

from flowkernels import backend
from flowkernels.ops import conv_net, glow_step, glow_steps
from flowkernels.ops.glow_step.reference import glow_steps_training_reference
from python_tests.battery import Example, OpBattery, assert_same_bits
from python_tests.ops.test_glow_step import definition as step


def network(x, context, parameters):
    """x: [batch, H, W, channels]."""
    weight_in, bias_in, weight_mid, bias_mid, weight_out, bias_out, log_gain = parameters
    x = x.movedim(-1, 1)
    if context is not None:
        x = torch.cat([x, context[:, :, None, None].expand(-1, -1, *x.shape[2:])], 1)
    h = F.relu(F.conv2d(F.relu(F.conv2d(x, weight_in, bias_in, padding=1)), weight_mid, bias_mid))
    return (F.conv2d(h, weight_out, bias_out, padding=1) * (3 * log_gain).exp()[:, None, None]).movedim(1, -1)


def definition(x, networks, weights, biases, context=None, inverse=False):
    total = 0
    if inverse:
        for parameters, weight, bias in zip(reversed(networks), reversed(weights), reversed(biases), strict=True):
            x, logabsdet, _ = step(x, network(x[..., : x.shape[-1] // 2], context, parameters), weight, bias, True)
            total = total + logabsdet
        return x, total
    for parameters, weight, bias in zip(networks, weights, biases, strict=True):
        x = torch.einsum("oc,...c->...o", weight, x + bias)
        x, logabsdet, _ = step(x, network(x[..., : x.shape[-1] // 2], context, parameters), None, None, False)
        total = total + logabsdet
    return x, total


def level(channels, hidden, steps, features, dtype=torch.float32):
    """The parameters of each step: seven of its network, a weight and a bias."""
    g = torch.Generator().manual_seed(channels)
    half = channels // 2
    shapes = [
        (hidden, half + features, 3, 3),
        (hidden,),
        (hidden, hidden, 1, 1),
        (hidden,),
        (channels, hidden, 3, 3),
        (channels,),
        (channels,),
    ]
    shapes += [(channels, channels), (channels,)]
    draw = lambda s: torch.randn(s, generator=g, dtype=torch.float64) / (s[1:].numel() ** 0.5 if len(s) > 1 else 5)
    return [[draw(torch.Size(s)).to(dtype) for s in shapes] for _ in range(steps)]


def parted(parameters):
    """networks, weights and biases of a flat list."""
    steps = [parameters[i : i + 9] for i in range(0, len(parameters), 9)]
    return [s[:7] for s in steps], [s[7] for s in steps], [s[8] for s in steps]


def images(batch, height, width, channels, features=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, height, width, channels, generator=g, dtype=torch.float64).to(dtype)
    return x, torch.randn(batch, features, generator=g, dtype=torch.float64).to(dtype) if features else None


def example(height, width, channels, hidden, steps, *, features=0, inverse=False):
    def make(batch, dtype):
        x, context = images(batch, height, width, channels, features, dtype)
        parameters = [t for s in level(channels, hidden, steps, features, dtype) for t in s]

        def with_matrices(f):  # the op's logabsdet is that of the couplings alone
            def run(rows, parameters):
                networks, weights, biases = parted(parameters)
                y, logabsdet = f(rows[0], networks, weights, biases, context=rows[1] if features else None, inverse=inverse)
                log = sum(torch.linalg.slogdet(w.contiguous())[1] for w in weights)  # LAPACK's bits depend on strides
                return y, logabsdet + height * width * log

            return run

        def schema(rows, parameters):
            networks, weights, biases = parted(parameters)
            return rows[0], rows[1] if features else None, [t for n in networks for t in n], weights, biases, inverse

        rows = [x] if context is None else [x, context]
        return Example(rows, parameters, with_matrices(glow_steps), with_matrices(definition), schema, transform=True)

    return make


class TestGlowSteps(OpBattery):
    bare_op = torch.ops.flowkernels.glow_steps.default
    cases = {
        "forward": example(3, 2, 4, 5, 2),
        "inverse": example(2, 3, 4, 4, 2, inverse=True),
        "one step, context": example(2, 2, 2, 3, 1, features=2),
        "context, inverse": example(1, 2, 4, 3, 2, features=1, inverse=True),
    }


def in_turn(x, networks, weights, biases, context, inverse):
    """The same ops one after another."""
    logabsdets = []

    def raw(passing, parameters):
        passing = passing.movedim(-1, 1)
        if context is not None:
            passing = torch.cat([passing, context[:, :, None, None].expand(-1, -1, *passing.shape[2:])], 1)
        return conv_net(passing, *parameters).movedim(1, -1)

    if inverse:
        passing = x[..., : x.shape[-1] // 2]
        for i in reversed(range(len(weights))):
            x, logabsdet, passing = glow_step(x, raw(passing, networks[i]), weights[i], biases[i], inverse=True)
            logabsdets.append(logabsdet)
    else:
        x, _, passing = glow_step(x, None, weights[0], biases[0])
        for parameters, weight, bias in zip(networks, [*weights[1:], None], [*biases[1:], None], strict=True):
            x, logabsdet, passing = glow_step(x, raw(passing, parameters), weight, bias)
            logabsdets.append(logabsdet)
    return x, torch.stack(logabsdets).sum(0)


SIZES = [  # batch, height, width, channels, hidden, steps, context features
    (1, 16, 16, 12, 64, 2, 0),  # a band to each thread
    (1, 4, 4, 48, 64, 3, 0),  # too little for that
    (2, 9, 7, 6, 20, 1, 3),
    (5, 8, 8, 24, 33, 3, 0),
    (17, 4, 4, 12, 24, 2, 5),
    (40, 1, 3, 4, 8, 2, 0),
    (3, 33, 17, 10, 40, 2, 0),
]


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_has_the_bits_of_its_parts_on_any_number_of_threads(size, dtype, inverse):
    *shape, hidden, steps, features = size
    x, context = images(*shape, features, dtype)
    networks, weights, biases = parted([t for s in level(shape[-1], hidden, steps, features, dtype) for t in s])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = in_turn(x, networks, weights, biases, context, inverse)
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            for turned in (x, x.movedim(-1, 1).contiguous().movedim(1, -1)):
                y, logabsdet = glow_steps(turned, networks, weights, biases, context=context, inverse=inverse)
                assert torch.equal(y, want[0])
                # in double precision over all steps, and rounded once
                torch.testing.assert_close(logabsdet, want[1], rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
                some = slice(0, 1) if len(x) < 4 else slice(1, 4)
                part = glow_steps(
                    turned[some], networks, weights, biases, context=None if context is None else context[some], inverse=inverse
                )
                assert_same_bits(part, (y[some], logabsdet[some]))
    finally:
        torch.set_num_threads(before)


def _gradients(run, x, networks, weights, biases, context):
    tensors = x, *(t for n in networks for t in n), *weights, *biases, *([] if context is None else [context])
    leaves = [t.detach().requires_grad_() for t in tensors]
    count = len(weights)
    parameters = leaves[1 : 1 + 7 * count]
    networks = [parameters[7 * i : 7 * i + 7] for i in range(count)]
    weights, biases = leaves[1 + 7 * count : 1 + 8 * count], leaves[1 + 8 * count : 1 + 9 * count]
    y, logabsdet = run(leaves[0], networks, weights, biases, None if context is None else leaves[-1])
    return torch.autograd.grad(y.sin().sum() + logabsdet.square().sum(), leaves)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("size", SIZES[1:6])
def test_gradients_are_those_of_its_parts(size, inverse):
    *shape, hidden, steps, features = size
    x, context = images(*shape, features, torch.float64)
    parts = parted([t for s in level(shape[-1], hidden, steps, features, torch.float64) for t in s])
    together = lambda x, n, w, b, c: glow_steps(x, n, w, b, context=c, inverse=inverse)
    want = _gradients(lambda *a: in_turn(*a, inverse), x, *parts, context)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for turned in (x, x.movedim(-1, 1).contiguous().movedim(1, -1)):
                got = _gradients(together, turned, *parts, context)
                torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)  # the sum over steps of log|det| is rounded once
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("features", [0, 3])
def test_what_is_kept_for_the_gradient(features, inverse):
    x, context = images(3, 4, 5, 6, features, torch.float64)
    networks, weights, biases = parted([t for s in level(6, 8, 3, features, torch.float64) for t in s])
    arguments = x, context, [t for n in networks for t in n], weights, biases, inverse
    op = torch.ops.flowkernels.glow_steps_training.default
    torch.library.opcheck(op, arguments)
    y, logabsdet, *kept = op(*arguments)
    assert_same_bits((y, logabsdet), glow_steps(x, networks, weights, biases, context=context, inverse=inverse))
    torch.testing.assert_close(kept, list(glow_steps_training_reference(*arguments)[2:]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("unused", [0, 1])
def test_gradients_where_an_output_is_not_used(unused):
    x, _ = images(3, 2, 2, 4, 0, torch.float64)
    parts = parted([t for s in level(4, 5, 2, 0, torch.float64) for t in s])
    used = lambda run: lambda *a: [o if i != unused else o.detach() for i, o in enumerate(run(*a))]
    got = _gradients(used(lambda x, n, w, b, c: glow_steps(x, n, w, b)), x, *parts, None)
    torch.testing.assert_close(got, _gradients(used(lambda *a: in_turn(*a, False)), x, *parts, None), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("inverse", [False, True])
def test_networks_of_several_widths_train_in_turn(inverse):
    x, _ = images(3, 2, 2, 4, 0, torch.float64)
    a, b = level(4, 5, 1, 0, torch.float64)[0], level(4, 7, 1, 0, torch.float64)[0]
    parts = parted([*a, *b])
    got = _gradients(lambda x, n, w, b, c: glow_steps(x, n, w, b, inverse=inverse), x, *parts, None)
    assert_same_bits(got, _gradients(lambda *a: in_turn(*a, inverse), x, *parts, None))


@pytest.mark.parametrize("inverse", [False, True])
def test_wide_networks_are_parts_in_turn_and_so_is_the_reference(inverse):
    x, _ = images(2, 3, 3, 4)
    networks, weights, biases = parted([t for s in level(4, 513, 2, 0) for t in s])
    got = glow_steps(x, networks, weights, biases, inverse=inverse)
    assert_same_bits(got, in_turn(x, networks, weights, biases, None, inverse))
    with backend("reference"):
        torch.testing.assert_close(glow_steps(x, networks, weights, biases, inverse=inverse), got, rtol=1e-4, atol=1e-5)


def test_parameters_of_any_strides_and_empty_batches():
    x, _ = images(3, 4, 4, 6)
    networks, weights, biases = parted([t for s in level(6, 8, 2, 0) for t in s])
    want = glow_steps(x, networks, weights, biases)
    spread = lambda t: torch.stack([t, t], -1)[..., 0]
    assert_same_bits(glow_steps(spread(x), [[*map(spread, n)] for n in networks], [*map(spread, weights)], [*map(spread, biases)]), want)
    y, logabsdet = glow_steps(x[:0], networks, weights, biases)
    assert y.shape == (0, 4, 4, 6) and logabsdet.shape == (0,)


@pytest.mark.parametrize("inverse", [False, True])
def test_a_bad_value_stays_in_its_image(inverse):
    x, _ = images(20, 4, 4, 6)
    networks, weights, biases = parted([t for s in level(6, 8, 2, 0) for t in s])
    want = glow_steps(x, networks, weights, biases, inverse=inverse)
    bad = x.clone()
    bad[7, 1, 2, 0], bad[11, 0, 0, 5] = torch.nan, torch.inf
    others = [i for i in range(20) if i not in (7, 11)]
    got = glow_steps(bad, networks, weights, biases, inverse=inverse)
    assert_same_bits([t[others] for t in got], [t[others] for t in want])
    assert not got[0][[7, 11]].isfinite().all((1, 2, 3)).any()


def _with(values, i, value):
    return [*values[:i], value, *values[i + 1 :]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, n, w, b: (x, [], [], []), "at least one; got 0, 0, 0"),
        (lambda x, n, w, b: (x, n[:1], w, b), "got 1, 2, 2"),
        (lambda x, n, w, b: (x[..., :5], n, w, b), "x must be .* an even number of channels"),
        (lambda x, n, w, b: (x.double(), n, w, b), "must be .* torch.float64"),
        (lambda x, n, w, b: (x, n, _with(w, 1, w[1][:5]), b), r"weight must be \[6, 6\]"),
        (lambda x, n, w, b: (x, n, w, _with(b, 0, b[0].double())), r"bias must be \[6\], torch.float32"),
        (lambda x, n, w, b: (x, _with(n, 1, _with(n[1], 0, n[1][0][:, :2])), w, b), r"weight_in must be \[8, 3, 3, 3\]"),
        (lambda x, n, w, b: (x, _with(n, 0, _with(n[0], 6, n[0][6][:4])), w, b), r"log_gain must be \[6\]"),
        (lambda x, n, w, b: (x[0], n, w, b), "x must be"),
        (lambda x, n, w, b: (x, _with(n, 1, n[1][:6]), w, b), "must be the seven tensors of a conditioner; got 6"),
    ],
)
def test_bad_input(change, message):
    x, _ = images(3, 4, 4, 6)
    networks, weights, biases = parted([t for s in level(6, 8, 2, 0) for t in s])
    with pytest.raises(ValueError, match=message):
        glow_steps(*change(x, networks, weights, biases))


def test_images_without_pixels():
    x = torch.zeros(5000, 0, 3, 6, requires_grad=True)
    tensors = [t.requires_grad_() for s in level(6, 8, 2, 0) for t in s]
    stale = [torch.full((5000,), torch.nan) for _ in range(3)]  # whose memory is taken again
    del stale
    y, logabsdet = glow_steps(x, *parted(tensors))
    assert y.shape == x.shape and torch.equal(logabsdet, torch.zeros(5000))
    assert not any(g.any() for g in torch.autograd.grad(y.sum() + logabsdet.sum(), tensors, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("grad", [True, False])
def test_a_failure_of_the_kernel_is_not_passed_over(monkeypatch, grad):
    def broken(*_):
        raise RuntimeError("the kernel failed")

    module = sys.modules["flowkernels.ops.glow_step.steps"]
    monkeypatch.setattr(module, "_glow_steps", broken)
    monkeypatch.setattr(module, "_training", broken)
    x, _ = images(3, 4, 4, 6)
    networks, weights, biases = parted([t for s in level(6, 8, 2, 0) for t in s])
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="the kernel failed"):
        glow_steps(x.requires_grad_(), networks, weights, biases)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c[:2], r"context must be \[3, features\], torch.float32, to fit x; got \[2, 2\]"),
        (lambda c: c.double(), r"context must be .* got \[3, 2\], torch.float64"),
        (lambda c: c[0], "context must be"),
        (lambda c: c[:, :1], r"weight_in must be \[8, 4, 3, 3\]"),
        (lambda c: None, r"weight_in must be \[8, 3, 3, 3\]"),
    ],
)
def test_bad_context(change, message):
    x, context = images(3, 4, 4, 6, 2)
    networks, weights, biases = parted([t for s in level(6, 8, 2, 2) for t in s])
    with pytest.raises(ValueError, match=message):
        glow_steps(x, networks, weights, biases, context=change(context))
