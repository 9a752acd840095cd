import importlib

import pytest
import torch

from flowkernels.ops import masked_linear
from flowkernels.ops.masked_linear import _dweight, _dx
from flowkernels.ops.masked_linear.reference import (
    masked_linear_dweight_reference,
    masked_linear_dx_reference,
    masked_linear_reference,
)
from python_tests.battery import Example, OpBattery
from python_tests.triton.device import DEVICE, GPU, randn

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, in the interpreter


def staircase(inputs, outputs, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, inputs + 1, (outputs,), generator=g).sort().values.to(DEVICE, torch.int32)


def tensors(batch, inputs, outputs, dtype):
    return randn((batch, inputs), (inputs, outputs), (outputs,), (batch, outputs), dtype=dtype)


def example(inputs, outputs):
    visible = staircase(inputs, outputs)

    def make(batch, dtype):
        x, weight, bias, _ = tensors(batch, inputs, outputs, dtype)
        return Example(
            [x],
            [weight, bias],
            lambda rows, p: (masked_linear(rows[0], *p, visible),),
            lambda rows, p: (masked_linear_reference(rows[0], *p, visible),),
            lambda rows, p: (rows[0], *p, visible),
        )

    return make


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    module = importlib.import_module("flowkernels.ops.masked_linear.kernels")  # the name `ops.masked_linear` is the function
    if not GPU:  # small matrices have many tiles then; test_resources.py compiles the tiles of every day
        monkeypatch.setattr(module, "_TILES", dict.fromkeys(module._TILES, ((16, 16, 16, 4), (32, 32, 16, 4))))
    return module


class TestMaskedLinear(OpBattery):
    bare_op = torch.ops.flowkernels.masked_linear.default
    row_bits = GPU  # the interpreter multiplies tiles with BLAS
    cases = {"several tiles": example(20, 18)}


# at, beside and beyond the edges of tiles, which are 16 wide here, or 32 where both sides of the weight are 128 or more
SHAPES = [(1, 1, 1), (17, 36, 15), (3, 16, 50), (50, 5, 33), (2, 130, 128), (37, 0, 3), (4, 3, 0), (0, 3, 4)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("batch", "inputs", "outputs"), SHAPES)
def test_equals_float64(batch, inputs, outputs, dtype):
    x, weight, bias, dy = tensors(batch, inputs, outputs, dtype)
    visible = staircase(inputs, outputs)
    exact = [t.double() for t in (x, weight, bias, dy)]
    with torch.no_grad():
        got = masked_linear(x, weight, bias, visible), _dx(dy, weight, visible), _dweight(x, dy, visible)
    want = (
        masked_linear_reference(*exact[:3], visible),
        masked_linear_dx_reference(exact[3], exact[1], visible),
        masked_linear_dweight_reference(exact[0], exact[3], visible),
    )
    # the interpreter truncates to bfloat16, the GPU rounds
    unit = torch.finfo(dtype).eps * (2 if dtype == torch.bfloat16 else 1)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == dtype and g.shape == w.shape and g.isfinite().all()
        if w.numel():
            error = (g - w).abs()
            assert (error <= 0.51 * unit * w.abs() + 8 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * w.abs().max()).all()


@pytest.mark.parametrize("counts", [[0, 0, 0], [4, 4, 4], [0, 4, 4], [0, 0, 4]], ids=str)
def test_flat_staircases(counts):
    visible = torch.tensor(counts, dtype=torch.int32, device=DEVICE)
    x, weight, bias, dy = tensors(5, 4, 3, torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(masked_linear(x, weight, bias, visible), masked_linear_reference(x, weight, bias, visible))
        torch.testing.assert_close(_dx(dy, weight, visible), masked_linear_dx_reference(dy, weight, visible))
        torch.testing.assert_close(_dweight(x, dy, visible), masked_linear_dweight_reference(x, dy, visible))


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_seen_is_not_read_into_a_sum(bad):
    """Everything outside the staircase is spoilt, and one value of x and dy; each output says whether it saw it."""
    visible = staircase(40, 36)
    mask = torch.arange(40, device=DEVICE)[:, None] < visible
    x, weight, bias, dy = tensors(4, 40, 36, torch.float32)
    spoilt = torch.where(mask, weight, bad)
    with torch.no_grad():
        y, dx = masked_linear(x, weight, bias, visible), _dx(dy, weight, visible)
        torch.testing.assert_close(masked_linear(x, spoilt, bias, visible), y, rtol=0, atol=0)
        torch.testing.assert_close(_dx(dy, spoilt, visible), dx, rtol=0, atol=0)
        for k in (0, 17, 39):
            x_bad = x.clone()
            x_bad[2, k] = bad
            got, sees = masked_linear(x_bad, spoilt, bias, visible), visible > k
            assert not got[2, sees].isfinite().any() and torch.equal(got[2, ~sees], y[2, ~sees])
            assert torch.equal(got[[0, 1, 3]], y[[0, 1, 3]])
        for n in (0, 20, 35):
            dy_bad = dy.clone()
            dy_bad[2, n] = bad
            got, seen = _dx(dy_bad, spoilt, visible), torch.arange(40, device=DEVICE) < visible[n]
            assert not got[2, seen].isfinite().any() and torch.equal(got[2, ~seen], dx[2, ~seen])
            assert torch.equal(got[[0, 1, 3]], dx[[0, 1, 3]])
            dweight = _dweight(x, dy_bad, visible)
            assert not dweight[mask[:, n], n].isfinite().any() and dweight[~mask].eq(0).all()


def test_splits_of_the_batch_are_summed_in_order():
    visible = staircase(9, 5)
    x, _, _, dy = tensors(300, 9, 5, torch.float32)  # a program takes 8 blocks of 16 rows, on a GPU of 32
    got = _dweight(x, dy, visible)
    torch.testing.assert_close(got, masked_linear_dweight_reference(x, dy, visible), rtol=1e-5, atol=1e-5)
    assert torch.equal(got, _dweight(x, dy, visible))


def test_large_tiles_change_no_bits(kernels, monkeypatch):
    visible = staircase(50, 40)
    x, weight, bias, dy = tensors(40, 50, 40, torch.float32)
    small = masked_linear(x[:3], weight, bias, visible), _dx(dy[:3], weight, visible)
    monkeypatch.setattr(kernels, "_fills_the_gpu", lambda rows, columns: True)
    large = masked_linear(x, weight, bias, visible), _dx(dy, weight, visible)
    for s, g in zip(small, large, strict=True):
        torch.testing.assert_close(s, g[:3], rtol=0 if GPU else 1e-5, atol=0 if GPU else 1e-5)
