"""The CUDA gradient of the inverse without a GPU: its kernels, run on a CPU, against the CPU op and autograd in float64."""

import itertools

import pytest
import torch

from flowkernels.ops import Activation, Conditioner, Form, ScaleMap
from flowkernels.ops.autoregressive.mirror import mirrored_layers
from flowkernels.ops.autoregressive.training import CUDA_LAYERS
from python_tests.battery import assert_same_bits
from python_tests.cuda import emulated
from python_tests.cuda.emulated import H200, ONE, TIGHT, Order, needs_emulator, run_on
from python_tests.ops.test_autoregressive import FORMS, GATED, RESIDUAL, SCALES, SHARED, Part, TestAutoregressive, example, widened
from python_tests.ops.test_autoregressive_schedule import LAYOUTS

# the loop adds nothing to the gradients by features that several layers read
CASES = {name: case for name, case in TestAutoregressive.cases.items() if name.endswith("inverse") and name != "wired inverse"}
del TestAutoregressive  # or it would be collected here once more

pytestmark = needs_emulator


def arguments(made, seed=3):
    """Of autoregressive_inverse_backward, with x = f^-1(z) and cotangents of its own."""
    _z, context, *network_and_map, _ = made.schema(made.rows, made.parameters)
    with torch.no_grad():
        x = torch.ops.flowkernels.autoregressive(*made.schema(made.rows, made.parameters))[0]
    g = torch.Generator().manual_seed(seed)
    dx, dlogabsdet = (torch.randn(shape, generator=g, dtype=x.dtype) for shape in (x.shape, x.shape[:1]))
    return dx, dlogabsdet, x, context, *network_and_map


def by_kernels(arguments, layout):
    """In a layout of the loop's twin."""
    rows, capacity, consumers, producers, panel, backwards, elements, apart, without_registers = layout
    order = Order.BACKWARDS if backwards else Order.FORWARDS
    run_on(H200, order, layout=(rows, capacity, consumers, producers, panel, elements, apart, without_registers))
    return emulated.ops.autoregressive_inverse_backward(*arguments)


def by_rule(arguments, device, order):
    run_on(device, order)
    return emulated.ops.autoregressive_inverse_backward(*arguments)


def by_cpu(arguments):
    return torch.ops.flowkernels.autoregressive_inverse_backward(*arguments)


def assert_is_the_cpus(made, layout, dtype=torch.float64):
    a = arguments(made)
    got = by_kernels(a, layout)
    exact = by_cpu([t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else _doubled(t) for t in a])
    tolerance = 1e-10 if dtype is torch.float64 else 1e-3
    torch.testing.assert_close(list(got), [t.to(dtype) for t in exact], rtol=tolerance, atol=tolerance)
    return got


def _doubled(value):
    return [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in value] if isinstance(value, list) else value


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_network_of_the_battery(case, dtype):
    for batch, panel, elements in ((1, 0, 0), (19, 0, 0), (5, 1, 2048), (5, 2, 60), (5, 2, 2048), (5, 16, 4096)):
        made = CASES[case](batch, dtype)
        first, *others = (
            assert_is_the_cpus(made, (*layout[:4], panel, layout[5], elements, 0, layout[8]), dtype) for layout in LAYOUTS[:3]
        )
        for other in others:  # rows, slots and threads change no bit
            assert_same_bits(other, first)


def test_small_sizes_exhaustively():
    for features, width, layers, rule in itertools.product((1, 2, 3, 6), (1, 9), (0, 1, 2), ("even", "random")):
        made = example(features, (width,) * layers, rule=rule, context=features % 3, activation="tanh", inverse=True)(3, torch.float64)
        for panel, backwards, elements in ((1, 0, 100), (2, 1, 4096), (2, 1, 100), (4, 0, 4096)):
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


@pytest.mark.parametrize(("features", "widths", "context"), [(40, (150, 130), 0), (20, (200,), 30), (70, (64, 64), 5), (9, (12,), 0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_layouts_by_the_rule(features, widths, context, dtype):
    """Whatever the device, and where the state does not fit shared memory."""
    a = arguments(example(features, widths, context=context, inverse=True)(37, dtype))
    first, *others = (
        by_rule(a, device, order) for device, order in ((H200, Order.SHUFFLED), (ONE, Order.FORWARDS), (TIGHT, Order.BACKWARDS))
    )
    tolerance = 1e-10 if dtype is torch.float64 else 1e-3
    torch.testing.assert_close(list(first), list(by_cpu(a)), rtol=tolerance, atol=tolerance)
    for other in others:
        assert_same_bits(other[:2], first[:2])  # the parameters' are sums over the batch, whose shares a device chooses


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
    got = by_kernels(a, LAYOUTS[0])
    weights, biases, context_weights = (others[i::3] for i in range(3))  # a layer's are drawn weight, bias, context weight
    torch.testing.assert_close(list(got), [dz, dcontext, *weights, *biases, *context_weights], rtol=1e-9, atol=1e-10)


def test_row_alone_and_strides():
    for parts in ((9, 7), RESIDUAL, GATED):
        made = example(6, parts, context=2, order=[3, 1, 4, 0, 5, 2], inverse=True)(21, torch.float32)
        dx, dlogabsdet, x, context, weights, *rest = arguments(made)
        rows = (dx, dlogabsdet, x, context)
        whole = by_kernels((*rows, weights, *rest), LAYOUTS[2])
        strided = [torch.stack([t, t], -1)[..., 0] for t in rows]
        wide = [torch.cat([w, w], 1)[:, : w.shape[1]] if w.dim() == 2 else w for w in weights]
        assert_same_bits(by_kernels((*strided, wide, *rest), LAYOUTS[1]), whole)
        for begin, end in [(0, 1), (3, 5), (7, 10), (10, 21)]:
            part = by_kernels((*(t[begin:end] for t in rows), weights, *rest), LAYOUTS[0])
            assert_same_bits(part[:2], tuple(t[begin:end] for t in whole[:2]))


def test_a_bad_row_stays_alone():
    made = example(5, (12, 9), inverse=True)(6, torch.float32)
    a = list(arguments(made))
    clean = by_kernels(a, LAYOUTS[1])[0]
    a[0] = a[0].clone()
    a[0][1, 3] = torch.inf
    got = by_kernels(a, LAYOUTS[1])[0]
    keep = [0, 2, 3, 4, 5]
    assert torch.equal(got[keep], clean[keep]) and not got[1, :4].isfinite().all() and torch.equal(got[1, 4:], clean[1, 4:])


def test_a_network_that_is_not_autoregressive_gives_nan():
    visible = [torch.tensor([0, 0, 2, 2, 2, 2], dtype=torch.int32)]
    rows = (torch.ones(2, 3), torch.ones(2), torch.ones(2, 3), None)
    network = ([torch.ones(3, 6)], [torch.ones(6)], [], [], visible, None, [0], [])
    for layout in LAYOUTS:
        dz, _, dweight, _ = by_kernels((*rows, *network, 0, 0.0, 0.0, int(Form.GATE)), layout)
        assert dz[:, 2].isfinite().all() and dz[:, :2].isnan().all() and dweight[:2, 2:].isnan().all()


# what the mirrored loop makes of values that several layers read or add, before and behind activations, gates and factors
TANGLED = [
    *SHARED,
    Part(5, "tanh", source=5, residual=6, unitwise="affine"),
    Part(5, "silu", source=7, unitwise="read"),
    Part(5, source=8, residual=7),
    Part(5, "softplus", source=9, unitwise="read", residual=9),
    Part(0, source=10),
]
DEEP = [Part(7, context="add")]
for block in range(3):
    h = 3 * block + 1
    DEEP += [
        Part(7, "silu", source=h, unitwise="affine" if block == 1 else "read"),
        Part(7, "elu", source=h + 1),
        Part(7, source=h + 2, residual=h),
    ]
DEEP.append(Part(0))


@pytest.mark.parametrize("parts", [TANGLED, DEEP, widened(DEEP, 40)], ids=["shared", "deep", "deep and wide"])
def test_wired_networks(parts):
    made = example(6, parts, context=2, order=[3, 1, 4, 0, 5, 2], inverse=True)
    for panel, elements in ((0, 0), (1, 2048), (2, 60), (16, 4096)):
        for layout in LAYOUTS:
            assert_is_the_cpus(made(9, torch.float64), (*layout[:4], panel, layout[5], elements, 0, layout[8]))
    wider = example(30, widened(parts, 50), context=2, inverse=True)(9, torch.float64)
    assert_is_the_cpus(wider, LAYOUTS[0])


def network_of(a):
    return Conditioner(a[4], a[5], a[8], a[10], a[6], a[9], a[11], a[7])


@pytest.mark.parametrize(
    ("parts", "refusal"),
    [
        ([Part(5, "tanh"), Part(5, "tanh", source=0, residual=1), Part(0)], "the features must be read by one masked layer"),
        ([Part(4, "tanh", unitwise="affine"), Part(5), Part(0)], "the features must be read by one masked layer"),
        ([Part(5, "tanh"), Part(5, "tanh"), Part(0, source=1)], "every layer must be read"),
    ],
)
def test_networks_that_are_not_mirrored(parts, refusal):
    a = arguments(example(4, parts, inverse=True)(2, torch.float64))
    assert mirrored_layers(network_of(a)) is None
    with pytest.raises(RuntimeError, match=refusal):
        by_kernels(a, LAYOUTS[0])


def test_layers_are_counted_as_the_kernel_has_them():
    """On both sides of what it takes: networks that end in more and more plain layers."""
    met = set()
    for parts, context in ((TANGLED, 2), (DEEP, 2), (RESIDUAL, 2), (GATED, 2), ([Part(5, "tanh"), Part(0)], 0), ("by turns", 0)):
        for more in range(32):
            tail = [Part(5, "tanh")] * more
            if parts == "by turns":  # without a wiring
                tail = ([Part(5, "tanh"), Part(5, "silu", unitwise="affine")] * more)[:more]
            a = arguments(
                example(3, [*(parts[:-1] if parts != "by turns" else []), *tail, Part(0)], context=context, inverse=True)(1, torch.float64)
            )
            layers = mirrored_layers(network_of(a))
            if len(a[4]) > CUDA_LAYERS or not CUDA_LAYERS - 1 <= layers <= CUDA_LAYERS + 2:
                continue
            met.add(layers)
            try:
                by_kernels(a, LAYOUTS[0])
            except RuntimeError as error:
                assert layers > CUDA_LAYERS and "more layers" in str(error)
            else:
                assert layers <= CUDA_LAYERS
    assert {CUDA_LAYERS, CUDA_LAYERS + 1} <= met


def _on_gpu(value):
    return value.cuda() if isinstance(value, torch.Tensor) else [_on_gpu(v) for v in value] if isinstance(value, list) else value


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_gpu_has_the_cpus_gradient(case):
    for batch, dtype in itertools.product((0, 1, 37, 3000), (torch.float64, torch.float32)):
        made = CASES[case](batch, dtype)
        a = arguments(made)
        got = torch.ops.flowkernels.autoregressive_inverse_backward(*map(_on_gpu, a))
        tolerance = 1e-9 if dtype is torch.float64 else 2e-3
        torch.testing.assert_close([t.cpu() for t in got], list(by_cpu(a)), rtol=tolerance, atol=tolerance)
        again = torch.ops.flowkernels.autoregressive_inverse_backward(*map(_on_gpu, a))
        assert_same_bits(again[:1], got[:1])
