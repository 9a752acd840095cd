"""The CUDA training step without a GPU: its kernels, run on a CPU, against the CPU's own in float64."""

import itertools
from typing import NamedTuple

import pytest
import torch
from torch._subclasses import FakeTensorMode

from flowkernels import backend
from flowkernels.ops import Activation, Conditioner, Form
from flowkernels.ops.autoregressive import training
from flowkernels.ops.autoregressive.loop import Map
from flowkernels.ops.scale_map import ScaleMap
from python_tests.battery import assert_same_bits
from python_tests.cuda import emulated
from python_tests.cuda.emulated import H200, ONE, Device, Order, needs_emulator
from python_tests.ops.test_autoregressive import FORMS, GATED, RESIDUAL, SCALES, SHARED, WIRED, Part, TestAutoregressive, example, widened
from python_tests.ops.test_autoregressive_products import flow_with_inputs

CASES = {name: case for name, case in TestAutoregressive.cases.items() if not name.endswith("inverse")}
del TestAutoregressive  # or it would be collected here once more
pytestmark = needs_emulator

# device, in which order its threads run, bytes of deltas held together; by the first, tiles and shares of the batch are chosen
LAYOUTS = [(H200, Order.FORWARDS, 1 << 20), (ONE, Order.BACKWARDS, 0), (ONE._replace(multiprocessors=4), Order.SHUFFLED, 1 << 20)]


class Kernels(NamedTuple):
    """The two ops of a training step by the CUDA kernels, in a layout."""

    device: Device
    order: Order
    most_delta_bytes: int

    def training(self, *arguments):
        emulated.run_on(self.device, self.order, most_delta_bytes=self.most_delta_bytes)
        return emulated.ops._autoregressive_training(*arguments)

    def backward(self, *arguments):
        emulated.run_on(self.device, self.order, most_delta_bytes=self.most_delta_bytes)
        return emulated.ops._autoregressive_backward(*arguments)


LAYOUTS = [Kernels(*layout) for layout in LAYOUTS]


def map_of(made):
    x, context, *tensors, order, activations, wiring, kind, p0, p1, form, inverse = made.schema(made.rows, made.parameters)
    weights, biases, context_weights, context_biases, visible = tensors
    order = torch.arange(x.shape[1]) if order is None else order
    stages = [len(activations), len(context_weights), int(bool(context_biases)), int(bool(wiring)), kind, form, 0, int(inverse)]
    return x, context, (weights, biases, context_weights, context_biases, visible, [order], activations, wiring, stages, [p0, p1])


def stacked(n, lists):
    return tuple(part * n for part in lists)


def cotangents(x):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(x.dtype) for shape in (x.shape, x.shape[:1])]


def step(x, context, lists, need_dx=True, by=None, need_dcontext=True, need_parameters=True):
    """Outputs and gradients, by the CPU's kernels or by those for CUDA in a layout."""
    ops = torch.ops.flowkernels
    arguments = context, *lists
    rest = *arguments, [0] * len(lists[5]), need_dx
    with torch.no_grad():
        if by is None:
            y, logabsdet, kept = ops.autoregressive_training(x, *arguments)
            return y, logabsdet, *ops.autoregressive_backward(*cotangents(x), kept, *rest, need_parameters)
        y, logabsdet, kept = by.training(x, *arguments)
        return y, logabsdet, *by.backward(*cotangents(x), kept, *rest, need_dcontext, need_parameters)


def doubled(value):
    if isinstance(value, (list, tuple)):
        return type(value)(doubled(v) for v in value)
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def assert_is_the_cpus(x, context, lists, layouts=LAYOUTS, **options):
    exact = step(*doubled((x, context, lists)), **options)
    tolerance = 1e-10 if x.dtype == torch.float64 else 2e-3
    for layout in layouts:
        got = step(x, context, lists, by=layout, **options)
        torch.testing.assert_close(got, tuple(t.to(x.dtype) for t in exact), rtol=tolerance, atol=tolerance)


CASES["values shared"] = example(6, [*SHARED, Part(5, "tanh", source=0, residual=6), Part(0, source=7)], context=2)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_network_of_the_battery(case, dtype):
    for batch in (0, 1, 19):
        x, context, lists = map_of(CASES[case](batch, dtype))
        for maps, need_dx in ((1, True), (1, False), (2, True), (2, False)):
            assert_is_the_cpus(x, context, stacked(maps, lists), need_dx=need_dx)


def test_small_sizes_exhaustively():
    for features, width, layers, rule in itertools.product(range(1, 7), (1, 2, 9), (0, 1, 2), ("even", "random")):
        made = example(features, (width,) * layers, rule=rule, context=features % 3, activation="tanh")(3, torch.float64)
        assert_is_the_cpus(*map_of(made), layouts=LAYOUTS[:2])


@pytest.mark.parametrize(
    ("features", "parts", "context", "batch"),
    [
        (70, (70, 140), 0, 300),  # several tiles on every side, and several shares of the batch
        (20, (140,), 33, 300),
        (90, (), 0, 130),
        (20, widened(RESIDUAL, 70), 3, 140),
        (9, widened(GATED, 66), 70, 140),
        (30, widened(WIRED, 65), 0, 140),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sizes_beyond_a_tile(features, parts, context, batch, dtype):
    made = example(features, parts, context=context, activation="tanh", rule="random")(batch, dtype)
    assert_is_the_cpus(*map_of(made))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sizes_around_a_chunk(dtype):
    """And around a tile: one more than there is would be read where one is missing."""
    for features, hidden, batch in ((7, 15, 15), (8, 16, 7), (9, 17, 9), (15, 65, 31), (64, 64, 32), (17, 63, 33)):
        made = example(features, (hidden,), context=features, activation="tanh", rule="random")(batch, dtype)
        assert_is_the_cpus(*map_of(made), layouts=LAYOUTS[:2])


@pytest.mark.parametrize("features", [5, 40])
def test_maps_of_different_orders(features):
    """What a lane hands on to the next map is another's."""
    x, context, lists = map_of(example(features, (11,), activation="tanh")(9, torch.float32))
    g = torch.Generator().manual_seed(0)
    three = stacked(3, lists)
    orders = [torch.randperm(features, generator=g) for _ in range(3)]
    assert_is_the_cpus(x, context, (*three[:5], orders, *three[6:]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [*SCALES, ScaleMap.exp_half(0.1)], ids=repr)
def test_maps_and_forms(scale, form):
    for dtype in (torch.float64, torch.float32):
        x, context, lists = map_of(example(5, (11, 8), scale=scale, form=form, order=[3, 1, 4, 0, 2])(9, dtype))
        assert_is_the_cpus(x, context, stacked(2, lists))


@pytest.mark.parametrize("activation", Activation, ids=lambda a: a.name)
def test_activations(activation):
    x, context, lists = map_of(example(4, (11, 8), activation=activation.name.lower(), context=2)(9, torch.float64))
    assert_is_the_cpus(x, context, stacked(2, lists))


@pytest.mark.parametrize("parts", [(150, 70), RESIDUAL, GATED, WIRED])
def test_tiles_threads_and_the_batch_change_no_bit_of_a_row(parts):
    context = 3 if parts in (RESIDUAL, GATED) else 0
    x, given, lists = map_of(example(40, parts, context=context, order=list(range(39, -1, -1)))(300, torch.float32))
    rows = lambda begin, end: (x[begin:end], None if given is None else given[begin:end], stacked(2, lists))
    whole = step(*rows(0, 300), by=LAYOUTS[0])
    for layout in LAYOUTS[1:]:
        assert_same_bits(step(*rows(0, 300), by=layout)[:4], whole[:4])
    for begin, end in [(0, 1), (127, 131), (299, 300)]:
        y, logabsdet, kept = LAYOUTS[1].training(*rows(begin, end)[:2], *stacked(2, lists))
        assert_same_bits((y, logabsdet), tuple(t[begin:end] for t in whole[:2]))
        part = [t[begin:end] for t in cotangents(x)]
        dx = LAYOUTS[1].backward(*part, kept, rows(begin, end)[1], *stacked(2, lists), [0, 0], True, True, True)[0]
        assert_same_bits((dx,), (whole[2][begin:end],))


def test_a_context_without_a_gradient():
    x, context, lists = map_of(example(6, (9, 7), context=2)(21, torch.float32))
    for parts in (lists, stacked(2, lists)):
        whole, without = (step(x, context, parts, by=LAYOUTS[0], need_dcontext=needed) for needed in (True, False))
        assert without[3].shape == (0, 2)
        assert_same_bits(without[:3] + without[4:], whole[:3] + whole[4:])


@pytest.mark.parametrize("by", [None, LAYOUTS[0]], ids=["cpu", "cuda"])
@pytest.mark.parametrize("parts", [(9, 7), (9, 90), RESIDUAL, GATED])
def test_parameters_without_a_gradient(parts, by):
    x, context, lists = map_of(example(6, parts, context=2)(300 if by else 1100, torch.float32))  # more than a tile, or a span of the CPU's
    for maps in (lists, stacked(2, lists)):
        whole, without = (step(x, context, maps, by=by, need_parameters=needed) for needed in (True, False))
        assert len(whole) == len(without) and all(t.shape == (0,) for t in without[4:])
        assert_same_bits(without[:4], whole[:4])


def test_a_layer_without_inputs_has_its_bias():
    visible = [torch.zeros(0, dtype=torch.int32), torch.zeros(6, dtype=torch.int32)]
    weights, biases = [torch.zeros(3, 0), torch.zeros(0, 6)], [torch.zeros(0), torch.arange(6.0) / 4]
    lists = weights, biases, [], [], visible, [torch.arange(3)], [0, 0], [], [2, 0, 0, 0, int(SCALES[0].kind), 0, 0, 0], [*SCALES[0].packed]
    assert_is_the_cpus(torch.randn(5, 3), None, lists)


def test_strides():
    x, context, lists = map_of(example(6, (9, 7), context=2)(21, torch.float32))
    want = step(x, context, lists, by=LAYOUTS[0])
    wide = tuple([torch.cat([w, w], 1)[:, : w.shape[1]] for w in part] if i in (0, 2) else part for i, part in enumerate(lists))
    turned = tuple([w.mT.contiguous().mT for w in part] if i in (0, 2) else part for i, part in enumerate(lists))
    strided = [torch.stack([t, t], -1)[..., 0] for t in (x, context)]
    assert_same_bits(step(*strided, wide, by=LAYOUTS[0]), want)
    assert_same_bits(step(x.mT.contiguous().mT, context.mT.contiguous().mT, turned, by=LAYOUTS[1]), want)


def test_an_infinity_reaches_only_what_sees_it():
    """Of a feature that few units see: products with 0 would spread it over a tile."""
    x, context, lists = map_of(example(80, (90,), scale=SCALES[0])(7, torch.float32))
    clean = step(x, context, lists, by=LAYOUTS[0])
    bad = x.clone()
    bad[3, 60] = torch.inf
    got = step(bad, context, lists, by=LAYOUTS[0])
    keep = [0, 1, 2, 4, 5, 6]
    for g, c in zip(got[:3], clean[:3], strict=True):
        assert_same_bits((g[keep],), (c[keep],))
    assert_same_bits((got[0][3, :60],), (clean[0][3, :60],))
    assert not got[0][3, 60:].isfinite().all()
    gradient = step(x, context, lists, by=LAYOUTS[0])[2]
    assert gradient.isfinite().all()


def test_gradients_stay_inside_the_staircase():
    x, context, lists = map_of(example(70, (90,), rule="random")(300, torch.float32))
    gradients = step(x, context, lists, by=LAYOUTS[0])[4:]
    for dweight, visible in zip(gradients, lists[4], strict=False):
        outside = torch.arange(dweight.shape[0])[:, None] >= visible
        assert outside.any() and (dweight[outside] == 0).all() and (dweight[~outside] != 0).any()


def test_visible_that_does_not_ascend_reads_nothing_outside():
    """No answer is right; memory is not touched where it should not be (`make sanitize`)."""
    x, context, lists = map_of(example(70, (90,))(30, torch.float32))
    visible = [torch.full_like(v, 1 << 30) * torch.arange(len(v)).remainder(3).sub(1).int() for v in lists[4]]
    y, *_ = step(x, context, (*lists[:4], visible, *lists[5:]), by=LAYOUTS[0])
    assert y.shape == x.shape


@pytest.mark.parametrize("parts", [(60,), (30, 30)])
def test_more_than_2_31_elements(parts):
    """Whose places are no 32-bit integers; the last rows alone are computed."""
    x, context, lists = map_of(example(3, parts, context=2, order=[2, 0, 1])(5, torch.float32))
    n, two = 31_500_003, stacked(2, lists)
    dy, dlogabsdet = cotangents(x)
    want = step(x, context, two, by=LAYOUTS[0], need_parameters=False)
    emulated.run_on(H200, last_blocks=3)
    with emulated.unfilled_memory():
        many = [emulated.last_of_many(t, n) for t in (x, context, dy, dlogabsdet)]
        y, logabsdet, kept = emulated.ops._autoregressive_training(*many[:2], *two)
        assert all(t.numel() > 1 << 31 for t in kept)
        dx, dcontext, *_ = emulated.ops._autoregressive_backward(*many[2:], kept, many[1], *two, [0, 0], True, True, False)
        assert_same_bits(tuple(t[-5:] for t in (y, logabsdet, dx, dcontext)), want[:4])


def test_refusals():
    x, context, lists = map_of(example(4, (9,))(3, torch.float32))
    training, backward = LAYOUTS[0].training, LAYOUTS[0].backward
    with pytest.raises(RuntimeError, match="float32 or float64"):
        training(x.half(), context, *lists)
    kept = training(x, context, *lists)[2]
    dy, dlogabsdet = cotangents(x)
    rest = context, *lists, [0], True, True, True
    with pytest.raises(RuntimeError, match="values are not those of the forward pass"):
        backward(dy, dlogabsdet, [kept[0][:2]], *rest)
    with pytest.raises(RuntimeError, match="one entry per row"):
        backward(dy, dlogabsdet[:2], kept, *rest)
    with pytest.raises(RuntimeError, match="learned"):
        backward(dy, dlogabsdet, kept, context, *lists, [1], True, True, True)
    inverse = (*lists[:8], [*lists[8][:-1], 1], lists[9])
    with pytest.raises(RuntimeError, match="forward ones"):
        training(x, context, *inverse)


@pytest.fixture
def by_kernels(monkeypatch):
    """Flows that train as on a GPU."""
    monkeypatch.setattr(training, "_training", LAYOUTS[0].training)
    monkeypatch.setattr(training, "_backward", lambda *a: LAYOUTS[0].backward(*a[:-1], True, a[-1]))


@pytest.mark.parametrize(("residual", "contexts", "with_x"), [(False, 0, False), (False, 3, True), (True, 3, True), (True, 0, False)])
def test_gradients_of_a_flow(residual, contexts, with_x, by_kernels):
    flow, x, context, inputs = flow_with_inputs(with_x, contexts, residual=residual)

    def gradients():
        return torch.autograd.grad(flow.log_prob(x, context).square().sum(), inputs)

    got = gradients()
    with backend("reference"):
        want = gradients()
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


class OnAGpu(NamedTuple):
    """All that the choice of an implementation asks of a tensor."""

    device: torch.device = torch.device("cuda", 0)
    is_cuda: bool = True


@pytest.fixture(params=["ieee", "tf32"])
def precision(request):
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, request.param
    yield request.param
    matmul.fp32_precision = before


@pytest.mark.parametrize("library", [True, False])
def test_what_a_gpu_is_given(library, precision, monkeypatch):
    """Its library's kernels, or without it, or where tf32 is asked for, products of plain chains."""
    monkeypatch.setattr(training, "_COMPILED_FOR_CUDA", library)
    monkeypatch.setattr(training, "wants_reference", lambda *_: False)

    def served(parts, inverse, scale=SCALES[0], **options):
        made = example(4, parts, scale=scale, inverse=inverse, **options)(2, torch.float32)
        *tensors, order, activations, wiring = made.schema(made.rows, made.parameters)[2:10]
        weights, biases, context_weights, context_biases, visible = tensors
        network = Conditioner(weights, biases, visible, activations, context_weights, order, wiring, context_biases)
        return training.serves([Map(network, scale, Form.SCALE_SHIFT, inverse)], OnAGpu())

    assert served((9, 7), False) and served((9, 7), False, context=2)
    assert served(RESIDUAL, False, context=2) == served(GATED, False, context=2) == served(WIRED, False) == library
    for parts in ((9, 7), RESIDUAL, GATED):
        assert served(parts, True, context=2) == library
    assert not served(WIRED, True)  # whose features several layers read
    for parts in ([Part(4, "tanh", unitwise="affine"), Part(5), Part(0)], [Part(5), Part(5, "tanh", unitwise="read"), Part(0)]):
        assert served(parts, False) == library  # no wiring says that a layer is read unit by unit
    assert not served([Part(4, "tanh", unitwise="affine"), Part(5), Part(0)], True)  # the features unit by unit
    assert not served((9, 7), False, narrow=True) and not served((9, 7), True, narrow=True)
    monkeypatch.setattr(training._extension, "unserved_gpus", {0: "another architecture"})
    assert not served((9, 7), True) and served((9, 7), False) and not served(RESIDUAL, False, context=2)


def test_what_is_multiplied_in_tf32(precision, monkeypatch):
    monkeypatch.setattr(training, "_COMPILED_FOR_CUDA", True)

    class Rows(NamedTuple):
        shape: tuple[int, int]
        dtype: torch.dtype = torch.float32
        device: torch.device = torch.device("cuda", 0)

    def chain(hidden, wiring):
        weights = [
            torch.empty(6, hidden, device="meta"),
            torch.empty(hidden, hidden, device="meta"),
            torch.empty(hidden, 12, device="meta"),
        ]
        return [Map(Conditioner(weights, weights, weights, [0] * 3, [], None, wiring), SCALES[0], Form.SCALE_SHIFT)]

    large, small, wired = chain(2048, []), chain(100, []), chain(2048, [0, -1, 0, 0] * 3)
    assert training._by_library(large, Rows((4096, 6))) == (precision == "ieee")
    assert training._by_library(large, Rows((4096, 6), torch.float64))
    assert training._by_library(small, Rows((4096, 6))) and training._by_library(wired, Rows((4096, 6)))


def test_what_the_loop_on_a_gpu_is_given():
    def network(features, hidden, layers=2):
        widths = [features, *[hidden] * (layers - 1), 2 * features]
        weights = [torch.empty(k, n, device="meta") for k, n in itertools.pairwise(widths)]
        visible = [torch.empty(n, dtype=torch.int32, device="meta") for n in widths[1:]]
        return Conditioner(weights, visible, visible, [0] * layers, [])

    served = lambda network, scale=SCALES[0], gpu=True: training.loop_serves(network, scale, gpu)
    assert served(network(6, 100)) and served(network(784, 32768, 3))
    assert not served(network(6, 100, 33)) and served(network(6, 100, 33), gpu=False)
    assert not served(network(8192, 200_000)) and served(network(8192, 200_000), gpu=False)  # more than its images count
    assert not served(network(6, 100), ScaleMap.unit())


@pytest.mark.parametrize("parts", [(9, 7), RESIDUAL, GATED])
def test_what_a_compiler_is_told_has_the_kernels_shapes(parts):
    """The ops of the CUDA library have no kernel for a CPU, whose tests would tell."""
    x, context, lists = map_of(example(6, parts, context=2, activation="silu")(5, torch.float32))
    arguments, ops = (context, *stacked(2, lists)), torch.ops.flowkernels
    *outputs, kept = LAYOUTS[0].training(x, *arguments)
    for needs in itertools.product((True, False), repeat=3):  # dx, dcontext, parameters
        rest = *arguments, [0, 0], *needs
        gradients = LAYOUTS[0].backward(*cotangents(x), kept, *rest)
        with FakeTensorMode() as mode:
            fake = lambda value: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            fakes = [[fake(v) for v in value] if isinstance(value, list) else fake(value) for value in rest]
            *fake_outputs, fake_kept = ops._autoregressive_training(fake(x), *fakes[:-4])
            fake_gradients = ops._autoregressive_backward(*map(fake, cotangents(x)), fake_kept, *fakes)
        shapes = lambda *tensors: [t.shape for t in tensors]
        assert shapes(*fake_outputs, *fake_kept, *fake_gradients) == shapes(*outputs, *kept, *gradients)


def on_gpu(value):
    if isinstance(value, (list, tuple)):
        return type(value)(on_gpu(v) for v in value)
    return value.cuda() if isinstance(value, torch.Tensor) else value


class Gpu:
    """The two ops of a training step on a GPU, as `Kernels`."""

    def training(self, *arguments):
        return torch.ops.flowkernels._autoregressive_training(*on_gpu(arguments))

    def backward(self, *arguments):
        return [t.cpu() for t in torch.ops.flowkernels._autoregressive_backward(*on_gpu(arguments))]


def step_on_gpu(*arguments, **options):
    return tuple(t.cpu() for t in step(*arguments, by=Gpu(), **options))


@pytest.mark.gpu
class TestOnAGpu:
    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_gpu_has_the_emulators_bits(self, case, dtype):
        own = Kernels(H200._replace(multiprocessors=torch.cuda.get_device_properties(0).multi_processor_count), Order.FORWARDS, 64 << 20)
        for batch in (0, 1, 37):
            x, context, lists = map_of(CASES[case](batch, dtype))
            assert_same_bits(step_on_gpu(x, context, stacked(2, lists)), step(x, context, stacked(2, lists), by=own))

    @pytest.mark.parametrize(("hidden", "batch"), [((520, 500), 2200), ((530, 520), 9000)])  # beyond an H200's smallest tiles
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_gpu_large_tiles(self, hidden, batch, dtype):
        x, context, lists = map_of(example(40, hidden, context=3, activation="tanh", rule="random")(batch, dtype))
        exact = step(*doubled((x, context, stacked(2, lists))))
        tolerance = 1e-9 if dtype is torch.float64 else 2e-3
        for got, want in zip(step_on_gpu(x, context, stacked(2, lists)), exact, strict=True):
            torch.testing.assert_close(got.double() / want.abs().max(), want / want.abs().max(), rtol=0, atol=tolerance)

    def test_gpu_more_than_2_31_elements(self):
        if torch.cuda.mem_get_info()[0] < 60 << 30:
            pytest.skip("needs 60 GB of a GPU's memory")
        x, context, lists = map_of(example(3, (60,), context=2, order=[2, 0, 1])(5, torch.float32))
        n, two = 31_500_003, on_gpu(stacked(2, lists))
        given = x, context, *cotangents(x)

        def found(x, context, dy, dlogabsdet):
            y, logabsdet, kept = torch.ops.flowkernels._autoregressive_training(x, context, *two)
            rest = [0, 0], True, True, False
            dx, dcontext, *_ = torch.ops.flowkernels._autoregressive_backward(dy, dlogabsdet, kept, context, *two, *rest)
            return tuple(t[-5:].clone() for t in (y, logabsdet, dx, dcontext))

        with torch.no_grad():
            want = found(*on_gpu(given))
            assert_same_bits(found(*(emulated.last_of_many(t.cuda(), n) for t in given)), want)
