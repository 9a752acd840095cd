"""A flow of nflows, taken over: the same densities, the same samples, and what sampling costs before and after.

pip install nflows
python examples/from_nflows.py
"""

import argparse
import time
from collections.abc import Callable

import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.transforms import CompositeTransform, MaskedAffineAutoregressiveTransform, PointwiseAffineTransform, RandomPermutation

from flowkernels.integrations import from_nflows


def make(features: int, context_features: int, layers: int = 5) -> Flow:
    """As for neural posterior estimation: a standardisation, then MAF layers and permutations. Of a flow that embeds its context,
    `from_nflows(flow._transform)` is taken over, and given `flow._embedding_net(context)`."""
    parts = [PointwiseAffineTransform(shift=torch.randn(features), scale=torch.rand(features) + 0.5)]
    for _ in range(layers):
        parts += [
            MaskedAffineAutoregressiveTransform(
                features, 50, context_features=context_features, use_residual_blocks=False, activation=torch.tanh
            ),
            RandomPermutation(features),
        ]
    return Flow(CompositeTransform(parts), StandardNormal([features])).eval()


def seconds(call: Callable[[], object], repeats: int = 3) -> float:
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return sorted(times)[repeats // 2]


def main(features: int = 10, samples: int = 10_000) -> float:
    torch.manual_seed(0)
    theirs = make(features, context_features=8)
    ours = from_nflows(theirs)
    x, context = torch.randn(100, features), torch.randn(100, 8)
    with torch.no_grad():
        difference = (ours.log_prob(x, context) - theirs.log_prob(x, context)).abs().max().item()
        print(f"log p(x | context) differs by up to {difference:.1e} nats")
        before = seconds(lambda: theirs.sample(samples, context[:1]))
        after = seconds(lambda: ours.sample(samples, context[0]))
    print(
        f"{samples} samples given one context: {before * 1e3:.1f} ms before, {after * 1e3:.2f} ms after, {before / after:.0f} times as fast"
    )
    return difference


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, default=10)
    main(parser.parse_args().features)
