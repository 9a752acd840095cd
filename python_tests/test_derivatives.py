"""Derivatives of whole layers and flows beyond plain backward: torch.func, forward mode, double backward."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap

from flowkernels import backend
from flowkernels.flows import MAF, RealNVP
from flowkernels.layers import MaskedAutoregressive


@pytest.fixture(params=[False, True], ids=["plain", "residual"])
def layer(request) -> MaskedAutoregressive:
    torch.manual_seed(0)
    return MaskedAutoregressive(3, (8, 8), context_features=2, activation="tanh", residual=request.param).double()


X, CONTEXT = (torch.randn(s, generator=torch.Generator().manual_seed(1), dtype=torch.float64) for s in ((5, 3), (5, 2)))


def nll(layer, parameters, x, context):
    z, logabsdet = functional_call(layer, parameters, (x[None], context[None]))
    return (z.square().sum(1) / 2 - logabsdet)[0]


def test_grad_is_that_of_backward(layer):
    parameters = dict(layer.named_parameters())
    total = lambda p: vmap(lambda x, c: nll(layer, p, x, c))(X, CONTEXT).sum()
    got = grad(total)({name: p.detach() for name, p in parameters.items()})
    z, logabsdet = layer(X, CONTEXT)
    want = torch.autograd.grad((z.square().sum(1) / 2 - logabsdet).sum(), list(parameters.values()))
    torch.testing.assert_close(list(got.values()), list(want))


def test_per_sample_gradients(layer):
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    one = grad(lambda p, x, c: nll(layer, p, x, c))
    got = vmap(one, in_dims=(None, 0, 0))(parameters, X, CONTEXT)
    want = [one(parameters, x, c) for x, c in zip(X, CONTEXT, strict=True)]
    torch.testing.assert_close(got, {name: torch.stack([w[name] for w in want]) for name in parameters})


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_ensembles(layer, direction):
    """vmap over the parameters of several networks."""
    ensemble = {name: torch.stack([p.detach() * f for f in (1.0, 0.5, -1.0)]) for name, p in layer.named_parameters()}

    class Way(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x, context):
            return getattr(self.layer, direction)(x, context)

    run = lambda parameters: functional_call(Way(), {f"layer.{name}": p for name, p in parameters.items()}, (X, CONTEXT))
    got = vmap(run)(ensemble)
    for i in range(3):
        want = run({name: p[i] for name, p in ensemble.items()})
        torch.testing.assert_close([g[i] for g in got], list(want))


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("jacobian", [jacrev, jacfwd])
def test_jacobians(layer, direction, jacobian):
    f = lambda x: getattr(layer, direction)(x[None], CONTEXT[:1])[0][0]
    torch.testing.assert_close(jacobian(f)(X[0]), torch.autograd.functional.jacobian(f, X[0]))


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_forward_mode(layer, direction):
    f = lambda x, c: getattr(layer, direction)(x, c)
    tangents = (torch.cos(X), torch.sin(CONTEXT))
    want = torch.autograd.functional.jvp(f, (X, CONTEXT), tangents)
    torch.testing.assert_close(jvp(f, (X, CONTEXT), tangents), want)
    for frozen in (False, True):  # no parameter asks for a gradient: the tangents must be seen all the same
        layer.requires_grad_(not frozen)
        with forward_ad.dual_level():
            outputs = f(*map(forward_ad.make_dual, (X, CONTEXT), tangents))
            got = [forward_ad.unpack_dual(o).tangent for o in outputs]
        torch.testing.assert_close(got, list(want[1]))


def test_hessian_of_log_prob():
    torch.manual_seed(0)
    flow = MAF(3, transforms=2, hidden_features=(8, 8), activation="tanh").double()
    f = lambda x: flow.log_prob(x[None])[0]
    want = torch.autograd.functional.hessian(f, X[0])
    assert want.abs().max() > 0.1
    torch.testing.assert_close(jacrev(jacrev(f))(X[0]), want)
    torch.testing.assert_close(jacfwd(jacrev(f))(X[0]), want)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_score_matching(batch_norm):
    """Implicit score matching (Hyvarinen 2005), 1/2 |score|^2 + its divergence, and a gradient penalty: backward through backward."""
    torch.manual_seed(0)
    flow = MAF(3, context_features=2, transforms=2, hidden_features=(8, 8), activation="tanh", batch_norm=batch_norm).double().eval()

    def gradients():
        x = X.clone().requires_grad_()
        (score,) = torch.autograd.grad(flow.log_prob(x, CONTEXT).sum(), x, create_graph=True)
        divergence = sum(torch.autograd.grad(score[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(3))
        loss = (score.square().sum(1) / 2 + divergence + 0.1 * (score.norm(dim=1) - 1).square()).mean()
        return loss, *torch.autograd.grad(loss, list(flow.parameters()))

    got = gradients()
    with backend("reference"):
        want = gradients()
    assert all(g.ne(0).any() for g in got)
    torch.testing.assert_close(got, want)


def test_second_derivatives_by_the_parameters_of_a_residual_network():
    """v^T H w of log p, by double backward and by differences of the gradient."""
    torch.manual_seed(0)
    flow = RealNVP((1, 2, 2), levels=1, blocks=1, hidden_channels=3, batch_norm=False).double().eval()
    parameters = [p for p in flow.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in parameters:
            p.add_(0.3 * torch.randn_like(p))
    x = torch.randn(5, 1, 2, 2, dtype=torch.float64)
    v, w = ([torch.randn_like(p) for p in parameters] for _ in range(2))
    along = lambda gradients, direction: sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))

    def slope(create_graph=False):
        return along(torch.autograd.grad(flow.log_prob(x).sum(), parameters, create_graph=create_graph), v)

    got = along(torch.autograd.grad(slope(create_graph=True), parameters), w)
    step, ends = 1e-5, []
    for sign in (1, -2):
        with torch.no_grad():
            for p, d in zip(parameters, w, strict=True):
                p.add_(d, alpha=sign * step)
        ends.append(slope())
    torch.testing.assert_close(got, (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-5)
