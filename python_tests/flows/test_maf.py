import copy
import pickle

import pytest
import torch
from torch.distributions import Independent

from flowkernels.flows import IAF, MAF, FlowDistribution, RealNVP


def shaken(flow):
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return flow


@pytest.fixture(params=[(0, False), (3, False), (3, True)], ids=["plain", "context", "context and batch norm"])
def case(request):
    torch.manual_seed(0)
    context_features, batch_norm = request.param
    flow = shaken(MAF(4, context_features=context_features, transforms=3, hidden_features=(14, 13), batch_norm=batch_norm)).double().eval()
    x = torch.randn(6, 4, dtype=torch.float64)
    context = torch.randn(6, context_features, dtype=torch.float64) if context_features else None
    return flow, x, context


class TestMAF:
    def test_log_prob_is_the_bases_and_the_jacobians(self, case):
        flow, x, context = case
        z, logabsdet = flow(x, context)
        for b in range(2):
            c = None if context is None else context[b : b + 1]
            jacobian = torch.autograd.functional.jacobian(lambda v, c=c: flow(v[None], c)[0][0], x[b])
            torch.testing.assert_close(logabsdet[b], torch.linalg.slogdet(jacobian)[1])
        want = torch.distributions.Normal(0, 1).log_prob(z).sum(1) + logabsdet
        torch.testing.assert_close(flow.log_prob(x, context), want)

    def test_inverse_undoes_forward(self, case):
        flow, x, context = case
        with torch.no_grad():
            z, logabsdet = flow(x, context)
            back, opposite = flow.inverse(z, context)
        torch.testing.assert_close(back, x)
        torch.testing.assert_close(opposite, -logabsdet)

    def test_sample_and_log_prob_agree_with_log_prob(self, case):
        flow, _, context = case
        x, log_prob = flow.sample_and_log_prob(5, context)
        assert not x.requires_grad and x.shape == (5, *(() if context is None else (6,)), 4) and log_prob.shape == x.shape[:-1]
        torch.testing.assert_close(flow.distribution(context).log_prob(x), log_prob)

    def test_samples_are_of_the_density(self, case):
        """Weighted samples of a Student distribution say of the density that its integral is 1 and that its medians are the samples'."""
        flow, _, context = case
        torch.manual_seed(1)
        n, one = 100_000, None if context is None else context[:1]
        samples = flow.sample(n, one).view(n, 4)
        student = torch.distributions.StudentT(torch.tensor(4.0, dtype=torch.float64), samples.mean(0), samples.std(0))
        x = student.sample((n,))
        with torch.no_grad():
            weight = (flow.log_prob(x, None if one is None else one.expand(n, -1)) - student.log_prob(x).sum(1)).exp()
        error = weight.std() / n**0.5
        assert error < 0.02 and abs(weight.mean() - 1) < 5 * error
        below = weight[:, None] * (x < samples.median(0).values)
        assert ((below.mean(0) - 0.5).abs() < 5 * (0.5 / n**0.5 + error)).all()

    def test_rsample_has_gradients_and_sample_has_none(self, case):
        flow, _, context = case
        context = None if context is None else context.requires_grad_()
        x, log_prob = flow.rsample_and_log_prob(2, context)
        (x.sum() + log_prob.sum()).backward()
        assert all(p.grad is not None for p in flow.parameters()) and (context is None or context.grad.ne(0).any())
        assert not flow.sample(2, context).requires_grad and flow.rsample(2, context).requires_grad

    def test_temperature_scales_the_noise(self, case):
        flow, _, context = case
        x = flow.sample(3, context, temperature=0.0)
        assert torch.equal(x[0], x[2])

    def test_state(self, case):
        flow, x, context = case
        want = flow.log_prob(x, context)
        for twin in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
            assert torch.equal(twin.log_prob(x, context), want)
        torch.testing.assert_close(
            flow.float().log_prob(x.float(), None if context is None else context.float()), want.float(), rtol=1e-4, atol=1e-4
        )

    def test_distribution(self, case):
        flow, x, context = case
        d = flow.distribution(context)
        assert d.event_shape == (4,) and d.batch_shape == (() if context is None else (6,))
        assert d.sample().shape == d.batch_shape + d.event_shape and d.sample((2, 3)).shape == (2, 3, *d.batch_shape, 4)
        torch.testing.assert_close(d.log_prob(x), flow.log_prob(x, context))
        wide = d.expand((2, 6))
        with pytest.raises(RuntimeError):  # 6 is not 3, whatever the first dimension
            wide.expand((2, 3))
        assert wide.batch_shape == (2, 6) and wide.sample().shape == (2, 6, 4) and wide.sample((3,)).shape == (3, 2, 6, 4)
        torch.testing.assert_close(wide.log_prob(x), flow.log_prob(x, context).expand(2, 6))
        assert repr(d) == f"FlowDistribution({type(flow).__name__}, batch_shape={tuple(d.batch_shape)}, event_shape=(4,))"

    def test_compiles_without_graph_breaks(self, case):
        flow, x, context = case
        torch._dynamo.reset()
        f = torch.compile(flow.log_prob, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(f(x, context), flow.log_prob(x, context))
        with torch.no_grad():
            inverse = torch.compile(flow.inverse, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(inverse(x, context), flow.inverse(x, context))


@pytest.mark.parametrize("context", [None, torch.zeros(6, 2)], ids=["no context", "context"])
def test_a_subclass_of_the_distribution_is_one_when_expanded(context):
    """As Pyro's plates need of one that is given its mixin."""

    class Callable(FlowDistribution):
        def __call__(self):
            return self.rsample()

    d = Callable(MAF(4, context_features=0 if context is None else 2, hidden_features=(4,)), context)
    assert type(d.expand((3, 6))) is Callable and d.expand((3, 6))().shape == (3, 6, 4)
    d = Independent(d.expand((3, 6)), 1).expand((2, 3))
    assert type(d.base_dist) is Callable and d.sample().shape == (2, 3, 6, 4)


def test_orders_alternate():
    flow = MAF(3, transforms=3, hidden_features=(4,))
    assert [layer.order.tolist() for layer in flow.layers] == [[0, 1, 2], [2, 1, 0], [0, 1, 2]]


@pytest.mark.parametrize("flow", [MAF, IAF, RealNVP])
@pytest.mark.parametrize("n", [3, 700])
@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 3)])
def test_samples_of_many_contexts(flow, n, batch):
    """Sample i of context c is made of row i, c of the noise, however the rows are put together."""
    torch.manual_seed(0)
    flow = flow(4, context_features=2, transforms=2, hidden_features=(9,)).eval()
    context = torch.randn(*batch, 2)
    torch.manual_seed(1)
    x, log_prob = flow.sample_and_log_prob(n, context)
    torch.manual_seed(1)
    again = flow.sample(n, context)
    torch.manual_seed(1)
    rows = context.expand(n, *batch, 2).reshape(-1, 2)
    with torch.no_grad():
        z = torch.randn(len(rows), 4)
        want, logabsdet = flow.inverse(z, rows)
    for got in (x, again):
        assert got.shape == (n, *batch, 4) and got.is_contiguous()
        torch.testing.assert_close(got.reshape(-1, 4), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(log_prob.flatten(), flow.base.log_prob(z) - logabsdet, rtol=1e-5, atol=1e-5)


def test_freeze_is_evaluation():
    assert not MAF(3, transforms=1, hidden_features=(4,)).freeze().training


def test_empty_batch():
    flow = MAF(3, transforms=2, hidden_features=(4,))
    with torch.no_grad():
        assert flow.inverse(torch.zeros(0, 3))[0].shape == (0, 3) and flow.log_prob(torch.zeros(0, 3)).shape == (0,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MAF(3, transforms=0), "transforms must be a whole number of at least 1; got 0"),
        (lambda: MAF(3, context_features=2, hidden_features=(4,)).sample(2), "context is missing"),
        (lambda: MAF(3, hidden_features=(4,)).sample(2, torch.zeros(2)), r"context must be None, as the flow takes none; got \[2\]"),
        (
            lambda: MAF(3, context_features=2, hidden_features=(4,)).sample(2, torch.zeros(5, 3)),
            r"context must be \[\*batch, 2\]; got \[5, 3\]",
        ),
        (lambda: MAF(3, hidden_features=(4,)).log_prob(torch.zeros(2, 4)), r"x must have shape \[batch, 3\]"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
