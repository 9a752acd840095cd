import itertools

import pytest
import torch

from flowkernels import backend
from flowkernels.ops import channel_affine
from flowkernels.ops.channel_affine.reference import channel_affine_reference
from python_tests.battery import Example, OpBattery
from python_tests.triton.device import assert_rounded, randn
from python_tests.triton.test_coupling import LAYOUTS


def inputs(shape, dtype=torch.float64):
    """x, shift, log_scale, bias."""
    wide = torch.promote_types(dtype, torch.float32)
    return [*randn(shape, dtype=dtype), *randn(*[shape[1:2]] * 3, dtype=wide, seed=1)]


def run(x, shift, log_scale, bias, **options):
    tensors = [None if t is None else t.detach().requires_grad_() for t in (x, shift, log_scale, bias)]
    y, logabsdet = channel_affine(*tensors[:3], bias=tensors[3], **options)
    outputs = [t for t in (y, logabsdet) if t.requires_grad]
    weights = [(torch.arange(t.numel(), device=t.device) % 5 - 2).view_as(t).to(t.dtype) for t in outputs]  # exact in every dtype
    return y.detach(), logabsdet.detach(), *torch.autograd.grad(outputs, [t for t in tensors if t is not None], weights)


def assert_equals_reference(tensors, **options):
    got = run(*tensors, **options)
    with backend("reference"):
        want = run(*tensors, **options)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-11)


def example(*shape, inverse=False):
    def make(batch, dtype):
        x, *parameters = inputs((batch, *shape), dtype)
        return Example(
            [x],
            parameters,
            lambda rows, p: channel_affine(rows[0], p[0], p[1], bias=p[2], inverse=inverse),
            lambda rows, p: channel_affine_reference(rows[0], *p, inverse),
            lambda rows, p: (rows[0], *p, inverse),
            transform=True,
        )

    return make


class TestChannelAffine(OpBattery):
    bare_op = torch.ops.flowkernels.channel_affine.default
    cases = {"images, inverse": example(3, 1, 4, inverse=True)}


# a tile has 1024 elements, and parameters are summed 32 tiles at a time
@pytest.mark.parametrize(
    "shape", [(3, 5), (600, 8), (2, 1500), (2, 3, 33, 65), (33, 1, 1024), (2, 40, 5), (2, 5, 2, 3, 4), (0, 4)], ids=str
)
def test_sizes_beyond_a_tile(shape):
    assert_equals_reference(inputs(shape))
    assert_equals_reference(inputs(shape), inverse=True, keep="output")


def test_many_tiles_are_added_up_by_torch(monkeypatch):
    from flowkernels.ops.channel_affine import kernels

    monkeypatch.setattr(kernels, "_MOST_PARTS", 2)
    assert_equals_reference(inputs((2, 3, 33, 65)))
    assert_equals_reference(inputs((600, 8)), inverse=True, keep="output")


@pytest.mark.parametrize("without", [(1,), (3,), (1, 3)])
def test_without_a_shift_or_bias(without):
    tensors = [None if i in without else t for i, t in enumerate(inputs((3, 4, 2)))]
    for inverse, keep in itertools.product([False, True], ["input", "output"]):
        assert_equals_reference(tensors, inverse=inverse, keep=keep)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 2, 5), (2, 3, 2, 3, 4)], ids=str)
def test_layouts(layout, shape):
    if len(shape) == 2 and layout == "transposed sites":
        pytest.skip("vectors have no sites")
    x, *parameters = inputs(shape)
    assert_equals_reference([LAYOUTS[layout](x), *(p[:1].expand_as(p) for p in parameters)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_float32_rounded_once(dtype):
    x, *parameters = inputs((3, 4, 2, 3), dtype)
    got, want = run(x, *parameters), run(x.float(), *parameters)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == dtype or torch.equal(g, w)
        assert_rounded(g, w)
