"""Autoregressive maps of which some features pass unchanged: couplings, additive maps, and what lies between them and a whole MADE.

The oracle is written out from the definition of a coupling, and does not go through the op's reference.
"""

import pytest
import torch
import torch.nn.functional as F

from flowkernels import ScaleMap, backend
from flowkernels.ops import Conditioner, Form, Map, MaskedLayer, autoregressive, autoregressive_stack, check_conditioner
from flowkernels.ops.activation import Activation
from flowkernels.ops.scale_map import PoweredMap, apply_form, invert_form
from python_tests.battery import Example, OpBattery, assert_gradients_do_not_depend_on_threads, assert_same_bits, with_grad


def passing(features, count, widths, *, context=0, scale=None, form="scale_shift", learned=False, order=None, inverse=False, ordered=False):
    """`count` features pass, and a ReLU network of them gives shift and raw scale of the others; with `ordered` each of these sees those
    generated before it too."""
    scale = ScaleMap.softclip() if scale is None else scale
    each = 1 if scale == ScaleMap.unit() else 2
    outputs = each * (features - count)
    reads = features if ordered else count
    shapes = [*zip([reads, *widths], [*widths, outputs], strict=True)]
    order = torch.tensor(order) if order else torch.arange(features)
    if ordered:  # a unit of the first layer for each feature that may be seen, then the outputs
        assert len(widths) == 1 and widths[0] == features
        seen = [torch.arange(1, features + 1), torch.arange(count, features).repeat_interleave(each)]
    else:
        seen = [torch.full((b,), a) for a, b in shapes]

    def network(parameters):
        left = iter(parameters)
        layers = []
        for number, visible in enumerate(seen):
            layer = MaskedLayer(next(left), next(left), visible.int(), Activation.RELU if number + 1 < len(shapes) else Activation.IDENTITY)
            layers.append(layer._replace(context_weight=next(left)) if context and number == 0 else layer)
        return Conditioner.of(layers, order), next(left, None)

    def make(batch, dtype):
        g = torch.Generator().manual_seed(2)
        randn = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype)
        parameters = []
        for number, (a, b) in enumerate(shapes):
            parameters += [randn(a, b) / a**0.5, 0.3 * randn(b)]
            parameters += [randn(context, b)] if context and number == 0 else []
        parameters += [torch.full((1,), 0.7, dtype=dtype)] if learned else []
        rows = [randn(batch, features), *([randn(batch, context)] if context else [])]

        def op(rows, parameters):
            conditioner, a = network(parameters)
            assert not conditioner.wiring
            powered = scale if a is None else PoweredMap(scale, a)
            return autoregressive(rows[0], conditioner, *rows[1:], scale=powered, form=form, inverse=inverse)

        def oracle(rows, parameters):
            conditioner, a = network(parameters)
            x = rows[0][:, order]
            y = x
            map_ = scale if a is None else PoweredMap(scale, a)
            # one pass for a coupling; as many as there are features to invert what sees its own output
            for _ in range(features if ordered and inverse else 1):
                h = (y if ordered and inverse else x)[:, :reads]
                for number, (weight, bias, visible) in enumerate(zip(conditioner.weights, conditioner.biases, seen, strict=True)):
                    h = h @ (weight * (torch.arange(len(weight))[:, None] < visible)) + bias
                    h = h + rows[1] @ conditioner.context_weights[0] if context and number == 0 else h
                    h = F.relu(h) if number + 1 < len(shapes) else h
                shift, raw = (h, torch.zeros_like(h)) if each == 1 else (h[:, 0::2], h[:, 1::2])
                new, log = (invert_form if inverse else apply_form)(Form[form.upper()], x[:, count:], shift, raw, map_)
                y = torch.cat([x[:, :count], new], 1)
            if each == 1:
                log = log.detach()
            return y[:, torch.argsort(order)], log.sum(1)

        def schema(rows, parameters):
            n, a = network(parameters)
            packed = (scale if a is None else PoweredMap(scale, a)).packed
            lists = (n.weights, n.biases, n.context_weights, n.context_biases, n.visible, order, n.activations, n.wiring)
            return (rows[0], rows[1] if context else None, *lists, int(scale.kind), *packed, int(Form[form.upper()]), inverse)

        return Example(rows, parameters, op, oracle, schema, transform=True)

    make.network = network
    return make


def both(name, *args, **options):
    return {f"{name} {d}": passing(*args, inverse=d == "inverse", **options) for d in ("forward", "inverse")}


TANH = ScaleMap.exp_tanh(1.5, inner=2.0)


class TestPassing(OpBattery):
    bare_op = torch.ops.flowkernels.autoregressive.default
    dynamic_shapes = (True,)  # with static ones TestAutoregressive compiles the same op
    implicit = frozenset({"autoregressive behind inverse", "autoregressive and additive behind inverse"})
    cases = {
        **both("coupling", 5, 2, (7, 6)),
        **both("coupling of odd features", 5, 3, (7,), order=[0, 2, 4, 1, 3], form="shift_scale"),
        **both("coupling with a context", 4, 2, (9, 5), context=3, form="divide"),
        **both("learned scale", 5, 2, (7, 6), scale=TANH, learned=True),
        **both("learned scale, gate", 4, 1, (6,), scale=TANH, learned=True, form="gate"),
        **both("learned scale, divide", 4, 1, (6,), scale=TANH, learned=True, form="divide", context=2),
        **both("additive", 5, 2, (7, 6), scale=ScaleMap.unit(), context=2),
        **both("additive, divide", 3, 1, (4,), scale=ScaleMap.unit(), form="divide"),
        **both("no hidden layer", 4, 2, ()),
        **both("beyond one vector", 40, 19, (33,), order=list(range(39, -1, -1))),
        **both("autoregressive behind", 6, 2, (6,), ordered=True),
        **both("autoregressive and additive behind", 6, 2, (6,), ordered=True, scale=ScaleMap.unit()),
    }


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("batch", [0, 256, 257, 1500])
def test_gradients_do_not_depend_on_threads(batch, learned):
    assert_gradients_do_not_depend_on_threads(passing(7, 3, (300, 20), context=3, scale=TANH, learned=learned)(batch, torch.float32))


def test_recorded_and_bare_calls_have_the_same_bits():
    for case in (case for name, case in TestPassing.cases.items() if name.endswith("forward")):
        rows, parameters, op, *_ = case(37, torch.float32)
        with torch.no_grad():
            want = op(rows, parameters)
        assert_same_bits([t.detach() for t in op(rows, with_grad(parameters))], want)


def test_a_stack_of_couplings_is_the_couplings_one_by_one():
    makers = [passing(6, 3, (7,), order=[*range(i % 2, 6, 2), *range(1 - i % 2, 6, 2)], scale=TANH, learned=True) for i in range(3)]
    examples = [make(11, torch.float64) for make in makers]
    for inverse in (False, True):
        maps = []
        for make, each in zip(makers, examples, strict=True):
            network, a = make.network(each.parameters)
            maps.append(Map(network, PoweredMap(TANH, a), Form.SCALE_SHIFT, inverse))
        x, total = examples[0].rows[0], 0
        got = autoregressive_stack(x, maps)
        for map_ in maps:
            x, logabsdet = autoregressive(x, map_.conditioner, scale=map_.scale, inverse=inverse)
            total = total + logabsdet
        assert_same_bits(got[:1], [x])
        torch.testing.assert_close(got[1], total, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("scale", [ScaleMap.softclip(), ScaleMap.unit()], ids=repr)
def test_steps(scale):
    make = passing(5, 2, (4,), scale=scale)
    network, _ = make.network(make(1, torch.float32).parameters)
    each = 1 if scale == ScaleMap.unit() else 2
    assert check_conditioner(network, scale) == [[2, 4, 3 * each]]


class TestBadInput:
    def network(self, scale=None):
        make = passing(5, 2, (4,), scale=scale)
        return make.network(make(1, torch.float32).parameters)[0]

    def test_outputs_for_more_features_than_there_are(self):
        network = self.network()._replace(order=torch.arange(2))
        with pytest.raises(ValueError, match="the last layer must give shift and raw scale of at most 2 features; got 6 outputs"):
            autoregressive(torch.zeros(2, 2), network)

    def test_half_a_feature(self):
        network = self.network()
        weight, bias, seen = (getattr(network, name)[-1] for name in ("weights", "biases", "visible"))
        odd = network._replace(weights=[network.weights[0], weight[:, :5]], biases=[network.biases[0], bias[:5]])
        odd = odd._replace(visible=[network.visible[0], seen[:5]])
        with pytest.raises(ValueError, match="the last layer must give shift and raw scale of at most 5 features; got 5 outputs"):
            check_conditioner(odd)
        with pytest.raises(ValueError, match="got 5 outputs"):
            autoregressive(torch.zeros(2, 5), odd)

    def test_a_coupling_that_reads_what_it_transforms(self):
        network = self.network()
        first = torch.cat([network.weights[0], torch.ones(1, 4)])
        network = network._replace(weights=[first, network.weights[1]], visible=[network.visible[0] + 1, network.visible[1]])
        with pytest.raises(ValueError, match="the network is not autoregressive: feature 2 in the order of generation"):
            check_conditioner(network)
        with torch.no_grad(), pytest.raises(RuntimeError, match="the network is not autoregressive"):
            autoregressive(torch.zeros(2, 5), network, inverse=True)

    def test_an_additive_map_without_an_order(self):
        network = self.network(ScaleMap.unit())._replace(order=None)
        for grad in (False, True):
            with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r"order is missing|x must have shape"):
                autoregressive(torch.zeros(2, 3).requires_grad_(grad), network, scale=ScaleMap.unit())

    def test_a_learned_scale_of_another_dtype(self):
        scale = PoweredMap(TANH, torch.ones(1, dtype=torch.float64, requires_grad=True))
        with pytest.raises(ValueError, match=r"a learned scale must be torch.float32, like the weights; got torch.float64"):
            autoregressive(torch.zeros(2, 5), self.network(), scale=scale)

    def test_a_gate_without_a_scale_in_a_stack(self):
        maps = [Map(self.network(ScaleMap.unit()), ScaleMap.unit(), Form.GATE)]
        for grad in (False, True):
            with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="form must not be 'gate' where sigma is 1"):
                autoregressive_stack(torch.zeros(2, 5).requires_grad_(grad), maps)

    def test_scales_that_do_not_go_together(self):
        with pytest.raises(ValueError, match="form must not be 'gate' where sigma is 1"):
            autoregressive(torch.zeros(2, 5), self.network(ScaleMap.unit()), scale=ScaleMap.unit(), form="gate")
        for scale in (PoweredMap(ScaleMap.exp(), torch.ones(1)), PoweredMap(TANH, torch.ones(3))):
            with pytest.raises(ValueError, match="a learned scale must be one number over an exp_tanh map"):
                autoregressive(torch.zeros(2, 5), self.network(), scale=scale)


def test_a_network_that_reads_nothing_without_a_kernel():
    counts = [torch.full((n,), seen, dtype=torch.int32) for n, seen in ((5, 0), (6, 5))]
    weights, biases = [torch.randn(0, 5), torch.randn(5, 6)], [torch.randn(5), torch.randn(6)]
    network = Conditioner(weights, biases, counts, [1, 0], [], torch.tensor([2, 0, 1]))
    x = torch.randn(4, 3, requires_grad=True)
    for inverse in (False, True):
        got = autoregressive(x, network, inverse=inverse)
        with backend("reference"):
            torch.testing.assert_close(got, autoregressive(x, network, inverse=inverse))
        (dx,) = torch.autograd.grad(got[0].square().sum(), x, create_graph=True)
        assert torch.autograd.grad(dx.sum(), x)[0].isfinite().all()
