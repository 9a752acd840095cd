"""Batch normalisation of channels against its definition, written out, and autograd through that."""

import pytest
import torch

from flowkernels import _extension, backend
from flowkernels.ops.channel_affine.normalize import normalize_channels
from python_tests.battery import IMAGE_LAYOUTS, LAYOUTS, assert_same_bits, with_grad

EPS = 1e-4
# few and many sites, more than 16 rows of 16, samples that share a part of the sums, groups of samples, one channel
SHAPES = [(7, 5), (1, 3, 4), (2500, 3), (37, 3, 4, 5), (40, 1, 8, 8), (3, 2, 33, 33), (2, 5, 2, 3, 4), (3, 4, 70, 1)]


def definition(x, log_gain, bias):
    each, dims = (-1, *[1] * (x.dim() - 2)), [0, *range(2, x.dim())]
    variance, mean = x.var(dims, correction=0), x.mean(dims)
    log_scale = -0.5 * torch.log(variance + EPS) + (0 if log_gain is None else log_gain)
    z = (x - mean.view(each)) * log_scale.exp().view(each) + (0 if bias is None else bias.view(each))
    return z, (x.shape[2:].numel() * log_scale.sum()).expand(len(x)), variance.detach(), mean.detach()


def example(shape, dtype=torch.float64, affine=True):
    g = torch.Generator().manual_seed(4)
    x = 2 * torch.randn(shape, generator=g, dtype=dtype) + 3
    log_gain, bias = (0.3 * torch.randn(shape[1], generator=g, dtype=dtype) if affine else None for _ in range(2))
    return x, log_gain, bias


def results(f, x, log_gain, bias):
    """Outputs, and gradients of what depends on z and the log-determinant unevenly."""
    given = [x, *(t for t in (log_gain, bias) if t is not None)]
    inputs = with_grad(given)
    outputs = f(*inputs, *[None] * (3 - len(inputs)))
    weights = [torch.linspace(-1, 2, o.numel(), dtype=o.dtype).view_as(o) for o in outputs[:2]]
    return *outputs, *torch.autograd.grad(sum((o * w).sum() for o, w in zip(outputs, weights, strict=False)), inputs)


def normalize(x, log_gain, bias):
    return normalize_channels(x, log_gain, bias, EPS)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition(shape, affine):
    arguments = example(shape, affine=affine)
    want = results(definition, *arguments)
    torch.testing.assert_close(results(normalize, *arguments), want, rtol=1e-10, atol=1e-10)
    with backend("reference"):
        torch.testing.assert_close(results(normalize, *arguments), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_error_in_float32_is_that_of_rounding(shape):
    arguments = example(shape, torch.float32)
    exact = results(definition, *(t.double() for t in arguments))
    eager = results(definition, *arguments)
    for g, e, w in zip(results(normalize, *arguments), eager, exact, strict=True):
        allowed = 4 * (e - w).abs().max() + 16 * torch.finfo(torch.float32).eps * (1 + w.abs().max())
        assert g.dtype == torch.float32 and (g - w).abs().max() <= allowed


@pytest.mark.skipif(not _extension.has_kernel("channel_normalize", "CPU"), reason="the reference rounds every square")
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics_in_float32_are_rounded_once(shape):
    x, *_ = example(shape, torch.float32)
    _, _, variance, mean = normalize(x, None, None)
    dims = [0, *range(2, x.dim())]
    assert torch.equal(mean, x.double().mean(dims).float())
    each = mean.view(-1, *[1] * (x.dim() - 2))
    assert torch.equal(variance, (x - each).double().square().mean(dims).float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_layout_does_not_matter(shape, dtype):
    x, log_gain, bias = example(shape, dtype)
    for layout in (LAYOUTS | IMAGE_LAYOUTS).values():
        strided = layout(x)
        assert_same_bits(results(normalize, strided, log_gain, bias), results(normalize, strided.contiguous(), log_gain, bias))
    wide = [torch.stack([t, t], -1)[:, 0] for t in (log_gain, bias)]
    assert_same_bits(normalize(x, *wide), normalize(x, log_gain, bias))


def test_threads_do_not_change_a_bit():
    threads = torch.get_num_threads()
    for shape in ((9000, 8), (5, 4, 64, 64)):
        found = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(results(normalize, *example(shape, torch.float32)))
        torch.set_num_threads(threads)
        assert_same_bits(found[1], found[0])
        assert_same_bits(found[2], found[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_float32_rounded_once(dtype):
    x, log_gain, bias = example((7, 3, 4, 5), torch.float32)
    x = x.to(dtype)
    z, *others, dx, dlog_gain, dbias = results(normalize, x, log_gain, bias)
    want, *want_others = normalize(x.float(), log_gain, bias)
    assert z.dtype == dx.dtype == dtype and torch.equal(z, want.to(dtype))
    assert dlog_gain.dtype == dbias.dtype == torch.float32
    assert_same_bits(others, want_others)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", [(4, 2), (3, 2, 2, 3)])
def test_gradients_of_gradients(shape, affine):
    inputs = with_grad([t for t in example(shape, affine=affine) if t is not None])
    f = lambda *a: normalize(*a, *[None] * (3 - len(a)))[:2]
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(dtype, channels_last):
    x, log_gain, bias = example((3, 2, 4, 5), torch.float32)
    x = x.to(dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    torch.library.opcheck(torch.ops.flowkernels.channel_normalize.default, (x, log_gain, bias, EPS))
    z, logabsdet, variance, mean = normalize(x, log_gain, bias)
    torch.library.opcheck(torch.ops.flowkernels.channel_normalize_backward.default, (z, logabsdet, x, log_gain, variance, mean, EPS))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic):
    arguments = example((5, 3, 4, 4), torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(normalize, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    torch.testing.assert_close(results(compiled, *arguments), results(normalize, *arguments))


def test_statistics_have_no_gradient():
    x, log_gain, bias = example((6, 2, 3))
    of_statistics = lambda x: normalize(x, log_gain, bias)[2:]
    assert not any(t.requires_grad for t in of_statistics(x.requires_grad_()))
    for tangents in (torch.func.jvp(of_statistics, (x,), (x,))[1], torch.func.jacrev(of_statistics)(x)):
        assert all(torch.equal(t, torch.zeros_like(t)) for t in tangents)


def test_many_cotangents_at_once():
    inputs = with_grad(example((6, 2, 3)))
    outputs = normalize(*inputs)[:2]
    cotangents = [torch.stack([torch.full_like(o, k).cumsum(0) for k in range(3)]) for o in outputs]
    pull = lambda *v: torch.autograd.grad(outputs, inputs, v, retain_graph=True)
    want = tuple(map(torch.stack, zip(*map(pull, *cotangents), strict=True)))
    torch.testing.assert_close(torch.func.vmap(pull)(*cotangents), want)


def test_batches_are_apart_under_vmap():
    x, log_gain, bias = example((6, 2, 3), torch.float64)
    batches = x.view(2, 3, 2, 3)
    loss = lambda x, log_gain: sum(o.sin().sum() for o in normalize(x, log_gain, bias)[:2])
    gradient = torch.func.grad(loss, (0, 1))
    got = torch.func.vmap(gradient, (0, None))(batches, log_gain)
    want = [torch.stack(each) for each in zip(*(gradient(b, log_gain) for b in batches), strict=True)]
    torch.testing.assert_close(got, tuple(want))
