"""Rules of gradients and of memory, which no other test would miss."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flowkernels import ops
from flowkernels.layers import Chain, FlowBatchNorm, MaskedAutoregressive
from flowkernels.ops import PoweredMap, ScaleMap, autoregressive_stack, channel_affine, coupling, glow_step
from flowkernels.ops.autoregressive.loop import Map
from flowkernels.ops.channel_affine.normalize import normalize_channels


def test_the_log_determinant_of_an_additive_coupling_has_no_gradient():
    y, logabsdet = coupling(torch.randn(3, 4, requires_grad=True), torch.randn(3, 2))
    assert y.requires_grad and not logabsdet.requires_grad


def test_the_log_determinant_of_a_glow_step_without_a_coupling_has_no_gradient():
    y, logabsdet, passing = glow_step(torch.randn(3, 4, requires_grad=True), None, torch.randn(4, 4), torch.randn(4))
    assert y.requires_grad and passing.requires_grad and not logabsdet.requires_grad


def test_running_statistics_have_no_gradient():
    norm = FlowBatchNorm(3)
    for _ in range(2):
        norm(torch.randn(8, 3, requires_grad=True))[0].sum().backward()
    assert not norm.running_mean.requires_grad and not norm.running_var.requires_grad


def test_cotangents_of_any_layout_and_those_of_zeros():
    x, raw = (torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w, b = torch.randn(4, 4, dtype=torch.float64, requires_grad=True), torch.randn(4, dtype=torch.float64, requires_grad=True)
    outputs = glow_step(x, raw, w, b)
    dy = torch.randn(4, 3, 3, 2, dtype=torch.float64).transpose(0, 3)
    got = torch.autograd.grad(outputs[0], (x, raw, w, b), dy, retain_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad(outputs[0], (x, raw, w, b), dy.contiguous()), rtol=0, atol=1e-12)


def test_a_gradient_reaches_an_affine_map_between():
    layer = MaskedAutoregressive(4, (8,)).requires_grad_(False)
    affine = torch.rand(3, 4).requires_grad_()
    y, _ = autoregressive_stack(torch.randn(5, 4), [Map(layer.conditioner(), layer.scale, layer.form, False, affine)])
    assert torch.autograd.grad(y.sum(), affine)[0].any()


def test_one_tensor_in_two_places_of_a_conv_net_counts_once_each():
    c = 4
    p = [torch.randn(s, dtype=torch.float64) * 0.5 for s in ((c, c, 3, 3), (c,), (c, c, 1, 1), (c,), (c, c, 3, 3), (c,), (c,))]
    p[4] = p[0]  # shared
    x = torch.randn(2, c, 3, 3, dtype=torch.float64, requires_grad=True)
    p[0].requires_grad_()

    def first(create):
        return torch.autograd.grad(ops.conv_net(x, *p).sin().sum(), (x, p[0]), create_graph=create)

    torch.testing.assert_close(first(True), first(False))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("kind", ["one layer", "the same twice", "learned scale"])
def test_what_inputs_owe_to_each_other_counts_once(kind, inverse):
    torch.manual_seed(0)
    layer = MaskedAutoregressive(3, (4,), context_features=2).double()
    chain, a, parameters = Chain([layer, layer]), torch.tensor([0.7], dtype=torch.float64, requires_grad=True), [*layer.parameters()]
    x, context = (torch.randn(5, n, dtype=torch.float64, requires_grad=True) for n in (3, 2))

    def gradients(create_graph):
        own = x * parameters[0].exp().sum() * 0.1
        given = own, context + own.sum(1, keepdim=True) * parameters[1].sum() + a
        if kind == "learned scale":
            scale = PoweredMap(ScaleMap.exp_tanh(0.7), a)
            outputs = ops.autoregressive(given[0], layer.conditioner(), given[1], scale=scale, inverse=inverse)
        else:
            module = layer if kind == "one layer" else chain
            outputs = module.inverse(*given) if inverse else module(*given)
        wanted = [x, context, *parameters, *([a] if kind == "learned scale" else [])]
        return torch.autograd.grad(sum(o.sin().sum() for o in outputs), wanted, create_graph=create_graph)

    torch.testing.assert_close(gradients(True), gradients(False))


@pytest.mark.parametrize("lie", [(0, 1, 2, 3), (0, 2, 3, 1), (0, 1, 3, 2), (1, 0, 2, 3), (3, 2, 1, 0)], ids=str)
@pytest.mark.parametrize(
    "op",
    [
        lambda x: channel_affine(x, None, x.new_zeros(4)),
        lambda x: normalize_channels(x, None, None, 1e-5),
        lambda x: coupling(x, x[:, :2]),
        lambda x: coupling(x, x[:, :2], x[:, 2:]),
    ],
    ids=["channel_affine", "normalize_channels", "additive", "affine"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_faked_lies_as_what_is_computed(op, lie, dtype):
    x = torch.randn([(2, 4, 3, 5)[d] for d in lie]).permute([lie.index(d) for d in range(4)]).to(dtype)
    assert x.shape == (2, 4, 3, 5)
    with FakeTensorMode() as mode:
        faked = [(t.dtype, t.stride()) for t in op(mode.from_tensor(x))]
    assert faked == [(t.dtype, t.stride()) for t in op(x)]
