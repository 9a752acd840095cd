"""Other libraries' networks against ours with the same parameters, over 200 random configurations of each library."""

import functools
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowkernels.integrations import from_nflows, from_normflows, from_zuko

nflows_autoregressive = pytest.importorskip("nflows.transforms.autoregressive")
normflows = pytest.importorskip("normflows")
zuko = pytest.importorskip("zuko")

CONFIGURATIONS = range(200)
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
            if isinstance(m, nn.BatchNorm1d):
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
