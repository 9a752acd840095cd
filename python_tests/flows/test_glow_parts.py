"""A Glow whose parts are watched, of a subclass, or in another precision computes what they say."""

import copy

import pytest
import torch
from torch import nn

from flowkernels.flows import Glow, glow_steps
from flowkernels.layers import ActNormConv1x1
from python_tests.flows.test_changed_modules import glow, module_by_module


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("part", ["coupling", "mixing"])
def test_hooks_on_one_kind_of_module_of_a_glow_run(part, inverse):  # one at a time
    flow, x, called = glow(), torch.randn(5, 3, 8, 8), []
    steps = flow.layers[1]
    module = steps.couplings[1] if part == "coupling" else steps.mixings[1]
    if inverse:  # no hook runs there, but a method of its own does
        own = module.inverse
        module.inverse = lambda *args, **options: called.append(1) or own(*args, **options)
        flow.inverse(torch.randn(5, 192))
    else:
        module.register_forward_hook(lambda *_: called.append(1))
        flow(x)
    assert called == [1]


@pytest.mark.parametrize("part", ["actnorm", "conv", "mixing", "coupling", "conditioner", "conv_mid"])
def test_a_hook_sees_the_first_batch_once(part):
    flow, called = Glow((3, 8, 8), levels=1, steps=2, hidden_channels=4), []
    mixing, coupling = flow.layers[1].mixings[1], flow.layers[1].couplings[1]
    parts = {"actnorm": mixing.actnorm, "conv": mixing.conv, "mixing": mixing, "coupling": coupling, "conditioner": coupling.conditioner}
    parts.get(part, coupling.conditioner.conv_mid).register_forward_hook(lambda *_: called.append(1))
    flow(torch.randn(5, 3, 8, 8))
    assert called == [1]


@pytest.mark.parametrize("coupling", ["affine", "additive"])
def test_global_hooks_see_the_modules_of_a_glow(coupling):
    flow, x, seen = glow(coupling=coupling), torch.randn(5, 3, 8, 8), set()
    want = flow(x)
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(module))
    try:
        got = flow(x)
    finally:
        handle.remove()
    steps = flow.layers[1]
    assert seen >= {*steps.mixings, *steps.couplings, *(m.actnorm for m in steps.mixings), *(m.conv for m in steps.mixings)}
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


def test_a_subclass_of_a_mixing_is_called():
    class Doubled(ActNormConv1x1):
        def forward(self, x, context=None):
            z, logabsdet = super().forward(x)
            return 2 * z, logabsdet

    for coupling in ("affine", "additive"):
        flow, x = glow(coupling=coupling), torch.randn(5, 3, 8, 8)
        flow.layers[1].mixings[1].__class__ = Doubled
        torch.testing.assert_close(flow(x)[0], module_by_module(flow, x)[0].flatten(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inverse", [False, True])
def test_a_glow_under_autocast(inverse):
    flow = glow()
    call, x = (flow.inverse, torch.randn(5, 192)) if inverse else (flow, torch.randn(5, 3, 8, 8))
    want = call(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = call(x)
    torch.testing.assert_close(got[0].float(), want[0], rtol=0.1, atol=0.2)
    torch.testing.assert_close(got[1].float(), want[1], rtol=0.05, atol=2.0)


@pytest.mark.parametrize("coupling", ["affine", "additive"])
def test_a_glow_in_half_precision(coupling):
    flow = glow(coupling=coupling).bfloat16()
    x = torch.randn(5, 3, 8, 8).bfloat16()
    z, logabsdet = flow(x)
    want_z, want_logabsdet = module_by_module(flow, x)
    torch.testing.assert_close(z, want_z.flatten(1), rtol=0.1, atol=0.1)
    torch.testing.assert_close(logabsdet, want_logabsdet, rtol=0.02, atol=1.0)


@pytest.mark.parametrize("inverse", [False, True])
def test_half_precision_is_float32_where_torch_is_slow_in_it(inverse, monkeypatch):
    flow = glow().bfloat16()
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.1 * torch.randn_like(p))
    wide = copy.deepcopy(flow).float()
    x = (torch.randn(5, 192) if inverse else torch.randn(5, 3, 8, 8)).bfloat16()
    joined, errors = [], []
    call = glow_steps._joined
    monkeypatch.setattr(glow_steps, "_joined", lambda *a, **o: joined.append(1) or call(*a, **o))
    for quick in (True, False):
        monkeypatch.setattr(glow_steps, "has_half_products", lambda dtype, quick=quick: quick)
        joined.clear()
        y, logabsdet = (flow.inverse if inverse else flow)(x)
        gradients = torch.autograd.grad(y.float().sum() + logabsdet.sum(), list(flow.parameters()))
        assert bool(joined) != quick and y.dtype == torch.bfloat16 and logabsdet.dtype == torch.float32
        assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in gradients)
        want = (wide.inverse if inverse else wide)(x.float())
        errors.append([(a.float() - b).square().mean().item() for a, b in zip((y, logabsdet), want, strict=True)])
    assert errors[1][0] < errors[0][0] and errors[1][1] < 2 * errors[0][1]  # whose matrices are rounded too


def test_data_of_another_dtype_is_told_as_the_layers_tell_it():
    with pytest.raises(ValueError, match="like the parameters, or be cast by torch.autocast; got torch.float64"):
        glow()(torch.randn(5, 3, 8, 8, dtype=torch.float64))


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_context_of_another_dtype_is_told_as_the_layers_tell_it(dtype, quick, monkeypatch):
    monkeypatch.setattr(glow_steps, "has_half_products", lambda dtype: quick)
    flow, x = Glow((1, 4, 4), levels=1, steps=2, hidden_channels=4, context_features=2), torch.randn(5, 1, 4, 4)
    flow(x, torch.randn(5, 2))
    other = torch.float64 if dtype == torch.float32 else torch.float32
    with pytest.raises(ValueError, match=f"context must be {dtype}, like the parameters, or be cast by torch.autocast; got {other}"):
        flow.to(dtype)(x.to(dtype), torch.randn(5, 2, dtype=other))


def test_the_last_prior_in_half_precision_sums_in_float32():
    flow, x = Glow((3, 8, 8), levels=1, steps=1, hidden_channels=4), torch.randn(5, 12, 4, 4).bfloat16()
    prior = flow.layers[2].bfloat16()
    nn.init.normal_(prior.bias)
    want = copy.deepcopy(prior).float()(x.float())[1]
    torch.testing.assert_close((prior(x)[1], prior.inverse(x)[1]), (want, -want))
