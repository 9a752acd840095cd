"""Inverse autoregressive flow: exact in both directions, one pass for its own samples, gradients as the D-pass reference has them."""

import copy

import pytest
import torch

import flowkernels
from flowkernels import ScaleMap
from flowkernels.flows import IAF, MAF
from flowkernels.layers import Inverse, _stack

CASES = {
    "plain": {},
    "gate": {"gate": True},
    "gate, context": {"gate": True, "context_features": 3, "activation": "elu"},
    "context, tanh": {"context_features": 3, "activation": "tanh"},
    "exp scale, old context rule": {"context_features": 3, "context_rule": "all_but_first", "scale": ScaleMap.exp_tanh(2.0)},
    "residual": {"residual": True, "hidden_features": (16, 16), "activation": "silu"},
    "one feature": {"features": 1, "hidden_features": (3,), "context_features": 3},
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    """A flow away from its initialisation, data and context, in float64."""
    torch.manual_seed(0)
    settings = {"features": 4, "transforms": 3, "hidden_features": (14, 13), **request.param}
    flow = IAF(**settings).double()
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(6, flow.features, dtype=torch.float64)
    return flow, x, torch.randn(6, flow.context_features, dtype=torch.float64) if flow.context_features else None


def test_log_determinants_are_the_jacobians_in_both_directions(case):
    flow, x, context = case
    for direction in (flow.forward, flow.inverse):
        _, logabsdet = direction(x, context)
        for b in range(2):
            c = None if context is None else context[b : b + 1]
            jacobian = torch.autograd.functional.jacobian(lambda v, c=c, f=direction: f(v[None], c)[0][0], x[b])
            torch.testing.assert_close(logabsdet[b], torch.linalg.slogdet(jacobian)[1])


def test_samples_come_with_their_log_prob(case):
    flow, _, context = case
    x, log_prob = flow.sample_and_log_prob(5, context)
    assert not x.requires_grad and x.shape == (5, *(() if context is None else (6,)), flow.features) and log_prob.shape == x.shape[:-1]
    torch.testing.assert_close(flow.distribution(context).log_prob(x), log_prob)


def test_gradients_are_those_of_the_d_pass_reference(case):
    flow, x, context = case
    weight = torch.randn(6, dtype=torch.float64)

    def gradients(method):
        model, rows = copy.deepcopy(flow), x.clone().requires_grad_()
        c = None if context is None else context.clone().requires_grad_()
        if method == "log_prob":
            loss = (weight * model.log_prob(rows, c)).sum()
        else:
            y, logabsdet = model.inverse(rows, c)
            loss = (weight * (y.cos().sum(1) + logabsdet)).sum()
        return torch.autograd.grad(loss, [rows, *([] if c is None else [c]), *model.parameters()], allow_unused=True)

    for method in ("log_prob", "rsample"):
        ours = gradients(method)
        with flowkernels.backend("reference"):
            wanted = gradients(method)
        assert [g is None for g in ours] == [g is None for g in wanted]
        for a, b in zip(ours, wanted, strict=True):
            if b is not None:
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_sampling_is_a_single_pass_of_the_network(monkeypatch):
    """No step of sampling runs the sequential direction."""
    flow = IAF(5, transforms=2, hidden_features=(8,), gate=True)
    real, directions = _stack.autoregressive_stack, set()
    monkeypatch.setattr(_stack, "autoregressive_stack", lambda x, maps, c: directions.update(m.inverse for m in maps) or real(x, maps, c))
    flow.sample(3)
    x, log_prob = flow.rsample_and_log_prob(3)
    (x.sum() + log_prob.sum()).backward()
    assert directions == {False}
    flow.log_prob(x)
    assert directions == {False, True}


def test_it_is_a_maf_the_other_way_round():
    torch.manual_seed(0)
    iaf, maf = IAF(4, transforms=2, hidden_features=(9,)), MAF(4, transforms=2, hidden_features=(9,))
    for inverse, layer in zip(reversed(iaf.layers), maf.layers, strict=True):
        layer.load_state_dict(inverse.layer.state_dict())
    z = torch.randn(5, 4)
    torch.testing.assert_close(iaf.inverse(z), maf(z))


def test_the_gate_is_the_papers():
    """Equations 9 and 10 of Kingma et al. (2016): z' = sigma z + (1 - sigma) m, log q' = log q - sum log sigma, near 1 at the start."""
    torch.manual_seed(0)
    flow = IAF(4, transforms=1, hidden_features=(9,), gate=True)
    step = flow.layers[0].layer
    z = torch.randn(7, 4)
    hidden = z
    for layer in list(step.layers)[:-1]:
        hidden = torch.relu(layer(hidden))
    out = step.layers[-1](hidden)
    m, sigma = out[:, 0::2], torch.sigmoid(out[:, 1::2] + 2)
    x, logabsdet = flow.inverse(z)
    torch.testing.assert_close(x, sigma * z + (1 - sigma) * m)
    torch.testing.assert_close(logabsdet, sigma.log().sum(1))
    assert sigma.min() > 0.5


def test_orders_alternate_from_the_noise_on():
    flow = IAF(3, transforms=3, hidden_features=(4,))
    assert all(isinstance(layer, Inverse) for layer in flow.layers)
    assert [layer.layer.order.tolist() for layer in reversed(flow.layers)] == [[0, 1, 2], [2, 1, 0], [0, 1, 2]]


@pytest.mark.parametrize("gate", [False, True])
def test_one_step_of_maximum_likelihood_raises_the_likelihood(gate):
    torch.manual_seed(0)
    flow = IAF(3, transforms=2, hidden_features=(16,), gate=gate)
    x = 0.5 * torch.randn(200, 3) + torch.tensor([0.3, -0.2, 0.1])
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    nats = []
    for _ in range(30):
        loss = -flow.log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        nats.append(-loss.item())
    assert nats[-1] > nats[0] + 0.3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: IAF(3, transforms=0), "transforms must be a whole number of at least 1; got 0"),
        (lambda: IAF(3, context_features=2, hidden_features=(4,)).sample(2), "context is missing"),
        (lambda: IAF(3, hidden_features=(4,)).rsample(2, torch.zeros(2)), r"context must be None, as the flow takes none; got \[2\]"),
        (
            lambda: IAF(3, context_features=2, hidden_features=(4,)).inverse(torch.zeros(6, 3), torch.zeros(4, 2)),
            r"context must be \[6, 2\], a row for each of z; got \[4, 2\]",
        ),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
