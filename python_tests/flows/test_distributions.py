"""Bases, distributions and samples of flows: what they take, refuse and give."""

import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from flowkernels.flows import IAF, MAF, NICE, Flow, RealNVP, StandardLogistic, StandardNormal
from flowkernels.layers import DiagonalScale
from python_tests.battery import assert_same_bits


@pytest.mark.parametrize(
    ("base", "got"),
    [
        (torch.distributions.Normal(0.0, 1.0), "Normal"),
        (torch.distributions.Independent(torch.distributions.Normal(torch.zeros(3), 1.0), 1), "Independent"),
        (StandardLogistic, "the class StandardLogistic"),
        ("normal", "str"),
    ],
)
def test_a_base_that_is_none_is_refused(base, got):
    with pytest.raises(TypeError, match=rf"base must have log_prob\(z\) and sample\(n, features, \*, like\), .*; got {got}"):
        Flow([DiagonalScale(3)], 3, base=base)


@pytest.mark.parametrize("kind", [MAF, IAF, RealNVP, NICE])
def test_a_flow_takes_a_base_whose_parameters_train(kind):
    """Normals with a learned mean: what the flow adds to its density does not change."""

    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean = nn.Parameter(torch.tensor([3.0, -2.0, 1.0]))

        def log_prob(self, z):
            return StandardNormal().log_prob(z - self.mean)

        def sample(self, n, features, *, like, generator=None):
            return self.mean + StandardNormal().sample(n, features, like=like, generator=generator)

    torch.manual_seed(0)
    flow = kind(3, hidden_features=(4,), base=Learned()).eval()
    x = torch.randn(5, 3)
    z, logabsdet = flow(x)
    log_prob = flow.log_prob(x)
    torch.testing.assert_close(log_prob, torch.distributions.Normal(flow.base.mean, 1.0).log_prob(z).sum(1) + logabsdet)
    (gradient,) = torch.autograd.grad(log_prob.sum(), flow.base.mean)
    torch.testing.assert_close(gradient, (z - flow.base.mean).sum(0).detach())
    with torch.no_grad():
        noise, _ = flow(flow.sample(4000))
    torch.testing.assert_close(noise.mean(0), flow.base.mean.detach(), rtol=0, atol=0.1)


def test_a_base_that_gives_a_density_for_each_feature_is_refused():
    class Each(StandardNormal):
        def log_prob(self, z):
            return -0.5 * z.square()

    flow = Flow([DiagonalScale(3)], 3, base=Each())
    for call in (lambda: flow.log_prob(torch.randn(3, 3)), lambda: flow.rsample_and_log_prob(3)):
        with pytest.raises(ValueError, match=r"base.log_prob must return one number for each row, \[3\]; got \[3, 3\]"):
            call()


@pytest.mark.parametrize("context", [np.zeros((2, 3), dtype=np.float32), [0.0, 0.0, 0.0]])
def test_contexts_of_distributions_are_tensors(context):
    flow = MAF(2, context_features=3, hidden_features=(4,))
    for call in (flow.distribution, lambda c: flow.sample(4, c), lambda c: flow.rsample_and_log_prob(4, c)):
        with pytest.raises(TypeError, match=r"context must be a torch.Tensor; got"):
            call(context)


def test_samples_by_a_generator():
    flow = MAF(3, hidden_features=(8,), context_features=1)
    context = torch.zeros(2, 1)
    draw = lambda method, seed, **more: getattr(flow, method)(5, context, generator=torch.Generator().manual_seed(seed), **more)
    for method in ("sample", "rsample", "sample_and_log_prob", "rsample_and_log_prob"):
        state = torch.random.get_rng_state()
        one, again, other = (draw(method, seed) for seed in (1, 1, 2))
        assert torch.equal(torch.random.get_rng_state(), state)
        one, again, other = (t[0] if isinstance(t, tuple) else t for t in (one, again, other))
        assert torch.equal(one, again) and not torch.equal(one, other)
    assert draw("sample", 1, temperature=0.0).unique(dim=0).shape[0] == 1


@pytest.mark.parametrize("base", [StandardNormal(), StandardLogistic()])
def test_the_base_density_is_in_full_precision_under_autocast(base):
    z = 3 * torch.randn(5, 60)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = [base.log_prob(z), torch.compile(base.log_prob, backend="eager", fullgraph=True)(z)]
    assert_same_bits(under, [base.log_prob(z)] * 2)


def test_distributions_take_more_batch_dimensions():
    flow = MAF(2, hidden_features=(4,))
    x = torch.randn(4, 5, 2)
    distribution = flow.distribution()
    torch.testing.assert_close(distribution.log_prob(x), flow.log_prob(x.flatten(0, 1)).view(4, 5))
    with pytest.raises(ValueError, match=r"got \[4, 5, 2\]: distribution\(context\).log_prob takes any"):
        flow.log_prob(x)
    for wrong in (torch.randn(4, 5, 3), torch.zeros(())):
        with pytest.raises(ValueError, match=rf"value must have shape \[\*batch, 2\]; got {re.escape(str(list(wrong.shape)))}"):
            distribution.log_prob(wrong)
    samples, log_prob = distribution.sample_and_log_prob((3, 2))
    assert samples.shape == (3, 2, 2) and log_prob.shape == (3, 2) and not log_prob.requires_grad


def test_numbers_of_sampling_are_checked():
    flow = MAF(2, context_features=3, hidden_features=(4,))
    context = torch.randn(5, 3)
    for n in (-1, 2.0, True, torch.tensor(2)):
        with pytest.raises(ValueError, match="n must be a whole number of at least 0; got"):
            flow.sample(n, context)
    for temperature in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature must be at least 0; got"):
            flow.sample(2, context, temperature)
    with pytest.raises(ValueError, match=r"value must have a batch that broadcasts with that of the contexts, \[5\]; got \[4, 2\]"):
        flow.distribution(context).log_prob(torch.randn(4, 2))


def test_the_first_density_of_a_process_imports_nothing_large():
    code = (
        "import sys, torch, flowkernels as fk\n"
        "d = fk.flows.MAF(2, hidden_features=(4,), context_features=1).distribution(torch.zeros(3, 1))\n"
        "assert d.log_prob(torch.zeros(5, 1, 2)).shape == (5, 3)\n"
        "sys.exit('sympy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}).returncode == 0
