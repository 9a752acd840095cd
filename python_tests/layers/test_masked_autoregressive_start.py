"""Where training begins."""

import pytest
import torch

from flowkernels.flows import IAF, MAF
from flowkernels.layers import masked_autoregressive


@pytest.fixture(autouse=True)
def start_of_users(monkeypatch):
    monkeypatch.setattr(masked_autoregressive, "INITIAL_OUTPUTS", 0.1)


@pytest.mark.parametrize("kind", [MAF, IAF])
@pytest.mark.parametrize(("features", "hidden"), [(3, (16,)), (16, (8,)), (64, (8, 8)), (16, (512, 512))])
def test_a_new_flow_is_near_standard_noise(features, hidden, kind):
    x = torch.randn(500, features, generator=torch.Generator().manual_seed(0))
    for seed in range(5):
        torch.manual_seed(seed)
        flow = kind(features, hidden_features=hidden)
        z, logabsdet = flow(x)
        assert (z - x).abs().mean() < 0.2
        assert (flow.log_prob(x) - flow.base.log_prob(x)).mean() > -0.1 * features
        assert logabsdet.std() > 0  # and not the identity, whose hidden layers would get no gradient


def test_all_parameters_get_a_gradient_at_once():
    torch.manual_seed(0)
    flow = MAF(5, hidden_features=(32, 32), context_features=2)
    flow.log_prob(torch.randn(50, 5), torch.randn(50, 2)).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in flow.parameters())
