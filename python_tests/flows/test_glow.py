"""Glow: density, both directions, initialisation, order of z, state, freezing."""

import copy
import pickle
import re
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from flowkernels.flows import Glow
from flowkernels.layers import ActNorm, ActNormConv1x1, InvertibleConv1x1, _fold

SMALL = {"levels": 2, "steps": 2, "hidden_channels": 5}
CASES = {
    "affine": SMALL,
    "additive": {**SMALL, "coupling": "additive"},
    "plain weights": {**SMALL, "parametrization": "plain"},
    "context": {**SMALL, "context_features": 3},
    "one level": {"levels": 1, "steps": 3, "hidden_channels": 5, "context_features": 2},
}
SHAPE = (2, 4, 8)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Flows this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def initialised(shape=SHAPE, by=0.1, **settings):
    """A flow that saw its first batch, with its parameters then moved, so that no coupling or prior is the identity."""
    torch.manual_seed(0)
    flow = Glow(shape, **settings)
    c = settings.get("context_features", 0)
    flow(torch.randn(16, *shape) * 2 + 1, torch.randn(16, c) if c else None)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(by * torch.randn_like(p))
    return flow


@pytest.fixture(params=CASES)
def case(request):
    settings = CASES[request.param]
    flow = initialised(**settings).double().eval()
    c = settings.get("context_features", 0)
    context = torch.randn(4, c, dtype=torch.float64) if c else None
    return flow, torch.randn(4, *SHAPE, dtype=torch.float64), context


@pytest.fixture
def another(request, case):
    """An uninitialised flow with the settings of the case's."""
    return Glow(SHAPE, **CASES[request.node.callspec.params["case"]])


class TestGlow:
    def test_logabsdet_is_the_jacobians_both_ways(self, case):
        flow, x, context = case
        z, logabsdet = flow(x, context)
        back, opposite = flow.inverse(z, context)
        assert z.shape == (4, 64) and logabsdet.shape == opposite.shape == (4,)
        torch.testing.assert_close(back, x)
        torch.testing.assert_close(opposite, -logabsdet)
        c = None if context is None else context[1:2]
        for way, rows, want in ((flow, x, logabsdet), (flow.inverse, z.detach(), opposite)):
            row = rows[1:2]
            f = lambda v, way=way, row=row: way(v.view_as(row), c)[0].flatten()
            jacobian = torch.autograd.functional.jacobian(f, row.flatten(), vectorize=True)
            torch.testing.assert_close(want[1], torch.linalg.slogdet(jacobian)[1])

    def test_samples(self, case):
        flow, _, context = case
        samples, log_prob = flow.sample_and_log_prob(3, context)
        assert samples.shape == (3, *(() if context is None else (4,)), *SHAPE)
        torch.testing.assert_close(flow.distribution(context).log_prob(samples), log_prob)
        cold = flow.sample(3, context, temperature=0.0)
        assert torch.equal(cold[0], cold[2]) and not torch.equal(samples[0], samples[2])

    def test_a_training_step_reaches_every_parameter(self, case):
        flow, x, context = case
        (-flow.train().log_prob(x, context).mean()).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 and torch.isfinite(p.grad).all() for p in flow.parameters())

    def test_state(self, case, another):
        flow, x, context = case
        want = flow.log_prob(x, context)
        for twin in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
            assert torch.equal(twin.log_prob(x, context), want)
        another.load_state_dict(flow.state_dict())
        got = another.eval().log_prob(x.float(), None if context is None else context.float())
        torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-3)

    def test_freeze_changes_nothing_but_the_work(self, case, monkeypatch):
        flow, x, context = case
        with torch.no_grad():
            z, logabsdet = flow(x, context)
            want = flow.inverse(z, context)
            flow.freeze()
            monkeypatch.setattr(_fold, "slogdet", None)
            monkeypatch.setattr(_fold, "slogdet_inverse", None)
            torch.testing.assert_close(flow(x, context), (z, logabsdet))
            torch.testing.assert_close(flow.inverse(z, context), want)


def test_the_first_batch_initialises_every_actnorm():
    torch.manual_seed(0)
    flow = Glow(SHAPE, **SMALL)
    x = torch.randn(300, *SHAPE) * 5 - 3
    outputs = []
    for module in flow.modules():
        if isinstance(module, ActNormConv1x1):
            module.register_forward_pre_hook(lambda m, args: outputs.append((m.actnorm, args[0])))
    with pytest.raises(RuntimeError, match="before it was initialised"):
        flow.eval().log_prob(x)
    outputs.clear()
    first = flow.train()(x)
    assert len(outputs) == 4
    for actnorm, before in outputs:
        rows = actnorm(before)[0].transpose(0, 1).flatten(1)
        torch.testing.assert_close(rows.mean(1), torch.zeros(len(rows)), atol=1e-5, rtol=0)
        torch.testing.assert_close(rows.std(1), torch.ones(len(rows)), atol=1e-3, rtol=0)
    torch.testing.assert_close(flow(x), first)  # and the second batch goes through the matrices that the first one made
    torch.testing.assert_close(flow.eval()(2 * x + 1)[1], first[1])


def test_an_average_of_a_flow_is_initialised_with_it():
    """The trainer's average is copied before the first batch, and gets the flow's buffers after it."""
    torch.manual_seed(0)
    flow = Glow(SHAPE, **SMALL)
    average = copy.deepcopy(flow).eval()
    flow(torch.randn(8, *SHAPE))
    for mine, theirs in zip([*average.parameters(), *average.buffers()], [*flow.parameters(), *flow.buffers()], strict=True):
        mine.data.copy_(theirs)
    x = torch.randn(3, *SHAPE)
    torch.testing.assert_close(average.log_prob(x), flow.log_prob(x))


def test_z_has_its_parts_in_the_order_in_which_they_left():
    """With identities everywhere, z is the image itself in another order."""
    flow = Glow((1, 8, 8), levels=3, steps=1, hidden_channels=3, coupling="additive", parametrization="plain")
    with torch.no_grad():
        for module in flow.modules():
            if isinstance(module, ActNorm):
                module.initialised.fill_(True)
            elif isinstance(module, InvertibleConv1x1):
                module.plain_weight.copy_(torch.eye(module.channels))
    x = torch.arange(64.0).view(1, 1, 8, 8)
    z, logabsdet = flow(x)
    assert logabsdet.item() == 0
    rest, want = x, []
    for _ in range(2):
        rest = torch.nn.functional.pixel_unshuffle(rest, 2)
        rest, left = rest.chunk(2, 1)
        want.append(left.flatten(1))
    want.append(torch.nn.functional.pixel_unshuffle(rest, 2).flatten(1))
    assert torch.equal(z, torch.cat(want, 1))
    assert torch.equal(flow.inverse(z)[0], x)


def test_likelihood_is_the_papers():
    """Gaussian densities of what leaves and of what is left, instead of maps to standard noise."""
    flow = initialised(**SMALL, by=0.2).double().eval()
    x = torch.randn(3, *SHAPE, dtype=torch.float64)
    squeeze, steps, prior, factor_out = flow.layers
    h, total = steps(squeeze(x)[0])
    kept, left = h.chunk(2, 1)
    out = prior.conditioner(kept)
    total = total + torch.distributions.Normal(out[:, 0::2], out[:, 1::2].exp()).log_prob(left).sum((1, 2, 3))
    squeeze, steps, top, _ = factor_out.rest.layers
    h, logabsdet = steps(squeeze(kept)[0])
    mean, log_scale = top.bias.view(2, -1, 1, 1)
    total = total + logabsdet + torch.distributions.Normal(mean, log_scale.exp()).log_prob(h).sum((1, 2, 3))
    torch.testing.assert_close(flow.log_prob(x), total)
    coupling = steps.couplings[0]
    y, _ = coupling(h)
    first, second = h.chunk(2, 1)
    shift, s = coupling.conditioner(first)[:, 0::2], coupling.conditioner(first)[:, 1::2]
    torch.testing.assert_close(y, torch.cat([first, (second + shift) * torch.sigmoid(s + 2)], 1))


def test_round_trip_of_a_deep_flow_in_float32():
    """32 steps on each of 2 levels: the error is a few hundred times that of one rounding."""
    flow = initialised((3, 8, 8), levels=2, steps=32, hidden_channels=8, by=0.02).eval()
    x = torch.randn(8, 3, 8, 8)
    exact = copy.deepcopy(flow).double()
    with torch.no_grad():
        z, logabsdet = flow(x)
        back, opposite = flow.inverse(z)
        want = exact.log_prob(x.double())
        got = flow.log_prob(x)
    print(f"round trip: {(back - x).abs().max():.1e}, log-density: {(got - want).abs().max():.1e} of {want.abs().max():.0f} nats")
    assert (back - x).abs().max() < 1e-4
    torch.testing.assert_close(opposite, -logabsdet, atol=1e-3, rtol=0)
    torch.testing.assert_close(got.double(), want, atol=2e-3, rtol=1e-6)


def test_context_reaches_every_output():
    for settings in ({**SMALL, "context_features": 3}, CASES["one level"]):
        flow = initialised(**settings).double().eval()
        x, context = torch.randn(1, *SHAPE, dtype=torch.float64), torch.randn(1, settings["context_features"], dtype=torch.float64)
        for way, rows in ((flow, x), (flow.inverse, flow(x, context)[0].detach())):
            f = lambda c, way=way, rows=rows: way(rows, c)[0].flatten()
            jacobian = torch.autograd.functional.jacobian(f, context, vectorize=True)
            assert jacobian.abs().amax((1, 2)).gt(0).all()


def test_both_parametrisations_of_equal_weights_have_equal_likelihoods():
    lu = initialised(**SMALL).double().eval()
    plain = Glow(SHAPE, **SMALL, parametrization="plain").double().eval()
    state = {name: value for name, value in lu.state_dict().items() if name in plain.state_dict()}
    for name, module in lu.named_modules():
        if isinstance(module, InvertibleConv1x1):
            state[f"{name}.plain_weight"] = module.weight().detach()
    plain.load_state_dict(state)
    x = torch.randn(4, *SHAPE, dtype=torch.float64)
    torch.testing.assert_close(plain.log_prob(x), lu.log_prob(x))


@pytest.mark.parametrize("inverse", [False, True])
def test_as_many_factorisations_as_there_are_sizes(monkeypatch, inverse):
    flow = initialised((1, 8, 8), levels=3, steps=32, hidden_channels=2, parametrization="plain", by=0.01).eval()
    name, shapes = "slogdet_inverse" if inverse else "slogdet", []
    computed = getattr(_fold, name)
    monkeypatch.setattr(_fold, name, lambda w, **options: shapes.append(tuple(w.shape)) or computed(w, **options))
    with torch.no_grad():
        flow.sample(2) if inverse else flow.log_prob(torch.randn(2, 1, 8, 8))
    assert sorted(shapes) == [(32, 4, 4), (32, 8, 8), (32, 16, 16)]


def test_a_singular_weight_cannot_be_frozen():
    flow = initialised(**SMALL, parametrization="plain")
    with torch.no_grad():
        flow.layers[1].mixings[1].conv.plain_weight[0].zero_()
    assert flow.log_prob(torch.randn(2, *SHAPE)).isinf().all()
    with pytest.raises(ValueError, match=r"layers\.1\.mixings\.1\.conv cannot be frozen: its weight is singular"):
        flow.freeze()


def test_compiles_without_graph_breaks():
    flow = initialised(levels=2, steps=1, hidden_channels=3).eval()
    x = torch.randn(3, *SHAPE)
    torch._dynamo.reset()
    with torch.no_grad():
        f = torch.compile(flow.log_prob, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(f(x), flow.log_prob(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: Glow((3, 28, 24), levels=3, steps=1),
            "divisible by 8, to be halved at each of 3 levels; got 28 x 24: these can be halved 2 times",
        ),
        (lambda: Glow((1, 7, 8), levels=1, steps=1), "divisible by 2, to be halved at each of 1 levels; got 7 x 8: these cannot be halved"),
        *(
            (
                partial(Glow, shape, levels=1, steps=1),
                rf"^image_shape must be \(C, H, W\), each a whole number of at least 1; got {re.escape(repr(shape))}$",
            )
            for shape in (64, None, (8, 8), (1, 0, 8), (1.5, 8, 8), (3, 8.0, 8), (True, 8, 8), ("3", 8, 8), "388")
        ),
        (lambda: Glow((1, 8, 8), levels=0, steps=1), "levels must be a whole number of at least 1; got 0"),
        (lambda: Glow((1, 8, 8), levels=1, steps=0), "steps must be a whole number of at least 1; got 0"),
        (lambda: Glow((1, 8, 8), levels=1, steps=1, hidden_channels=0), "hidden_channels must be a whole number of at least 1; got 0"),
        (lambda: Glow((1, 8, 8), levels=1, steps=1, coupling="spline"), "coupling must be 'affine' or 'additive'; got 'spline'"),
        (lambda: Glow((1, 8, 8), levels=1, steps=1, parametrization="qr"), "parametrization must be 'lu' or 'plain'; got 'qr'"),
        (lambda: Glow(SHAPE, **SMALL).log_prob(torch.zeros(2, 2, 8, 8)), r"x must have shape \[batch, 2, 4, 8\]; got \[2, 2, 8, 8\]"),
        (lambda: Glow(SHAPE, **SMALL, context_features=3).log_prob(torch.zeros(2, *SHAPE)), r"context is missing: the flow takes \[2, 3\]"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", CASES)
def test_the_first_batch_may_be_checkpointed(name):
    torch.manual_seed(0)
    flow = Glow(SHAPE, **CASES[name])
    x, context = torch.randn(8, *SHAPE), torch.randn(8, flow.context_features) if flow.context_features else None
    plain = copy.deepcopy(flow)
    for other, call in ((plain, plain.log_prob), (flow, partial(checkpoint, flow.log_prob, use_reentrant=False))):
        call(x, context).mean().backward()
        assert all(m.initialised for m in other.modules() if isinstance(m, ActNorm))
    for (name, p), q in zip(flow.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0, msg=name)


def test_a_dtype_is_refused_in_either_direction():
    flow = initialised(**SMALL)
    for call in (lambda: flow(torch.randn(2, *SHAPE).bfloat16()), lambda: flow.inverse(torch.randn(2, flow.features).bfloat16())):
        with torch.no_grad(), pytest.raises(ValueError, match=r"must be torch\.float32, like the parameters"):
            call()


def test_sampling_before_the_first_batch_is_refused():
    with pytest.raises(RuntimeError, match="pass a batch of data in training mode, or load a checkpoint"):
        Glow(SHAPE, **SMALL).sample(2)
