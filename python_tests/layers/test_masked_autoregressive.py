import copy
import pickle

import pytest
import torch

from flowkernels import backend
from flowkernels.layers import FlowBatchNorm, Inverse, MaskedAutoregressive, MaskedLinear, Permute
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


def test_narrow_layers_still_see_the_last_feature():
    degrees = hidden_degrees(4, 30)
    assert degrees[0] == 1 and degrees[-1] == 29
    assert hidden_degrees(4, 30, rule="cycling").tolist() == [1, 2, 3, 4]
    assert hidden_degrees(16, 5, context=True)[:8].eq(0).all()


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
        ({"features": 0}, "features must be at least 1; got 0"),
        ({"hidden_features": (4, 0)}, r"hidden_features must be widths of at least 1; got \(4, 0\)"),
        ({"context_features": -1}, "context_features must be at least 0; got -1"),
        ({"order": "sideways"}, "order must be 'ascending', 'descending' or a permutation; got 'sideways'"),
        ({"order": [0, 1, 1]}, r"order must be a permutation of 0..2; got \[0, 1, 1\]"),
        ({"degrees": "odd"}, "rule must be 'even', 'cycling' or 'random'; got 'odd'"),
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
