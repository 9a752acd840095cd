"""Gradients of the masked autoregressive map and its inverse, beyond what the battery asks of every op."""

import pytest
import torch

from flowkernels import ScaleMap, _extension, backend
from flowkernels.ops import Activation, Conditioner, Form, Map, MaskedLayer, autoregressive
from flowkernels.ops.autoregressive.loop import Lists
from python_tests.battery import assert_gradients_do_not_depend_on_threads, assert_same_bits
from python_tests.ops.test_autoregressive import FORMS, GATED, RESIDUAL, SCALES, WIRED, Part, example


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [*SCALES, ScaleMap.exp_half(0.1), ScaleMap.softplus(ceiling=0.7)], ids=repr)
@pytest.mark.parametrize("inverse", [False, True])
def test_gradients_are_those_of_the_reference(scale, form, inverse):
    """Limits that hold for many of the scales too."""
    rows, parameters, op, oracle, *_ = example(5, (11, 8), scale=scale, form=form, inverse=inverse)(30, torch.float64)
    leaves = [t.requires_grad_() for t in (*rows, *parameters)]
    g = torch.Generator().manual_seed(3)
    cotangents = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((30, 5), (30,))]
    got, want = (torch.autograd.grad(f(rows, parameters), leaves, cotangents) for f in (op, oracle))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * max(w.abs().max().item() for w in want))


NETWORKS = {
    "plain": ((30, 20), 0),
    "context": ((30, 20), 3),
    "wide": ((30, 60), 0),
    "wide, context": ((30, 110), 3),
    "residual": (RESIDUAL, 2),
    "gated": (GATED, 3),
    "wired": (WIRED, 0),
}


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("batch", [0, 256, 257, 1500])
def test_gradients_do_not_depend_on_threads(batch, network, inverse):
    """Sums over rows go span by span, and a span has a chunk of rows for each thread."""
    parts, context = NETWORKS[network]
    assert_gradients_do_not_depend_on_threads(example(7, parts, context=context, inverse=inverse)(batch, torch.float32))


@pytest.mark.parametrize(("network", "activation"), [*((name, "relu") for name in NETWORKS), ("plain", "silu"), ("wide, context", "silu")])
@pytest.mark.skipif(not _extension.status().cpu_library, reason="the reference's products are BLAS's")
def test_values_and_gradients_of_few_rows_have_the_bits_of_many(network, activation):
    parts, context = NETWORKS[network]
    rows, parameters, op, *_ = example(7, parts, context=context, activation=activation)(30, torch.float32)

    def run(few):
        leaves = [t[:few].clone().requires_grad_() for t in rows]
        y, logabsdet = op(leaves, [p.requires_grad_() for p in parameters])
        return y, logabsdet, *torch.autograd.grad(y.square().sum() + logabsdet.sum(), leaves)

    many = run(30)
    for few in range(1, 9):
        assert_same_bits(run(few), [t[:few] for t in many])


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.skipif(not _extension.status().cpu_library, reason="the CPU library was not built")
def test_a_map_is_one_node_of_the_graph(network, inverse):
    """No graph of a layer's parts, and none of D passes."""
    parts, context = NETWORKS[network]
    rows, parameters, op, *_ = example(7, parts, context=context, inverse=inverse)(4, torch.float32)
    leaves = [t.requires_grad_() for t in (*rows, *parameters)]
    y, logabsdet = op(rows, parameters)
    assert y.grad_fn is logabsdet.grad_fn
    below = [node for node, _ in y.grad_fn.next_functions if node is not None]
    assert {id(node.variable) for node in below} == set(map(id, leaves))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    ("parts", "degrees"),
    [
        ([Part(9, "tanh"), Part(0)], [1, 1, 2, 3, 3, 3]),
        ([Part(6, "tanh"), Part(6, residual=0), Part(6, "tanh", source=0, residual=2), Part(0)], None),
    ],
    ids=["shared degrees", "features added"],
)
def test_a_network_that_reads_the_first_features_alone(parts, degrees, inverse):
    rows, parameters, op, oracle, *_ = example(6, parts, degrees=degrees, narrow=True, inverse=inverse)(9, torch.float64)
    assert parameters[0].shape[0] < 6
    leaves = [t.requires_grad_() for t in (*rows, *parameters)]
    torch.testing.assert_close(op(rows, parameters), oracle(rows, parameters))
    got, want = (torch.autograd.grad([o.sin().sum() for o in f(rows, parameters)], leaves) for f in (op, oracle))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("inverse", [False, True])
def test_a_network_that_reads_a_part_of_the_features_that_come_together(inverse):
    """Features 1 and 2 see what feature 0 made; of the two, a later unit sees the first alone, and the weight ends there."""
    g = torch.Generator().manual_seed(0)
    leaf = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()
    layers = [
        MaskedLayer(leaf(2, 4), leaf(4), torch.tensor([1, 1, 2, 2], dtype=torch.int32), Activation.TANH),
        MaskedLayer(leaf(4, 8), leaf(8), torch.tensor([0, 0, 2, 2, 2, 2, 4, 4], dtype=torch.int32)),
    ]
    network, x = Conditioner.of(layers), leaf(9, 4)
    leaves = [x, *network.weights, *network.biases]
    found = []
    for name in ("auto", "reference"):
        with backend(name):
            outputs = autoregressive(x, network, inverse=inverse)
            found.append((*outputs, *torch.autograd.grad([o.sin().sum() for o in outputs], leaves)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("width", [63, 64, 65, 127, 128, 129])
def test_widths_about_a_block(width, inverse):
    rows, parameters, op, oracle, *_ = example(2, (width, width), activation="tanh", inverse=inverse)(9, torch.float64)
    leaves = [t.requires_grad_() for t in (*rows, *parameters)]
    got, want = (torch.autograd.grad([o.sin().sum() for o in f(rows, parameters)], leaves) for f in (op, oracle))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("inverse", [False, True])
def test_a_layer_without_units_may_take_the_context(inverse):
    empty = torch.empty(0, dtype=torch.int32)
    g = torch.Generator().manual_seed(0)
    leaf = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()
    layers = [
        MaskedLayer(leaf(3, 5), leaf(5), torch.tensor([1, 1, 2, 2, 3], dtype=torch.int32), Activation.TANH),
        MaskedLayer(leaf(5, 0), leaf(0), empty, context_weight=leaf(2, 0), gate=True),
        MaskedLayer(leaf(5, 8), leaf(8), torch.tensor([0, 0, 2, 2, 4, 4, 5, 5], dtype=torch.int32), source=1),
    ]
    network, x, context = Conditioner.of(layers), leaf(4, 4), leaf(4, 2)
    got = autoregressive(x, network, context, inverse=inverse)
    with backend("reference"):
        want = autoregressive(x, network, context, inverse=inverse)
    torch.testing.assert_close(got, want)
    leaves = [x, *network.weights, *network.biases]
    got, want = (torch.autograd.grad([o.sin().sum() for o in outputs], leaves, materialize_grads=True) for outputs in (got, want))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("activation", ["gelu", "silu", "elu", "softplus"])
@pytest.mark.parametrize("inverse", [False, True])
def test_gradients_through_a_contexts_own_activation(activation, inverse):
    """Some derivatives are known from the activation's value, others need what came before it."""
    parts = [Part(7, activation, context=activation), Part(7, activation, context="gate"), Part(7, residual=1, context="gate+"), Part(0)]
    rows, parameters, op, oracle, *_ = example(4, parts, context=3, inverse=inverse)(9, torch.float64)
    leaves = [t.requires_grad_() for t in (*rows, *parameters)]
    got, want = (torch.autograd.grad([o.sin().sum() for o in f(rows, parameters)], leaves) for f in (op, oracle))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("activation", ["softplus", "sigmoid"])
def test_a_unit_far_below_zero_has_a_gradient_in_float32(activation, inverse):
    """Its derivative, which is found from its value, is not what a difference from 1 leaves."""
    rows, parameters, op, *_ = example(3, (8,), activation=activation, inverse=inverse)(5, torch.float64)
    parameters[1] -= 25
    found = []
    for dtype in (torch.float32, torch.float64):
        leaves = [p.to(dtype).requires_grad_() for p in parameters]
        found.append(torch.autograd.grad([o.sum() for o in op([t.to(dtype) for t in rows], leaves)], leaves[1])[0].double())
    torch.testing.assert_close(*found, rtol=1e-3, atol=0)


@pytest.mark.parametrize("width", [63, 64])
@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("batch", [0, 1, 600])
@pytest.mark.skipif(not _extension.status().cpu_library, reason="the CPU library was not built")
def test_a_first_layer_that_costs_little_is_not_kept(batch, activation, context, width):
    """Nor what comes before its activation. Its values are made again, by the same rule in C++ and for torch.compile."""
    units, features = 11, 8 - 2 * context
    make = example(features, (units, width), context=context, activation=activation)
    rows, parameters, op, oracle, schema, *_ = make(batch, torch.float64)
    x, c, weights, biases, contexts, _, visible, order, activations, *_ = schema(rows, parameters)
    network = Conditioner(weights, biases, visible, activations, contexts, order)
    *lists, _, activations, wiring, stages, scales = Lists.of([Map(network, ScaleMap.softclip(), Form.SCALE_SHIFT)])
    _, _, (kept,) = torch.ops.flowkernels.autoregressive_training(x, c, *lists, activations, wiring, stages, scales)
    layers = (units if width < 64 else 0) + width
    assert kept.shape == (batch, features + (2 if activation == "silu" else 1) * layers + 2 * features)
    leaves = [t.requires_grad_() for t in (*rows, *parameters)]
    got, want = (torch.autograd.grad([o.sin().sum() for o in f(rows, parameters)], leaves) for f in (op, oracle))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
