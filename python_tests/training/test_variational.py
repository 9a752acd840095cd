"""Reverse KL against densities whose normalising constants are known."""

import doctest
import math

import pytest
import torch

from flowkernels.flows import IAF, MAF, RealNVP
from flowkernels.training import log_normalizer, reverse_kl, train_reverse_kl, variational


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Flows this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def flow(**settings):
    torch.manual_seed(0)
    return IAF(2, **{"transforms": 2, "hidden_features": (16,), **settings})


def gaussian(x, context=None):
    """Z = 2 pi * 0.5 * 3, centred at the context."""
    mean = 0.0 if context is None else context
    return -0.5 * ((x - mean) / torch.tensor([0.5, 3.0])).square().sum(1)


def test_the_documented_example_recovers_the_bananas_constant():
    from flowkernels.training import variational

    assert doctest.testmod(variational, raise_on_error=True).attempted > 5


def test_the_loss_is_minus_log_z_where_the_flow_is_the_density():
    class Identity(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(()))

        def inverse(self, z, context=None):
            return z + self.unused, z.new_zeros(len(z))

    from flowkernels.flows import Flow

    model = Flow([Identity()], 2)
    density = lambda x: 7.0 - 0.5 * x.square().sum(1)
    want = 7.0 + math.log(2 * math.pi)
    assert abs(reverse_kl(model, density, 5).item() + want) < 1e-5
    found = log_normalizer(model, density, 10_000)  # more rows than are in flight at once
    assert abs(found.log_z - want) < 1e-5 and found.standard_error < 1e-6 and abs(found.effective_samples - 10_000) < 1


@pytest.mark.parametrize(
    "model",
    [lambda: MAF(2, transforms=2, hidden_features=(16,)), lambda: RealNVP(2, transforms=4, hidden_features=(16,), batch_norm=False)],
)
def test_every_flow_recovers_a_gaussians_constant(model):
    torch.manual_seed(0)
    q = model()
    losses = train_reverse_kl(q, gaussian, steps=150, samples=128, learning_rate=2e-2)
    found = log_normalizer(q, gaussian, 4000)
    want = math.log(2 * math.pi * 1.5)
    assert losses[0] > losses[-1] > -want - 0.3
    assert found.effective_samples > 2000 and abs(found.log_z - want) < 5 * found.standard_error


def test_a_context_is_amortised():
    q = flow(context_features=2)
    contexts = torch.tensor([[-1.0, 0.0], [1.0, 2.0], [0.5, -1.0]])
    train_reverse_kl(q, gaussian, context=contexts, steps=200, samples=64, learning_rate=2e-2)
    for context in contexts:
        found = log_normalizer(q, gaussian, 4000, context)
        assert found.effective_samples > 1500 and abs(found.log_z - math.log(2 * math.pi * 1.5)) < 5 * found.standard_error + 1e-3


def test_log_normalizer_takes_a_density_with_zeros():
    q = flow()
    half = lambda x: torch.where(x[:, 0] > 0, q.log_prob(x), -math.inf)
    found = log_normalizer(q, half, 4000)
    with torch.no_grad():
        share = (q.sample(100_000)[:, 0] > 0).double().mean()
    assert abs(found.log_z - math.log(share)) < 5 * found.standard_error


def no_gradient(x):
    return gaussian(x) - (0 * x).abs().sum(1).sqrt()


def nan_flow():
    made = flow()
    with torch.no_grad():
        next(made.parameters()).fill_(math.nan)
    return made


def test_a_density_that_is_zero_at_all_samples():
    assert log_normalizer(flow(), lambda x: torch.full((len(x),), -math.inf), 100) == (-math.inf, math.inf, 0.0)


def nan_at_two(x):
    return torch.where(torch.arange(len(x)) == 2, math.nan, gaussian(x))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_log_normalizer_names_the_sample_among_all(value, monkeypatch):
    monkeypatch.setattr(variational, "rows_in_flight", lambda flow: 10)
    seen = []

    def density(x):
        seen.extend(x)
        return torch.where(torch.arange(len(seen) - len(x), len(seen)) == 13, value, gaussian(x))

    with pytest.raises(ValueError, match=f"log_density must be finite or -inf; it is {value} for sample 13, x = "):
        log_normalizer(flow(), density, 25)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: reverse_kl(flow(), lambda x: gaussian(x)[:, None], 5), ValueError, r"must return shape \[5\], .*; got \[5, 1\]"),
        (lambda: reverse_kl(flow(), lambda x: gaussian(x).sum(), 5), ValueError, r"must return shape \[5\], .*; got \[\]"),
        (lambda: reverse_kl(flow(), lambda x: 1.0, 5), TypeError, "must return a tensor; got float"),
        (lambda: reverse_kl(flow(), nan_at_two, 5), ValueError, r"finite; it is nan for sample 2, x = \[\S+, \S+\]$"),
        (lambda: reverse_kl(flow(), lambda x: gaussian(x) - math.inf, 5), ValueError, "it is -inf for sample 0, .*soft wall"),
        (lambda: reverse_kl(flow(), lambda x: gaussian(x.detach()), 5), ValueError, "must be differentiable"),
        (lambda: log_normalizer(flow(), nan_at_two, 5), ValueError, "finite or -inf; it is nan for sample 2"),
        (lambda: log_normalizer(flow(), gaussian, 1), ValueError, "n must be at least 2; got 1"),
        (lambda: log_normalizer(flow(), gaussian, 2.5), ValueError, "n must be a whole number of at least 1; got 2.5"),
        (
            lambda: log_normalizer(flow(context_features=2), gaussian, 5, torch.zeros(3, 2)),
            ValueError,
            r"a single one, \[2\]; got \[3, 2\]",
        ),
        (lambda: train_reverse_kl(flow(), gaussian, steps=0), ValueError, "steps must be a whole number of at least 1; got 0"),
        (lambda: train_reverse_kl(flow(), gaussian, learning_rate=-1.0), ValueError, "learning_rate must be positive"),
        (lambda: train_reverse_kl(flow(), gaussian, clip_norm=-1.0), ValueError, "clip_norm must be positive; got -1.0"),
        (
            lambda: train_reverse_kl(flow(), no_gradient, steps=3),
            ValueError,
            "the gradient's norm is nan in step 1",
        ),
        (lambda: reverse_kl(flow(), gaussian, 0), ValueError, "n must be a whole number of at least 1; got 0"),
        (lambda: reverse_kl(nan_flow(), gaussian, 5), ValueError, "samples of the flow must be finite: its parameters have become NaN"),
    ],
)
def test_mistakes_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_gradients_that_are_switched_off_are_named():
    with torch.no_grad(), pytest.raises(ValueError, match="use log_normalizer there"):
        reverse_kl(flow(), gaussian, 5)


def test_a_flow_without_anything_to_train_is_named():
    with pytest.raises(ValueError, match="flow must have parameters to train"):
        train_reverse_kl(flow().requires_grad_(False), gaussian, steps=2)
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1; got 2.0"):
        train_reverse_kl(flow(), gaussian, steps=2.0)
