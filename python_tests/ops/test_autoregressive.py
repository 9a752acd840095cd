"""The autoregressive op against the D-pass loop, autograd's Jacobian and the definition of its conditioner."""

import itertools
from typing import NamedTuple

import pytest
import torch

from flowkernels import ScaleMap, backend
from flowkernels.ops import Activation, Conditioner, Form, MaskedLayer, autoregressive, check_conditioner
from flowkernels.ops.autoregressive.reference import autoregressive_reference
from flowkernels.ops.degrees import hidden_degrees, staircase
from python_tests.battery import Example, OpBattery, assert_as_exact_as_eager

SCALES = [
    ScaleMap.exp(),
    ScaleMap.exp_half(),
    ScaleMap.exp_clamped(-5.0, 3.0),
    ScaleMap.exp_tanh(2.0),
    ScaleMap.exp_atan(2.0),
    ScaleMap.softclip(),
    ScaleMap.sigmoid(bias=2.0),
    ScaleMap.sigmoid(bias=2.0, floor=1e-3),
    ScaleMap.softplus(floor=1e-3),
    ScaleMap.softplus(ceiling=3.0),
]
FORMS = ["scale_shift", "shift_scale", "divide", "gate"]


class Part(NamedTuple):
    """One layer of a test network: how wide, what it reads and adds, and what the context does there."""

    width: int  # 0: the output layer
    activation: str = "identity"
    source: int | None = None
    residual: int | None = None
    context: str = ""  # "add", "gate", or the activation of a term that is added; with a trailing "+" it has a bias
    unitwise: str = ""  # "read" or "affine"


def staircases(parts, rule, context, degrees):
    """What each layer's units see, given the degrees of the features; values that are added to each other share their degrees."""
    g = torch.Generator().manual_seed(0)
    top = int(degrees.max()) if len(degrees) else 1
    values = [degrees]
    for number, part in enumerate(parts):
        if part.residual is not None:
            values.append(values[part.residual])
        elif part.unitwise:
            values.append(values[number if part.source is None else part.source])
        elif part.width:
            values.append(hidden_degrees(part.width, top, rule=rule, context=context, generator=g))
        else:
            values.append(degrees.repeat_interleave(2))
    sources = [number if part.source is None else part.source for number, part in enumerate(parts)]
    units = lambda n: torch.arange(1, n + 1, dtype=torch.int32)
    return [
        units(len(above)) if part.unitwise else staircase(values[source], above, strict=not part.width)
        for part, source, above in zip(parts, sources, values[1:], strict=True)
    ]


def example(
    features,
    parts,
    *,
    rule="even",
    context=0,
    activation="relu",
    scale=None,
    form="scale_shift",
    order=None,
    degrees=None,
    narrow=False,
    inverse=False,
):
    """parts: the network, or the widths of a plain one. degrees: sorted degrees of the features in their order of generation;
    shared degrees make a partial order. narrow: weights for the features that are seen alone."""
    if all(isinstance(p, int) for p in parts):
        parts = [Part(w, activation if w else "identity", context="add" if context else "") for w in (*parts, 0)]
    degrees = torch.arange(1, features + 1) if degrees is None else torch.tensor(degrees)
    visible = staircases(parts, rule, context > 0, degrees)
    widths = [features, *map(len, visible)]
    scale = scale or ScaleMap.softclip()
    order = None if order is None else torch.tensor(order)

    def layer(number, tensor):
        """tensor(fan_in, *shape) gives the next parameter."""
        part, seen, outputs = parts[number], visible[number], len(visible[number])
        wiring = {"source": part.source, "residual": part.residual}
        if part.unitwise:
            pair = (tensor(1, outputs), tensor(10, outputs)) if part.unitwise == "affine" else (None, None)
            return MaskedLayer(*pair, seen, Activation[part.activation.upper()], **wiring)
        fan_in = (seen + context).clamp(min=1)
        source = number if part.source is None else part.source
        rows = int(seen[-1]) if narrow and source == 0 and outputs else widths[source]
        weight, bias = tensor(fan_in, rows, outputs), tensor(10, outputs)
        if part.context:
            kind = part.context.rstrip("+")
            wiring["context_weight"] = tensor(fan_in, context, outputs)
            wiring["context_bias"] = tensor(10, outputs) if part.context.endswith("+") else None
            wiring["gate"] = kind == "gate"
            wiring["context_activation"] = Activation[{"add": "IDENTITY", "gate": "SIGMOID"}.get(kind, kind.upper())]
        return MaskedLayer(weight, bias, seen, Activation[part.activation.upper()], **wiring)

    def conditioner(parameters):
        left = iter(parameters)
        network = Conditioner.of([layer(number, lambda *_: next(left)) for number in range(len(parts))], order)
        assert next(left, None) is None
        return network

    def make(batch, dtype):
        g = torch.Generator().manual_seed(2)
        randn = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype)
        parameters = []

        def draw(fan_in, *shape):
            parameters.append(randn(*shape) / torch.as_tensor(fan_in, dtype=dtype).sqrt())
            return parameters[-1]

        for number in range(len(parts)):
            layer(number, draw)
        rows = [randn(batch, features), *([randn(batch, context)] if context else [])]
        split = lambda rows: (rows[0], rows[1] if context else None)

        def op(rows, parameters):
            x, c = split(rows)
            return autoregressive(x, conditioner(parameters), c, scale=scale, form=form, inverse=inverse)

        def oracle(rows, parameters):
            x, c = split(rows)
            return autoregressive_reference(x, conditioner(parameters), c, scale, Form[form.upper()], inverse)

        def schema(rows, parameters):
            n = conditioner(parameters)
            lists = (n.weights, n.biases, n.context_weights, n.context_biases, n.visible, order, n.activations, n.wiring)
            return (*split(rows), *lists, int(scale.kind), *scale.packed, int(Form[form.upper()]), inverse)

        return Example(rows, parameters, op, oracle, schema, transform=True)

    return make


# context in front of the first activation and inside the block, an activation as the block reads: nflows
RESIDUAL = [
    Part(7, context="tanh+"),
    Part(7, "tanh", unitwise="read"),
    Part(7, "tanh", context="add+"),
    Part(7, residual=1),
    Part(0),
]
# the context gates the end of the block, which begins with a batch norm: normflows
GATED = [
    Part(6, context="add"),
    Part(6, "silu", unitwise="affine"),
    Part(9, "silu"),
    Part(6, residual=1, context="gate+"),
    Part(0),
]
# a residual of activated values behind an activation, several layers that read and add the same values, the features read twice
WIRED = [
    Part(5, "elu"),
    Part(8, "elu"),
    Part(5, "sigmoid", residual=1),
    Part(5, "tanh", source=0, residual=3),
    Part(5, unitwise="affine", source=3, residual=1),
    Part(0, source=5),
]


# values that several products read, and others add before and after: the beginning of networks that gradients are tested with
SHARED = [
    Part(5, "elu"),
    Part(5, "silu", residual=1),
    Part(5, "tanh", source=1),
    Part(7, "gelu", source=2, context="tanh"),
    Part(5, "sigmoid", source=4, residual=2),
    Part(5, "relu", source=3, residual=2, context="gate+"),
]


def both(name, *args, **kwargs):
    return {f"{name} {d}": example(*args, inverse=d == "inverse", **kwargs) for d in ("forward", "inverse")}


class TestAutoregressive(OpBattery):
    bare_op = torch.ops.flowkernels.autoregressive.default
    cases = {
        **both("two layers", 4, (9, 7)),
        **both("context", 3, (10, 9), context=2, activation="tanh"),
        **both("fewer units than features", 6, (3,), order=[3, 1, 4, 0, 5, 2], activation="elu"),
        **both("one feature", 1, (3, 3), context=2, activation="sigmoid"),
        **both("no hidden layer", 3, ()),
        **both("three layers, cycling", 4, (5, 4, 6), rule="cycling", activation="silu"),
        **both("random degrees", 4, (6, 5), rule="random", activation="softplus", form="gate", scale=ScaleMap.sigmoid(bias=1.0)),
        **both("shared degrees", 5, (6, 6), degrees=[1, 1, 2, 4, 4], activation="gelu"),
        **both("a coupling", 4, (5,), degrees=[1, 1, 2, 2], activation="leaky_relu", form="shift_scale"),
        **both("residual", 2, RESIDUAL, context=2),
        **both("gated", 2, GATED, context=2, order=[1, 0]),
        **both("wired", 2, WIRED),
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", SCALES, ids=repr)
@pytest.mark.parametrize("inverse", [False, True])
class TestMapsAndForms:
    def test_equal_the_oracle(self, scale, form, inverse):
        for batch in (3, 30):
            rows, parameters, op, oracle, *_ = example(4, (11, 8), scale=scale, form=form, inverse=inverse)(batch, torch.float64)
            with torch.no_grad():
                torch.testing.assert_close(op(rows, parameters), oracle(rows, parameters), rtol=1e-12, atol=1e-12)

    def test_round_trip(self, scale, form, inverse):
        rows, parameters, op, *_ = example(4, (11, 8), scale=scale, form=form, inverse=inverse)(30, torch.float64)
        back = example(4, (11, 8), scale=scale, form=form, inverse=not inverse)(30, torch.float64).op
        with torch.no_grad():
            y, logabsdet = op(rows, parameters)
            x, opposite = back([y], parameters)
        torch.testing.assert_close(x, rows[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(opposite, -logabsdet, rtol=1e-9, atol=1e-9)


def widened(parts, width):
    return [part._replace(width=width if part.width else 0) for part in parts]


@pytest.mark.parametrize(
    "features, parts, context",
    [
        (40, (300, 520), 0),
        (20, (600,), 300),
        (130, (64, 64), 5),
        (300, (40,), 0),
        (10, widened(RESIDUAL, 270), 3),
        (10, widened(GATED, 270), 300),
        (9, widened(GATED, 20), 2),
        (10, widened(WIRED, 270), 0),
        (37, (512, 1024), 3),  # rows of weights whole pages apart
    ],
)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sizes_beyond_one_chunk(features, parts, context, inverse, dtype):
    """Sums longer than a chunk of 256 inputs, in every form of the loop, with the same bits in each."""
    case = example(features, parts, context=context, activation="tanh", inverse=inverse)
    rows, parameters, op, oracle, *_ = case(101, dtype)
    with torch.no_grad():
        whole = op(rows, parameters)
        want = oracle([t.double() for t in rows], [t.double() for t in parameters])
        for g, w in zip(whole, want, strict=True):
            torch.testing.assert_close(
                g, w.to(dtype), **({"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4})
            )
        for begin, end in [(0, 1), (3, 5), (7, 10), (10, 14), (40, 53)]:
            part = op([t[begin:end] for t in rows], parameters)
            assert all(torch.equal(p, w[begin:end]) for p, w in zip(part, whole, strict=True))


@pytest.fixture
def restored_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("restored_threads")
def test_any_batch_on_any_number_of_threads(threads, inverse, dtype):
    """However the rows are shared out in tiles, each row has the same bits."""
    rows, parameters, op, *_ = example(9, (70, 40), context=2, inverse=inverse)(1500, dtype)
    with torch.no_grad():
        torch.set_num_threads(1)
        whole = op(rows, parameters)
        torch.set_num_threads(threads)
        for batch in (*range(1, 34), *range(47, 260, 16), *range(49, 260, 16), 385, 577, 640, 769, 1000, 1153, 1500):
            got = op([t[:batch] for t in rows], parameters)
            assert all(torch.equal(g, w[:batch]) for g, w in zip(got, whole, strict=True)), batch


@pytest.mark.parametrize(("features", "batch", "inverse"), [(50, 2000, False), (12, 9000, True)])
def test_error_in_float32_is_that_of_eager_float32(features, batch, inverse):
    assert_as_exact_as_eager(example(features, (300, 300), inverse=inverse)(batch, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("inverse", [False, True])
def test_half_precision_is_float32_rounded_once(dtype, inverse):
    case = example(5, (12, 9), context=2, inverse=inverse)
    rows, parameters, op, *_ = case(9, torch.float32)
    rows, parameters = [t.to(dtype) for t in rows], [t.to(dtype) for t in parameters]
    with torch.no_grad():
        y, logabsdet = op(rows, parameters)
        want, want_logabsdet = op([t.float() for t in rows], [t.float() for t in parameters])
    assert y.dtype == dtype and torch.equal(y, want.to(dtype))
    assert logabsdet.dtype == torch.float32 and torch.equal(logabsdet, want_logabsdet)


def test_a_bad_value_reaches_only_what_sees_it():
    rows, parameters, op, *_ = example(5, (12, 9), inverse=True)(3, torch.float32)
    with torch.no_grad():
        clean, clean_logabsdet = op(rows, parameters)
        rows[0][1, 2] = torch.nan
        got, logabsdet = op(rows, parameters)
    assert torch.equal(got[1, :2], clean[1, :2]) and got[1, 2:].isnan().all() and logabsdet[1].isnan()
    assert torch.equal(got[0::2], clean[0::2]) and torch.equal(logabsdet[0::2], clean_logabsdet[0::2])


def test_overflow_is_an_infinity():
    for batch in (2, 9):
        rows, parameters, op, *_ = example(1, (3,), scale=ScaleMap.exp(), inverse=True)(batch, torch.float32)
        parameters[-1][1] = -200.0  # 1/sigma = exp(200)
        with torch.no_grad():
            x, logabsdet = op(rows, parameters)
        assert x.isinf().all() and (logabsdet > 190).all()


def test_backend_reference_runs_the_reference():
    rows, parameters, op, oracle, *_ = example(4, (9,), inverse=True)(6, torch.float32)
    with torch.no_grad(), backend("reference"):
        assert all(torch.equal(g, w) for g, w in zip(op(rows, parameters), oracle(rows, parameters), strict=True))
    with pytest.raises(ValueError, match="backend must be one of auto, reference, cpp, cuda, triton; got 'fast'"), backend("fast"):
        pass
    with (
        torch.no_grad(),
        backend("cuda"),
        pytest.raises(RuntimeError, match="'cuda' was chosen, but autoregressive was called with tensors on cpu"),
    ):
        op(rows, parameters)


def test_memory_outside_the_tensors_is_not_touched():
    """Rows of x and y lie between guards; a step over an edge would show."""
    for batch, inverse in itertools.product((1, 3, 5, 13), (False, True)):
        rows, parameters, op, *_ = example(3, (7, 5), inverse=inverse)(batch, torch.float32)
        guarded = torch.full((batch + 2, 5), torch.nan)
        guarded[1:-1, 1:-1] = rows[0]
        with torch.no_grad():
            got = op([guarded[1:-1, 1:-1]], parameters)
            want = op(rows, parameters)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


class TestBadInput:
    def conditioner(self, context=0, visible=None):
        g = torch.Generator().manual_seed(0)
        seen = visible or [[1, 2], [0, 0, 1, 1, 2, 2]]
        layers = [
            MaskedLayer(
                torch.randn(n, m, generator=g),
                torch.zeros(m),
                torch.tensor(v, dtype=torch.int32),
                Activation.IDENTITY,
                torch.zeros(context, m) if context else None,
            )
            for (n, m), v in zip([(3, 2), (2, 6)], seen, strict=True)
        ]
        return Conditioner.of(layers)

    @pytest.mark.parametrize(
        ("x", "context", "network", "message"),
        [
            (torch.zeros(3), None, 0, r"x must have shape \[batch, 3\], one column per feature; got \[3\]"),
            (torch.zeros(2, 4), None, 0, r"x must have shape \[batch, 3\], one column per feature; got \[2, 4\]"),
            (torch.zeros(2, 3).long(), None, 0, "x must be float64, float32, float16 or bfloat16; got torch.int64"),
            (torch.zeros(2, 3).double(), None, 0, "x must be torch.float32, like the weights; got torch.float64"),
            (torch.zeros(2, 3, device="meta"), None, 0, "x must be on cpu, like the weights; got meta"),
            (torch.zeros(2, 3), None, 2, r"context is missing: the network takes \[batch, 2\]"),
            (torch.zeros(2, 3), torch.zeros(2, 2), 0, r"context was given, \[2, 2\], but the network takes none"),
            (torch.zeros(2, 3), torch.zeros(4, 2), 2, r"context must have shape \[2, 2\], one row per row of x; got \[4, 2\]"),
            (torch.zeros(2, 3), torch.zeros(2, 2).double(), 2, "context must be torch.float32 on cpu, like x; got torch.float64"),
        ],
    )
    def test_calls(self, x, context, network, message):
        for inverse in (False, True):
            with pytest.raises(ValueError, match=message):
                autoregressive(x, self.conditioner(network), context, inverse=inverse)

    def test_unknown_form(self):
        with pytest.raises(ValueError, match="form"):
            autoregressive(torch.zeros(2, 3), self.conditioner(), form="affine")

    @pytest.mark.parametrize(
        ("visible", "message"),
        [
            ([[1, 2], [0, 0, 1, 1, 1, 2]], None),
            ([[1, 2], [1, 1, 1, 1, 2, 2]], "the network is not autoregressive: feature 0 in the order of generation can see itself"),
            ([[2, 3], [0, 0, 1, 1, 2, 2]], "the network is not autoregressive: feature 1"),
            ([[2, 1], [0, 0, 1, 1, 2, 2]], r"layer 0: visible must ascend from 0 to at most 3; got \[2, 1\]"),
            ([[1, 4], [0, 0, 1, 1, 2, 2]], r"layer 0: visible must ascend from 0 to at most 3; got \[1, 4\]"),
        ],
    )
    def test_networks(self, visible, message):
        network = self.conditioner(visible=visible)
        if message is None:
            check_conditioner(network)
            return
        with pytest.raises(ValueError, match=message):
            check_conditioner(network)
        with torch.no_grad(), pytest.raises(RuntimeError, match="autoregressive|visible"):
            autoregressive(torch.zeros(2, 3), network, inverse=True)

    @pytest.mark.parametrize(
        ("number", "change", "message"),
        [
            (1, {"source": 2}, "layer 1 must read values 0 to 1; got source 2 and residual -1"),
            (1, {"residual": 0}, "layer 1: residual must be 4 wide, like the layer; got 2"),
            (2, {"residual": 2}, "the last layer must be a masked layer with neither gate nor residual nor activation"),
            (2, {"activation": Activation.TANH}, "the last layer must be a masked layer with neither gate nor residual nor activation"),
            (
                1,
                {"weight": None, "bias": None},
                "layer 1: visible of a unitwise layer must be 1..4; got",
            ),
            (1, {"weight": torch.zeros(3, 4)}, "layer 1 must have 4 inputs, the outputs of the layer it reads; got 3"),
            (1, {"context_bias": torch.zeros(3)}, r"layer 1: context_bias must have shape \[4\]; got \[3\]"),
            (0, {"bias": torch.zeros(3)}, r"layer 0: bias must have shape \[4\]; got \[3\]"),
        ],
    )
    def test_wiring(self, number, change, message):
        seen = [[1, 1, 1, 1], [2, 3, 4, 4], [0, 0, 4, 4]]
        shapes = [(2, 4), (4, 4), (4, 4)]
        layers = [
            MaskedLayer(torch.zeros(shape), torch.zeros(4), torch.tensor(v, dtype=torch.int32), context_weight=torch.zeros(3, 4))
            for shape, v in zip(shapes, seen, strict=True)
        ]
        check_conditioner(Conditioner.of(layers))
        layers[number] = layers[number]._replace(**change)
        network = Conditioner.of(layers)
        with pytest.raises(ValueError, match=message):
            check_conditioner(network)
        if "visible" not in message:
            with torch.no_grad(), pytest.raises(RuntimeError, match="flowkernels::autoregressive"):
                autoregressive(torch.zeros(2, 2), network, torch.zeros(2, 3))

    def test_context_weights_belong_to_layers(self):
        network = self.conditioner()
        n = len(network.weights)
        spare = [torch.zeros(3, len(network.visible[0]))] * (n + 1)
        with pytest.raises(ValueError, match=f"one entry for each layer that takes the context, 0 or 1 or {n}; got {n + 1}"):
            check_conditioner(network._replace(context_weights=spare))
        wired = network._replace(wiring=[number for layer in range(n) for number in (layer, -1, 0, 0)], context_weights=spare[:1])
        with pytest.raises(ValueError, match="one entry for each layer that takes the context, 0; got 1"):
            check_conditioner(wired)
        x, context = torch.zeros(2, network.features), torch.zeros(2, 3)
        for grad in (False, True):
            with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="context_weights do not fit the wiring"):
                autoregressive(x.clone().requires_grad_(grad), wired, context)

    def test_a_bias_needs_a_weight(self):
        lone = MaskedLayer(None, torch.zeros(2), torch.arange(1, 3, dtype=torch.int32))
        last = MaskedLayer(torch.zeros(2, 4), torch.zeros(4), torch.tensor([0, 0, 1, 1], dtype=torch.int32))
        with pytest.raises(ValueError, match=r"layer 0: a layer without weight takes no bias; got one of shape \[2\]"):
            Conditioner.of([lone, last])

    def test_the_activation_of_no_context_wires_nothing(self):
        layers = [layer._replace(context_activation=Activation.TANH) for layer in self.conditioner().layers]
        assert Conditioner.of(layers).wiring == []

    def test_scale_is_a_scale_map(self):
        with pytest.raises(ValueError, match="scale must be a ScaleMap, such as .*; got 'exp'"):
            autoregressive(torch.zeros(2, 3), self.conditioner(), scale="exp")

    def test_order_is_a_permutation(self):
        with pytest.raises(ValueError, match=r"order must be a permutation of 0..2; got \[0, 0, 1\]"):
            check_conditioner(self.conditioner()._replace(order=torch.tensor([0, 0, 1])))
