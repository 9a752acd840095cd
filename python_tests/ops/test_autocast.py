"""Autocast: who is cast and who is not, in eager and compiled calls alike."""

import pytest
import torch

from flowkernels import backend
from flowkernels.flows import MAF
from flowkernels.layers import MaskedAutoregressive
from flowkernels.ops import masked_linear

VISIBLE = torch.tensor([0, 1, 1, 3, 5], dtype=torch.int32)
BACKENDS = ["auto", "reference"]


def autocast() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def way(compiled: bool, function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function


def arguments(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g).to(dtype).requires_grad_() for shape in ((7, 5), (5, 5), (5,))]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("compiled", [False, True])
class TestMaskedLinear:
    def test_takes_the_autocast_dtype(self, name, compiled):
        inputs = arguments()
        halves = [t.detach().bfloat16().requires_grad_() for t in inputs]
        with backend(name):
            f = way(compiled, lambda *a: masked_linear(*a, VISIBLE))
            with autocast():
                y = f(*inputs)
            want = masked_linear(*halves, VISIBLE)
            cotangent = torch.ones_like(y)
            got_gradients = torch.autograd.grad(y, inputs, cotangent)
            want_gradients = torch.autograd.grad(want, halves, cotangent)
        assert y.dtype == torch.bfloat16 and torch.equal(y, want)
        for got, wanted in zip(got_gradients, want_gradients, strict=True):
            assert got.dtype == torch.float32 and torch.equal(got, wanted.float())

    def test_without_a_gradient(self, name, compiled):
        x, weight, bias = (t.detach() for t in arguments())
        with backend(name), autocast():
            y = way(compiled, lambda *a: masked_linear(*a, VISIBLE))(x, weight, bias)
            mixed = way(compiled, lambda *a: masked_linear(*a, VISIBLE))(x.bfloat16(), weight, bias)
        assert y.dtype == torch.bfloat16 and torch.equal(y, mixed)

    def test_float64_stays(self, name, compiled):
        inputs = arguments(torch.float64)
        with backend(name), autocast():
            assert way(compiled, lambda *a: masked_linear(*a, VISIBLE))(*inputs).dtype == torch.float64


@pytest.mark.parametrize("name", BACKENDS)
def test_gradients_under_autocast_stay_in_the_dtype_of_the_forward_pass(name):
    inputs = arguments()
    penalty = lambda y: sum(g.square().sum() for g in torch.autograd.grad(y.square().sum(), inputs, create_graph=True))
    with backend(name):
        want = torch.autograd.grad(penalty(masked_linear(*inputs, VISIBLE)), inputs)
        y = masked_linear(*inputs, VISIBLE)
        with autocast():
            got = torch.autograd.grad(penalty(y), inputs)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_the_bare_op_is_not_cast():
    x, weight, bias = (t.detach() for t in arguments())
    with backend("reference"), autocast():
        bare = [op(x, weight, bias, VISIBLE) for op in (torch.ops.flowkernels.masked_linear, torch.ops.flowkernels.masked_linear.default)]
    assert all(torch.equal(y, masked_linear(x, weight, bias, VISIBLE)) for y in bare)


@pytest.fixture
def layer() -> MaskedAutoregressive:
    torch.manual_seed(0)
    return MaskedAutoregressive(2, (5,), context_features=2)  # small: the compiler sees every pass of the inverse


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("grad", [False, True])
def test_a_float32_network_stays_in_float32(layer, name, compiled, direction, grad):
    """Whatever the layers before it returned; so the inverse undoes the forward map."""
    x, context = torch.randn(5, 2).bfloat16(), torch.randn(5, 2).bfloat16()
    with backend(name), torch.set_grad_enabled(grad):
        f = way(compiled, getattr(layer, direction))
        with autocast():
            got = f(x, context)
        want = getattr(layer, direction)(x.float(), context.float())
        if grad:
            gradients = [torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), list(layer.parameters())) for outputs in (got, want)]
            torch.testing.assert_close(*gradients)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.float32
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_a_half_network_is_asked_for(layer, direction):
    x, context = torch.randn(5, 2), torch.randn(5, 2)
    layer.bfloat16()
    with autocast(), torch.no_grad():
        y, logabsdet = getattr(layer, direction)(x, context)
        want = getattr(layer, direction)(x.bfloat16(), context.bfloat16())
    assert y.dtype == torch.bfloat16 and logabsdet.dtype == torch.float32
    assert torch.equal(y, want[0]) and torch.equal(logabsdet, want[1])


def test_log_prob_behind_an_encoder():
    torch.manual_seed(0)
    flow, encoder = MAF(4, context_features=3, transforms=2, hidden_features=(8,), batch_norm=True), torch.nn.Linear(6, 3)
    x, images = torch.randn(9, 4), torch.randn(9, 6)
    with autocast():
        context = encoder(images)
        log_prob = flow.log_prob(x, context)
        log_prob.mean().backward()
    assert context.dtype == torch.bfloat16 and log_prob.dtype == torch.float32
    torch.testing.assert_close(flow.eval().log_prob(x, context.float()).shape, log_prob.shape)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in (*flow.parameters(), *encoder.parameters()))
