import pytest
import torch

from flowkernels import backend
from flowkernels._extension import has_kernel
from flowkernels.ops import masked_linear
from flowkernels.ops.masked_linear.reference import masked_linear_dense, masked_linear_reference, sees_all
from python_tests.battery import Example, OpBattery, assert_as_exact_as_eager, assert_same_bits


def loop(x, weight, bias, visible):
    """y[:, j] from the definition, a column at a time, seeing nothing that it should not."""
    columns = [x[:, :seen] @ weight[:seen, j] + bias[j] for j, seen in enumerate(visible.tolist())]
    return torch.stack(columns, dim=-1) if columns else x.new_zeros(len(x), 0)


def example(inputs, visible):
    visible = torch.tensor(visible, dtype=torch.int32)

    def make(batch, dtype):
        g = torch.Generator().manual_seed(1)
        x, weight, bias = (torch.randn(s, generator=g, dtype=dtype) for s in ((batch, inputs), (inputs, len(visible)), (len(visible),)))
        return Example(
            [x],
            [weight, bias],
            lambda rows, p: (masked_linear(rows[0], *p, visible),),
            lambda rows, p: (loop(rows[0], *p, visible),),
            lambda rows, p: (rows[0], *p, visible),
        )

    return make


class TestMaskedLinear(OpBattery):
    bare_op = torch.ops.flowkernels.masked_linear.default
    row_bits = has_kernel("masked_linear", "CPU")  # the reference is a BLAS product
    cases = {
        "square": example(6, [1, 1, 2, 3, 5, 6]),
        "sees nothing at first": example(3, [0, 0, 1, 3, 3]),
        "one input": example(1, [0, 1]),
        "one output": example(5, [3]),
        "several panels and chunks": example(
            300, sorted(torch.randint(0, 301, (61,), generator=torch.Generator().manual_seed(3)).tolist())
        ),
    }


@pytest.mark.parametrize(("inputs", "outputs"), [(2100, 70), (70, 2100), (2304, 2049)])
def test_more_terms_than_a_task_takes_through_all_panels(inputs, outputs):
    g = torch.Generator().manual_seed(4)
    visible = torch.randint(0, inputs + 1, (outputs,), generator=g).sort().values.int()
    x, weight, dy = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((11, inputs), (inputs, outputs), (11, outputs)))
    mask = torch.arange(inputs)[:, None] < visible
    x.requires_grad_()
    weight.requires_grad_()
    y = masked_linear(x, weight, None, visible)
    dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    torch.testing.assert_close(y, x @ (weight * mask), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(dx, dy @ (weight * mask).T, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(dweight, x.T @ dy * mask, rtol=1e-10, atol=1e-10)


def test_an_unseen_infinity_does_not_reach_an_output():
    visible = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    x, weight, bias = torch.ones(2, 3), torch.ones(3, 4), torch.zeros(4)
    x[0, 1] = torch.inf
    weight[2, 1] = torch.nan
    y = masked_linear(x, weight, bias, visible)
    assert y[0, :2].tolist() == [0, 1] and not y[0, 2:].isfinite().any() and y[1].tolist() == [0, 1, 2, 3]


def test_an_unseen_infinity_does_not_reach_a_gradient():
    visible = torch.tensor([0, 1, 2], dtype=torch.int32)
    x, weight = torch.ones(2, 2, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    cotangent = torch.ones(2, 3)
    cotangent[0, 1] = torch.inf
    dx, dweight = torch.autograd.grad(masked_linear(x, weight, None, visible), (x, weight), cotangent)
    assert not dx[0, 0].isfinite() and dx[0, 1] == 1 and dx[1].tolist() == [2, 1]
    assert dweight[1].tolist() == [0, 0, 2] and not dweight[0, 1].isfinite()


def test_gradient_outside_the_staircase_is_zero():
    visible = torch.tensor([0, 2, 3], dtype=torch.int32)
    weight = torch.randn(3, 3, requires_grad=True)
    masked_linear(torch.randn(4, 3), weight, None, visible).square().sum().backward()
    assert weight.grad[:, 0].eq(0).all() and weight.grad[2, 1] == 0 and weight.grad[:2, 1].ne(0).all()


@pytest.mark.parametrize(("inputs", "outputs"), [(0, 2), (2, 0), (0, 0)])
@pytest.mark.parametrize("leading", [(3,), (2, 3)])
def test_no_inputs_or_no_outputs(inputs, outputs, leading):
    x, weight, bias = torch.randn(*leading, inputs), torch.randn(inputs, outputs), torch.randn(outputs)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = masked_linear(*leaves, torch.full((outputs,), inputs, dtype=torch.int32))
    assert torch.equal(y, bias.expand(*leading, outputs))
    dx, dweight, dbias = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert torch.equal(dx, torch.zeros_like(x)) and dweight.shape == weight.shape
    assert torch.equal(dbias, torch.full((outputs,), float(x[..., :0].flatten(0, -2).shape[0])))


def test_leading_dimensions():
    visible = torch.tensor([1, 2], dtype=torch.int32)
    x, weight = torch.randn(2, 3, 2), torch.randn(2, 2)
    y = masked_linear(x, weight, None, visible)
    torch.testing.assert_close(y, masked_linear(x.view(6, 2), weight, None, visible).view(2, 3, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["auto", "reference"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_half_precision_is_float32_rounded_once(dtype, name, with_bias):
    g = torch.Generator().manual_seed(0)
    visible = torch.tensor([0, 2, 2, 7, 30], dtype=torch.int32)
    x, weight, bias, dy = (torch.randn(s, generator=g).to(dtype) for s in ((2, 9, 30), (30, 5), (5,), (2, 9, 5)))
    inputs = [x, weight, bias] if with_bias else [x, weight]

    def run(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        y = masked_linear(*leaves, *([] if with_bias else [None]), visible)
        with torch.no_grad():
            assert torch.equal(masked_linear(*leaves, *([] if with_bias else [None]), visible), y)
        return y, *torch.autograd.grad(y, leaves, dy.to(dtype))

    with backend(name):
        halves, singles = run(dtype), run(torch.float32)
    for number, (got, want) in enumerate(zip(halves, singles, strict=True)):
        assert got.dtype == dtype
        if name == "auto" or number == 0:
            assert torch.equal(got, want.to(dtype))
        else:  # torch's own half product rounds once too, of a sum in another order
            torch.testing.assert_close(got.float(), want, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.skipif(not has_kernel("masked_linear", "CPU"), reason="the reference reads no staircase on the way")
@pytest.mark.parametrize("visible", [[1, 0, 2], [0, 1, 4], [-1, 0, 1]])
def test_a_bad_staircase_does_not_reach_memory(visible):
    visible = torch.tensor(visible, dtype=torch.int32)
    x, weight, dy = torch.zeros(2, 3), torch.zeros(3, 3), torch.zeros(2, 3)
    ops = torch.ops.flowkernels
    with pytest.raises(ValueError, match=rf"visible must ascend from 0 to at most 3; got \[{', '.join(map(str, visible.tolist()))}\]"):
        masked_linear(x, weight, None, visible)
    for call in (
        lambda: ops.masked_linear.default(x, weight, None, visible),
        lambda: ops.masked_linear_dx(dy, weight, visible),
        lambda: ops.masked_linear_dweight(x, dy, visible),
    ):
        with pytest.raises(RuntimeError, match="visible must ascend from 0 to the number of inputs"):
            call()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4)}, r"x must have shape \[\*, 3\] for a weight \[3, 2\]; got \[2, 4\]"),
        ({"x": torch.zeros(2, 3).long()}, "x must be float64, float32, float16 or bfloat16; got torch.int64"),
        ({"x": torch.zeros(2, 3).half()}, "weight must be torch.float16 on cpu, like x; got torch.float32 on cpu"),
        ({"weight": torch.zeros(3, 2).double()}, "weight must be torch.float32 on cpu, like x; got torch.float64"),
        ({"weight": torch.zeros(3, 2, device="meta")}, "weight must be torch.float32 on cpu, like x; got torch.float32 on meta"),
        ({"bias": torch.zeros(2).bfloat16()}, "bias must be torch.float32 on cpu, like x; got torch.bfloat16"),
        ({"visible": torch.zeros(2, dtype=torch.int32, device="meta")}, "visible must be on cpu, like x; got meta"),
        ({"bias": torch.zeros(3)}, r"bias must have shape \[2\], one value per output; got \[3\]"),
        ({"visible": torch.zeros(3, dtype=torch.int32)}, r"visible must be int32 \[2\], one count per output; got torch.int32 \[3\]"),
        ({"visible": torch.zeros(2)}, r"visible must be int32 \[2\], one count per output; got torch.float32 \[2\]"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    args = {"x": torch.zeros(2, 3), "weight": torch.zeros(3, 2), "bias": torch.zeros(2), "visible": torch.zeros(2, dtype=torch.int32)}
    with pytest.raises(ValueError, match=message):
        masked_linear(**(args | change))


def test_error_in_float32_is_that_of_eager_float32():
    """Eager is a product with a masked weight: the loop's products with vectors have several sums at once, and a smaller error."""
    ours = example(300, torch.arange(1, 301).tolist())(2000, torch.float32)
    mask = torch.ones(300, 300).triu()
    assert_as_exact_as_eager(ours._replace(oracle=lambda rows, p: (torch.addmm(p[1], rows[0], p[0] * mask),)))


@pytest.mark.skipif(not has_kernel("masked_linear", "CPU"), reason="a BLAS product has other bits for other batches")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (3, 9), (20, 17), (300, 61), (50, 1700), (1030, 40)])
def test_few_rows_have_the_bits_of_many(inputs, outputs, dtype):
    """Few go through weights as they lie, many through packed panels."""
    g = torch.Generator().manual_seed(5)
    x, weight = (torch.randn(shape, generator=g, dtype=dtype) for shape in ((40, inputs), (inputs, outputs)))
    bias = torch.randn(outputs, generator=g, dtype=dtype)
    x[1, inputs // 2] = torch.inf
    x[2, -1] = torch.nan
    ramp = torch.linspace(0, inputs, outputs).int()
    for visible in (ramp, ramp // 2, torch.randint(0, inputs + 1, (outputs,), generator=g).sort().values.int(), torch.zeros_like(ramp)):
        for given in (bias, None):
            many = masked_linear(x, weight, given, visible)
            for rows in range(1, 9):
                assert_same_bits(masked_linear(x[:rows], weight, given, visible), many[:rows])
                assert_same_bits(masked_linear(x[5 : 5 + rows, :], weight.mT.contiguous().mT, given, visible), many[5 : 5 + rows])


def test_one_row_without_a_batch():
    x, weight, bias, visible = torch.randn(3), torch.randn(3, 4), torch.randn(4), torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    y = masked_linear(x, weight, bias, visible)
    assert y.shape == (4,) and torch.equal(y, masked_linear(x[None], weight, bias, visible)[0])


@pytest.mark.parametrize("visible", [[0, 2, 2, 3], [3, 3, 3, 3], [0, 0, 0, 0]])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_the_dense_product_is_the_map(visible, rows):
    visible = torch.tensor(visible, dtype=torch.int32)
    x, weight, bias = torch.randn(rows, 3, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    weight[torch.arange(3)[:, None] >= visible] = float("nan")  # what nobody sees
    for b in (None, bias):
        torch.testing.assert_close(masked_linear_dense(x, weight, b, visible), masked_linear_reference(x, weight, b, visible))
    assert sees_all(visible, 3) == bool((visible == 3).all())
    assert masked_linear_dense(x[:, :0], weight[:0], bias, visible.clamp(max=0)).equal(bias.expand(rows, 4))
