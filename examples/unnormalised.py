"""A density known up to a constant: Neal's funnel fitted by reverse KL, its constant found, and expectations taken under it.

v ~ N(0, 1.5), x_i ~ N(0, exp(v / 2)) for i = 1..9 (Neal 2003, section 8, with half his scale), times a constant that nobody is told.
An IAF draws each sample with its density in one pass, so a step costs two evaluations of a network. What the fit leaves is mended by
importance weights, where the flow reaches: one fitted by reverse KL is too narrow rather than too wide, here for v > 4, and what it never
draws is missing in log Z, and in its standard error.

    python examples/unnormalised.py
"""

import argparse
import math

import torch
from torch import Tensor

from flowkernels.flows import IAF
from flowkernels.training import log_normalizer, train_reverse_kl

FEATURES, LOG_Z, SCALE = 10, 7.0, 1.5


def funnel(x: Tensor) -> Tensor:
    """log p~(x), [rows, 10] -> [rows]; its integral is exp(LOG_Z)."""
    v, others = x[:, 0], x[:, 1:]
    log_v = -0.5 * (v / SCALE) ** 2 - math.log(SCALE * math.sqrt(2 * math.pi))
    log_others = -0.5 * others**2 * torch.exp(-v)[:, None] - 0.5 * v[:, None] - 0.5 * math.log(2 * math.pi)
    return LOG_Z + log_v + log_others.sum(1)


def main(steps: int = 1500, samples: int = 100_000) -> float:
    torch.manual_seed(0)
    flow = IAF(FEATURES, transforms=2, hidden_features=(32, 32), activation="tanh")
    say = lambda step, loss: step % max(1, steps // 5) or print(f"step {step}: KL - log Z = {loss:.3f} nats")
    train_reverse_kl(flow, funnel, steps=steps, samples=256, learning_rate=5e-3, on_step=say)

    found = log_normalizer(flow, funnel, samples)
    share = found.effective_samples / samples
    print(f"log Z = {found.log_z:.3f} +- {found.standard_error:.3f} (exact {LOG_Z}), {share:.0%} of the samples effective")

    x, log_q = flow.sample_and_log_prob(samples)
    weight = torch.softmax(funnel(x) - log_q, 0)
    mean, second = (weight * x[:, 0]).sum(), (weight * x[:, 0] ** 2).sum()
    print(f"v: mean {mean:.2f} (exact 0), standard deviation {(second - mean**2).sqrt():.2f} (exact {SCALE})")
    return found.log_z


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    main(parser.parse_args().steps)
