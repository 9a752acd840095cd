"""Stacks of autoregressive maps, against the same maps one by one."""

import itertools

import pytest
import torch

from flowkernels import backend
from flowkernels.ops import Activation, Conditioner, Form, Map, ScaleMap, autoregressive, autoregressive_stack
from flowkernels.ops.autoregressive.loop import Lists, stack_op
from flowkernels.ops.autoregressive.training import _inverses_one_by_one
from python_tests.battery import Example, OpBattery, assert_same_bits, with_grad
from python_tests.ops.test_autoregressive import GATED, RESIDUAL, example

AFFINE = torch.tensor([[0.5, -1.0, 0.0, 2.0], [2.0, 0.5, -1.5, 1.0], [0.0, 1.0, -1.0, 0.25]])


def stacked(*makers, affine_before=None):
    """An example of a stack: makers are those of `example`; affine_before numbers the map whose input goes through AFFINE."""

    def make(batch, dtype):
        parts = [maker(batch, dtype) for maker in makers]
        rows = max((p.rows for p in parts), key=len)
        parameters = [t for p in parts for t in p.parameters]
        ends = list(itertools.accumulate((len(p.parameters) for p in parts), initial=0))

        def maps(rows, parameters):
            for number, (p, a, b) in enumerate(zip(parts, ends[:-1], ends[1:], strict=True)):
                _, _, weights, biases, contexts, context_biases, visible, order, activations, wiring, *packed, form, inverse = p.schema(
                    rows[: len(p.rows)], parameters[a:b]
                )
                network = Conditioner(weights, biases, visible, activations, contexts, order, wiring, context_biases)
                affine = AFFINE.to(rows[0].dtype) if number == affine_before else None
                yield Map(network, ScaleMap.from_packed(*packed), Form(form), inverse, affine)

        split = lambda rows: (rows[0], rows[1] if len(rows) > 1 else None)

        def op(rows, parameters):
            x, context = split(rows)
            return autoregressive_stack(x, list(maps(rows, parameters)), context)

        def oracle(rows, parameters):
            (x, *context), total = rows, 0
            for number, (p, a, b) in enumerate(zip(parts, ends[:-1], ends[1:], strict=True)):
                if number == affine_before:
                    before, factor, after = AFFINE.to(x.dtype)
                    x = (x + before) * factor + after
                x, logabsdet = p.oracle([x, *context][: len(p.rows)], parameters[a:b])
                total = total + logabsdet
            return x, total

        schema = lambda rows, parameters: (*split(rows), *Lists.of(list(maps(rows, parameters))), True)
        return Example(rows, parameters, op, oracle, schema, transform=affine_before is None)

    return make


DOWN = (3, 2, 1, 0)


class TestAutoregressiveStack(OpBattery):
    bare_op = stack_op
    cases = {
        "inverses": stacked(example(4, (9, 7), inverse=True), example(4, (6,), activation="tanh", order=DOWN, inverse=True)),
        "forward maps": stacked(example(4, (9,)), example(4, (9, 5), order=DOWN, form="gate", scale=ScaleMap.sigmoid(bias=2.0))),
        "context in one of them": stacked(
            example(4, (9, 7), context=3, inverse=True), example(4, (5,), order=(1, 3, 0, 2), inverse=True), example(4, (5,), inverse=True)
        ),
        "both directions, wired": stacked(
            example(4, GATED, context=2, inverse=True), example(4, (6, 6), order=DOWN), example(4, RESIDUAL, context=2)
        ),
        "an affine map between": stacked(example(4, (9,)), example(4, (6,), order=DOWN, inverse=True), affine_before=1),
        "one map": stacked(example(4, (300, 270), inverse=True)),
    }


def one_by_one(x, maps, context):
    total = 0
    for m in maps:
        own = context if m.conditioner.context_weights else None
        x, logabsdet = autoregressive(x, m.conditioner, own, scale=m.scale, form=m.form, inverse=m.inverse)
        total = total + logabsdet
    return x, total


def three_inverses(batch, dtype=torch.float32, features=5):
    """x, maps, context, parameters."""
    order = [(3 * k + 4) % features for k in range(features)]
    makers = [example(features, (300, 40), context=2, inverse=True), example(features, (20,), order=order, inverse=True)]
    made = [maker(batch, dtype) for maker in (*makers, makers[0])]
    parameters = [with_grad(p.parameters) for p in made]
    maps = []
    for p, own in zip(made, parameters, strict=True):
        _, _, weights, biases, contexts, _, visible, order, activations, *_ = p.schema(p.rows, own)
        maps.append(Map(Conditioner(weights, biases, visible, activations, contexts, order), ScaleMap.softclip(), Form.SCALE_SHIFT, True))
    return *with_grad(made[0].rows), maps, [t for own in parameters for t in own]


@pytest.mark.parametrize("features", [5, 40])  # log-derivatives are added up in chunks of 16
@pytest.mark.parametrize("batch", [1, 2, 7, 300])
def test_the_bits_are_those_of_the_maps_one_by_one(batch, features):
    x, context, maps, _ = three_inverses(batch, features=features)
    with torch.no_grad():
        assert_same_bits(autoregressive_stack(x, maps, context), one_by_one(x, maps, context))


@pytest.mark.parametrize("batch", [3, 130])
def test_the_gradient_is_that_of_the_maps_one_by_one(batch):
    x, context, maps, parameters = three_inverses(batch, torch.float64)
    inputs = [x, context, *parameters]
    weigh = lambda y, logabsdet: (y.sin().sum() + logabsdet.square().sum(),)
    got = torch.autograd.grad(weigh(*autoregressive_stack(x, maps, context)), inputs)
    want = torch.autograd.grad(weigh(*one_by_one(x, maps, context)), inputs)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    with backend("reference"):
        want = torch.autograd.grad(weigh(*one_by_one(x, maps, context)), inputs)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("batch", [0, 3, 130, 700])
def test_forward_maps_together_are_the_maps_one_by_one(batch):
    """Those with few deltas share their parallel regions, those with many do not; one takes no context, and it may be the last."""
    for widths in ((7, 6), (900, 300)):
        makers = [
            example(5, widths, context=2),
            example(5, (20,), order=(4, 0, 3, 1, 2)),
            example(5, (9,), order=(4, 3, 2, 1, 0), context=2),
        ]
        made = [maker(batch, torch.float64) for maker in makers]
        for order in ((0, 1, 2), (0, 2, 1)):
            parameters = [with_grad(p.parameters) for p in made]
            maps = []
            for i in order:
                _, _, weights, biases, contexts, _, visible, generated, activations, *_ = made[i].schema(made[i].rows, parameters[i])
                network = Conditioner(weights, biases, visible, activations, contexts, generated)
                maps.append(Map(network, ScaleMap.softclip(), Form.SCALE_SHIFT))
            x, context = with_grad(made[0].rows)
            inputs = [x, context, *itertools.chain(*parameters)]
            weigh = lambda y, logabsdet: (y.sin().sum() + logabsdet.square().sum(),)
            got = autoregressive_stack(x, maps, context)
            want = one_by_one(x, maps, context)
            assert_same_bits(got[:1], want[:1])
            got, want = (torch.autograd.grad(weigh(*outputs), inputs) for outputs in (got, want))
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("batch", [3, 37])
def test_gradient_by_one_inverse_after_another_is_that_of_the_op(batch):
    """What a GPU runs, whose kernel takes one map."""
    x, context, maps, _ = three_inverses(batch, torch.float64)
    lists = Lists.of(maps)
    with torch.no_grad():
        y, _, between = stack_op(x, context, *lists, True)
        kept = [*between.unbind(), y]
        *tensors, _, activations, wiring, stages, scales = lists
        cotangents, numbers = (torch.randn_like(y), torch.randn_like(y[:, 0])), (activations, wiring, stages, scales)
        arguments = *cotangents, kept, context, *tensors, *numbers, [0, 0, 0], True, True
        torch.testing.assert_close(
            _inverses_one_by_one(*arguments), torch.ops.flowkernels.autoregressive_backward(*arguments), rtol=1e-11, atol=1e-11
        )


def test_rows_that_lie_apart():
    """One row of a matrix whose elements are not neighbours, and a tensor that is one element seen often."""
    made = example(4, (6,), context=3)(1, torch.float32)
    x, _ = made.rows
    _, _, weights, biases, contexts, _, visible, _, activations, *_ = made.schema(made.rows, made.parameters)
    network = Conditioner(weights, biases, visible, activations, contexts)
    for context in (torch.randn(1, 6)[:, ::2], torch.full((1, 1), 2.0).expand(1, 3)):
        want = autoregressive(x, network, context.contiguous())
        torch.testing.assert_close(autoregressive(x, network, context), want)
        torch.testing.assert_close(autoregressive(x.clone().requires_grad_(), network, context), want)


def test_weights_on_another_device_are_refused():
    x, context, maps, _ = three_inverses(6)
    networks = (m.conditioner for m in maps)
    on_meta = [m._replace(conditioner=n._replace(weights=[w.to("meta") for w in n.weights])) for m, n in zip(maps, networks, strict=True)]
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="x must be on meta, like the weights; got cpu"):
            autoregressive_stack(x, on_meta, context)


def test_backward_op_is_what_it_says():
    _, context, maps, _ = three_inverses(5, torch.float64)
    *tensors, _, activations, wiring, stages, scales = Lists.of(maps)
    lists = [[t.detach() for t in some] for some in tensors]
    dy, kept = torch.randn(5, 5, dtype=torch.float64), [torch.randn(5, 5, dtype=torch.float64) for _ in maps]
    for needs in itertools.product((False, True), repeat=2):
        arguments = dy, dy[:, 0], kept, context.detach(), *lists, activations, wiring, stages, scales, [0, 0, 0], *needs
        torch.library.opcheck(torch.ops.flowkernels.autoregressive_backward.default, arguments, test_utils="test_faketensor")


@pytest.mark.parametrize("parts", [RESIDUAL, GATED, (6, 9), (6, 90), None], ids=["residual", "gated", "plain", "wide", "no context"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_training_op_is_what_it_says(parts, activation):
    rows, parameters, *_, schema, _ = example(5, parts or (6, 9), context=2 if parts else 0, activation=activation)(4, torch.float32)
    lists = schema(rows, parameters)
    network = Conditioner(lists[2], lists[3], lists[6], lists[8], lists[4], lists[7], lists[9], lists[5])
    if parts is None:  # a wiring that names the activation of a context that no layer takes
        network = network._replace(wiring=[number for layer in range(3) for number in (layer, -1, 0, int(Activation.GELU))])
    rows = [*rows, None][:2]
    *tensors, _, activations, wiring, stages, scales = Lists.of([Map(network, ScaleMap.softclip(), Form.SCALE_SHIFT)] * 2)
    arguments = rows[0], rows[1], *tensors, activations, wiring, stages, scales
    torch.library.opcheck(torch.ops.flowkernels.autoregressive_training.default, arguments, test_utils="test_faketensor")


def test_half_precision_goes_map_by_map():
    x, context, maps, _ = three_inverses(6)
    with torch.no_grad():
        got = autoregressive_stack(x.bfloat16(), maps, context.bfloat16())
        assert_same_bits(got, one_by_one(x.bfloat16(), maps, context.bfloat16()))


def test_bad_input():
    x, context, maps, _ = three_inverses(6)
    with pytest.raises(ValueError, match="maps must hold at least one map"):
        autoregressive_stack(x, [])
    with pytest.raises(ValueError, match=r"x must have shape \[batch, 5\]"):
        autoregressive_stack(x[:, :4], maps, context)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            with pytest.raises(ValueError, match=r"context is missing: the network takes \[batch, 2\]"):
                autoregressive_stack(x, maps)
            for name in ("auto", "reference"):
                with backend(name), pytest.raises(ValueError, match="no network takes one"):
                    autoregressive_stack(x, maps[1:2], context)
