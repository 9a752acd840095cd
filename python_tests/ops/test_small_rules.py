"""Rules of gradients, which no other test would miss."""

import torch

from flowkernels import ops
from flowkernels.layers import FlowBatchNorm, MaskedAutoregressive
from flowkernels.ops import autoregressive_stack, coupling, glow_step
from flowkernels.ops.autoregressive.loop import Map


def test_the_log_determinant_of_an_additive_coupling_has_no_gradient():
    y, logabsdet = coupling(torch.randn(3, 4, requires_grad=True), torch.randn(3, 2))
    assert y.requires_grad and not logabsdet.requires_grad


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
