"""The CUDA loop without a GPU: its twin on the CPU runs the kernel's phases for all threads in turn, on the kernel's own schedule.

What the twin cannot show is barriers, memory and speed. Threads run forwards and backwards, and copies land as late as the kernel's waits
allow, so that a phase in which threads depend on each other, or a slot that is read too early or refilled too early, gives other bits.
"""

import itertools
from copy import deepcopy

import pytest
import torch

from flowkernels import _backend, loop_weights
from flowkernels.flows import MAF
from flowkernels.ops import (
    Activation,
    Conditioner,
    Form,
    Map,
    MaskedLayer,
    autoregressive,
    autoregressive_stack,
    check_conditioner,
)
from flowkernels.ops.autoregressive import map as map_module
from flowkernels.ops.autoregressive import stack as stack_module
from flowkernels.ops.autoregressive.loop import NUMBERS, Lists
from python_tests.battery import assert_same_bits, needs_tests_library
from python_tests.ops import test_autoregressive, test_autoregressive_stack
from python_tests.ops.test_autoregressive import FORMS, GATED, RESIDUAL, SCALES, WIRED, example, widened

CASES = test_autoregressive.TestAutoregressive.cases  # the class itself would be collected here once more
pytestmark = needs_tests_library

# rows, elements in a slot, warps that compute, warps that copy, steps of a panel (0: by rule), threads backwards, elements of a panel,
# whether the last layer's sums are apart, whether panels do without registers
LAYOUTS = [(4, 4096, 2, 1, 0, 0, 0, 0, 0), (8, 256, 4, 2, 0, 1, 0, 0, 1), (32, 512, 8, 4, 0, 0, 0, 0, 0), (16, 1024, 2, 3, 0, 0, 0, 1, 0)]


def twin(example, layout):
    with torch.no_grad():
        return torch.ops.flowkernels._autoregressive_twin(*example.schema(example.rows, example.parameters), list(layout))


def assert_is_right(got, example, dtype, by="oracle"):
    with torch.no_grad():
        want = getattr(example, by)([t.double() for t in example.rows], [t.double() for t in example.parameters])
    tolerance = 1e-10 if dtype is torch.float64 else 1e-4
    torch.testing.assert_close(got, tuple(w.to(dtype) for w in want), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_network_of_the_battery(case, dtype):
    for batch in (1, 19):
        made = CASES[case](batch, dtype)
        for panel, elements in ((0, 0), (1, 2048), (2, 60), (2, 2048), (16, 4096)):
            first, *others = (twin(made, (*layout[:4], panel, layout[5], elements, *layout[7:])) for layout in LAYOUTS)
            assert_is_right(first, made, dtype)
            for other in others:  # rows, slots and threads change no bit
                assert_same_bits(other, first)


@pytest.mark.parametrize("inverse", [False, True])
def test_small_sizes_exhaustively(inverse):
    for features, width, layers, rule in itertools.product(range(1, 7), (1, 2, 9), (0, 1, 2), ("even", "random")):
        made = example(features, (width,) * layers, rule=rule, context=features % 3, activation="tanh", inverse=inverse)(3, torch.float64)
        for panel, backwards, elements in itertools.product((1, 2, 4), (0, 1), (100, 4096)):
            assert_is_right(twin(made, (4, 256, 1, 1, panel, backwards, elements, 0, backwards)), made, torch.float64)


@pytest.mark.parametrize(
    ("features", "parts", "context"),
    [
        (40, (300, 520), 0),  # several runs, several blocks of units
        (20, (600,), 300),
        (70, (64, 64), 5),
        (20, widened(RESIDUAL, 270), 3),
        (9, widened(GATED, 40), 70),
        (100, widened(WIRED, 40), 0),
    ],
)
@pytest.mark.parametrize("inverse", [False, True])
def test_sizes_beyond_a_block(features, parts, context, inverse):
    made = example(features, parts, context=context, activation="tanh", inverse=inverse)(2, torch.float32)
    first, *others = (
        twin(made, (4, capacity, 2, 1, 4, backwards, 500, 0, backwards)) for capacity, backwards in [(8192, 0), (1024, 1), (1028, 0)]
    )
    assert_is_right(first, made, torch.float32, by="op")  # the CPU's loop in float64: the D passes take long
    for other in others:
        assert_same_bits(other, first)


@pytest.mark.parametrize("degrees", [None, [1, 1, 1, 4, 5, 5, 7, 8, 9, 10] * 4])
@pytest.mark.parametrize("widths", [(50,), (50, 50), (33, 70), (400, 90), (700, 700)])
def test_panels_in_registers_have_the_bits_of_panels_in_memory(widths, degrees):
    """One unit to a lane, two, and more than there is room for; values that come one by one and several at once."""
    made = example(40, widths, degrees=degrees and sorted(degrees), inverse=True)(5, torch.float32)
    for panel, elements in ((0, 0), (2, 100_000), (8, 100_000)):
        in_registers, in_memory = (twin(made, (4, 4096, 2, 1, panel, 0, elements, 0, without)) for without in (0, 1))
        assert_is_right(in_registers, made, torch.float32, by="op")
        assert_same_bits(in_registers, in_memory)
        assert_same_bits(twin(made, (16, 4096, 3, 1, panel, 1, elements, 1, 0)), in_registers)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", SCALES, ids=repr)
@pytest.mark.parametrize("inverse", [False, True])
def test_maps_and_forms(scale, form, inverse):
    for dtype in (torch.float64, torch.float32):
        made = example(4, (11, 8), scale=scale, form=form, inverse=inverse)(9, dtype)
        assert_is_right(twin(made, LAYOUTS[0]), made, dtype)


def one_sum(activation, to_shift, to_raw):
    """A forward map z_2 = x_2 sigma(raw) + shift whose shift or raw scale is activation(x_1): no sum whose order could differ."""
    ones = torch.ones(1, 1)
    hidden = MaskedLayer(torch.cat([ones, ones]), torch.zeros(1), torch.tensor([1], dtype=torch.int32), activation)
    output = MaskedLayer(torch.tensor([[0.0, 0.0, to_shift, to_raw]]), torch.zeros(4), torch.tensor([0, 0, 1, 1], dtype=torch.int32))
    return Conditioner.of([hidden, output])


def assert_has_the_bits_of_vector_lanes(conditioner, scale, form):
    x = torch.cat([torch.linspace(-20, 20, 1999), torch.tensor([0.0, 1e-30, -1e-30, 200.0, -200.0, torch.inf, -torch.inf, torch.nan])])
    for second in (0.0, 1.25):
        rows = torch.stack([x, torch.full_like(x, second)], 1)
        n = conditioner
        arguments = (
            rows,
            None,
            n.weights,
            n.biases,
            [],
            [],
            n.visible,
            None,
            n.activations,
            n.wiring,
            int(scale.kind),
            *scale.packed,
            form,
            False,
        )
        want = torch.ops.flowkernels.autoregressive(*arguments)
        assert_same_bits(torch.ops.flowkernels._autoregressive_twin(*arguments, list(LAYOUTS[2])), want)


@pytest.mark.parametrize("activation", Activation, ids=lambda a: a.name)
def test_activations_have_the_bits_of_vector_lanes(activation):
    assert_has_the_bits_of_vector_lanes(one_sum(activation, 1.0, 0.0), SCALES[0], 0)


@pytest.mark.parametrize("scale", SCALES, ids=repr)
def test_maps_have_the_bits_of_vector_lanes(scale):
    for form in range(4):
        assert_has_the_bits_of_vector_lanes(one_sum(Activation.IDENTITY, 0.5, 1.0), scale, form)


def test_a_bad_value_reaches_only_what_sees_it():
    made = example(5, (12, 9), inverse=False)(6, torch.float32)
    for layout in LAYOUTS:
        clean = twin(made, layout)[0]
        spoilt = made._replace(rows=[made.rows[0].clone()])
        spoilt.rows[0][1, 2] = torch.inf
        got = twin(spoilt, layout)[0]
        keep = [b for b in range(6) if b != 1]
        assert torch.equal(got[keep], clean[keep]) and torch.equal(got[1, :2], clean[1, :2])
        assert not got[1, 2:].isfinite().any()


def test_strides_and_row_alone():
    made = example(6, (9, 7), context=2, order=[3, 1, 4, 0, 5, 2], inverse=True)(21, torch.float32)
    whole = twin(made, LAYOUTS[2])
    strided = made._replace(
        rows=[t.mT.contiguous().mT for t in made.rows], parameters=[torch.cat([t, t], -1)[..., : t.shape[-1]] for t in made.parameters]
    )
    assert_same_bits(twin(strided, LAYOUTS[1]), whole)
    for begin, end in [(0, 1), (3, 5), (7, 10), (10, 21)]:
        assert_same_bits(twin(made._replace(rows=[t[begin:end] for t in made.rows]), LAYOUTS[0]), tuple(t[begin:end] for t in whole))


@pytest.mark.parametrize("case", [name for name in CASES if name.endswith("inverse")])
def test_steps_are_those_of_the_conditioner(case):
    arguments = CASES[case](1, torch.float32)
    arguments = arguments.schema(arguments.rows, arguments.parameters)
    weights, biases, context_weights, context_biases, visible, order, activations, wiring = arguments[2:10]
    network = Conditioner(weights, biases, visible, activations, context_weights, order, wiring, context_biases)
    ends = torch.ops.flowkernels._autoregressive_steps(*arguments)
    assert ends[0].eq(0).all() and ends[1:].tolist() == check_conditioner(network)


def not_autoregressive():
    """Feature 1 of 3 sees itself."""
    g = torch.Generator().manual_seed(0)
    layer = MaskedLayer(torch.randn(3, 6, generator=g), torch.zeros(6), torch.tensor([0, 0, 2, 2, 2, 2], dtype=torch.int32))
    return Conditioner.of([layer])


def test_a_network_that_is_not_autoregressive_gives_nan():
    n = not_autoregressive()
    arguments = (torch.zeros(2, 3), None, n.weights, n.biases, [], [], n.visible, None, n.activations, [], 0, 0.0, 0.0, 0)
    for layout in LAYOUTS:
        y, logabsdet = torch.ops.flowkernels._autoregressive_twin(*arguments, True, list(layout))
        assert y[:, 0].isfinite().all() and y[:, 1:].isnan().all() and logabsdet.isnan().all()
        assert torch.ops.flowkernels._autoregressive_twin(*arguments, False, list(layout))[0].isfinite().all()


def test_a_staircase_that_does_not_ascend_gives_nan():
    """Its counts of units that are known would fall from step to step, and sizes made of them would be negative."""
    seen = ([0] * 95 + [2] + [0] * 95 + [1] + [4] * 8, [0] * 2 + [31] * 30 + [150] * 32, [0, 0, 1, 1, 2, 2, 3, 3])
    weights = [torch.zeros(4, 200), torch.zeros(200, 64), torch.zeros(4, 8)]
    visible = [torch.tensor(v, dtype=torch.int32) for v in seen]
    wiring = [0, -1, 0, 0, 1, -1, 0, 0, 0, -1, 0, 0]
    arguments = (torch.zeros(1, 4), None, weights, [w.new_zeros(w.shape[1]) for w in weights], [], [], visible, None, [1, 1, 0], wiring)
    for panel in (0, 1, 2, 4):
        layout = [4, 4096, 2, 1, panel, 0, 4096, 0, 0]
        y, logabsdet = torch.ops.flowkernels._autoregressive_twin(*arguments, 0, 0.0, 0.0, 0, True, layout)
        assert y.isnan().all() and logabsdet.isnan().all()


@pytest.mark.parametrize("inverse", [False, True])
def test_no_features(inverse):
    arguments = (torch.zeros(2, 0), None, [torch.zeros(0, 0)], [torch.zeros(0)], [], [], [torch.zeros(0, dtype=torch.int32)], None, [0], [])
    for layout in LAYOUTS:
        y, logabsdet = torch.ops.flowkernels._autoregressive_twin(*arguments, 0, 0.0, 0.0, 0, inverse, list(layout))
        assert y.shape == (2, 0) and logabsdet.tolist() == [0.0, 0.0]


def test_a_negative_zero_has_the_sign_that_a_row_alone_has():
    """A unit that sees nothing of a run keeps its sum as it is, whichever units share its thread."""
    x, weight, bias = (
        torch.randn(40, 112, generator=torch.Generator().manual_seed(0)),
        torch.full((112, 224), 0.01),
        torch.full((224,), -0.0),
    )
    x[:, 0] = -0.0
    arguments = (
        x,
        None,
        [weight],
        [bias],
        [],
        [],
        [torch.arange(112, dtype=torch.int32).repeat_interleave(2)],
        None,
        [0],
        [],
        5,
        0.01,
        0.0,
        0,
    )
    first, *others = (
        torch.ops.flowkernels._autoregressive_twin(*arguments, False, [rows, 8192, consumers, 2, 0, 0, 0, 0, 0])
        for rows, consumers in ((4, 14), (32, 14), (8, 2))
    )
    assert first[0][:, 0].signbit().all()
    for other in others:
        assert torch.equal(other[0].view(torch.int32), first[0].view(torch.int32))


@pytest.mark.parametrize("case", test_autoregressive_stack.TestAutoregressiveStack.cases)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_stacks(case, dtype):
    """The twin of a stack has the bits of its maps one by one, each of which the tests above compare."""
    for batch, layout in itertools.product((0, 1, 19), LAYOUTS):
        made = test_autoregressive_stack.TestAutoregressiveStack.cases[case](batch, dtype)
        x, context, *lists, _ = made.schema(made.rows, made.parameters)
        y, logabsdet, kept = torch.ops.flowkernels._autoregressive_stack_twin(x, context, *lists, True, list(layout))
        assert_is_right((y, logabsdet), made, dtype)
        outputs, total = [], torch.zeros_like(logabsdet)
        for m in Lists(*lists).maps():
            n, own = m.conditioner, context if m.conditioner.context_weights else None
            x = x if m.affine is None else (x + m.affine[0]) * m.affine[1] + m.affine[2]
            network = (n.weights, n.biases, n.context_weights, n.context_biases, n.visible, n.order, n.activations, n.wiring)
            packed = (int(m.scale.kind), *m.scale.packed, int(m.form), m.inverse)
            x, own_logabsdet = torch.ops.flowkernels._autoregressive_twin(x, own, *network, *packed, list(layout))
            total = total + own_logabsdet
            outputs.append(x)
        assert_same_bits((y, logabsdet, kept), (x, total, torch.stack(outputs)[:-1]))
        bare = torch.ops.flowkernels._autoregressive_stack_twin(made.rows[0], context, *lists, False, list(layout))
        assert_same_bits(bare, (y, logabsdet, kept[:0]))


def with_bfloat16_weights(arguments):
    """Those of the op autoregressive_stack, with the matrices' rounding asked for."""
    *most, stages, scales, keep = arguments
    return *most, [1 if i % NUMBERS == NUMBERS - 2 else n for i, n in enumerate(stages)], scales, keep


def with_rounded_matrices(arguments):
    x, context, weights, biases, context_weights, *rest = arguments
    rounded = lambda tensors: [t.bfloat16().to(t.dtype) if t.dim() == 2 else t for t in tensors]
    return x, context, rounded(weights), biases, rounded(context_weights), *rest


def stack_twin(arguments, layout):
    with torch.no_grad():
        return torch.ops.flowkernels._autoregressive_stack_twin(*arguments, list(layout))


@pytest.mark.parametrize("panel", [0, 2])
@pytest.mark.parametrize("case", test_autoregressive_stack.TestAutoregressiveStack.cases)
def test_bfloat16_weights_are_rounded_matrices(case, panel):
    make = test_autoregressive_stack.TestAutoregressiveStack.cases[case]
    for batch, layout in itertools.product((1, 19), LAYOUTS):
        layout = (*layout[:4], panel, layout[5], 500 if panel else 0, *layout[7:])
        made = make(batch, torch.float32)
        arguments = made.schema(made.rows, made.parameters)
        got = stack_twin(with_bfloat16_weights(arguments), layout)
        assert_same_bits(got, stack_twin(with_rounded_matrices(arguments), layout))
        assert not torch.equal(got[0], stack_twin(arguments, layout)[0])  # or not rounding would do
        made = make(batch, torch.float64)
        arguments = made.schema(made.rows, made.parameters)
        assert_same_bits(stack_twin(with_bfloat16_weights(arguments), layout), stack_twin(arguments, layout))


@pytest.mark.parametrize(("features", "widths", "context"), [(20, (600,), 300), (40, (300, 520), 0), (70, (64, 64), 5)])
@pytest.mark.parametrize("inverse", [False, True])
def test_bfloat16_weights_of_sizes_beyond_a_block(features, widths, context, inverse):
    made = test_autoregressive_stack.stacked(example(features, widths, context=context, inverse=inverse))(2, torch.float32)
    arguments = made.schema(made.rows, made.parameters)
    for capacity, backwards in [(8192, 0), (1024, 1), (1028, 0)]:
        layout = (4, capacity, 2, 1, 4, backwards, 500, 0, backwards)
        assert_same_bits(stack_twin(with_bfloat16_weights(arguments), layout), stack_twin(with_rounded_matrices(arguments), layout))


@pytest.mark.parametrize("low", [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_every_number_is_rounded_as_torch_rounds_it(low):
    """As shifts of maps whose feature 0 is 1 and whose others are 0: all of bfloat16's, and numbers between them."""
    numbers = (torch.arange(-(1 << 15), 1 << 15) << 16 | low).int().view(torch.float32).view(256, 256)
    x = torch.zeros(1, 257)
    x[0, 0] = 1
    visible = torch.tensor([0, 0] + [1] * 512, dtype=torch.int32)
    for shifts in numbers:
        matrix = torch.zeros(257, 514)
        matrix[0, 2::2] = shifts
        lists = Lists.of(
            [Map(Conditioner([matrix], [torch.zeros(514)], [visible], [0], []), SCALES[0], Form.SCALE_SHIFT)], bfloat16_weights=True
        )
        y, *_ = stack_twin((x, None, *lists, False), LAYOUTS[0])
        torch.testing.assert_close(y[0, 1:], shifts.bfloat16().float() + 0.0, rtol=0, atol=0, equal_nan=True)


def test_loop_weights_ask_for_it(monkeypatch):
    """From the choice to the op, with the twin in the place of a GPU."""
    x, context, maps, _ = test_autoregressive_stack.three_inverses(5)
    rounded = lambda tensors: [t.detach().bfloat16().float() if t.dim() == 2 else t for t in tensors]
    networks = [m.conditioner for m in maps]
    networks = [n._replace(weights=rounded(n.weights), context_weights=rounded(n.context_weights)) for n in networks]
    calls = [
        lambda maps: autoregressive_stack(x, maps, context),
        lambda maps: autoregressive(x, maps[0].conditioner, context, inverse=True),
        lambda maps: autoregressive(x.bfloat16(), maps[0].conditioner.to(torch.bfloat16), context.bfloat16(), inverse=True),
    ]
    used = []
    for number, call in enumerate(calls):
        with torch.no_grad():
            exact = call(maps)
            want = call([m._replace(conditioner=n) for m, n in zip(maps, networks, strict=True)])
            with loop_weights(torch.bfloat16):
                assert_same_bits(call(maps), exact)  # a CPU rounds nothing
        with monkeypatch.context() as on_a_gpu:
            for module in (stack_module, map_module):
                on_a_gpu.setattr(module, "rounds_loop_weights", lambda _: _backend._choice.loop_weights is torch.bfloat16)
                on_a_gpu.setattr(module, "stack_op", lambda *arguments: used.append(arguments) or stack_twin(arguments, LAYOUTS[0]))
            with loop_weights(torch.bfloat16), torch.no_grad():
                got = call(maps)
            with loop_weights(torch.bfloat16):
                with_gradient = call(maps)
        assert len(used) == number + 1 and used[number][11][NUMBERS - 2]
        tolerance = 1e-2 if got[0].dtype is torch.bfloat16 else 1e-4
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
        if number < 2:
            assert not torch.allclose(got[0], exact[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(tuple(t.detach() for t in with_gradient), exact, rtol=tolerance, atol=tolerance)  # exact


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, "bfloat16", None])
def test_loop_weights_of_another_dtype(dtype):
    with pytest.raises(ValueError, match="loop_weights must be torch.float32 or torch.bfloat16; got"), loop_weights(dtype):
        pass


SM_80, SM_86, SM_90 = (108, 163 * 1024, 164 * 1024), (84, 99 * 1024, 100 * 1024), (132, 227 * 1024, 228 * 1024)


@pytest.mark.parametrize("device", [SM_80, SM_86, SM_90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_launch(device, dtype):
    """Whatever the size, what a launch takes fits, and panels and sums do not depend on the batch."""
    item = dtype.itemsize
    in_bfloat16s = (False, True) if dtype is torch.float32 else (False,)
    sizes = [(1, (3,)), (6, (50, 50)), (63, (512, 512)), (784, (1024, 1024)), (3072, (2048,)), (5000, ())]
    for (features, widths), inverse, in_bfloat16 in itertools.product(sizes, (False, True), in_bfloat16s):
        z, weights, visible = torch.zeros(1, features, dtype=dtype), [], []
        for inputs, outputs in itertools.pairwise((features, *widths, 2 * features)):
            weights.append(torch.zeros(outputs, dtype=dtype).expand(inputs, outputs))
            visible.append(torch.zeros(outputs, dtype=torch.int32))
        biases = [w.new_zeros(w.shape[1]) for w in weights]
        arguments = (z, None, weights, biases, [], [], visible, None, [0] * len(weights), [], 0, 0.0, 0.0, 0, inverse)
        panels = set()
        for batch in (1, 100, 1000, 2000, 100_000, 10**9):
            rows, capacity, consumers, producers, in_shared, shared, slot, blocks, panel, units, apart = (
                torch.ops.flowkernels._autoregressive_plan(*arguments, [*device, batch, in_bfloat16])
            )
            panels.add(panel)
            assert units == features + sum(v.numel() for v in visible)
            assert not apart or (in_shared and rows == 16 and inverse)
            units_in_shared = units - 2 * features + 64 if apart else units
            most = 4 if dtype is torch.float64 else 32
            assert rows in {4, 8, 16, most} and rows <= most and 32 * (consumers + producers) <= 512 and (in_shared or rows == most)
            assert 3 * slot + (units_in_shared * (36 if rows == 32 else rows) * item if in_shared else 0) <= shared <= device[1]
            assert capacity >= 1024 and capacity % 4 == 0 and slot % 16 == 0 and capacity * (2 if in_bfloat16 else item) <= 32 * 1024
            resident = (384 if dtype is torch.float64 else 512) // (32 * (consumers + producers)) if in_shared else 1
            assert 1 <= blocks <= -(-batch // rows) and blocks <= resident * device[0]
        assert len(panels) == 1 and panels <= {1, 2, 4, 8, 16, features}


@pytest.mark.gpu
class TestOnAGpu:
    """What a GPU gives is what the twin gives: the same phases, the same operations, the same bits."""

    def moved(self, made, device="cuda"):
        to = lambda v: v.to(device) if isinstance(v, torch.Tensor) else [to(t) for t in v] if isinstance(v, list) else v
        return tuple(to(a) for a in made.schema(made.rows, made.parameters))

    def run(self, arguments):
        with torch.no_grad():
            return torch.ops.flowkernels.autoregressive(*arguments)

    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_gpu_has_the_twins_bits(self, case, dtype):
        for batch in (0, 1, 5, 37, 3000):
            made = CASES[case](batch, dtype)
            got = self.run(self.moved(made))
            assert_same_bits(tuple(t.cpu() for t in got), twin(made, LAYOUTS[0]))

    @pytest.mark.parametrize("case", test_autoregressive_stack.TestAutoregressiveStack.cases)
    def test_gpu_stack_has_the_twins_bits(self, case):
        for batch, dtype in itertools.product((0, 1, 37, 3000), (torch.float64, torch.float32)):
            made = test_autoregressive_stack.TestAutoregressiveStack.cases[case](batch, dtype)
            with torch.no_grad():
                got = torch.ops.flowkernels.autoregressive_stack(*self.moved(made))
                arguments = made.schema(made.rows, made.parameters)
                assert_same_bits(tuple(t.cpu() for t in got), stack_twin(arguments, LAYOUTS[0]))
                got = torch.ops.flowkernels.autoregressive_stack(*with_bfloat16_weights(self.moved(made)))
                assert_same_bits(tuple(t.cpu() for t in got), stack_twin(with_bfloat16_weights(arguments), LAYOUTS[0]))

    @pytest.mark.parametrize("inverse", [False, True])
    @pytest.mark.parametrize(
        ("features", "widths", "batch"),
        [(63, (512, 512), 70), (63, (512, 512), 4000), (300, (700,), 70), (20, (15000,), 70), (784, (1024, 1024), 2000)],
    )
    def test_gpu_large_networks(self, features, widths, batch, inverse):
        """Streamed weights, a state in shared and in global memory and in both: as on the CPU, to rounding."""
        made = example(features, widths, inverse=inverse)(batch, torch.float32)
        made = made._replace(parameters=[0.7 * p for p in made.parameters])  # with its own the inverse reaches 1e85, and no digit is right
        got, want = self.run(self.moved(made)), self.run(made.schema(made.rows, made.parameters))
        torch.testing.assert_close(tuple(t.cpu() for t in got), want, rtol=1e-4, atol=1e-4)

    def test_gpu_loop_weights(self):
        """Rounding by choice, and a network that is in bfloat16 by nature: as with rounded matrices, where no gradient is asked for."""
        flow = MAF(20, transforms=3, hidden_features=(300, 300)).cuda().eval()
        rounded = deepcopy(flow).bfloat16()
        z = torch.randn(70, 20, device="cuda").bfloat16()
        with loop_weights(torch.bfloat16):
            with_gradient = flow.inverse(z.float())
            with torch.no_grad():
                got = flow.inverse(z.float())
        with torch.no_grad():
            exact, want, in_bfloat16 = flow.inverse(z.float()), deepcopy(rounded).float().inverse(z.float()), rounded.inverse(z)
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)  # biases are not rounded
        torch.testing.assert_close(in_bfloat16[1], want[1], rtol=1e-1, atol=1e-1)  # what goes from map to map is
        torch.testing.assert_close(tuple(t.detach() for t in with_gradient), exact, rtol=1e-4, atol=1e-4)
        assert not torch.equal(got[0], exact[0])

    def test_gpu_tensors_on_two_devices(self):
        made = example(3, (4,))(2, torch.float32)
        arguments = list(self.moved(made))
        arguments[3] = [t.cpu() for t in arguments[3]]
        with pytest.raises(RuntimeError, match="all tensors must be on the device of x"):
            self.run(arguments)
