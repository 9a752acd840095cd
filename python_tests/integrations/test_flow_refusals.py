"""Whole flows that cannot be taken over are refused with the reason, and those that can train and are independent."""

import copy
import math

import pytest
import torch
from torch import nn

from flowkernels.integrations import from_nflows, from_normflows, from_zuko
from python_tests.integrations.foreign_layers import nflows_layer, zuko_layer

nflows = pytest.importorskip("nflows.flows")
nflows_nets = pytest.importorskip("nflows.nn.nets")
distributions = pytest.importorskip("nflows.distributions")
transforms = pytest.importorskip("nflows.transforms")
autoregressive = pytest.importorskip("nflows.transforms.autoregressive")
normflows = pytest.importorskip("normflows")
zuko = pytest.importorskip("zuko")


def nflows_flow(*parts, base=(4,), embedding=None):
    transform = transforms.CompositeTransform([transforms.CompositeTransform([transforms.ReversePermutation(4)]), *parts])
    return nflows.Flow(transform, distributions.StandardNormal(base), embedding)


def zuko_standardised(scale: float):
    affine = zuko.flows.UnconditionalTransform(torch.distributions.AffineTransform, loc=torch.zeros(2), scale=torch.full((2,), scale))
    return zuko.flows.Flow([affine, zuko.flows.MaskedAutoregressiveTransform(2)], zuko.flows.MAF(2).base)


def normflows_model(*parts, base=None):
    return normflows.NormalizingFlow(base or normflows.distributions.DiagGaussian(4), list(parts))


def normflows_coupling(network=None, **settings):
    return normflows.flows.AffineCouplingBlock(network or normflows.nets.MLP([2, 8, 4]), **settings)


@pytest.mark.parametrize(
    ("take_over", "module", "error", "message"),
    [
        (from_nflows, lambda: nflows_flow(base=(3,)), ValueError, r"must be a StandardNormal of \[4\]; got StandardNormal of \[3\]"),
        (
            from_nflows,
            lambda: nflows_flow(embedding=nn.Linear(2, 2)),
            ValueError,
            "embedding_net must be the identity; got Linear: take over flow._transform, and give it embedded contexts",
        ),
        (
            from_nflows,
            lambda: nflows_flow(transforms.CompositeTransform([transforms.LULinear(4)])),
            TypeError,
            "transform 1.0, LULinear, is none of the transforms that are taken over",
        ),
        (from_nflows, lambda: nflows_flow(transforms.ActNorm(4)), ValueError, "transform 1, ActNorm, has not been initialised: give it"),
        (
            from_nflows,
            lambda: nflows_flow(transforms.RandomPermutation(4, 2)),
            ValueError,
            "must permute dimension 1, the features; got dim=2",
        ),
        (
            from_nflows,
            lambda: nflows_flow(transforms.AffineCouplingTransform([1, 0, 0, 0], nn.Linear)),
            ValueError,
            "transform 1, AffineCouplingTransform, must transform half of the features, 2 of 4; it transforms 1",
        ),
        (
            from_nflows,
            lambda: nflows_flow(*(nflows_layer(features=4, context_features=c) for c in (2, None))),
            ValueError,
            r"all transforms must take the same context; theirs have \[2, 0\] features",
        ),
        (
            from_nflows,
            lambda: transforms.PointwiseAffineTransform(1.0, 2.0),
            ValueError,
            "knows how many features there are; got Pointwise",
        ),
        (
            from_normflows,
            lambda: normflows_model(base=normflows.distributions.GaussianMixture(2, 4)),
            ValueError,
            "q0 must be a DiagGaussian of vectors without temperature; got GaussianMixture",
        ),
        (
            from_normflows,
            lambda: normflows_model(base=normflows.distributions.DiagGaussian((3, 2, 2))),
            ValueError,
            r"got DiagGaussian of shape \(3, 2, 2\), temperature None",
        ),
        (
            from_normflows,
            lambda: normflows_model(normflows.flows.Planar((4,))),
            TypeError,
            "flow 0 of the model, Planar, is none of the flows that are taken over",
        ),
        (
            from_normflows,
            lambda: normflows_model(normflows.flows.ActNorm(4)),
            ValueError,
            "ActNorm, has not been initialised: give the model",
        ),
        (
            from_normflows,
            lambda: normflows_model(normflows_coupling(split_mode="checkerboard")),
            ValueError,
            "split_mode must be 'channel' or 'channel_inv'; got 'checkerboard'",
        ),
        (
            from_normflows,
            lambda: normflows_model(normflows_coupling(normflows.nets.MLP([2, 8, 4], leaky=0.1), scale_map="sigmoid")),
            ValueError,
            "scale_map must be 'exp' or 'sigmoid_inv', or 'sigmoid' with a ReLU MLP; got 'sigmoid'",
        ),
        (
            from_zuko,
            lambda: zuko.flows.Flow([zuko.flows.GeneralCouplingTransform(4, mask=[1, 0, 0, 0])], zuko.flows.MAF(4).base),
            ValueError,
            "must transform half of the features, 2 of 4; it transforms 3",
        ),
        (from_zuko, lambda: zuko.flows.Flow(zuko.flows.NICE(4).transform, zuko.flows.MAF(3).base), ValueError, r", of 4 features; got"),
        (from_zuko, lambda: zuko_standardised(-1.0), ValueError, r"must have a positive scale; got \[-1.0, -1.0\]"),
    ],
)
def test_flows_with_other_parts_are_refused(take_over, module, error, message):
    with pytest.raises(error, match=message):
        take_over(module().eval())


def test_batch_norms_between_layers_are_refused_in_training():
    flow = nflows.MaskedAutoregressiveFlow(3, 8, 2, 1, batch_norm_between_layers=True)
    with pytest.raises(ValueError, match=r"transform 2, BatchNorm, normalises by the batch it sees; call eval\(\) on the flow"):
        from_nflows(flow)
    assert not from_nflows(flow.eval()).training


def test_a_flow_with_another_map_is_refused():
    class Shifted(transforms.ReversePermutation):
        def forward(self, inputs, context=None):
            z, logabsdet = super().forward(inputs, context)
            return z + 0.1, logabsdet

    class Halved(normflows.NormalizingFlow):
        def log_prob(self, x):
            return super().log_prob(x) / 2

    with pytest.raises(ValueError, match="Flow does not compute what this version"):
        from_nflows(nflows_flow(Shifted(4)))
    with pytest.raises(ValueError, match="Halved does not compute what this version"):
        from_normflows(Halved(normflows.distributions.DiagGaussian(4), [normflows_coupling()]))


@pytest.mark.parametrize("library", ["nflows", "normflows", "zuko"])
def test_a_flow_taken_over_trains_copies_and_is_independent(library):
    torch.manual_seed(0)
    if library == "nflows":
        standardise = transforms.PointwiseAffineTransform(torch.randn(4), torch.rand(4) + 0.5)
        network = lambda inputs, outputs: nn.Sequential(nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, outputs))
        coupling = transforms.AffineCouplingTransform([1, 0, 1, 0], lambda i, o: WithoutContext(network(i, o)))
        module, take_over, fixed = nflows_flow(standardise, coupling, nflows_layer(features=4)), from_nflows, 2
    elif library == "normflows":
        base = normflows.distributions.DiagGaussian(4, trainable=False)
        module, take_over, fixed = normflows_model(normflows_coupling(), normflows_coupling(), base=base), from_normflows, 2
    else:
        module, take_over, fixed = zuko.flows.RealNVP(4), from_zuko, 0
    flow, x = take_over(module), torch.randn(50, 4)
    assert flow.training
    with torch.no_grad():
        want = flow.log_prob(x)
        for p in module.parameters():
            p.fill_(0.3)
        for twin in (flow, copy.deepcopy(flow)):
            assert torch.equal(twin.log_prob(x), want)
    flow.log_prob(x).mean().neg().backward()
    assert sum(p.grad is None for p in flow.parameters()) == fixed and all(p.grad is None for p in flow.parameters() if not p.requires_grad)
    torch.optim.SGD((p for p in flow.parameters() if p.requires_grad), lr=0.05).step()
    assert flow.log_prob(x).mean() > want.mean()
    z, logabsdet = flow(x)
    back, opposite = flow.inverse(z)
    torch.testing.assert_close((back, opposite), (x, -logabsdet), rtol=1e-3, atol=1e-3)


class WithoutContext(nn.Module):
    """nflows gives networks a context, and None where there is none."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        assert context is None
        return self.network(x)


def test_an_inverse_or_a_density_of_its_own_is_refused():
    class Inverted(autoregressive.MaskedAffineAutoregressiveTransform):
        def inverse(self, inputs, context=None):
            x, logabsdet = super().inverse(inputs, context)
            return x + 1, logabsdet

    class Scored(nflows.Flow):
        def _log_prob(self, inputs, context):
            return super()._log_prob(inputs, context) - 1

    class Sampled(nflows.Flow):
        def _sample(self, num_samples, context):
            return super()._sample(num_samples, context) + 1

    class Based(zuko.flows.MAF):
        def forward(self, c=None):
            flow = super().forward(c)
            return type(flow)(flow.transform, zuko.distributions.DiagNormal(torch.ones(3), torch.ones(3)))

    class Turned(normflows.flows.AffineCouplingBlock):
        def forward(self, z):
            x, logabsdet = super().forward(z)
            return x + 1, logabsdet

    class Drawn(normflows.NormalizingFlow):
        def sample(self, num_samples=1):
            x, log_prob = super().sample(num_samples)
            return x + 1, log_prob

    patched = nflows_layer(features=4)
    patched._elementwise_inverse = lambda inputs, parameters: (inputs, inputs.sum(1))
    flow, replaced = nflows_flow(), nflows_flow()
    replaced.sample = lambda num_samples, context=None: flow.sample(num_samples) + 1
    for take_over, module in (
        (from_nflows, Inverted(3, 8)),
        (from_nflows, nflows_flow(Inverted(4, 8))),
        (from_nflows, nflows_flow(patched)),
        (from_nflows, Scored(flow._transform, flow._distribution)),
        (from_zuko, Based(3, transforms=1)),
        (from_normflows, normflows_model(Turned(normflows.nets.MLP([2, 8, 4])))),
    ):
        with pytest.raises(ValueError, match="does not compute what this version"):
            take_over(module)
    for take_over, module in (
        (from_nflows, Sampled(flow._transform, flow._distribution)),
        (from_nflows, replaced),
        (from_normflows, Drawn(normflows.distributions.DiagGaussian(4), [normflows_coupling()])),
    ):
        with pytest.raises(ValueError, match="has a _?sample of its own, which would not be taken over"):
            take_over(module)


def test_batch_norms_keep_their_settings_and_have_statistics_of_their_own():
    module = transforms.BatchNorm(4, eps=1e-3, momentum=0.3).eval()
    flow, before = from_nflows(module), copy.deepcopy(module.state_dict())
    assert (flow.layers[0].eps, flow.layers[0].momentum) == (1e-3, 0.3)
    flow.train()(torch.randn(9, 4) + 5)
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())


@pytest.mark.parametrize("name", ["shift", "log_scale"])
def test_what_is_frozen_of_an_actnorm_stays_frozen(name):
    module = transforms.ActNorm(4)
    module(torch.randn(9, 4))
    getattr(module, name).requires_grad_(False)
    layer = from_nflows(module.eval()).layers[0]
    assert (layer.bias.requires_grad, layer.log_scale.requires_grad) == (name != "shift", name != "log_scale")


def test_a_coupling_that_transforms_the_rest_too_is_named():
    rest = lambda features: transforms.PointwiseAffineTransform(torch.ones(features))
    network = lambda inputs, outputs: WithoutContext(nn.Linear(inputs, outputs))
    with pytest.raises(TypeError, match="transform 0, AffineCouplingTransform, is none of the transforms that are taken over"):
        from_nflows(transforms.AffineCouplingTransform([0, 1, 0, 1], network, unconditional_transform=rest))


def test_a_flow_without_memory_is_taken_over_unseen():
    module = normflows_model(normflows_coupling())
    flow = from_normflows(module.to("meta"))
    assert all(t.is_meta for t in flow.state_dict().values()) and flow.features == 4


def test_networks_of_couplings_that_mix_their_batch_are_refused_and_left_alone():
    network = lambda i, o: nflows_nets.ResidualNet(i, o, 8, use_batch_norm=True)
    flow = nflows_flow(transforms.AffineCouplingTransform([0, 1, 0, 1], network))
    before = copy.deepcopy(flow.state_dict())
    with pytest.raises(
        ValueError, match=r"ResidualNet.blocks.0.batch_norm_layers.0 normalises by the batch .*; call eval\(\) on the network"
    ):
        from_nflows(flow)
    assert all(torch.equal(t, before[name]) for name, t in flow.state_dict().items())
    dropout = lambda i, o: nflows_nets.ResidualNet(i, o, 8, dropout_probability=0.5)
    flow = nflows_flow(transforms.AffineCouplingTransform([0, 1, 0, 1], dropout))
    with pytest.raises(ValueError, match="ResidualNet.blocks.0.dropout drops units at random while it trains"):
        from_nflows(flow)
    flow._transform._transforms[1].transform_net.eval()  # the rest trains on
    ours = from_nflows(flow)
    networks = [m for m in ours.modules() if isinstance(m, nflows_nets.ResidualNet)]
    assert ours.training and networks and not any(m.training for network in networks for m in network.modules())


def test_what_is_frozen_stays_frozen():
    model = normflows_model(normflows_coupling(), normflows.flows.ActNorm(4, scale=False), base=normflows.distributions.DiagGaussian(4))
    model.log_prob(torch.randn(20, 4))
    model.q0.loc.requires_grad_(False)
    first = model.flows[0].flows[1].param_map.net[0]
    first.weight.requires_grad_(False)
    trained = {id(p): p.requires_grad for p in model.parameters()}
    ours = from_normflows(model)
    count = lambda module, flag: sum(p.numel() for p in module.parameters() if p.requires_grad is flag)
    assert count(ours, True) == count(model, True) and len(trained) == len(list(model.parameters()))
    for take_over, module in ((from_nflows, nflows_layer()), (from_zuko, zuko_layer())):
        next(module.parameters()).requires_grad_(False)
        with pytest.warns(UserWarning, match="some parameters of .* are frozen; those made of them are not: freeze them again"):
            take_over(module)
        assert not any(p.requires_grad for p in take_over(module.requires_grad_(False)).parameters())


def test_a_flow_of_nflows_runs_on_our_transform():
    """As sbi's posteriors may, whose flows embed their contexts."""
    torch.manual_seed(0)
    module = nflows_flow(nflows_layer(features=4, context_features=2), embedding=nn.Linear(3, 2)).eval()
    context, x = torch.randn(5, 3), torch.randn(5, 4)
    drawn = lambda: (torch.manual_seed(1), *module.sample_and_log_prob(7, context))[1:]
    with torch.no_grad():
        want = (*drawn(), module.log_prob(x, context))
        module._transform = from_nflows(module._transform)
        torch.testing.assert_close((*drawn(), module.log_prob(x, context)), want, rtol=1e-4, atol=1e-4)


def test_flows_are_compared_without_gradients(monkeypatch):
    model = normflows_model(normflows_coupling(), base=normflows.distributions.DiagGaussian(4))
    seen, right = set(), torch.nn.functional.linear

    def linear(*arguments):
        seen.add(torch.is_grad_enabled())
        return right(*arguments)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    from_normflows(model)
    assert seen == {False}


def test_flows_are_compared_without_autocast_and_count_their_features_by_their_base():
    flow = nflows.Flow(transforms.CompositeTransform([transforms.PointwiseAffineTransform(0.0, 2.0)]), distributions.StandardNormal([4]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert from_nflows(flow).features == 4
        from_nflows(nflows_layer())
        from_zuko(zuko.flows.MAF(3))


def test_zukos_standardisation_by_numbers_is_of_the_flows_dtype():
    plain = zuko.flows.MAF(2, transforms=2, hidden_features=(8,)).double()
    affine = zuko.flows.UnconditionalTransform(torch.distributions.AffineTransform, 0.1, 2.0)
    flow = from_zuko(zuko.flows.Flow([affine, *plain.transform.transforms], plain.base))
    assert flow.layers[0].log_scale.tolist() == [math.log(2.0)] * 2 and flow.sample(2).dtype == torch.float64


def test_nflows_batch_norms_alone_may_be_in_evaluation_mode():
    torch.manual_seed(0)
    module, x = nflows_flow(nflows_layer(features=4), transforms.BatchNorm(4).eval()), torch.randn(7, 4)
    flow = from_nflows(module)
    assert module.training and flow.training
    torch.testing.assert_close(flow.log_prob(x), module.log_prob(x))
