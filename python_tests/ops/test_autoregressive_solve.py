"""The CUDA gradient of the inverse without a GPU: its products around the loop's twin, against the CPU op and autograd in float64."""

import itertools

import pytest
import torch

from flowkernels import _extension
from flowkernels.ops import Activation, Form, ScaleMap
from python_tests.battery import assert_same_bits
from python_tests.ops.test_autoregressive import FORMS, SCALES, TestAutoregressive, example
from python_tests.ops.test_autoregressive_schedule import LAYOUTS

PLAIN = {name: case for name, case in TestAutoregressive.cases.items() if name.endswith("inverse")}
for other in ("residual", "gated", "wired"):
    del PLAIN[f"{other} inverse"]
del TestAutoregressive  # or it would be collected here once more

pytestmark = pytest.mark.skipif(not _extension.status().cpu_library, reason="the CPU library was not built")


def arguments(made, seed=3):
    """Of autoregressive_inverse_backward, with x = f^-1(z) and cotangents of its own."""
    _z, context, *network_and_map, _ = made.schema(made.rows, made.parameters)
    with torch.no_grad():
        x = torch.ops.flowkernels.autoregressive(*made.schema(made.rows, made.parameters))[0]
    g = torch.Generator().manual_seed(seed)
    dx, dlogabsdet = (torch.randn(shape, generator=g, dtype=x.dtype) for shape in (x.shape, x.shape[:1]))
    return dx, dlogabsdet, x, context, *network_and_map


def by_twin(arguments, layout):
    return torch.ops.flowkernels._autoregressive_inverse_backward_twin(*arguments, list(layout), [132, layout[5], 0])


def by_cpu(arguments):
    return torch.ops.flowkernels.autoregressive_inverse_backward(*arguments)


def assert_is_the_cpus(made, layout, dtype=torch.float64):
    a = arguments(made)
    got = by_twin(a, layout)
    exact = by_cpu([t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else _doubled(t) for t in a])
    tolerance = 1e-10 if dtype is torch.float64 else 1e-3
    torch.testing.assert_close(list(got), [t.to(dtype) for t in exact], rtol=tolerance, atol=tolerance)
    return got


def _doubled(value):
    return [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in value] if isinstance(value, list) else value


@pytest.mark.parametrize("case", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_plain_network_of_the_battery(case, dtype):
    for batch in (1, 19):
        made = PLAIN[case](batch, dtype)
        for panel, elements in ((0, 0), (1, 2048), (2, 60), (2, 2048), (16, 4096)):
            first, *others = (
                assert_is_the_cpus(made, (*layout[:4], panel, layout[5], elements, 0, layout[8]), dtype) for layout in LAYOUTS
            )
            for other in others:  # rows, slots and threads change no bit
                assert_same_bits(other, first)


def test_small_sizes_exhaustively():
    for features, width, layers, rule in itertools.product(range(1, 7), (1, 2, 9), (0, 1, 2), ("even", "random")):
        made = example(features, (width,) * layers, rule=rule, context=features % 3, activation="tanh", inverse=True)(3, torch.float64)
        for panel, backwards, elements in itertools.product((1, 2, 4), (0, 1), (100, 4096)):
            assert_is_the_cpus(made, (4, 256, 1, 1, panel, backwards, elements, 0, backwards))


@pytest.mark.parametrize(("features", "widths", "context"), [(40, (300, 520), 0), (20, (600,), 30), (70, (64, 64), 5), (30, (), 0)])
def test_sizes_beyond_a_block(features, widths, context):
    made = example(features, widths, context=context, activation="tanh", inverse=True)(2, torch.float32)
    first, *others = (
        assert_is_the_cpus(made, (4, capacity, 2, 1, 4, backwards, 500, 0, backwards), torch.float32)
        for capacity, backwards in [(8192, 0), (1024, 1), (1028, 0)]
    )
    for other in others:
        assert_same_bits(other, first)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [*SCALES, ScaleMap.exp_half(0.1)], ids=repr)
def test_maps_and_forms(scale, form):
    assert_is_the_cpus(example(4, (11, 8), scale=scale, form=form, inverse=True)(9, torch.float64), LAYOUTS[0])


@pytest.mark.parametrize("activation", Activation, ids=lambda a: a.name)
def test_activations(activation):
    assert_is_the_cpus(example(4, (11, 8), activation=activation.name.lower(), context=2, inverse=True)(9, torch.float64), LAYOUTS[1])


def test_against_autograd_through_the_d_passes():
    made = example(5, (12, 9), context=2, order=[3, 1, 4, 0, 2], activation="silu", inverse=True)(6, torch.float64)
    a = arguments(made)
    inputs = [t.requires_grad_() for t in (*made.rows, *made.parameters)]
    outputs = made.oracle(inputs[:2], inputs[2:])
    dz, dcontext, *others = torch.autograd.grad(outputs, inputs, a[:2])
    got = by_twin(a, LAYOUTS[0])
    weights, biases, context_weights = (others[i::3] for i in range(3))  # a layer's are drawn weight, bias, context weight
    torch.testing.assert_close(list(got), [dz, dcontext, *weights, *biases, *context_weights], rtol=1e-9, atol=1e-10)


def test_row_alone_and_strides():
    made = example(6, (9, 7), order=[3, 1, 4, 0, 5, 2], inverse=True)(21, torch.float32)
    a = arguments(made)
    twin = lambda a, layout: torch.ops.flowkernels._autoregressive_solve_twin(*a, list(layout))
    dx, dlogabsdet, x, _, weights, _, _, _, visible, order, activations, _, *scale_and_form = a
    columns = sum(len(v) for v in visible)
    values = torch.randn(21, columns, generator=torch.Generator().manual_seed(0))
    rows, rest = (dx, dlogabsdet, x, values), (weights, visible, order, activations, *scale_and_form)
    whole = twin((*rows, *rest), LAYOUTS[2])
    assert whole[1].shape == (21, columns)
    strided = [torch.stack([t, t], -1)[..., 0] for t in rows]
    wide = [torch.cat([w, w], 1)[:, : w.shape[1]] for w in weights]
    assert_same_bits(twin((*strided, wide, *rest[1:]), LAYOUTS[1]), whole)
    for begin, end in [(0, 1), (3, 5), (7, 10), (10, 21)]:
        assert_same_bits(twin((*(t[begin:end] for t in rows), *rest), LAYOUTS[0]), tuple(t[begin:end] for t in whole))


def test_a_bad_row_stays_alone():
    made = example(5, (12, 9), inverse=True)(6, torch.float32)
    a = list(arguments(made))
    clean = by_twin(a, LAYOUTS[1])[0]
    a[0] = a[0].clone()
    a[0][1, 3] = torch.inf
    got = by_twin(a, LAYOUTS[1])[0]
    keep = [0, 2, 3, 4, 5]
    assert torch.equal(got[keep], clean[keep]) and not got[1, :4].isfinite().all() and torch.equal(got[1, 4:], clean[1, 4:])


def test_a_network_that_is_not_autoregressive_gives_nan():
    visible = [torch.tensor([0, 0, 2, 2, 2, 2], dtype=torch.int32)]
    a = (
        torch.ones(2, 3),
        torch.ones(2),
        torch.ones(2, 3),
        torch.ones(2, 6),
        [torch.ones(3, 6)],
        visible,
        None,
        [0],
        0,
        0.0,
        0.0,
        int(Form.GATE),
    )
    for layout in LAYOUTS:
        dz, deltas = torch.ops.flowkernels._autoregressive_solve_twin(*a, list(layout))
        assert dz[:, 2].isfinite().all() and dz[:, :2].isnan().all() and deltas.isnan().all()


def _on_gpu(value):
    return value.cuda() if isinstance(value, torch.Tensor) else [_on_gpu(v) for v in value] if isinstance(value, list) else value


@pytest.mark.gpu
@pytest.mark.parametrize("case", PLAIN)
def test_gpu_has_the_cpus_gradient(case):
    for batch, dtype in itertools.product((0, 1, 37, 3000), (torch.float64, torch.float32)):
        made = PLAIN[case](batch, dtype)
        a = arguments(made)
        got = torch.ops.flowkernels.autoregressive_inverse_backward(*map(_on_gpu, a))
        tolerance = 1e-9 if dtype is torch.float64 else 2e-3
        torch.testing.assert_close([t.cpu() for t in got], list(by_cpu(a)), rtol=tolerance, atol=tolerance)
        again = torch.ops.flowkernels.autoregressive_inverse_backward(*map(_on_gpu, a))
        assert_same_bits(again[:1], got[:1])
