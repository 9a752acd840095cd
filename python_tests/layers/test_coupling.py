"""Coupling layers: the formula, what the conditioner sees and may return, and Glow's split prior made of them."""

import pytest
import torch
from torch import nn

from flowkernels import ScaleMap
from flowkernels.layers import MLP, AdditiveCoupling, AffineCoupling, FactorOut, Reshape

PARTS = ["first_half", "second_half", "even", "odd", "checkerboard_even", "checkerboard_odd"]


class Recorder(nn.Module):
    """Returns a fixed function of what it sees, and remembers it."""

    def __init__(self, inputs, outputs, context_features=0):
        super().__init__()
        self.conv = nn.Conv2d(inputs + context_features, outputs, 3, padding=1)
        self.calls = []

    def forward(self, *args):
        self.calls.append(args)
        x, *context = args
        if context:
            x = torch.cat([x, context[0][:, :, None, None].expand(-1, -1, *x.shape[2:])], 1)
        return self.conv(x)


def mask_of(part, shape):
    """Where a part transforms, [C, H, W], written out."""
    c, h, w = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
    return {
        "first_half": c < shape[0] - shape[0] // 2,
        "second_half": c >= shape[0] // 2,
        "even": c % 2 == 0,
        "odd": c % 2 == 1,
        "checkerboard_even": (h + w) % 2 == 0,
        "checkerboard_odd": (h + w) % 2 == 1,
    }[part]


def sizes(part, channels):
    """Inputs of the conditioner, and transformed channels."""
    if part.startswith("checkerboard"):
        return channels, channels
    transformed = int(mask_of(part, (channels, 1, 1)).sum())
    return channels - transformed, transformed


def spread(values, mask):
    """Values of the transformed channels put where they belong; those of a checkerboard are there already."""
    if values.shape[1] == len(mask):
        return values
    whole = values.new_zeros(values.shape[0], *mask.shape)
    whole[:, mask.flatten(1).any(1)] = values
    return whole


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("channels", [4, 5])
@pytest.mark.parametrize("context_features", [0, 2])
class TestCouplings:
    def setup(self, part, channels, context_features, factor, layer, **options):
        torch.manual_seed(0)
        inputs, transformed = sizes(part, channels)
        net = Recorder(inputs, factor * transformed, context_features)
        layer = layer(net, part=part, **options).double()
        x = torch.randn(3, channels, 4, 6, dtype=torch.float64)
        context = torch.randn(3, context_features, dtype=torch.float64) if context_features else None
        return layer, net, x, context, mask_of(part, x.shape[1:])

    def test_affine_is_its_formula(self, part, channels, context_features):
        layer, net, x, context, mask = self.setup(part, channels, context_features, 2, AffineCoupling, scale_parameter=0.7)
        z, logabsdet = layer(x, context)
        shift, s = (spread(half, mask) for half in net(*net.calls[0]).chunk(2, 1))
        log_scale = 0.7 * torch.tanh(s)
        torch.testing.assert_close(z, torch.where(mask, x * torch.exp(log_scale) + shift, x))
        torch.testing.assert_close(logabsdet, torch.where(mask, log_scale, 0).sum((1, 2, 3)))
        back, opposite = layer.inverse(z, context)
        torch.testing.assert_close(back, x)
        torch.testing.assert_close(opposite, -logabsdet)

    def test_additive_is_its_formula(self, part, channels, context_features):
        layer, net, x, context, mask = self.setup(part, channels, context_features, 1, AdditiveCoupling)
        z, logabsdet = layer(x, context)
        torch.testing.assert_close(z, torch.where(mask, x + spread(net(*net.calls[0]), mask), x))
        assert torch.equal(logabsdet, torch.zeros(3, dtype=torch.float64))
        torch.testing.assert_close(layer.inverse(z, context)[0], x)

    def test_the_conditioner_sees_the_untouched_part_and_the_context(self, part, channels, context_features):
        layer, net, x, context, mask = self.setup(part, channels, context_features, 2, AffineCoupling)
        layer(x, context)
        seen, *contexts = net.calls[0]
        wanted = torch.where(mask, 0, x) if part.startswith("checkerboard") else x[:, ~mask[:, 0, 0]]
        assert torch.equal(seen, wanted)
        assert contexts == ([] if context is None else [context])


def test_learned_parameter_has_a_gradient_and_one_value_or_one_for_each_channel():
    for initial in (0.5, torch.full((3,), 0.5)):
        torch.manual_seed(0)
        layer = AffineCoupling(nn.Linear(3, 6), part="odd", scale_parameter=initial)
        x = torch.randn(7, 6)
        z, logabsdet = layer(x)
        (z.square().sum() + logabsdet.sum()).backward()
        s = layer.conditioner(x[:, 0::2]).chunk(2, 1)[1]
        torch.testing.assert_close(logabsdet, (0.5 * torch.tanh(s)).sum(1))
        assert layer.scale_parameter.grad.numel() == torch.as_tensor(initial).numel() and layer.scale_parameter.grad.ne(0).all()


def test_interleaved_outputs_are_blocked_outputs_in_another_order():
    torch.manual_seed(0)
    blocked = AffineCoupling(nn.Linear(3, 6), scale=ScaleMap.sigmoid(bias=2.0), form="shift_scale")
    interleaved = AffineCoupling(nn.Linear(3, 6), scale=ScaleMap.sigmoid(bias=2.0), form="shift_scale", interleaved=True)
    order = torch.tensor([0, 3, 1, 4, 2, 5])
    with torch.no_grad():
        interleaved.conditioner.weight.copy_(blocked.conditioner.weight[order])
        interleaved.conditioner.bias.copy_(blocked.conditioner.bias[order])
    x = torch.randn(5, 6)
    torch.testing.assert_close(interleaved(x), blocked(x))


def test_glows_split_is_a_coupling_before_factor_out():
    """log p(x) with a learned prior N(mean(kept), sigma(kept)) of what leaves is that of the coupling in front, exactly."""
    torch.manual_seed(0)
    prior = nn.Conv2d(2, 4, 3, padding=1).double()
    coupling = AffineCoupling(prior, part="second_half", scale=ScaleMap.exp(), form="divide")
    factor_out = FactorOut((4, 2, 2), [Reshape((2, 2, 2), (8,))])
    x = torch.randn(3, 4, 2, 2, dtype=torch.float64)
    h, logabsdet = coupling(x)
    z, none = factor_out(h)
    normal = torch.distributions.Normal
    got = normal(0, 1).log_prob(z).sum(1) + logabsdet + none
    kept, left = x.chunk(2, 1)
    mean, log_sigma = prior(kept).chunk(2, 1)
    wanted = normal(mean, log_sigma.exp()).log_prob(left).sum((1, 2, 3)) + normal(0, 1).log_prob(kept).sum((1, 2, 3))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("part", ["first_half", "second_half", "even", "odd"])
@pytest.mark.parametrize("make", [AffineCoupling, AdditiveCoupling])
def test_a_conditioner_that_writes_into_x_is_refused(make, part):
    """It would change the part of x that passes, and with it the map."""
    layer = make(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 6 if make is AffineCoupling else 3)), part=part)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="conditioner must not write into its input.*inplace=True"):
            layer(torch.randn(5, 6))
    compiled = torch.compile(layer, backend="eager")
    for call, mode in ((layer, torch.inference_mode), (compiled, torch.no_grad)):  # where nobody counts, it is given a copy
        with mode():
            x = torch.randn(5, 6)
            before = x.clone()
            z, _ = call(x)
            assert torch.equal(x, before)
            with torch.inference_mode():
                torch.testing.assert_close(layer.inverse(z.clone())[0], before)


@pytest.mark.parametrize("part", ["checkerboard_even", "checkerboard_odd"])
def test_what_a_checkerboards_conditioner_sees_is_its_own(part):
    layer = AffineCoupling(nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(1, 2, 3, padding=1)), part=part)
    x = torch.randn(2, 1, 4, 4)
    before = x.clone()
    torch.testing.assert_close(layer.inverse(layer(x)[0])[0], before)
    assert torch.equal(x, before)


def test_under_autocast_a_conditioner_may_return_half_precision():
    torch.manual_seed(0)
    layer = AffineCoupling(nn.Linear(3, 6))
    x = torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        z, logabsdet = layer(x)
    assert z.dtype == logabsdet.dtype == torch.float32
    torch.testing.assert_close(z, layer(x)[0], atol=0.05, rtol=0.05)


def test_a_scale_that_overflows_spoils_its_own_row_alone():
    layer = AffineCoupling(nn.Linear(2, 4), scale=ScaleMap.exp())
    x = torch.randn(3, 4)
    want = layer(x)
    with torch.no_grad():
        spoilt = x.clone()
        spoilt[1, :2] = 1e30 * layer.conditioner.weight[2].sign()
        z, logabsdet = layer(spoilt)
    assert torch.isinf(z[1]).any() and not torch.isnan(logabsdet).any()
    for row in (0, 2):
        torch.testing.assert_close(z[row], want[0][row])
        torch.testing.assert_close(logabsdet[row], want[1][row])


def test_a_mask_that_was_made_without_gradients_serves_with_them():
    torch.manual_seed(0)
    layer = AdditiveCoupling(nn.Conv2d(1, 1, 3, padding=1), part="checkerboard_odd")
    x = torch.randn(2, 1, 9, 11, requires_grad=True)  # a size that no other test has
    with torch.inference_mode():
        layer(x)
    layer(x)[0].square().sum().backward()
    assert x.grad is not None


class Returns(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x, context=None):
        return self.value


@pytest.mark.parametrize(
    ("layer", "x", "message"),
    [
        (AffineCoupling(Returns(None)), torch.zeros(2, 1), r"x must have at least 2 channels, \[batch, channels, \*sites\], to split; got"),
        (AdditiveCoupling(Returns(torch.zeros(2, 2))), torch.zeros(2, 1), "at least 2 channels"),
        (
            AffineCoupling(Returns(torch.zeros(2, 3))),
            torch.zeros(2, 6),
            r"conditioner must return shift and raw scale of the second_half part of x, \[2, 6\]; got \[2, 3\]",
        ),
        (
            AdditiveCoupling(Returns(torch.zeros(2, 6)), part="odd"),
            torch.zeros(2, 6),
            r"conditioner must return shift of the odd part of x, \[2, 3\]; got \[2, 6\]",
        ),
        (
            AffineCoupling(Returns(torch.zeros(2, 3, 4, 4)), part="checkerboard_odd"),
            torch.zeros(2, 3, 4, 4),
            r"checkerboard_odd part of x, \[2, 6, 4, 4\]; got \[2, 3, 4, 4\]",
        ),
        (
            AffineCoupling(Returns(torch.zeros(2, 6, dtype=torch.float64))),
            torch.zeros(2, 6),
            "conditioner must return torch.float32 on cpu, like x; got torch.float64 on cpu",
        ),
        (AffineCoupling(Returns(torch.zeros(2, 6, device="meta"))), torch.zeros(2, 6), "like x; got torch.float32 on meta"),
        (AffineCoupling(nn.Linear(3, 6)), torch.zeros(2, 6, dtype=torch.int64), "x must be floating-point .* got torch.int64"),
        (
            AffineCoupling(Returns((torch.zeros(2, 3), torch.zeros(2, 3)))),
            torch.zeros(2, 6),
            "conditioner must return one tensor, shift and raw scale along dimension 1; got tuple",
        ),
        (AdditiveCoupling(nn.Conv2d(2, 2, 1)), torch.zeros(2, 4, 0, 4), "at least one site"),
    ],
)
def test_what_does_not_fit_is_named(layer, x, message):
    for call in (layer, layer.inverse):
        with pytest.raises(ValueError, match=message):
            call(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": "third_half"}, "part must be one of 'first_half', .*; got 'third_half'"),
        ({"form": "rotate"}, "form must be one of"),
        ({"scale": "exp"}, "scale must be a ScaleMap, .*; got 'exp'"),
    ],
)
def test_a_part_form_or_map_that_does_not_exist(options, message):
    with pytest.raises(ValueError, match=message):
        AffineCoupling(nn.Identity(), **options)


def test_the_map_is_known_where_none_was_named():
    plain, learned = AffineCoupling(nn.Identity()), AffineCoupling(nn.Identity(), scale_parameter=0.5)
    assert plain.scale == ScaleMap.softclip() and learned.scale == ScaleMap.exp_tanh(1.0)
    assert "scale=ScaleMap.softclip(slope=0.001)" in repr(plain)


def test_a_fake_call_leaves_nothing_behind():
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer = AffineCoupling(torch.nn.Conv2d(2, 4, 1), part="checkerboard_even")
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer(torch.randn(2, 2, 14, 6))
    assert type(layer(torch.randn(2, 2, 14, 6))[0]) is torch.Tensor


def test_a_transform_leaves_nothing_behind():
    """A mask of a size that no other test has, first made while torch.func looks on."""
    layer = AffineCoupling(nn.Conv2d(1, 2, 1), part="checkerboard_odd")
    x = torch.randn(2, 1, 3, 13)
    jacobian = torch.func.vmap(torch.func.jacfwd(lambda row: layer(row[None])[1][0]))(x)
    along = torch.func.jvp(lambda rows: layer(rows)[1], (x,), (x,))[1]
    torch.testing.assert_close(along, (jacobian * x).flatten(1).sum(1))
    assert layer(x)[1].shape == (2,)


def test_a_hook_inside_the_network_may_keep_what_it_sees():
    network, seen = MLP(2, (16, 16), 4), []
    network.layers[0].register_forward_hook(lambda module, args, output: seen.append((output, output.clone())))
    AffineCoupling(network, interleaved=True)(torch.randn(5, 4))
    (kept, as_it_was), *_ = seen
    assert torch.equal(kept, as_it_was) and (kept < 0).any()


def test_a_network_of_another_width_is_named():
    layer = AdditiveCoupling(MLP(3, (4,), 2))
    with pytest.raises(ValueError, match=r"x must have shape \[\*, 3\], as wide as the network's input; got \[4, 2\]"):
        layer(torch.randn(4, 4))
