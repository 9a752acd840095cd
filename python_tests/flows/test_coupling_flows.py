"""NICE and RealNVP, for vectors and images: density, both directions, context, state."""

import copy
import pickle
import warnings

import pytest
import torch

from flowkernels.flows import NICE, Flow, RealNVP, StandardLogistic, StandardNormal
from flowkernels.layers import DiagonalScale, FlowBatchNorm

SMALL = {"blocks": 1, "hidden_channels": 3}
CASES = {
    "NICE": (lambda c: NICE(5, hidden_features=(7,), context_features=c), (5,)),
    "NICE on images": (lambda c: NICE((2, 3, 2), hidden_features=(7, 6), context_features=c), (2, 3, 2)),
    "RealNVP": (lambda c: RealNVP(5, hidden_features=(7,), transforms=4, context_features=c), (5,)),
    "RealNVP without batch norm": (lambda c: RealNVP(4, hidden_features=(7,), batch_norm=False, context_features=c), (4,)),
    "RealNVP on images": (lambda c: RealNVP((1, 4, 4), **SMALL, context_features=c), (1, 4, 4)),
    "RealNVP on colour images, three levels": (lambda c: RealNVP((3, 4, 8), levels=3, **SMALL, context_features=c), (3, 4, 8)),
    "RealNVP on one level": (lambda c: RealNVP((2, 3, 2), levels=1, **SMALL, batch_norm=False, context_features=c), (2, 3, 2)),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Flows this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def shaken(flow):
    """Parameters and running statistics away from their initial values, so that no layer is the identity."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g, dtype=p.dtype))
        for name, b in flow.named_buffers():
            if name.endswith("running_mean"):
                b.add_(0.3 * torch.randn(b.shape, generator=g, dtype=b.dtype))
            elif name.endswith("running_var"):
                b.mul_(torch.rand(b.shape, generator=g, dtype=b.dtype) + 0.5)
    return flow


@pytest.fixture(params=CASES)
def shape_and_build(request):
    build, shape = CASES[request.param]
    return shape, build


@pytest.fixture(params=[0, 3], ids=["plain", "context"])
def case(request, shape_and_build):
    torch.manual_seed(0)
    shape, build = shape_and_build
    flow = shaken(build(request.param)).double().eval()
    x = torch.randn(4, *shape, dtype=torch.float64)
    context = torch.randn(4, request.param, dtype=torch.float64) if request.param else None
    return flow, x, context


class TestCouplingFlows:
    def test_log_prob_is_the_bases_and_the_jacobians(self, case):
        flow, x, context = case
        z, logabsdet = flow(x, context)
        assert z.shape == (4, x[0].numel()) and logabsdet.shape == (4,)
        for b in range(2):
            c = None if context is None else context[b : b + 1]
            forward = lambda v, c=c: flow(v.view(1, *flow.shape), c)[0][0]
            jacobian = torch.autograd.functional.jacobian(forward, x[b].flatten(), vectorize=True)
            torch.testing.assert_close(logabsdet[b], torch.linalg.slogdet(jacobian)[1])
        base = torch.distributions.Normal(0, 1).log_prob(z)
        if isinstance(flow.base, StandardLogistic):
            base = -z - 2 * torch.log1p(torch.exp(-z))
        torch.testing.assert_close(flow.log_prob(x, context), base.sum(1) + logabsdet)

    def test_the_inverse_has_the_jacobians_determinant_and_undoes_forward(self, case):
        flow, x, context = case
        with torch.no_grad():
            z, logabsdet = flow(x, context)
            back, opposite = flow.inverse(z, context)
        torch.testing.assert_close(back, x)
        torch.testing.assert_close(opposite, -logabsdet)
        c = None if context is None else context[:1]
        inverse = lambda v: flow.inverse(v[None], c)[0].flatten()
        jacobian = torch.autograd.functional.jacobian(inverse, z[0], vectorize=True)
        torch.testing.assert_close(opposite[0], torch.linalg.slogdet(jacobian)[1])

    def test_samples(self, case):
        flow, _, context = case
        batch = () if context is None else (4,)
        samples, log_prob = flow.sample_and_log_prob(5, context)
        assert samples.shape == (5, *batch, *flow.shape) and log_prob.shape == (5, *batch) and not samples.requires_grad
        d = flow.distribution(context)
        assert d.event_shape == flow.shape and d.batch_shape == batch
        torch.testing.assert_close(d.log_prob(samples), log_prob)
        cold = flow.sample(3, context, temperature=0.0)
        assert torch.equal(cold[0], cold[2])
        rsample, log_prob = flow.rsample_and_log_prob(2, context)
        (rsample.sum() + log_prob.sum()).backward()
        assert all(p.grad is not None for p in flow.parameters())

    def test_state(self, case):
        flow, x, context = case
        want = flow.log_prob(x, context)
        for twin in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
            assert torch.equal(twin.log_prob(x, context), want)
        with torch.no_grad():
            flow_32 = copy.deepcopy(flow).float()
            for p in flow_32.parameters():
                p.zero_()
        flow_32.load_state_dict(flow.state_dict())
        got = flow_32.log_prob(x.float(), None if context is None else context.float())
        torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-3)

    def test_empty_batch(self, case):
        flow, x, context = case
        with torch.no_grad():
            z, logabsdet = flow(x[:0], None if context is None else context[:0])
            assert z.shape == (0, x[0].numel()) and logabsdet.shape == (0,)
            assert flow.inverse(z, None if context is None else context[:0])[0].shape == x[:0].shape

    def test_a_training_step_reaches_every_parameter(self, case):
        flow, x, context = case
        flow.train()
        (-flow.log_prob(x, context).mean()).backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in flow.parameters())


def test_context_reaches_every_output(shape_and_build):
    torch.manual_seed(0)
    shape, build = shape_and_build
    flow = shaken(build(3)).double().eval()
    x, context = torch.randn(1, *shape, dtype=torch.float64), torch.randn(1, 3, dtype=torch.float64)
    for way, rows in ((flow, x), (flow.inverse, flow(x, context)[0].detach())):
        jacobian = torch.autograd.functional.jacobian(lambda c, way=way, rows=rows: way(rows, c)[0].flatten(), context, vectorize=True)
        assert jacobian.abs().amax((1, 2)).gt(0).all()


@pytest.mark.parametrize("name", ["NICE on images", "RealNVP on images"])
def test_compiles_without_graph_breaks(name):
    build, shape = CASES[name]
    torch.manual_seed(0)
    flow, x = build(0).eval(), torch.randn(3, *shape)
    torch._dynamo.reset()
    with torch.no_grad():
        f = torch.compile(flow.log_prob, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(f(x), flow.log_prob(x))


@pytest.mark.parametrize("name", ["NICE on images", "RealNVP on images"])
def test_trains_in_one_graph(name):
    build, shape = CASES[name]
    torch.manual_seed(0)
    flow, x = shaken(build(0)).train(), torch.randn(3, *shape)
    twin = copy.deepcopy(flow)
    torch._dynamo.reset()
    torch.compile(lambda v: -flow.log_prob(v).mean(), fullgraph=True, backend="aot_eager")(x).backward()
    (-twin.log_prob(x).mean()).backward()
    torch.testing.assert_close([p.grad for p in flow.parameters()], [p.grad for p in twin.parameters()], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(flow.state_dict(), twin.state_dict())


def test_nice_is_the_papers():
    flow = NICE((1, 28, 28))
    assert [layer.part.name for layer in flow.layers[1:5]] == ["ODD", "EVEN", "ODD", "EVEN"] and isinstance(flow.layers[5], DiagonalScale)
    assert isinstance(flow.base, StandardLogistic)
    widths = [part.weight.shape[1] for part in flow.layers[1].conditioner.layers]
    assert widths == [1000] * 5 + [392]
    assert isinstance(NICE(4, hidden_features=(3,), base=StandardNormal()).base, StandardNormal)


def test_realnvp_has_the_papers_scales_and_z_has_its_parts_in_the_order_in_which_they_left():
    """With all couplings the identity, z is the image itself in another order: what leaves is a diagonal of each 2 x 2 square."""
    flow = RealNVP((1, 8, 8), levels=3, batch_norm=False, **SMALL)
    parts = [layer.part.name.lower() for layer in flow.modules() if hasattr(layer, "part")]
    scale = ["checkerboard_even", "checkerboard_odd", "checkerboard_even", "second_half", "first_half", "second_half"]
    assert parts == [*scale, *scale, "checkerboard_even", "checkerboard_odd", "checkerboard_even", "checkerboard_odd"]
    with torch.no_grad():
        for layer in flow.modules():
            if hasattr(layer, "part"):
                layer.conditioner.conv_out.gain.zero_()
                layer.conditioner.conv_out.bias.zero_()
    x = torch.arange(64.0).view(1, 1, 8, 8)
    z = flow(x)[0][0]
    assert torch.equal(z[:16], x[0, 0, 0::2, 1::2].flatten()) and torch.equal(z[16:32], x[0, 0, 1::2, 0::2].flatten())
    kept = torch.stack([x[0, 0, 0::2, 0::2], x[0, 0, 1::2, 1::2]])
    left = [kept[c, i::2, 1 - i :: 2].flatten() for i in (0, 1) for c in (0, 1)]
    assert torch.equal(z[32:48], torch.cat([left[0], left[2], left[1], left[3]]))
    assert torch.equal(z[48:].sort().values, torch.stack([kept[:, 0::2, 0::2], kept[:, 1::2, 1::2]]).flatten().sort().values)


def test_realnvp_begins_as_the_authors_code_does():
    flow = RealNVP((1, 4, 4), **SMALL)
    initial = [layer.scale_parameter.item() for layer in flow.modules() if hasattr(layer, "part")]
    assert initial == [0.0] * 3 + [1.0] * 3 + [0.0] * 4
    assert all(layer.bias is None and layer.eps == 1e-4 for layer in flow.modules() if isinstance(layer, FlowBatchNorm))


def test_standard_logistic_has_its_density_and_its_samples():
    base, like = StandardLogistic(), torch.empty(0)
    z = torch.tensor([[0.0, -3.0], [200.0, -200.0]])
    torch.testing.assert_close(base.log_prob(z)[0], 2 * torch.log(torch.tensor(0.5)) - 3 - 2 * torch.log1p(torch.exp(torch.tensor(-3.0))))
    torch.testing.assert_close(base.log_prob(z)[1], torch.tensor(-400.0))
    samples = base.sample(200_000, 1, like=like, generator=torch.Generator().manual_seed(0)).flatten()
    assert torch.isfinite(samples).all() and abs(samples.mean()) < 0.02 and abs(samples.std() - base.std) < 0.02
    below = torch.sigmoid(samples).sort().values - torch.linspace(0, 1, 200_000)
    assert below.abs().max() < 0.005  # Kolmogorov and Smirnov
    assert base.sample(2, 3, like=like.to(torch.bfloat16)).dtype == torch.bfloat16
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch.func warns of what it does one by one
        drawn = torch.func.vmap(lambda _: base.sample(2, 3, like=like), randomness="different")(torch.zeros(4))
    assert drawn.shape == (4, 2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NICE(1), "shape must have at least 2 features to split; got 1"),
        (lambda: NICE((1, 1, 1)), "at least 2 features to split; got 1"),
        (lambda: NICE(4, couplings=0), "couplings must be a whole number of at least 1; got 0"),
        (lambda: NICE((4, 4)), r"shape must be a number of features or \(C, H, W\), whole numbers of at least 1; got \(4, 4\)"),
        (lambda: NICE(4, hidden_features=()), r"hidden_features must be widths, whole numbers of at least 1; got \(\)"),
        (lambda: RealNVP(1), "shape must have at least 2 features to split; got 1"),
        (
            lambda: RealNVP((3, 6, 6), levels=3),
            "at each of 3 levels but the last; got 6 x 6: these can be halved once",
        ),
        (lambda: RealNVP((3, 2, 2), levels=2), "at least 2 sites at the last of 2 levels; got 2 x 2"),
        (lambda: RealNVP((3, 8, 8), blocks=0), "blocks must be a whole number of at least 1; got 0"),
        (lambda: RealNVP(4, hidden_features=(3,)).log_prob(torch.zeros(2, 5)), r"x must have shape \[batch, 4\]; got \[2, 5\]"),
        (lambda: NICE((1, 2, 2), hidden_features=(3,)).log_prob(torch.zeros(2, 4)), r"x must have shape \[batch, 1, 2, 2\]; got \[2, 4\]"),
        (lambda: NICE((1, 2, 2), hidden_features=(3,)).inverse(torch.zeros(2, 5)), r"z must have shape \[batch, 4\]; got \[2, 5\]"),
        (lambda: RealNVP((1, 4, 4), **SMALL).eval().inverse(torch.zeros(2, 5)), r"z must have shape \[batch, 16\]; got \[2, 5\]"),
        (lambda: RealNVP((1, 4, 4), **SMALL, context_features=2).sample(2), "context is missing"),
        (lambda: NICE(4, hidden_features=(3,), context_features=2)(torch.zeros(5, 4)), r"context is missing: the flow takes \[5, 2\]"),
        (
            lambda: NICE(4, hidden_features=(3,), context_features=2)(torch.zeros(5, 4), torch.zeros(4, 2)),
            r"context must be \[5, 2\], a row for each of x; got \[4, 2\]",
        ),
        (
            lambda: NICE(4, hidden_features=(3,))(torch.zeros(5, 4), torch.zeros(5, 1)),
            r"context must be None, as the flow takes none; got \[5, 1\]",
        ),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_flow_of_any_layers_has_a_shape():
    flow = Flow([DiagonalScale(4)], 4)
    assert flow.shape == (4,) and flow.features == 4 and flow.sample(2).shape == (2, 4)
