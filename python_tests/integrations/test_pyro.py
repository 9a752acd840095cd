"""What Pyro's distributions become: what is refused, what trains, and flows in Pyro's own programs."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from flowkernels.flows import IAF, MAF
from flowkernels.integrations import from_pyro, to_pyro
from flowkernels.layers import MLP, FlowBatchNorm, Inverse, MaskedAutoregressive

pyro = pytest.importorskip("pyro")
dist = pytest.importorskip("pyro.distributions")
t = pytest.importorskip("pyro.distributions.transforms")
pyro_nn = pytest.importorskip("pyro.nn")


def normal(*shape):
    return dist.Normal(torch.zeros(shape), torch.ones(shape))


def distribution(*transforms, base=None):
    return dist.TransformedDistribution(normal(4) if base is None else base, list(transforms))


def autoregressive(**settings):
    return t.AffineAutoregressive(pyro_nn.AutoRegressiveNN(4, [8], **settings))


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        (lambda: nn.Linear(2, 2), TypeError, "must be a Pyro AffineAutoregressive, .* or .*TransformedDistribution; got Linear"),
        (lambda: autoregressive(skip_connections=True), ValueError, "module, AffineAutoregressive, has skip connections"),
        (lambda: autoregressive(nonlinearity=nn.Softsign()), ValueError, "module, AffineAutoregressive, activation .* got Softsign"),
        (lambda: autoregressive(param_dims=[1, 2]), TypeError, r"must have an AutoRegressiveNN with param_dims \[1, 1\]; got AutoRegr"),
        (
            lambda: t.conditional_affine_autoregressive(4, 2).condition(torch.zeros(2)),
            TypeError,
            r"has been conditioned; take over the distribution or transform on which condition\(context\) was called",
        ),
        (
            lambda: distribution(t.conditional_affine_coupling(4, 2).condition(torch.zeros(2))),
            TypeError,
            "transform 0 of the distribution, AffineCoupling, has been conditioned",
        ),
        (lambda: distribution(t.planar(4)), TypeError, "transform 0 of the distribution, Planar, is none of the transforms"),
        (lambda: distribution(t.affine_coupling(4, split_dim=1)), ValueError, "must transform half of the features, 2 of 4; it tran.* 3"),
        (lambda: distribution(t.Permute(torch.tensor([1, 0]), dim=-2), base=normal(2, 4)), ValueError, r"of a vector.* of \[2, 4\]"),
        (lambda: distribution(t.BatchNorm(4), t.permute(4)), ValueError, "BatchNorm, normalises by the batch it sees; call eval"),
        (lambda: distribution(t.AffineTransform(0.0, -2.0)), ValueError, "AffineTransform, must have a positive scale"),
        (lambda: distribution(base=normal(3, 4)), ValueError, r"must be independent normals of a vector.* of \[3, 4\]"),
        (
            lambda: distribution(autoregressive(), base=dist.MultivariateNormal(torch.zeros(4), torch.eye(4))),
            ValueError,
            "independent norm",
        ),
        (
            lambda: dist.ConditionalTransformedDistribution(
                dist.ConditionalTransformedDistribution(normal(4), [t.conditional_affine_autoregressive(4, 2)]), [t.permute(4)]
            ),
            ValueError,
            "the base must be independent normals .* got <.*ConditionalTransformedDistribution object",
        ),
        (
            lambda: dist.ConditionalTransformedDistribution(normal(4), [t.conditional_affine_autoregressive(4, 2), autoregressive()]),
            ValueError,
            r"all transforms must take the same context; theirs have \[0, 2\] features",
        ),
    ],
)
def test_what_cannot_be_taken_over_is_refused(module, error, message):
    with pytest.raises(error, match=message):
        from_pyro(module())


def test_a_map_or_an_inverse_of_its_own_is_refused():
    class Shifted(t.AffineAutoregressive):
        def _call(self, x):
            return super()._call(x) + 1

    class Inverted(t.AffineAutoregressive):
        def _inverse(self, y):
            return super()._inverse(y) + 1

    class Reversed(t.Permute):
        def _inverse(self, y):
            return super()._inverse(y) + 1

    network = pyro_nn.AutoRegressiveNN(4, [8])
    for module in (Shifted(network), Inverted(network), distribution(Shifted(network)), distribution(Reversed(torch.randperm(4)))):
        with pytest.raises(ValueError, match=f"{type(module).__name__} does not compute what this version"):
            from_pyro(module)


def test_float64_is_taken_over_whatever_the_default_is():
    base = dist.Normal(torch.zeros(4).double(), torch.ones(4).double())
    flow = from_pyro(distribution(autoregressive().double(), t.AffineTransform(0.1, 2.0), base=base))
    assert torch.get_default_dtype() == torch.float32 and flow.sample(2).dtype == torch.float64
    assert flow.layers[0].layer.log_scale.tolist() == [math.log(2.0)] * 4


def test_a_flow_taken_over_trains_copies_and_is_independent():
    torch.manual_seed(0)
    scale = torch.rand(4) + 0.5
    parts = [
        autoregressive(),
        t.permute(4),
        t.affine_coupling(4, [8]),
        t.AffineTransform(torch.randn(4), scale, event_dim=1),
        autoregressive(),
    ]
    flow, x = from_pyro(distribution(*parts)), torch.randn(50, 4)
    assert flow.training and any(isinstance(m, MLP) for m in flow.modules())
    modules = nn.ModuleList(part for part in parts if isinstance(part, nn.Module))
    trained = sum(p.numel() for p in modules.parameters())
    assert sum(p.numel() for p in flow.parameters() if p.requires_grad) == trained
    with torch.no_grad():
        want = flow.log_prob(x)
        for p in modules.parameters():
            p.fill_(0.3)
        scale.fill_(7.0)
        for twin in (flow, copy.deepcopy(flow)):
            assert torch.equal(twin.log_prob(x), want)
    flow.log_prob(x).mean().neg().backward()
    torch.optim.SGD((p for p in flow.parameters() if p.requires_grad), lr=0.05).step()
    assert flow.log_prob(x).mean() > want.mean()


def test_noise_goes_to_data_as_in_pyro():
    """An autoregressive transform is an IAF's layer, and its inv is a MAF's."""
    transform = autoregressive()
    iaf, maf = (from_pyro(distribution(part)) for part in (transform, transform.inv))
    assert isinstance(iaf.layers[0], Inverse) and isinstance(maf.layers[0], MaskedAutoregressive)


def test_what_is_frozen_stays_frozen():
    transform = t.affine_coupling(4, [8])
    transform.nn.layers[-1].weight.requires_grad_(False)
    flow = from_pyro(distribution(transform, t.AffineTransform(0.0, torch.full((4,), 2.0), event_dim=1)))
    frozen = [p.numel() for p in flow.parameters() if not p.requires_grad]
    assert sorted(frozen) == [4, 4, transform.nn.layers[-1].weight.numel()]


def test_a_batch_norm_stays_in_evaluation_mode_beside_transforms_that_train():
    """Each transform has a mode of its own; nobody has to call eval() on others than the batch norms."""
    torch.manual_seed(0)
    norm = t.BatchNorm(4).eval()
    module, x = distribution(autoregressive(), norm, t.affine_coupling(4)), torch.randn(7, 4)
    flow = from_pyro(module)
    torch.testing.assert_close(flow.log_prob(x), module.log_prob(x))
    assert flow.training and [m.training for m in flow.modules() if isinstance(m, FlowBatchNorm)] == [False]
    assert all(m.training for m in flow.train().modules())


class TestToPyro:
    def test_is_a_distribution_of_pyro(self):
        torch.manual_seed(0)
        flow, context = MAF(3, context_features=2, transforms=2, hidden_features=(8,)), torch.randn(5, 2)
        p = to_pyro(flow, context)
        with pyro.plate("rows", 5):
            x = pyro.sample("x", p)
        assert x.shape == (5, 3) and p.batch_shape == (5,) and p.event_shape == (3,)
        torch.testing.assert_close(p.log_prob(x), flow.log_prob(x, context))
        wider = p.expand([4, 5])
        assert wider.sample().shape == (4, 5, 3) and wider.mask(False).log_prob(torch.randn(4, 5, 3)).eq(0).all()
        with pytest.raises(TypeError, match="flow must be a flowkernels.flows.Flow; got Linear"):
            to_pyro(nn.Linear(2, 2))

    def test_the_last_samples_density_has_the_gradients_of_any_other(self):
        torch.manual_seed(0)
        flow = IAF(3, transforms=2, hidden_features=(8,)).double()
        p = to_pyro(flow)
        x = p.rsample((7,))
        weights = list(flow.parameters())
        both = (p.log_prob(x), flow.log_prob(x))
        assert both[0] is p._last[-1]
        torch.testing.assert_close(*both)
        torch.testing.assert_close(*(torch.autograd.grad(y.sum(), weights, retain_graph=True) for y in both))

    def test_a_sample_without_gradient_is_scored_with_one(self):
        flow = MAF(3, transforms=1, hidden_features=(8,))
        p = to_pyro(flow)
        x = p.sample((7,))
        assert not x.requires_grad and p.log_prob(x).requires_grad
        with torch.no_grad():
            assert p.log_prob(x).data_ptr() == p._last[-1].data_ptr()
        cooler = p.rsample((7,), 0.5)
        torch.testing.assert_close(p.log_prob(cooler), flow.log_prob(cooler))

    def test_a_sample_that_was_changed_is_scored_anew(self):
        """It may be moved by an optimizer, or written into; the density that is kept belongs to what was drawn."""
        torch.manual_seed(0)
        flow = MAF(3, transforms=1, hidden_features=(8,)).double()
        p = to_pyro(flow)
        x = p.sample((7,)).requires_grad_()
        (of_x,), (other,) = (torch.autograd.grad(q.log_prob(x).sum(), x) for q in (p, flow))
        torch.testing.assert_close(of_x, other)
        with torch.no_grad():
            x = p.sample((7,)).mul_(2)
            torch.testing.assert_close(p.log_prob(x), flow.log_prob(x))
        x = p.rsample((7,))
        with torch.no_grad():
            assert not p.log_prob(x).requires_grad
        with torch.inference_mode():
            x = p.sample((7,))
            torch.testing.assert_close(p.log_prob(x), flow.log_prob(x))

    def test_copies_and_pickles_are_without_the_last_sample(self):
        p = to_pyro(MAF(3, context_features=2, transforms=1, hidden_features=(8,)), torch.randn(5, 2)).expand([4, 5]).has_rsample_(False)
        x = p.rsample()
        for twin in (copy.copy(p), copy.deepcopy(p), pickle.loads(pickle.dumps(p))):
            assert type(twin) is type(p) and twin._last is None and twin.batch_shape == (4, 5) and not twin.has_rsample
            torch.testing.assert_close(twin.log_prob(x), p.log_prob(x))

    def test_it_is_the_guide_of_a_posterior(self):
        pyro.set_rng_seed(0)
        pyro.clear_param_store()
        flow = IAF(2, transforms=2, hidden_features=(16,))
        mean, deviation = torch.tensor([3.0, -1.0]), torch.tensor([0.5, 0.2])
        model = lambda: pyro.sample("z", dist.Normal(mean, deviation).to_event(1))

        def guide():
            pyro.module("flow", flow)
            pyro.sample("z", to_pyro(flow))

        loss = pyro.infer.Trace_ELBO(num_particles=32, vectorize_particles=True)
        svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss)
        losses = [svi.step() for _ in range(400)]
        assert sum(losses[-20:]) / 20 < 0.1 < losses[0]
        samples = flow.sample(4000)
        torch.testing.assert_close(samples.mean(0), mean, rtol=0, atol=0.1)
        torch.testing.assert_close(samples.std(0), deviation, rtol=0.2, atol=0)
