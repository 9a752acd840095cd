"""Other libraries' networks against ours with the same parameters, over 200 random configurations of each library."""

import functools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions.transforms import _InverseTransform

from flowkernels.flows import Flow
from flowkernels.integrations import from_nflows, from_normflows, from_pyro, from_zuko
from flowkernels.layers import MLP

nflows = pytest.importorskip("nflows.flows")
nflows_distributions = pytest.importorskip("nflows.distributions")
nflows_nets = pytest.importorskip("nflows.nn.nets")
nflows_transforms = pytest.importorskip("nflows.transforms")
nflows_autoregressive = pytest.importorskip("nflows.transforms.autoregressive")
normflows = pytest.importorskip("normflows")
pyro_distributions = pytest.importorskip("pyro.distributions")
pyro_nn = pytest.importorskip("pyro.nn")
pyro_transforms = pytest.importorskip("pyro.distributions.transforms")
zuko = pytest.importorskip("zuko")

CONFIGURATIONS = range(200)
FLOWS = range(60)
FUNCTIONS = [F.relu, torch.tanh, F.elu, F.gelu, F.silu, F.leaky_relu, torch.sigmoid]
MODULES = [nn.ReLU, nn.Tanh, nn.ELU, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.Sigmoid]
Outputs = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def one_thread():
    """The D passes of the others are hundreds of tiny matmuls, which a second thread only slows down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def prepared(module: nn.Module) -> nn.Module:
    """In float64 and evaluation mode, with parameters off their initial values, which are zero here and there, and busy batch norms."""
    module = module.double().eval()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn_like(p))
        for m in module.modules():
            if hasattr(m, "running_var"):
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 2.0)
    return module


def assert_agree(ours: nn.Module, forward, inverse, features: int, context: int, rows: int) -> None:
    x = torch.randn(rows, features, dtype=torch.float64)
    c = torch.randn(rows, context, dtype=torch.float64) if context else None
    with torch.no_grad():
        torch.testing.assert_close(ours(x, c), forward(x, c), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(ours.inverse(x, c), inverse(x, c), rtol=1e-10, atol=1e-10)


def made_settings(draw: random.Random) -> dict:
    residual = draw.random() < 0.6
    return {
        "features": draw.choice([1, 2, 3, 5, 7]),
        "hidden_features": draw.choice([1, 4, 9, 20]),
        "context_features": draw.choice([None, None, 1, 4]),
        "num_blocks": draw.choice([0, 1, 2, 3]),
        "use_residual_blocks": residual,
        "random_mask": not residual and draw.random() < 0.5,
        "activation": draw.choice(FUNCTIONS),
        "dropout_probability": draw.choice([0.0, 0.5]),
        "use_batch_norm": draw.random() < 0.4,
    }


@pytest.mark.parametrize("seed", CONFIGURATIONS)
def test_nflows(seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    settings = made_settings(draw)
    module = prepared(nflows_autoregressive.MaskedAffineAutoregressiveTransform(**settings))
    ours = from_nflows(draw.choice([module, module.autoregressive_net]))
    context = settings["context_features"] or 0
    assert_agree(ours, module.forward, module.inverse, settings["features"], context, draw.choice([1, 2, 3, 5, 11]))


@pytest.mark.parametrize("seed", CONFIGURATIONS)
def test_normflows(seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    settings = made_settings(draw)
    if not settings["use_residual_blocks"] and settings["num_blocks"]:
        settings["context_features"] = None  # normflows' feed-forward blocks refuse a context
    module = normflows.flows.MaskedAffineAutoregressive(**settings)
    if draw.random() < 0.3:
        settings.pop("features")
        made = normflows.nets.MADE(features=module.features, output_multiplier=2, permute_mask=True, **settings)
        module.autoregressive_net = made
    module = prepared(module)
    ours = from_normflows(draw.choice([module, module.autoregressive_net]))
    context = settings["context_features"] or 0
    assert_agree(ours, module.forward, module.inverse, module.features, context, draw.choice([1, 2, 3, 5, 11]))


def zuko_directions(module: nn.Module):
    transform = (lambda c: module(c).transform) if isinstance(module, zuko.flows.Flow) else module

    def inverse(z: Tensor, c: Tensor | None) -> Outputs:
        return transform(c).inv.call_and_ladj(z)

    return lambda x, c: transform(c).call_and_ladj(x), inverse


def nested_adjacency(features: int, draw: random.Random) -> Tensor:
    """Features in a random order, some of them in one step together, and some that see less than their step allows."""
    rank = torch.tensor([draw.randrange(features) for _ in range(features)])
    limit = torch.tensor([draw.randint(max(int(r) - 1, 0), int(r)) for r in rank])
    adjacency = rank < limit[:, None]
    return adjacency | torch.eye(features, dtype=torch.bool)


@pytest.mark.parametrize("seed", CONFIGURATIONS)
def test_zuko(seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    features, context = draw.choice([2, 3, 5, 7]), draw.choice([0, 0, 1, 4])
    widths = [draw.choice([8, 9, 20]) for _ in range(draw.choice([1, 2, 3]))]
    settings = {"hidden_features": widths, "activation": draw.choice(MODULES), "residual": draw.random() < 0.5}
    kind = draw.choice(["order", "passes", "adjacency", "flow"])
    if kind == "flow":
        module = zuko.flows.MAF(features, context, transforms=draw.choice([1, 3]), randperm=draw.random() < 0.5, **settings)
    else:
        if kind == "adjacency":
            adjacency = nested_adjacency(features, draw)
            if not context and adjacency.sum() == features:
                adjacency[features - 1, 0] = True  # zuko wants something to depend on something
            settings["adjacency"] = adjacency
        else:
            settings["order"] = torch.randperm(features)
        if kind == "passes":
            settings["passes"] = draw.randint(2, features)
        slope = draw.choice([1e-3, 1e-2])
        univariate = functools.partial(zuko.transforms.MonotonicAffineTransform, slope=slope)
        module = zuko.flows.MaskedAutoregressiveTransform(features, context, univariate=univariate, **settings)
    module = prepared(module)
    ours = from_zuko(module)
    forward, inverse = zuko_directions(module)
    assert_agree(ours, forward, inverse, features, context, draw.choice([1, 2, 3, 5, 11]))


def assert_flows_agree(ours: Flow, log_prob, inverse, features: int, context: int, rows: int) -> None:
    """Densities of data, and samples of noise with their log|det|."""
    assert isinstance(ours, Flow) and ours.shape == (features,) and ours.context_features == context and not ours.training
    draw = lambda width: torch.randn(rows, width, dtype=torch.float64) if width else None
    x, z, c = draw(features), draw(features), draw(context)
    with torch.no_grad():
        torch.testing.assert_close(ours.log_prob(x, c), log_prob(x, c), rtol=1e-10, atol=1e-10)
        samples, logabsdet = ours.inverse(z, c)
        theirs, other = inverse(z, c)
        torch.testing.assert_close(samples, theirs, rtol=1e-7, atol=1e-7)  # their D passes and ours differ by the map's condition
        torch.testing.assert_close(logabsdet, other, rtol=1e-6, atol=1e-6)  # normflows adds it up in float32


def nflows_transform(draw: random.Random, features: int, context: int) -> nn.Module:
    """One of the transforms that whole flows are made of."""
    t = nflows_transforms
    kind = draw.choice(["made", "made", "permutation", "norm", "affine", "inverse", "coupling"])
    if kind == "made":
        settings = made_settings(draw) | {"features": features, "context_features": context or None}
        return t.MaskedAffineAutoregressiveTransform(**settings)
    if kind == "permutation":
        return draw.choice([t.RandomPermutation, t.ReversePermutation])(features)
    if kind == "norm":
        norm = draw.choice([t.BatchNorm, t.ActNorm])(features)
        norm.initialized = torch.tensor(True)
        return norm
    if kind == "affine":
        numbers = (0.3, 1.7) if draw.random() < 0.5 else (torch.randn(features), torch.rand(features) + 0.5)
        return t.PointwiseAffineTransform(*numbers)
    if kind == "inverse":
        return t.InverseTransform(t.CompositeTransform([nflows_transform(draw, features, context) for _ in range(2)]))
    mask = torch.randperm(features) % 2
    network = lambda inputs, outputs: nflows_nets.ResidualNet(inputs, outputs, 8, context_features=context or None)
    return draw.choice([t.AffineCouplingTransform, t.AdditiveCouplingTransform])(mask, network)


@pytest.mark.parametrize("seed", FLOWS)
def test_flows_of_nflows(seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    features, context = draw.choice([2, 3, 5, 6]), draw.choice([0, 3])
    kind = draw.choice(["maf", "realnvp", "own", "own"])
    if kind == "own":
        parts = [nflows_transform(draw, features, context) for _ in range(draw.choice([1, 3, 5]))]
        made = nflows_autoregressive.MaskedAffineAutoregressiveTransform(features, 9, context_features=context or None)
        transform = nflows_transforms.CompositeTransform([nflows_transforms.CompositeTransform(parts), made])
        module = nflows.Flow(transform, nflows_distributions.StandardNormal([features]))
    elif kind == "maf":
        context, norms = 0, draw.random() < 0.5
        module = nflows.MaskedAutoregressiveFlow(features, 9, 3, 2, use_random_permutations=True, batch_norm_between_layers=norms)
    else:
        context, norms = 0, draw.random() < 0.5
        module = nflows.SimpleRealNVP(features, 9, 3, 2, batch_norm_between_layers=norms)
    module = prepared(module)
    ours = from_nflows(module if draw.random() < 0.7 else module._transform)
    assert_flows_agree(ours, module.log_prob, module._transform.inverse, features, context, draw.choice([1, 2, 11]))


def normflows_flow(draw: random.Random, features: int, context: int) -> nn.Module:
    kind = draw.choice(["made"] if context else ["made", "permutation", "norm", "coupling", "coupling"])
    if kind == "made":
        blocks = 2 if draw.random() < 0.5 or context else 0
        return normflows.flows.MaskedAffineAutoregressive(features, 9, context_features=context or None, num_blocks=blocks)
    if kind == "permutation":
        return normflows.flows.Permute(features, mode=draw.choice(["swap", "shuffle"]))
    if kind == "norm":
        return normflows.flows.ActNorm(features)
    mode, scale_map = draw.choice(["channel", "channel_inv"]), draw.choice(["exp", "sigmoid", "sigmoid_inv", None])
    halves = [(features + 1) // 2, features // 2]
    inputs, outputs = halves if mode == "channel" else halves[::-1]
    leaky = 0.0 if scale_map == "sigmoid" else draw.choice([0.0, 0.1])
    network = normflows.nets.MLP([inputs, 8, 8, outputs * (2 if scale_map else 1)], leaky=leaky)
    return normflows.flows.AffineCouplingBlock(network, scale=scale_map is not None, scale_map=scale_map or "exp", split_mode=mode)


@pytest.mark.parametrize("seed", FLOWS)
def test_models_of_normflows(seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    features, context = draw.choice([2, 3, 5, 6]), draw.choice([0, 0, 3])
    base = normflows.distributions.DiagGaussian(features, trainable=draw.random() < 0.5)
    parts = [normflows_flow(draw, features, context) for _ in range(draw.choice([1, 3, 5]))]
    kind = normflows.ConditionalNormalizingFlow if context else normflows.NormalizingFlow
    module = prepared(kind(base, parts))
    given = lambda c: () if c is None else (c,)
    log_prob = lambda x, c: module.log_prob(x, *given(c))
    x, c = (torch.randn(20, width, dtype=torch.float64) for width in (features, context))
    log_prob(x, c if context else None)  # initialises actnorms
    to_base = lambda z: base.loc + z * base.log_scale.exp()

    def inverse(z: Tensor, c: Tensor | None) -> Outputs:
        samples, logabsdet = module.forward_and_log_det(to_base(z), *given(c))
        return samples, (logabsdet + base.log_scale.sum()).double()

    assert_flows_agree(from_normflows(module), log_prob, inverse, features, context, draw.choice([1, 2, 11]))


@pytest.mark.parametrize("seed", FLOWS)
def test_couplings_of_zuko(seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    features, context = draw.choice([2, 3, 5, 6]), draw.choice([0, 3])
    settings = {"hidden_features": draw.choice([(), (8,), (9, 20)]), "activation": draw.choice([nn.ReLU, nn.ReLU, nn.Tanh])}
    settings |= {"randmask": draw.random() < 0.5, "normalize": draw.random() < 0.2, "transforms": draw.choice([1, 4])}
    module = prepared(draw.choice([zuko.flows.NICE, zuko.flows.RealNVP])(features, context, **settings))
    if draw.random() < 0.5:  # data that are standardised by the flow itself
        affine = functools.partial(zuko.flows.UnconditionalTransform, torch.distributions.AffineTransform)
        numbers = {"loc": torch.randn(features).double(), "scale": torch.rand(features).double() + 0.5, "buffer": True}
        module = zuko.flows.Flow([affine(**numbers), *module.transform.transforms], module.base).eval()
    ours = from_zuko(module)
    if settings["activation"] is nn.ReLU and settings["hidden_features"] and not settings["normalize"]:
        assert any(isinstance(m, MLP) for m in ours.modules())
    _, inverse = zuko_directions(module)
    assert_flows_agree(ours, lambda x, c: module(c).log_prob(x), inverse, features, context, draw.choice([1, 2, 11]))


def pyro_autoregressive(draw: random.Random, features: int, context: int) -> nn.Module:
    widths = [draw.choice([features, 8, 9, 20]) for _ in range(draw.choice([1, 2, 3]))]
    widths = [max(width, features) for width in widths]
    settings = {"nonlinearity": draw.choice(MODULES)()}
    kind = {"stable": True, "sigmoid_bias": draw.choice([2.0, 0.5])} if draw.random() < 0.4 else {}
    if not kind and draw.random() < 0.5:
        kind = {"log_scale_min_clip": -0.2, "log_scale_max_clip": 0.1}
    if context:
        network = pyro_nn.ConditionalAutoRegressiveNN(features, context, widths, **settings)
        return pyro_transforms.ConditionalAffineAutoregressive(network, **kind)
    return pyro_transforms.AffineAutoregressive(pyro_nn.AutoRegressiveNN(features, widths, **settings), **kind)


@pytest.fixture
def float64_by_default():
    """Pyro's inverse begins with zeros of the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def pyro_directions(transform):
    def forward(x: Tensor, c: Tensor | None) -> Outputs:
        of_context = transform if c is None else transform.condition(c)
        return (y := of_context(x)), of_context.log_abs_det_jacobian(x, y)

    def inverse(y: Tensor, c: Tensor | None) -> Outputs:
        of_context = transform if c is None else transform.condition(c)
        return (x := of_context.inv(y)), -of_context.log_abs_det_jacobian(x, y)

    return forward, inverse


@pytest.mark.filterwarnings("ignore:.*AutoRegressiveNN input_dim = 1")
@pytest.mark.parametrize("seed", CONFIGURATIONS)
def test_pyro(seed, float64_by_default):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    features, context = draw.choice([1, 2, 3, 5, 7]), draw.choice([0, 0, 1, 4])
    module = prepared(pyro_autoregressive(draw, features, context))
    forward, inverse = pyro_directions(module)
    assert_agree(from_pyro(module), forward, inverse, features, context, draw.choice([1, 2, 3, 5, 11]))


class Hypernet(nn.Module):
    """A network of one's own, as Pyro calls it."""

    def __init__(self, inputs: int, context_dim: int, outputs: int) -> None:
        super().__init__()
        self.context_dim, self.linear = context_dim, nn.Linear(inputs + context_dim, 2 * outputs)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Outputs:
        x = x if context is None else torch.cat([x, context.expand(*x.shape[:-1], -1)], -1)
        return self.linear(x.tanh()).chunk(2, -1)


def pyro_coupling(draw: random.Random, features: int, context: int) -> nn.Module:
    split = draw.choice([features // 2, features - features // 2])
    kind = {"log_scale_min_clip": -0.2, "log_scale_max_clip": 0.1} if draw.random() < 0.5 else {}
    outputs = features - split
    if draw.random() < 0.3:
        network = Hypernet(split, context, outputs)
    else:
        settings = {"hidden_dims": draw.choice([[8], [9, 20]]), "param_dims": [outputs, outputs], "nonlinearity": draw.choice(MODULES)()}
        settings |= {"nonlinearity": nn.ReLU()} if draw.random() < 0.5 else {}
        network = pyro_nn.ConditionalDenseNN(split, context, **settings) if context else pyro_nn.DenseNN(split, **settings)
    return (pyro_transforms.ConditionalAffineCoupling if context else pyro_transforms.AffineCoupling)(split, network, **kind)


def pyro_transform(draw: random.Random, features: int, context: int, autoregressive: bool) -> object:
    """One of the transforms that whole distributions are made of."""
    t = pyro_transforms
    kind = draw.choice(["made", "permutation", "norm", "affine", "coupling", "inverse", "composed"])
    if kind == "made" and autoregressive:
        return pyro_autoregressive(draw, features, context)
    if kind == "permutation":
        return t.permute(features)
    if kind == "norm":
        return t.BatchNorm(features)
    if kind == "affine":
        loc = torch.randn(features, dtype=torch.float64)
        return t.AffineTransform(loc, draw.choice([1.5, torch.rand(features, dtype=torch.float64) + 0.5]), event_dim=draw.choice([0, 1]))
    if kind == "inverse":
        return pyro_transform(draw, features, context, autoregressive).inv
    if kind == "composed":
        parts = [pyro_transform(draw, features, context, autoregressive) for _ in range(2)]
        conditional = any(hasattr(part, "condition") for part in parts)
        return (pyro_distributions.conditional.ConditionalComposeTransformModule if conditional else t.ComposeTransformModule)(parts)
    return pyro_coupling(draw, features, context)


@pytest.mark.filterwarnings("ignore:.*AutoRegressiveNN input_dim = 1")
@pytest.mark.parametrize("seed", FLOWS)
def test_distributions_of_pyro(seed, float64_by_default):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    features, context = draw.choice([2, 3, 5, 6]), draw.choice([0, 3])
    parts = [pyro_transform(draw, features, context, True) for _ in range(draw.choice([1, 3, 5]))]
    for part in parts:
        prepare_pyro(part)
    standard = draw.random() < 0.5
    loc = torch.zeros(features, dtype=torch.float64) if standard else torch.randn(features, dtype=torch.float64)
    base = pyro_distributions.Normal(loc, 1.0 + (not standard) * torch.rand(features, dtype=torch.float64))
    base = base.to_event(1) if draw.random() < 0.5 else base
    conditional = context and any(hasattr(part, "condition") for part in parts)
    kind = pyro_distributions.ConditionalTransformedDistribution if conditional else pyro_distributions.TransformedDistribution
    module = kind(base, parts)
    of_context = lambda c: module.condition(c) if conditional else module
    log_prob = lambda x, c: of_context(c).log_prob(x).view(len(x), -1).sum(1)
    normal = torch.distributions.Normal(loc, base.base_dist.scale if hasattr(base, "base_dist") else base.scale)

    def inverse(z: Tensor, c: Tensor | None) -> Outputs:
        x = normal.loc + z * normal.scale
        for transform in of_context(c).transforms:
            x = transform(x)
        return x, (-0.5 * z.square() - 0.5 * math.log(2 * math.pi)).sum(1) - log_prob(x, c)

    ours = from_pyro(module).eval()
    assert ours.context_features in (0, context)
    assert_flows_agree(ours, log_prob, inverse, features, ours.context_features, draw.choice([1, 2, 11]))


def prepare_pyro(transform) -> None:
    """Those that a composed or inverted transform holds, as well."""
    if isinstance(transform, _InverseTransform | pyro_distributions.conditional._ConditionalInverseTransformModule):
        prepare_pyro(transform.inv)
    for part in getattr(transform, "parts", getattr(transform, "transforms", [])):
        prepare_pyro(getattr(part, "transform", part))
    if isinstance(transform, nn.Module):
        prepared(transform)
