import copy
import pickle

import pytest
import torch
from torch.nn.utils import prune

from flowkernels import ScaleMap, backend
from flowkernels.layers import FlowBatchNorm, Inverse, MaskedAutoregressive, MaskedLinear, Permute, Unitwise
from flowkernels.ops import Conditioner, MaskedLayer
from flowkernels.ops.degrees import hidden_degrees, staircase


def shaken(layer):
    """The layer with its parameters moved off their initial values, inside their staircases."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return layer


@pytest.mark.parametrize("order", ["ascending", "descending", [2, 0, 3, 1]])
@pytest.mark.parametrize("hidden", [(16,), (3,), (10, 12, 9)])
@pytest.mark.parametrize("degrees", ["even", "cycling", "random"])
def test_an_output_depends_on_exactly_what_was_generated_before(order, hidden, degrees):
    torch.manual_seed(0)
    layer = shaken(MaskedAutoregressive(4, hidden, order=order, degrees=degrees, activation="tanh")).double()
    x = torch.randn(4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: layer(v[None])[0][0], x)[layer.order][:, layer.order]
    assert jacobian.triu(1).eq(0).all() and jacobian.diagonal().ne(0).all()
    if degrees == "even":
        assert jacobian.tril().ne(0).sum() == 10, "with even degrees every output sees every earlier feature"


@pytest.mark.parametrize("hidden", [(16,), (16, 16), (4, 4)])
@pytest.mark.parametrize("features", [1, 2, 30])
def test_context_reaches_every_output(features, hidden):
    layer = shaken(MaskedAutoregressive(features, hidden, context_features=2, activation="tanh")).double()
    x, context = torch.randn(1, features, dtype=torch.float64), torch.randn(1, 2, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda c: layer(x, c)[0][0], context)
    assert jacobian.ne(0).all()
    with torch.no_grad():
        for m in layer.layers[-1:]:
            m.context_weight.zero_()  # through the hidden units alone
    jacobian = torch.autograd.functional.jacobian(lambda c: layer(x, c)[0][0], context)
    assert jacobian.ne(0).all()


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("degrees", ["even", "cycling", "random"])
def test_by_the_old_rule_the_context_reaches_all_but_the_first(degrees, residual):
    torch.manual_seed(0)
    settings = {"context_features": 2, "degrees": degrees, "residual": residual, "activation": "tanh", "order": [2, 0, 3, 1]}
    x, context = torch.randn(1, 4, dtype=torch.float64), torch.randn(1, 2, dtype=torch.float64)
    for rule, first in (("every_output", True), ("all_but_first", False)):
        layer = shaken(MaskedAutoregressive(4, (24, 24), context_rule=rule, **settings)).double()
        seen = torch.autograd.functional.jacobian(lambda c, f=layer: f(x, c)[0][0], context).ne(0).all(-1).flatten()
        assert seen[layer.order].tolist() == [first, True, True, True]


@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("degrees", ["even", "cycling", "random"])
def test_residual_layers(degrees, context):
    torch.manual_seed(0)
    make = lambda: MaskedAutoregressive(
        4, (12, 12), context_features=context, residual=True, degrees=degrees, activation="tanh", order="descending"
    )
    layer = shaken(make()).double()
    x, c = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, context, dtype=torch.float64) if context else None
    jacobian = torch.autograd.functional.jacobian(lambda v: layer(v[None], None if c is None else c[:1])[0][0], x[0])
    jacobian = jacobian[layer.order][:, layer.order]
    assert jacobian.triu(1).eq(0).all() and jacobian.diagonal().ne(0).all()
    with torch.no_grad():
        z, logabsdet = layer(x, c)
        torch.testing.assert_close(logabsdet[0], torch.linalg.slogdet(jacobian)[1])
        back, opposite = layer.inverse(z, c)
        torch.testing.assert_close((back, opposite), (x, -logabsdet))
        with backend("reference"):
            torch.testing.assert_close(layer.inverse(z, c), (back, opposite))
        twin = make().double()
        twin.load_state_dict(layer.state_dict())
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert all(torch.equal(g, w) for g, w in zip(other(x, c), (z, logabsdet), strict=True))
    want = {f"layers.{i}.{name}" for i in (0, 2, 3, 5, 6, 7) for name in ("weight", "bias", "visible")} | {"order"}
    want |= {f"layers.{i}.context_weight" for i in (0, 2, 5, 7)} if context else set()
    assert set(layer.state_dict()) == want


def test_a_residual_block_starts_near_the_identity():
    layer = MaskedAutoregressive(3, (8,), residual=True)
    assert layer.layers[3].weight.abs().max() <= 1e-3 < layer.layers[2].weight.abs().max()


def test_a_layer_of_a_given_network():
    layer = shaken(MaskedAutoregressive(4, (9, 9), context_features=2, residual=True)).double()
    twin = MaskedAutoregressive.of(layer.conditioner(), scale=layer.scale)
    x, context = torch.randn(3, 4).double(), torch.randn(3, 2).double()
    with torch.no_grad():
        assert all(torch.equal(g, w) for g, w in zip(twin(x, context), layer(x, context), strict=True))
    with pytest.raises(ValueError, match="the network is not autoregressive"):
        network = layer.conditioner()
        MaskedAutoregressive.of(network._replace(visible=[*network.visible[:-1], network.visible[-1] * 0 + 9]))


def test_narrow_layers_still_see_the_last_feature():
    degrees = hidden_degrees(4, 30)
    assert degrees[0] == 1 and degrees[-1] == 29
    assert hidden_degrees(4, 30, rule="cycling").tolist() == [1, 2, 3, 4]
    assert hidden_degrees(16, 5, context=True)[:8].eq(0).all()
    assert hidden_degrees(7, 5, rule="cycling", context=True).tolist() == [0, 0, 1, 1, 2, 3, 4]
    assert hidden_degrees(200, 5, rule="random", context=True).unique().tolist() == [0, 1, 2, 3, 4]


def test_staircase_counts_what_is_seen():
    below = torch.tensor([1, 1, 2, 4])
    assert staircase(below, torch.tensor([1, 2, 3]), strict=False).tolist() == [2, 3, 3]
    assert staircase(below, torch.tensor([1, 2, 3, 5]), strict=True).tolist() == [0, 2, 3, 4]
    with pytest.raises(ValueError, match="degrees of the units above must ascend"):
        staircase(below, torch.tensor([2, 1]), strict=True)


def test_training_leaves_weights_outside_the_staircase_at_zero():
    layer = MaskedAutoregressive(5, (12, 12))
    optimizer = torch.optim.AdamW(layer.parameters(), weight_decay=0.1)
    for _ in range(3):
        z, logabsdet = layer(torch.randn(20, 5))
        optimizer.zero_grad()
        (z.square().sum(1) / 2 - logabsdet).mean().backward()
        optimizer.step()
    for m in layer.layers:
        outside = torch.arange(m.weight.shape[0])[:, None] >= m.visible
        assert m.weight[outside].eq(0).all() and m.weight[~outside].ne(0).all()


@pytest.mark.parametrize("context", [0, 3])
def test_gradient_through_the_inverse_is_that_of_the_loop(context):
    layer = shaken(MaskedAutoregressive(4, (9, 8), context_features=context)).double()
    z = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    c = torch.randn(3, context, dtype=torch.float64, requires_grad=True) if context else None
    x, logabsdet = layer.inverse(z, c)
    assert x.requires_grad and logabsdet.requires_grad
    inputs = [z, *([c] if context else []), *layer.parameters()]
    assert torch.autograd.gradcheck(lambda *a: layer.inverse(z, c), inputs, fast_mode=True)


@pytest.mark.parametrize(
    "make", [lambda: MaskedAutoregressive(4, (9, 9), order=[1, 3, 0, 2]), lambda: FlowBatchNorm(4), lambda: Permute([1, 3, 0, 2])]
)
def test_inverse_swaps_the_directions(make):
    layer = make().eval()
    x = torch.randn(6, 4)
    with torch.no_grad():
        for got, want in ((Inverse(layer)(x), layer.inverse(x)), (Inverse(layer).inverse(x), layer(x))):
            assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
        z, logabsdet = layer(x)
        back, opposite = layer.inverse(z)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(opposite, -logabsdet)
    assert logabsdet.shape == (6,)


def test_state_moves_with_the_layer():
    layer = shaken(MaskedAutoregressive(4, (9, 9), order=[1, 3, 0, 2]))
    x = torch.randn(5, 4)
    with torch.no_grad():
        want = layer(x)
        other = MaskedAutoregressive(4, (9, 9))
        other.load_state_dict(layer.state_dict())
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
            assert all(torch.equal(g, w) for g, w in zip(twin(x), want, strict=True))
        z, logabsdet = layer.double()(x.double())
        assert z.dtype == logabsdet.dtype == torch.float64
        torch.testing.assert_close(z.float(), want[0])
        assert layer.bfloat16()(x.bfloat16())[0].dtype == torch.bfloat16
    assert layer.order.dtype == torch.int64 and layer.layers[0].visible.dtype == torch.int32


def test_masked_linear_layer():
    layer = MaskedLinear(torch.tensor([0, 2, 3]), 3, context_features=2)
    x, context = torch.randn(4, 3), torch.randn(4, 2)
    want = layer.bias + x @ layer.weight + context @ layer.context_weight
    torch.testing.assert_close(layer(x, context), want)
    assert layer.weight[:, 0].eq(0).all() and layer.weight[2, 1] == 0
    assert torch.equal(Unitwise(3)(x), x) and torch.equal(shaken(Unitwise(3, affine=True))(0 * x)[0], shaken(Unitwise(3, affine=True)).bias)


class TestFlowBatchNorm:
    def test_training_uses_the_batch_and_evaluation_the_running_statistics(self):
        torch.manual_seed(0)
        layer = FlowBatchNorm(3, momentum=0.5).double()
        x = torch.randn(50, 3, dtype=torch.float64) * 3 + 1
        z, logabsdet = layer(x)
        torch.testing.assert_close(z.mean(0), torch.zeros(3, dtype=torch.float64))
        torch.testing.assert_close(z.var(0, correction=0), torch.ones(3, dtype=torch.float64), rtol=1e-4, atol=0)
        torch.testing.assert_close(layer.running_mean, 0.5 * x.mean(0))
        torch.testing.assert_close(layer.running_var, 0.5 + 0.5 * x.var(0, correction=0))
        layer.eval().set_statistics(x)
        torch.testing.assert_close(layer(x), (z, logabsdet))

    @pytest.mark.parametrize("inverse", [False, True])
    def test_logabsdet_is_that_of_the_jacobian(self, inverse):
        layer = shaken(FlowBatchNorm(3)).double().eval()
        layer.set_statistics(torch.randn(20, 3, dtype=torch.float64) * 2 + 1)
        f = layer.inverse if inverse else layer.forward
        x = torch.randn(1, 3, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(lambda v: f(v[None])[0][0], x[0])
        torch.testing.assert_close(f(x)[1][0], torch.linalg.slogdet(jacobian)[1])

    def test_gradients_pass_through_the_batch_statistics(self):
        layer = shaken(FlowBatchNorm(3)).double()
        x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(layer, (x,))

    def test_one_row_has_no_variance(self):
        with pytest.raises(ValueError, match="x must have at least 2 rows for batch statistics in training; got 1"):
            FlowBatchNorm(3)(torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": 0}, "features must be a whole number of at least 1; got 0"),
        ({"hidden_features": (4, 0)}, r"hidden_features must be widths, whole numbers of at least 1; got \(4, 0\)"),
        ({"context_features": -1}, "context_features must be a whole number of at least 0; got -1"),
        ({"order": "sideways"}, "order must be 'ascending', 'descending' or a permutation; got 'sideways'"),
        ({"order": [0, 1, 1]}, r"order must be a permutation of 0..2; got \[0, 1, 1\]"),
        ({"hidden_features": (4, 5), "residual": True}, r"hidden_features must all be equal with residual=True; got \(4, 5\)"),
        ({"context_rule": "none"}, "context_rule must be 'every_output' or 'all_but_first'; got 'none'"),
        ({"degrees": "odd"}, "^degrees must be 'even', 'cycling' or 'random'; got 'odd'"),
        ({"activation": "swoosh"}, "swoosh"),
        ({"form": "affine"}, "affine"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MaskedAutoregressive(**({"features": 3, "hidden_features": (4,)} | arguments))


def test_reference_and_kernel_agree_through_the_layer():
    layer = shaken(MaskedAutoregressive(6, (20, 20), context_features=2))
    x, context = torch.randn(11, 6), torch.randn(11, 2)
    with torch.no_grad():
        got = (*layer(x, context), *layer.inverse(x, context))
        with backend("reference"):
            want = (*layer(x, context), *layer.inverse(x, context))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("visible", [[1, 0, 2], [0, 1, 4], [-1, 0, 1]])
def test_a_masked_linear_layer_is_built_of_a_staircase(visible):
    with pytest.raises(ValueError, match=rf"visible must ascend from 0 to at most 3; got \[{', '.join(map(str, visible))}\]"):
        MaskedLinear(torch.tensor(visible), 3)


def test_an_additive_network_is_taken_over():
    layers = [
        MaskedLayer(torch.randn(3, 5), torch.zeros(5), torch.tensor([1, 1, 2, 2, 2], dtype=torch.int32)),
        MaskedLayer(torch.randn(5, 3), torch.zeros(3), torch.tensor([0, 2, 5], dtype=torch.int32)),
    ]
    network = Conditioner.of(layers, torch.arange(3))
    layer = MaskedAutoregressive.of(network, scale=ScaleMap.unit())
    x = torch.randn(4, 3)
    torch.testing.assert_close(layer.inverse(layer(x)[0])[0], x)
    with pytest.raises(ValueError, match="scale must be a ScaleMap"):
        MaskedAutoregressive.of(network, scale="unit")


def test_weight_norm_of_whole_matrices_trains():
    torch.manual_seed(0)
    layer = MaskedAutoregressive(4, (16,))
    for module in list(layer.layers):
        torch.nn.utils.parametrizations.weight_norm(module, dim=None)
    z, logabsdet = layer(torch.randn(8, 4))
    (z.square().sum() - logabsdet.sum()).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize(
    "change",
    [
        lambda module: prune.l1_unstructured(module, "weight", 0.4),
        lambda module: prune.random_unstructured(module, "context_weight", 0.4),
        lambda module: torch.nn.utils.weight_norm(module, dim=None),
        lambda module: torch.nn.utils.spectral_norm(module),
    ],
    ids=["prune", "prune context", "weight_norm", "spectral_norm"],
)
def test_weights_that_hooks_make_are_those_of_the_call(change):
    def changed() -> MaskedAutoregressive:
        layer = MaskedAutoregressive(4, (16,), context_features=2)
        with torch.no_grad():
            layer(x, context)
        for module in list(layer.layers):
            change(module)
        return layer

    torch.manual_seed(0)
    x, context = torch.randn(8, 4), torch.randn(8, 2)
    layer, loaded = changed(), changed()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    for _ in range(3):
        z, logabsdet = layer(x, context)
        optimizer.zero_grad()
        (z.square().sum() - logabsdet.sum()).backward()
        assert all(p.grad is not None for p in layer.parameters())
        optimizer.step()
    loaded.load_state_dict(layer.state_dict())
    with torch.no_grad():
        want = layer.eval()(x, context)
        for _ in range(3):
            torch.testing.assert_close(loaded.eval()(x, context), want)
            torch.testing.assert_close(loaded.inverse(want[0], context)[0], x)
