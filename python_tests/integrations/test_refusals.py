"""What cannot be taken over is refused with the reason, and what can keeps its place in training, copies and orders."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from flowkernels.flows import Flow
from flowkernels.integrations import from_nflows, from_normflows, from_zuko
from flowkernels.layers import MaskedAutoregressive

nflows = pytest.importorskip("nflows.flows")
nflows_nets = pytest.importorskip("nflows.nn.nets")
distributions = pytest.importorskip("nflows.distributions")
transforms = pytest.importorskip("nflows.transforms")
autoregressive = pytest.importorskip("nflows.transforms.autoregressive")
normflows = pytest.importorskip("normflows")
zuko = pytest.importorskip("zuko")


def nflows_layer(**settings):
    return autoregressive.MaskedAffineAutoregressiveTransform(**({"features": 3, "hidden_features": 8} | settings))


def zuko_layer(**settings):
    return zuko.flows.MaskedAutoregressiveTransform(**({"features": 4, "hidden_features": (8, 8)} | settings))


def test_batch_statistics_and_dropout_are_refused():
    message = r"blocks.0.batch_norm_layers.0 normalises by the batch it sees, which mixes its rows; call eval\(\) on the network"
    module = nflows_layer(use_batch_norm=True)
    with pytest.raises(ValueError, match=message):
        from_nflows(module)
    from_nflows(module.eval())
    with pytest.raises(ValueError, match="blocks.1.batch_norm normalises by the batch"):
        module = nflows_layer(use_batch_norm=True, use_residual_blocks=False).eval()
        module.autoregressive_net.blocks[1].batch_norm.train()
        from_nflows(module)
    with pytest.raises(ValueError, match=r"blocks.0.dropout drops units at random while it trains; call eval\(\) on the network"):
        from_normflows(normflows.flows.MaskedAffineAutoregressive(3, 8, dropout_probability=0.1))
    from_nflows(nflows_layer(dropout_probability=0.0))


def spoilt(edit):
    module = nflows_layer(use_residual_blocks=False, num_blocks=1)
    made = module.autoregressive_net
    edit(made.initial_layer.mask, made.blocks[0].linear.mask, made.final_layer.mask)
    return module


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda first, inner, last: last.fill_(1.0), "the masks are not autoregressive: the output of feature 0 sees input 0"),
        (
            lambda first, inner, last: (
                (first.fill_(0.0), first[0].copy_(torch.tensor([0.0, 1, 0])), first[1].copy_(torch.tensor([1.0, 0, 0])))
                and (inner.copy_(torch.eye(8)), last.zero_(), last[0:2, 0].fill_(1.0), last[2:4, 1].fill_(1.0))
            ),
            "the output of feature 0 sees input 1, and the output of feature 1 sees input 0",
        ),
        (
            lambda first, inner, last: (
                (first.zero_(), first[0, 0].fill_(1.0), first[1, 1].fill_(1.0))
                and (inner.copy_(torch.eye(8)), last.zero_(), last[2:4, 0].fill_(1.0), last[4:6, 1].fill_(1.0))
            ),
            "no order of degrees expresses these masks: the output of feature 1 sees input 0 and not input 1, "
            "and the output of feature 2 sees input 1 and not input 0",
        ),
        (
            lambda first, inner, last: inner[1, 0::2].zero_(),
            "no order of degrees expresses the mask of blocks.0.linear: its output 1 sees input 1, but not all",
        ),
    ],
)
def test_masks_that_are_no_staircase_are_refused(edit, message):
    with pytest.raises(ValueError, match=message):
        from_nflows(spoilt(edit))


def test_adjacencies_that_are_not_nested_are_refused():
    adjacency = torch.eye(4, dtype=torch.bool)
    adjacency[1, 0] = adjacency[3, 2] = True
    with pytest.raises(ValueError, match="the output of feature 1 sees input 0 and not input 2, and the output of feature 3 sees input 2"):
        from_zuko(zuko_layer(adjacency=adjacency))
    adjacency = torch.ones(4, 5, dtype=torch.bool).tril()
    adjacency[0, 4] = True
    with pytest.raises(ValueError, match="every unit must see the whole context; in hyper.0, output 1 does not see context feature 0"):
        from_zuko(zuko_layer(adjacency=adjacency, context=1))


@pytest.mark.parametrize(
    ("take_over", "module", "error", "message"),
    [
        (
            from_nflows,
            lambda: nn.Linear(2, 2),
            TypeError,
            "module must be an nflows MaskedAffineAutoregressiveTransform, MADE, CompositeTransform or Flow; got Linear",
        ),
        (
            from_normflows,
            lambda: nn.Linear(2, 2),
            TypeError,
            "module must be a normflows MaskedAffineAutoregressive, MADE or NormalizingFlow; got Linear",
        ),
        (from_zuko, lambda: nn.Linear(2, 2), TypeError, "module must be a zuko MaskedAutoregressiveTransform or Flow; got Linear"),
        (
            from_zuko,
            lambda: zuko.flows.GF(4),
            TypeError,
            "transform 0 of the flow must be a MaskedAutoregressiveTransform or a GeneralCouplingTransform; got",
        ),
        (from_nflows, lambda: nflows_layer(activation=torch.sin), ValueError, "activation must be one of"),
        (
            from_nflows,
            lambda: autoregressive.made_module.MADE(3, 8, output_multiplier=3),
            ValueError,
            "the MADE must have output_multiplier 2, scale and shift of each feature; got 3",
        ),
        (
            from_normflows,
            lambda: normflows.nets.MADE(3, 8, output_multiplier=2, preprocessing=nn.Tanh()),
            ValueError,
            "preprocessing must be None; got Tanh",
        ),
        (from_zuko, lambda: zuko.flows.NSF(4).transform.transforms[0], ValueError, "univariate must be MonotonicAffineTransform"),
    ],
)
def test_other_modules_are_refused(take_over, module, error, message):
    with pytest.raises(error, match=message):
        take_over(module().eval())


def test_a_subclass_with_another_map_is_refused():
    class Shifted(autoregressive.MaskedAffineAutoregressiveTransform):
        def _elementwise_forward(self, inputs, autoregressive_params):
            z, logabsdet = super()._elementwise_forward(inputs, autoregressive_params)
            return z + 0.1, logabsdet

    class Squared(normflows.nets.MADE):
        def forward(self, inputs, context=None):
            return super().forward(inputs, context).square()

    class Stretched(zuko.flows.MAF):
        def forward(self, c=None):
            flow = super().forward(c)
            return type(flow)(
                zuko.transforms.ComposedTransform(flow.transform, zuko.transforms.MonotonicAffineTransform(*torch.tensor([0.0, 0.5]))),
                flow.base,
            )

    with pytest.raises(ValueError, match=r"Shifted does not compute what this version .* differs by up to 1.0e-01"):
        from_nflows(Shifted(3, 8))
    with pytest.raises(ValueError, match="Squared does not compute"):
        from_normflows(Squared(3, 8, output_multiplier=2))
    with pytest.raises(ValueError, match="Stretched does not compute"):
        from_zuko(Stretched(3, transforms=1))


def test_the_floor_of_the_scale_is_that_of_the_transform():
    module = nflows_layer().double()
    module._epsilon = 0.1
    x = torch.randn(5, 3, dtype=torch.float64)
    for got, want in zip(from_nflows(module)(x), module(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_a_base_that_is_not_standard_normal_is_refused():
    flow = zuko.flows.MAF(3, transforms=1)
    assert isinstance(from_zuko(flow), Flow)
    next(flow.base.buffers()).add_(1.0)
    with pytest.raises(ValueError, match="base must be a standard normal"):
        from_zuko(flow)


def test_a_layer_taken_over_trains_copies_and_is_independent():
    module = nflows_layer(context_features=2, use_batch_norm=True).eval()
    layer = from_nflows(module)
    assert isinstance(layer, MaskedAutoregressive) and not layer.training and layer.context_features == 2
    x, context = torch.randn(5, 3), torch.randn(5, 2)
    with torch.no_grad():
        want = layer(x, context)
        for p in module.parameters():
            p.zero_()
        for twin in (layer, copy.deepcopy(layer)):
            assert all(torch.equal(g, w) for g, w in zip(twin(x, context), want, strict=True))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(x, context)[0].square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    optimizer.step()
    layer.layers[-1].bias.data.zero_()
    z, logabsdet = layer(x, context)
    back, opposite = layer.inverse(z, context)
    torch.testing.assert_close(back, x, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(opposite, -logabsdet, rtol=1e-3, atol=1e-3)


def test_other_libraries_are_not_imported_with_the_package():
    code = "import sys, flowkernels.integrations as i; print([m for m in ('nflows', 'normflows', 'zuko') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_another_map_is_refused_beside_a_nan_too():
    class Stretched(autoregressive.MaskedAffineAutoregressiveTransform):
        def _elementwise_forward(self, inputs, autoregressive_params):
            z, logabsdet = super()._elementwise_forward(inputs, autoregressive_params)
            return 7 * z, logabsdet

    plain, stretched = (kind(3, 8) for kind in (autoregressive.MaskedAffineAutoregressiveTransform, Stretched))
    for module in (plain, stretched):
        with torch.no_grad():
            module.autoregressive_net.final_layer.bias[0] = torch.nan
    assert isinstance(from_nflows(plain), MaskedAutoregressive)
    with pytest.raises(ValueError, match="Stretched does not compute"):
        from_nflows(stretched)


def test_flows_whose_layers_take_other_contexts_are_refused():
    layers = [zuko.flows.MaskedAutoregressiveTransform(3, context, hidden_features=(8,)) for context in (0, 2)]
    base = zuko.flows.MAF(3, transforms=1).base
    for transforms in (layers, layers[::-1]):
        with pytest.raises(ValueError, match=r"all transforms must take the same context; theirs have \[[02], [02]\] features"):
            from_zuko(zuko.flows.Flow(transforms, base))
    with pytest.raises(ValueError, match="module must have at least one transform; got none"):
        from_zuko(zuko.flows.Flow([], base))


def nflows_flow(*parts, base=(4,), embedding=None):
    transform = transforms.CompositeTransform([transforms.CompositeTransform([transforms.ReversePermutation(4)]), *parts])
    return nflows.Flow(transform, distributions.StandardNormal(base), embedding)


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
        (from_zuko, lambda: zuko.flows.Flow(zuko.flows.NICE(4).transform, zuko.flows.MAF(3).base), ValueError, "base must be a standard"),
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
    flow = nflows_flow()
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
        (from_normflows, Drawn(normflows.distributions.DiagGaussian(4), [normflows_coupling()])),
    ):
        with pytest.raises(ValueError, match="has a _?sample of its own, which would not be taken over"):
            take_over(module)


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
