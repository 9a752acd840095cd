"""The gradient of an inverse by implicit differentiation, which serves where no kernel makes it."""

import pytest
import torch

from flowkernels import ScaleMap, backend
from flowkernels.ops import Activation, Conditioner, Form, MaskedLayer, autoregressive
from flowkernels.ops.autoregressive.implicit import inverse_with_gradient
from flowkernels.ops.autoregressive.reference import autoregressive_reference
from flowkernels.ops.scale_map import PoweredMap
from python_tests.ops.test_autoregressive import FORMS, SCALES, TestAutoregressive, example

INVERSES = {name: case for name, case in TestAutoregressive.cases.items() if name.endswith("inverse")}
del TestAutoregressive  # or it would be collected here once more


def network_of(made, parameters):
    _, _, weights, biases, contexts, context_biases, visible, order, activations, wiring, kind, p0, p1, form, _ = made.schema(
        made.rows, parameters
    )
    network = Conditioner(weights, biases, visible, activations, contexts, order, wiring, context_biases)
    return network, ScaleMap.from_packed(kind, p0, p1), Form(form)


def gradients(outputs, leaves, **options):
    return torch.autograd.grad([o.sin().sum() for o in outputs], leaves, materialize_grads=True, **options)


def assert_is_the_references(made, tolerance=1e-9):
    leaves = [t.requires_grad_() for t in (*made.rows, *made.parameters)]
    z, context = (*made.rows, None)[:2]
    network, scale, form = network_of(made, made.parameters)
    outputs = inverse_with_gradient(z, network, context, scale, form)
    want = autoregressive_reference(z, network, context, scale, form, True)
    torch.testing.assert_close(outputs, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients(outputs, leaves), gradients(want, leaves), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", INVERSES)
def test_every_network_of_the_battery(case):
    assert_is_the_references(INVERSES[case](7, torch.float64))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [*SCALES, ScaleMap.exp_half(0.1)], ids=repr)
def test_maps_and_forms(scale, form):
    assert_is_the_references(example(4, (11, 8), scale=scale, form=form, inverse=True)(9, torch.float64))


def with_passing_features(grad=True):
    """Six features, of which the first two pass, in an order of its own; a learned scale."""
    g = torch.Generator().manual_seed(5)
    leaf = lambda *shape: (torch.randn(shape, generator=g, dtype=torch.float64) / 2).requires_grad_(grad)
    layers = [
        MaskedLayer(leaf(6, 7), leaf(7), torch.tensor([2, 2, 3, 3, 4, 5, 5], dtype=torch.int32), Activation.TANH),
        MaskedLayer(leaf(7, 8), leaf(8), torch.tensor([2, 2, 4, 4, 5, 5, 7, 7], dtype=torch.int32)),
    ]
    scale = PoweredMap(ScaleMap.exp_tanh(0.7), leaf(1))
    return leaf(5, 6), Conditioner.of(layers, torch.tensor([3, 0, 5, 1, 4, 2])), scale


def test_serves_where_no_kernel_does():
    """A map that the kernel's gradient does not take is one node all the same, and as it is in the reference."""
    z, network, scale = with_passing_features()
    leaves = [z, *network.weights, *network.biases, scale.a]
    outputs = autoregressive(z, network, scale=scale, inverse=True)
    assert {id(node.variable) for node, _ in outputs[0].grad_fn.next_functions if node is not None} == set(map(id, leaves))
    with backend("reference"):
        want = autoregressive(z, network, scale=scale, inverse=True)
    torch.testing.assert_close(outputs, want)
    torch.testing.assert_close(gradients(outputs, leaves), gradients(want, leaves), rtol=1e-9, atol=1e-9)


def test_second_derivatives_and_several_cotangents():
    z, network, scale = with_passing_features()
    leaves = [z, network.weights[0], network.biases[1], scale.a]

    def call(z, weight, bias, a):
        own = network._replace(weights=[weight, network.weights[1]], biases=[network.biases[0], bias])
        return autoregressive(z, own, scale=PoweredMap(scale.scale, a), inverse=True)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves, atol=1e-4)
    jacobians = [torch.autograd.functional.jacobian(call, tuple(leaves), vectorize=v) for v in (False, True)]
    torch.testing.assert_close(*jacobians)


def test_parts_of_the_gradient():
    z, network, scale = with_passing_features(grad=False)
    for which in (z, network.weights[1], scale.a):
        which.requires_grad_()
        for output in (0, 1):  # x alone, and log|det| alone
            y = autoregressive(z, network, scale=scale, inverse=True)[output]
            with backend("reference"):
                want = autoregressive(z, network, scale=scale, inverse=True)[output]
            torch.testing.assert_close(gradients([y], [which]), gradients([want], [which]), rtol=1e-9, atol=1e-9)
        which.requires_grad_(False)


def test_under_autocast():
    made = example(4, (9, 7), context=2, inverse=True)(6, torch.float32)
    leaves = [t.requires_grad_() for t in (*made.rows, *made.parameters)]
    outputs = inverse_with_gradient(
        made.rows[0], *network_of(made, made.parameters)[:1], made.rows[1], *network_of(made, made.parameters)[1:]
    )
    want = gradients(outputs, leaves, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gradients(outputs, leaves)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
