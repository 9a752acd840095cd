import pytest
import torch

from flowkernels._extension import has_kernel
from flowkernels.ops import masked_linear
from python_tests.battery import Example, OpBattery


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


def test_leading_dimensions():
    visible = torch.tensor([1, 2], dtype=torch.int32)
    x, weight = torch.randn(2, 3, 2), torch.randn(2, 2)
    y = masked_linear(x, weight, None, visible)
    torch.testing.assert_close(y, masked_linear(x.view(6, 2), weight, None, visible).view(2, 3, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4)}, r"x must have shape \[\*, 3\] for a weight \[3, 2\]; got \[2, 4\]"),
        ({"weight": torch.zeros(3, 2).double()}, "weight must be torch.float32 on cpu, like x; got torch.float64"),
        ({"bias": torch.zeros(3)}, r"bias must have shape \[2\], one value per output; got \[3\]"),
        ({"visible": torch.zeros(3, dtype=torch.int32)}, r"visible must be int32 \[2\], one count per output; got torch.int32 \[3\]"),
        ({"visible": torch.zeros(2)}, r"visible must be int32 \[2\], one count per output; got torch.float32 \[2\]"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    args = {"x": torch.zeros(2, 3), "weight": torch.zeros(3, 2), "bias": torch.zeros(2), "visible": torch.zeros(2, dtype=torch.int32)}
    with pytest.raises(ValueError, match=message):
        masked_linear(**(args | change))
