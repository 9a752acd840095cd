"""The per-channel affine map against its definition, written out, and its Jacobian."""

import pytest
import torch

from flowkernels import backend
from flowkernels.ops import channel_affine
from python_tests.battery import IMAGE_LAYOUTS, LAYOUTS, Example, OpBattery, assert_as_exact_as_eager, assert_same_bits


def definition(x, shift, log_scale, bias, inverse):
    shape = (1, -1) + (1,) * (x.dim() - 2)
    shift, bias = (torch.zeros_like(log_scale) if t is None else t for t in (shift, bias))
    shift, log_scale, bias = (t.view(shape) for t in (shift, log_scale, bias))
    y = (x - bias) * torch.exp(-log_scale) - shift if inverse else (x + shift) * torch.exp(log_scale) + bias
    sites = x.shape[2:].numel()
    return y, ((-sites if inverse else sites) * log_scale.sum()).expand(len(x))


def example(*shape, has="shift log_scale bias", inverse=False, keep="input"):
    names = [name for name in ("shift", "log_scale", "bias") if name in has.split()]

    def make(batch, dtype):
        g = torch.Generator().manual_seed(3)
        x, *parameters = (torch.randn(s, generator=g, dtype=dtype) for s in ((batch, *shape), *[shape[:1]] * len(names)))
        given = lambda parameters: [dict(zip(names, parameters, strict=True)).get(name) for name in ("shift", "log_scale", "bias")]

        def op(rows, parameters):
            shift, log_scale, bias = given(parameters)
            return channel_affine(rows[0], shift, log_scale, bias=bias, inverse=inverse, keep=keep)

        def oracle(rows, parameters):
            return definition(rows[0], *given(parameters), inverse)

        return Example([x], parameters, op, oracle, lambda rows, p: (rows[0], *given(p), inverse), transform=True)

    return make


class TestChannelAffine(OpBattery):
    bare_op = torch.ops.flowkernels.channel_affine.default
    layouts = LAYOUTS | IMAGE_LAYOUTS
    cases = {
        "vectors": example(5),
        "vectors, inverse": example(5, inverse=True, keep="output"),
        "actnorm on images": example(3, 4, 5, has="shift log_scale"),
        "actnorm on images, inverse": example(3, 4, 5, has="shift log_scale", inverse=True),
        "batch norm on images": example(3, 4, 5, keep="output"),
        "scale alone": example(1, 7, has="log_scale"),
    }


def results(op, rows, parameters):
    inputs = [t.detach().requires_grad_() for t in (*rows, *parameters)]
    outputs = op(inputs[:1], inputs[1:])
    return *outputs, *torch.autograd.grad(sum((o * o).sum() for o in outputs), inputs)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape", [(3, 1300), (2500, 3), (2, 3, 33, 33), (1, 2, 3, 2100), (2, 5, 2, 3, 4)])
def test_sizes_beyond_one_block(shape, inverse):
    rows, parameters, op, oracle, *_ = example(*shape[1:], inverse=inverse)(shape[0], torch.float64)
    first = results(op, rows, parameters)
    torch.testing.assert_close(first, results(oracle, rows, parameters), rtol=1e-10, atol=1e-9)
    for layout in IMAGE_LAYOUTS.values():
        y, logabsdet, dx, *sums = results(op, [layout(rows[0])], parameters)
        assert_same_bits((y, logabsdet, dx, *sums), first)


def test_threads_do_not_change_a_bit():
    threads = torch.get_num_threads()
    for shape in ((5, 4, 64, 64), (9000, 8)):
        rows, parameters, op, *_ = example(*shape[1:])(shape[0], torch.float32)
        found = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(results(op, rows, parameters))
        torch.set_num_threads(threads)
        assert_same_bits(found[1], found[0])
        assert_same_bits(found[2], found[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_float32_rounded_once(dtype):
    rows, parameters, op, *_ = TestChannelAffine.cases["batch norm on images"](7, torch.float32)
    x = rows[0].to(dtype)
    y, logabsdet = op([x], parameters)
    want, want_logabsdet = op([x.float()], parameters)
    assert y.dtype == dtype and torch.equal(y, want.to(dtype))
    assert logabsdet.dtype == torch.float32 and torch.equal(logabsdet, want_logabsdet)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nan_of_any_bits_stays_nan(dtype):
    shift = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001], dtype=torch.int32).view(torch.float32)
    for log_scale in (torch.zeros(4), shift):
        y, _ = channel_affine(torch.ones(3, 4, 5, dtype=dtype), shift, log_scale)
        assert y.isnan().all()


def test_round_trip():
    rows, parameters, op, *_ = TestChannelAffine.cases["batch norm on images"](7, torch.float64)
    y, logabsdet = op(rows, parameters)
    shift, log_scale, bias = parameters
    x, back = channel_affine(y, shift, log_scale, bias=bias, inverse=True)
    torch.testing.assert_close(x, rows[0])
    torch.testing.assert_close(back, -logabsdet)


def test_backend_reference_is_the_definition():
    rows, parameters, op, oracle, *_ = TestChannelAffine.cases["batch norm on images"](7, torch.float64)
    with backend("reference"):
        torch.testing.assert_close(op(rows, parameters), oracle(rows, parameters))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4).long()}, "x must be float64, float32, float16 or bfloat16; got torch.int64"),
        (
            {"x": torch.zeros(2, 3, 0)},
            r"x must have shape \[batch, channels, \*sites\] with at least one channel and site; got \[2, 3, 0\]",
        ),
        ({"x": torch.zeros(2)}, r"with at least one channel and site; got \[2\]"),
        ({"shift": torch.zeros(4)}, r"shift must have shape \[3\], one value per channel; got \[4\]"),
        ({"log_scale": torch.zeros(3, 1)}, r"log_scale must have shape \[3\], one value per channel; got \[3, 1\]"),
        ({"bias": torch.zeros(3).double()}, "bias must be torch.float32 on cpu; got torch.float64 on cpu"),
        ({"keep": "both"}, "keep must be 'input' or 'output'; got 'both'"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"x": torch.zeros(2, 3, 4), "shift": torch.zeros(3), "log_scale": torch.zeros(3), "bias": torch.zeros(3)}
    with pytest.raises(ValueError, match=message):
        channel_affine(**(arguments | change))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape", [(40,), (12, 8, 8)])
def test_error_in_float32_is_that_of_eager_float32(shape, inverse):
    assert_as_exact_as_eager(example(*shape, inverse=inverse)(3000, torch.float32))
