"""Layers that move numbers about or map them one by one, and flow batch norm."""

import math

import pytest
import torch
from torch import nn

from flowkernels import backend
from flowkernels.layers import (
    ActNorm,
    Chain,
    Dequantize,
    DiagonalScale,
    FactorOut,
    FlowBatchNorm,
    Inverse,
    Logit,
    Permute,
    Reshape,
    Squeeze,
)
from flowkernels.ops.channel_affine.normalize import normalize_channels


def jacobian_logabsdet(function, row):
    """log|det| of a map of one row, whatever its shape."""
    jacobian = torch.autograd.functional.jacobian(lambda v: function(v.view(row.shape)[None])[0].flatten(), row.flatten())
    return torch.linalg.slogdet(jacobian).logabsdet


@pytest.mark.parametrize("name", ["auto", "reference"])
@pytest.mark.parametrize("grad", [True, False])
def test_whoever_gets_a_logabsdet_may_add_to_it(name, grad):
    layers = [
        DiagonalScale(6),
        FlowBatchNorm(6).eval(),
        Inverse(DiagonalScale(6)),
        Chain([DiagonalScale(6)]),
        ActNorm(6),
        Permute([*range(6)], 6),
    ]
    with backend(name), torch.set_grad_enabled(grad):
        for layer in layers:
            logabsdet = layer(torch.randn(3, 6))[1]
            logabsdet[0] += 1
            assert logabsdet[0] != logabsdet[1], layer


def test_squeeze_is_channel_major():
    x = torch.arange(2 * 2 * 4 * 6).view(2, 2, 4, 6).float()
    z, logabsdet = Squeeze()(x)
    assert z.shape == (2, 8, 2, 3) and torch.equal(logabsdet, torch.zeros(2))
    for c in range(2):
        for i in range(2):
            for j in range(2):
                assert torch.equal(z[:, 4 * c + 2 * i + j], x[:, c, i::2, j::2])
    assert torch.equal(Squeeze().inverse(z)[0], x)


def test_factor_out_lets_the_second_half_leave_first():
    x = torch.arange(2 * 4 * 2 * 2).view(2, 4, 2, 2).float()
    layer = FactorOut((4, 2, 2), [Reshape((2, 2, 2), (8,)), DiagonalScale(8)])
    with torch.no_grad():
        layer.rest.layers[1].log_scale.fill_(math.log(3.0))
    z, logabsdet = layer(x)
    torch.testing.assert_close(z, torch.cat([x[:, 2:].flatten(1), 3 * x[:, :2].flatten(1)], 1))
    torch.testing.assert_close(logabsdet, torch.full((2,), 8 * math.log(3.0)))
    back, opposite = layer.inverse(z)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(opposite, -logabsdet)


def test_factor_out_of_an_odd_number_of_channels_keeps_the_smaller_half():
    layer = FactorOut((5,), [DiagonalScale(2)])
    x = torch.randn(3, 5)
    assert torch.equal(layer(x)[0], x[:, [2, 3, 4, 0, 1]]) and torch.equal(layer.inverse(layer(x)[0])[0], x)


def test_permute_and_chain():
    x = torch.randn(2, 4, 3, 3)
    chain = Chain([Permute([2, 0, 3, 1]), Squeeze(1), Reshape((4, 3, 3), (36,))])
    z, logabsdet = chain(x)
    assert torch.equal(z, x[:, [2, 0, 3, 1]].flatten(1)) and torch.equal(logabsdet, torch.zeros(2))
    assert torch.equal(chain.inverse(z)[0], x)


@pytest.mark.parametrize("shape", [(6,), (2, 3, 2)])
def test_logit_has_the_jacobians_determinant_in_both_directions(shape):
    torch.manual_seed(0)
    layer, x = Logit(0.05), torch.rand(3, *shape, dtype=torch.float64)
    z, logabsdet = layer(x)
    torch.testing.assert_close(z, torch.logit(0.05 + 0.9 * x), rtol=1e-12, atol=1e-14)
    back, opposite = layer.inverse(z)
    torch.testing.assert_close(back, x)
    for b in range(3):
        torch.testing.assert_close(logabsdet[b], jacobian_logabsdet(layer, x[b]))
        torch.testing.assert_close(opposite[b], jacobian_logabsdet(layer.inverse, z[b]))


def test_logit_is_finite_at_its_ends_and_exact_near_them():
    layer = Logit(1e-6)
    z, logabsdet = layer(torch.tensor([[0.0], [1.0]], dtype=torch.float64))
    assert torch.isfinite(z).all() and torch.isfinite(logabsdet).all()
    torch.testing.assert_close(layer.inverse(z)[0], torch.tensor([[0.0], [1.0]], dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logit_of_half_precision_is_computed_in_float32(dtype):
    x = torch.linspace(0.02, 0.98, 53)[None].to(dtype)
    z, logabsdet = Logit(0.3)(x)
    want, exact = Logit(0.3)(x.double())
    assert z.dtype == dtype and logabsdet.dtype == torch.float32
    torch.testing.assert_close(z.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-3)
    torch.testing.assert_close(logabsdet.double(), exact, rtol=1e-6, atol=0)


def test_logit_in_float32_is_as_exact_at_both_ends():
    near = torch.logspace(-7, -1, 200)
    x = torch.cat([near, 1 - near])[:, None]
    for got, want in zip(Logit(1e-6)(x), Logit(1e-6)(x.double()), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=3e-7, atol=1e-6)


@pytest.mark.parametrize("levels", [2, 17, 100, 255, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantize_keeps_every_level(levels, dtype):
    """Rounding carries none over to the next, nor to 1, nor, where levels are no power of two or next to one, to the one before."""
    layer, x = Dequantize(levels), torch.arange(levels).repeat(4000, 1).to(dtype)
    z = layer(x, generator=torch.Generator().manual_seed(0))[0]
    assert (z >= 0).all() and (z < 1).all() and torch.equal(layer.inverse(z)[0], x)


def test_dequantised_levels_come_back_and_their_noise_is_uniform():
    torch.manual_seed(0)
    layer, x = Dequantize(17), torch.randint(0, 17, (50, 2, 10, 10), dtype=torch.uint8)
    z, logabsdet = layer(x)
    assert z.dtype == torch.float32 and z.min() >= 0 and z.max() <= 1
    assert torch.equal(layer.inverse(z)[0], x.float())
    noise = (17 * z - x).flatten()
    assert abs(noise.mean() - 0.5) < 0.02 and abs(noise.var() - 1 / 12) < 0.005
    torch.testing.assert_close(logabsdet, torch.full((50,), -200 * math.log(17)))
    torch.testing.assert_close(layer.inverse(z)[1], -logabsdet)
    assert torch.equal(layer.inverse(torch.tensor([[-0.5, 1.7]]))[0], torch.tensor([[0.0, 16.0]]))
    again = [layer(x, generator=torch.Generator().manual_seed(3))[0] for _ in range(2)]
    assert torch.equal(*again)


def test_diagonal_scale():
    layer = DiagonalScale(3).double()
    with torch.no_grad():
        layer.log_scale.copy_(torch.tensor([0.5, -1.0, 2.0]))
    x = torch.randn(4, 3, dtype=torch.float64)
    z, logabsdet = layer(x)
    torch.testing.assert_close(z, x * torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64).exp())
    torch.testing.assert_close(logabsdet, torch.full((4,), 1.5, dtype=torch.float64))
    torch.testing.assert_close(layer.inverse(z), (x, -logabsdet))


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", [(4,), (4, 3, 5)])
class TestFlowBatchNorm:
    def layer(self, affine):
        torch.manual_seed(0)
        layer = FlowBatchNorm(4, affine=affine, eps=1e-4).double()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        return layer

    def test_normalises_each_channel_in_training(self, affine, shape):
        layer, x = self.layer(affine), 3 * torch.randn(8, *shape, dtype=torch.float64) + 2
        z, logabsdet = layer(x)
        dims = [0, *range(2, x.dim())]
        gain, bias = (layer.log_gain.exp(), layer.bias) if affine else (torch.ones(4).double(), torch.zeros(4).double())
        torch.testing.assert_close(z.mean(dims), bias.detach() if affine else bias)
        torch.testing.assert_close(
            z.std(dims, correction=0), (gain * (x.var(dims, correction=0) / (x.var(dims, correction=0) + 1e-4)).sqrt())
        )
        wanted = math.prod(shape[1:]) * (gain.log() - 0.5 * (x.var(dims, correction=0) + 1e-4).log()).sum()
        torch.testing.assert_close(logabsdet, wanted.expand(8))
        torch.testing.assert_close(layer.running_mean, 0.1 * x.mean(dims))
        torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * x.var(dims, correction=0))

    def test_in_evaluation_it_is_a_fixed_map_with_the_jacobians_determinant(self, affine, shape):
        layer, x = self.layer(affine), 3 * torch.randn(3, *shape, dtype=torch.float64) + 2
        layer.set_statistics(torch.randn(50, *shape, dtype=torch.float64) * 2 - 1)
        layer.eval()
        z, logabsdet = layer(x)
        torch.testing.assert_close(logabsdet[0], jacobian_logabsdet(layer, x[0]))
        back, opposite = layer.inverse(z)
        torch.testing.assert_close(back, x)
        torch.testing.assert_close(opposite, -logabsdet)

    def test_gradients_flow_through_the_batch_statistics(self, affine, shape):
        layer = self.layer(affine)
        x = torch.randn(3, *shape, dtype=torch.float64, requires_grad=True)
        inputs = (x, *layer.parameters())
        assert torch.autograd.gradcheck(lambda v, *_: layer(v), inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(lambda v, *_: layer(v), inputs, fast_mode=True)

    def test_batches_are_apart_under_vmap(self, affine, shape):
        layer, x = self.layer(affine), torch.randn(2, 3, *shape, dtype=torch.float64)
        loss = lambda v: sum(o.sin().sum() for o in normalize_channels(v, layer.log_gain, layer.bias, 1e-4)[:2])
        got = torch.func.vmap(torch.func.grad(loss))(x)
        torch.testing.assert_close(got, torch.stack([torch.func.grad(loss)(v) for v in x]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Squeeze()(torch.zeros(2, 1, 4, 5)), r"x must be \[batch, C, H, W\] with H and W divisible by 2; got \[2, 1, 4, 5\]"),
        (lambda: Squeeze()(torch.zeros(2, 4)), "divisible by 2; got"),
        (lambda: Squeeze().inverse(torch.zeros(2, 6, 4, 4)), r"C divisible by 4; got \[2, 6, 4, 4\]"),
        (lambda: Squeeze(0), "factor must be a whole number of at least 1; got 0"),
        (lambda: Reshape((2, 3), (5,)), r"after must have as many elements as before, \(2, 3\); got \(5,\)"),
        (lambda: Reshape((2, 3), (6,))(torch.zeros(4, 3, 2)), r"x must have shape \[batch, 2, 3\]; got \[4, 3, 2\]"),
        (lambda: FactorOut((1, 4, 4), [nn.Identity()]), r"at least 2 channels, of which half leaves; got \(1, 4, 4\)"),
        (lambda: FactorOut((4,), [DiagonalScale(2)])(torch.zeros(2, 5)), r"x must have shape \[batch, 4\]; got \[2, 5\]"),
        (lambda: FactorOut((4,), [DiagonalScale(2)]).inverse(torch.zeros(2, 5)), r"z must have shape \[batch, 4\]; got \[2, 5\]"),
        (
            lambda: FactorOut((4, 2, 2), [Permute([1, 0])])(torch.zeros(3, 4, 2, 2)),
            r"the last layer of rest must return flat noise, \[batch, 8\]; got \[3, 2, 2, 2\]: add a layers.Reshape",
        ),
        (lambda: Permute(3), r"permutation must be a sequence of indices; got 3: Permute.random\(features\) draws one"),
        (lambda: Chain([]), "layers must hold at least one layer; got none"),
        (lambda: Dequantize(1), "levels must be a whole number of at least 2; got 1"),
        (lambda: Logit(0.5), "alpha must be at least 0 and less than 0.5; got 0.5"),
        (lambda: DiagonalScale(0), "features must be a whole number of at least 1; got 0"),
        (lambda: FlowBatchNorm(3)(torch.zeros(4, 2)), r"x must have shape \[batch, 3, \*sites\]; got \[4, 2\]"),
        (lambda: FlowBatchNorm(3)(torch.zeros(1, 3)), "at least 2 rows for batch statistics in training; got 1"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
