"""Simulation-based inference: the posterior of a simulator's parameters, for any observation, by a conditional MAF.

A ball is thrown; its height and speed are unknown, and 10 noisy heights are observed. The flow is trained on pairs of parameters and
observations that the simulator made, maximising log q(parameters | observation) (neural posterior estimation, Papamakarios and Murray
2016). Then a thousand observations are answered with a thousand posterior samples each, and the credible intervals are checked: 90 percent
of them must hold the parameters that made the observation.

    python examples/posterior.py
"""

import argparse
import time

import torch
from torch import Tensor

from flowkernels.flows import MAF

TIMES = torch.linspace(0.1, 1.0, 10)


def draw_parameters(n: int) -> Tensor:
    """The prior: starting height and speed, [n, 2]."""
    return torch.tensor([1.5, 3.0]) + torch.randn(n, 2)


def simulate(parameters: Tensor) -> Tensor:
    """Heights at ten times, with noise that grows with the height, [n, 10]."""
    height, speed = parameters[:, :1], parameters[:, 1:]
    exact = height + speed * TIMES - 0.5 * 9.81 * TIMES**2
    return exact + (0.2 + 0.1 * exact.abs()) * torch.randn_like(exact)


def train(steps: int, batch: int) -> MAF:
    flow = MAF(features=2, context_features=len(TIMES), transforms=4, hidden_features=(64, 64))
    optimizer = torch.optim.Adam(flow.parameters(), lr=2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(1, steps + 1):
        parameters = draw_parameters(batch)
        loss = -flow.log_prob(parameters, simulate(parameters)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 5) == 0:
            print(f"step {step}: -log q = {loss.item():.3f} nats")
    return flow.eval()


def coverage(flow: MAF, observations: int, samples: int) -> Tensor:
    """How often the central 90 percent of the posterior hold the true parameters, [2]."""
    truth = draw_parameters(observations)
    observed = simulate(truth)
    began = time.perf_counter()
    drawn = flow.sample(samples, observed)  # [samples, observations, 2]
    print(f"{observations} observations x {samples} samples in {time.perf_counter() - began:.2f} s")
    low, high = drawn.quantile(torch.tensor([0.05, 0.95]), dim=0)
    return ((low < truth) & (truth < high)).float().mean(0)


def main(steps: int = 2000, batch: int = 500, observations: int = 1000, samples: int = 1000) -> Tensor:
    torch.manual_seed(0)
    flow = train(steps, batch)
    found = coverage(flow, observations, samples)
    error = (0.9 * 0.1 / observations) ** 0.5
    print(f"90 % intervals hold the height of {found[0]:.1%} of the observations, and the speed of {found[1]:.1%} (+- {error:.1%})")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    main(parser.parse_args().steps)
