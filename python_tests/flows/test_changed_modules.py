"""A fused path computes what the modules say, or it is not taken: flows whose modules somebody has changed, hooked or replaced."""

import copy
import functools

import pytest
import torch
from torch.nn.utils import prune

from flowkernels import ScaleMap
from flowkernels.flows import IAF, MAF, NICE, Flow, Glow, RealNVP
from flowkernels.layers import ActNorm, AffineCoupling, DiagonalScale, FlowBatchNorm, InvertibleConv1x1, Permute
from flowkernels.layers.mlp import Dense


def glow(**options) -> Glow:
    torch.manual_seed(0)
    flow = Glow((3, 8, 8), levels=1, steps=3, hidden_channels=8, **options)
    for coupling in flow.layers[1].couplings:
        torch.nn.init.normal_(coupling.conditioner.conv_out.weight, std=0.1)
        torch.nn.init.normal_(coupling.conditioner.conv_out.bias)
    flow(torch.randn(16, 3, 8, 8))  # initialises the actnorms
    return flow.eval()


def module_by_module(flow: Glow, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    squeeze, steps, *rest = flow.layers
    x, total = squeeze(x)
    for mixing, coupling in zip(steps.mixings, steps.couplings, strict=True):
        x, a = mixing(x)
        x, b = coupling(x)
        total = total + a + b
    for layer in rest:
        x, logabsdet = layer(x)
        total = total + logabsdet
    return x, total


def change_scale(coupling) -> None:
    coupling.scale = ScaleMap.exp_tanh(1.0)


def change_form(coupling) -> None:
    coupling.form = type(coupling.form).SCALE_SHIFT


def change_part(coupling) -> None:
    coupling.part = type(coupling.part).FIRST_HALF


def change_order(coupling) -> None:
    coupling.interleaved = False


@pytest.mark.parametrize("change", [None, change_scale, change_form, change_part, change_order])
@pytest.mark.parametrize("which", [0, 2])
def test_a_glow_is_its_modules(change, which):
    flow, x = glow(), torch.randn(5, 3, 8, 8)
    if change is not None:
        before = flow(x)[0]
        change(flow.layers[1].couplings[which])
        assert not torch.allclose(flow(x)[0], before)
    z, logabsdet = flow(x)
    want_z, want_logabsdet = module_by_module(flow, x)
    torch.testing.assert_close(z, want_z.flatten(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logabsdet, want_logabsdet, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(flow.inverse(z)[0], x, rtol=1e-3, atol=1e-4)


def test_a_glow_with_another_coupling():
    flow, x = glow(coupling="additive"), torch.randn(5, 3, 8, 8)
    other = AffineCoupling(glow().layers[1].couplings[0].conditioner, interleaved=True)
    flow.layers[1].couplings[0] = other
    torch.testing.assert_close(flow(x)[0], module_by_module(flow, x)[0].flatten(1), rtol=1e-4, atol=1e-5)


def test_hooks_on_the_modules_of_a_glow_run():
    flow, x, called = glow(), torch.randn(5, 3, 8, 8), []
    want = flow(x)
    for module in (flow.layers[1].couplings[1], flow.layers[1].mixings[0], flow.layers[1].couplings[0].conditioner.conv_mid):
        module.register_forward_hook(lambda *_: called.append(1))
    got = flow(x)
    assert len(called) == 3
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("normalize", ["spectral_norm", "parametrizations.spectral_norm", "parametrizations.weight_norm"])
def test_normalised_convolutions_in_a_glow_train(normalize):
    flow, x = glow().train(), torch.randn(5, 3, 8, 8)
    package = torch.nn.utils.parametrizations if "." in normalize else torch.nn.utils
    convolution = flow.layers[1].couplings[0].conditioner.conv_mid
    getattr(package, normalize.split(".")[-1])(convolution)
    for _ in range(2):  # a second step meets no graph of the first
        flow.zero_grad()
        flow.log_prob(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in convolution.parameters())


def frozen() -> Flow:
    torch.manual_seed(0)
    return Flow([InvertibleConv1x1(4), InvertibleConv1x1(4, parametrization="plain")], 4).freeze()


@pytest.mark.parametrize("copied", [lambda flow: flow, copy.deepcopy])
def test_what_is_frozen_follows_its_parameters(copied):
    flow, x = copied(frozen()), torch.randn(6, 4)
    with torch.no_grad():
        assert all(layer.kept() is not None for layer in flow.layers)
        for p in flow.parameters():
            p.add_(0.1 * torch.randn_like(p))
        assert all(layer.kept() is None for layer in copied(flow).layers)
        fresh = copy.deepcopy(flow).train().eval()
        for got, want in ((flow(x), fresh(x)), (flow.inverse(x), fresh.inverse(x))):
            torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_what_is_frozen_follows_its_buffers_and_leaves_parametrizations_alone():
    flow = frozen()
    with torch.no_grad():
        flow.layers[0].sign.neg_()
        assert flow.layers[0].kept() is None and flow.layers[1].kept() is not None
        torch.nn.utils.parametrize.register_parametrization(flow.layers[0], "log_diagonal", Doubled())
        flow.freeze()
        assert flow.layers[0].kept() is None and flow.layers[1].kept() is not None
        flow.layers[0].parametrizations.log_diagonal.original.add_(0.5)
        fresh, x = copy.deepcopy(flow).train().eval(), torch.randn(6, 4)
        torch.testing.assert_close(flow(x), fresh(x))


class Doubled(torch.nn.Module):
    def forward(self, t):
        return 2 * t


def test_inference_tensors_can_be_frozen():
    with torch.inference_mode():
        flow, x = frozen(), torch.randn(6, 4)
        assert all(layer.kept() is not None for layer in flow.layers)
        torch.testing.assert_close(flow.inverse(flow(x)[0])[0], x)


def test_other_parameters_in_the_place_of_frozen_ones():
    flow, x = frozen(), torch.randn(6, 4)
    others = {name: p.detach() + 0.1 for name, p in flow.named_parameters()}
    with torch.no_grad():
        got = torch.func.functional_call(flow, others, (x,))
        flow.load_state_dict(others, strict=False)
        torch.testing.assert_close(got, flow(x), rtol=0, atol=0)


FLOWS = {
    "NICE": lambda: NICE(4, hidden_features=(8,)),
    "RealNVP": lambda: RealNVP(4, hidden_features=(8,)),
    "MAF": lambda: MAF(4, transforms=2, hidden_features=(8,)),
    "MAF with batch norm": lambda: MAF(4, transforms=2, hidden_features=(8,), batch_norm=True),
    "IAF": lambda: IAF(4, transforms=2, hidden_features=(8,)),
    "scale": lambda: Flow([DiagonalScale(4), InvertibleConv1x1(4, parametrization="plain")], 4),
}


@pytest.mark.parametrize("make", FLOWS.values(), ids=FLOWS)
@pytest.mark.parametrize("inverse", [False, True])
def test_forward_mode(make, inverse):
    torch.manual_seed(0)
    flow = make().double().eval()
    x = torch.randn(4, dtype=torch.float64)
    run = lambda a: torch.cat([t.flatten() for t in (flow.inverse if inverse else flow)(a[None])])
    torch.testing.assert_close(torch.func.jacfwd(run)(x), torch.func.jacrev(run)(x))
    score = lambda a: flow.log_prob(a[None])[0]
    torch.testing.assert_close(torch.func.hessian(score)(x), torch.func.jacrev(torch.func.jacrev(score))(x))
    names, parameters = zip(*flow.named_parameters(), strict=True)
    by_parameters = lambda *p: torch.func.functional_call(flow, dict(zip(names, p, strict=True)), (x[None],))[1].sum()
    tangents = tuple(torch.randn_like(p) for p in parameters)
    _, along = torch.func.jvp(by_parameters, tuple(p.detach() for p in parameters), tangents)
    gradients = torch.func.grad(by_parameters, argnums=tuple(range(len(parameters))))(*(p.detach() for p in parameters))
    torch.testing.assert_close(along, sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True)))


def test_forward_mode_of_a_glow():
    flow = glow().double()
    x, direction = torch.randn(2, 3, 8, 8, dtype=torch.float64).unbind()
    score = lambda a: flow.log_prob(a[None])[0]
    _, along = torch.func.jvp(score, (x,), (direction,))
    torch.testing.assert_close(along, (torch.func.grad(score)(x) * direction).sum())


def test_a_log_determinant_may_be_added_to():
    for layer in (ActNorm(3), InvertibleConv1x1(3), InvertibleConv1x1(3, parametrization="plain"), Permute([2, 0, 1])):
        for call in (layer, layer.inverse):
            _, logabsdet = call(torch.randn(5, 3))
            want = logabsdet + 1
            with torch.no_grad():
                logabsdet += 1
            torch.testing.assert_close(logabsdet, want)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Permute([1, 0])(torch.randn(2, 4, 3, 3)), r"x must have shape \[batch, 2, \*sites\]; got \[2, 4, 3, 3\]"),
        (lambda: Permute([1, 0]).inverse(torch.randn(2, 4)), r"z must have shape \[batch, 2, \*sites\]; got \[2, 4\]"),
        (lambda: Flow([*MAF(4).layers[:1], Permute([1, 0]), *MAF(4).layers[:1]], 4)(torch.randn(3, 4)), r"x must have shape \[batch, 2"),
        (lambda: Permute([]), "features must be a whole number of at least 1; got 0"),
        (lambda: ActNorm(2)(torch.full((3, 2), torch.nan)), "x must be finite: it is the first batch"),
        (lambda: FlowBatchNorm(2)(torch.randint(0, 9, (6, 2))), "x must be torch.float32, like the layer's statistics; got torch.int64"),
        (lambda: FlowBatchNorm(2).eval()(torch.randn(6, 2).double()), "x must be torch.float32, like the layer's statistics"),
        (lambda: FlowBatchNorm(2).double()(torch.randn(6, 2).half()), "x must be torch.float64, like the layer's statistics"),
        (lambda: FlowBatchNorm(0), "features must be a whole number of at least 1; got 0"),
        (lambda: FlowBatchNorm(2, eps=-1.0), "eps must be positive"),
        (lambda: MAF((1, 4, 4)), r"features must be a whole number of at least 1; got \(1, 4, 4\)"),
        (lambda: MAF(4, hidden_features=16), r"hidden_features must be a sequence of widths; got 16, which for one layer is \(16,\)"),
        (lambda: MAF(2.5), "features must be a whole number of at least 1; got 2.5"),
        (lambda: MAF(4, hidden_features=(8.0,)), r"hidden_features must be widths, whole numbers of at least 1; got \(8.0,\)"),
        (lambda: NICE(2.5), r"shape must be a number of features or \(C, H, W\), whole numbers of at least 1; got 2.5"),
        (lambda: NICE(4, hidden_features=16), "hidden_features must be a sequence of widths; got 16"),
        *(
            (
                functools.partial(flow, shape, context_features=-1, **settings),
                "context_features must be a whole number of at least 0; got -1",
            )
            for flow, shape, settings in [
                (MAF, 4, {}),
                (NICE, 4, {}),
                (RealNVP, 4, {}),
                (RealNVP, (1, 4, 4), {}),
                (Glow, (3, 8, 8), {"levels": 2, "steps": 1}),
            ]
        ),
        (lambda: Flow([Permute([1, 0])], 2, context_features=0.5), "context_features must be a whole number of at least 0; got 0.5"),
        (lambda: MAF(4).sample(-1), "n must be a whole number of at least 0; got -1"),
        (
            lambda: MAF(4).sample((2, 3)),
            r"n must be a whole number of at least 0; got \(2, 3\): distribution\(context\).sample takes shapes",
        ),
        (lambda: MAF(4, context_features=2).sample(3, torch.ones(5, 2, dtype=torch.int64)), "context must be torch.float32"),
        (lambda: MAF(4, context_features=2).sample(3, torch.ones(5, 2).double()), "context must be torch.float32"),
        (lambda: MAF(4, context_features=2).distribution(torch.tensor(1.0)), r"context must be \[\*batch, 2\]; got \[\]"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_nan_in_the_first_batch_leaves_actnorm_as_it_was():
    layer, x = ActNorm(2), torch.randn(9, 2)
    spoilt = x.clone()
    spoilt[0, 0] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        layer(spoilt)
    assert not layer.initialised and not layer.bias.any()
    torch.testing.assert_close(layer(x)[0].mean(0), torch.zeros(2), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [{"padding_mode": "circular"}, {"dilation": 2, "padding": 2}, {"bias": False}, {"kernel_size": 5, "padding": 2}, {"groups": 3}],
    ids=lambda change: next(iter(change)),
)
def test_a_conditioner_of_other_convolutions_calls_them(change):
    flow, x = glow(), torch.randn(5, 3, 8, 8)
    net = flow.layers[1].couplings[0].conditioner
    options = {"kernel_size": 3, "padding": 1} | change
    net.conv_in = torch.nn.Conv2d(6, 9 if "groups" in change else 8, **options)
    if "groups" in change:
        net.conv_mid = torch.nn.Conv2d(9, 8, 1)
    h = torch.randn(5, 6, 8, 8)
    want = net.conv_out(net.conv_mid(net.conv_in(h).relu()).relu())
    torch.testing.assert_close(net(h), want)
    torch.testing.assert_close(flow.inverse(flow(x)[0])[0], x, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_convolution_of_a_tensor_that_is_no_parameter_is_called(name):  # a hypernetwork sets it anew at every call
    flow, x = glow(), torch.randn(5, 3, 8, 8)
    convolution = flow.layers[1].couplings[0].conditioner.conv_mid
    want, value = flow(x), getattr(convolution, name).detach().clone()
    delattr(convolution, name)
    setattr(convolution, name, value)
    torch.testing.assert_close(flow(x), want)


class Twice(InvertibleConv1x1):
    """Twice the map of its parent."""

    def forward(self, x, context=None):
        y, logabsdet = super().forward(x, context)
        return 2 * y, logabsdet + x[0].numel() * torch.tensor(2.0).log()

    def inverse(self, z, context=None):
        x, logabsdet = super().inverse(z / 2, context)
        return x, logabsdet - z[0].numel() * torch.tensor(2.0).log()


def test_a_part_of_a_mixing_that_was_replaced_is_called():
    flow, x = glow(), torch.randn(5, 3, 8, 8)
    mixing, plain = flow.layers[1].mixings[1], flow(x)
    doubled = Twice(mixing.conv.channels)
    doubled.load_state_dict(mixing.conv.state_dict())
    mixing.conv = doubled
    z, logabsdet = flow(x)
    assert not torch.allclose(logabsdet, plain[1])
    torch.testing.assert_close((z, logabsdet), module_by_module(flow, x), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(flow.inverse(z)[0], x, rtol=1e-3, atol=1e-4)


def test_hooks_on_the_parts_of_a_mixing_run():
    flow, x, called = glow(), torch.randn(5, 3, 8, 8), []
    want = flow(x)
    for part in flow.layers[1].mixings[0].children():
        part.register_forward_hook(lambda *_: called.append(1))
    torch.testing.assert_close(flow(x), want, rtol=1e-4, atol=1e-3)
    assert len(called) == 2


def test_a_pruned_mixing_trains():
    flow, x = glow().train(), torch.randn(5, 3, 8, 8)
    conv = flow.layers[1].mixings[0].conv
    prune.l1_unstructured(conv, "factors", 0.5)
    for _ in range(2):
        flow.log_prob(x).sum().backward()
        with torch.no_grad():
            conv.factors_orig.add_(0.01)
    torch.testing.assert_close(conv.factors, conv.factors_orig.detach() * conv.factors_mask, rtol=0, atol=0.02)


def test_an_inverse_of_its_own_is_called():
    for flow in (MAF(4, transforms=2, hidden_features=(8,)), RealNVP(4, transforms=2, hidden_features=(8,))):
        layer = flow.eval().layers[0]
        layer.inverse = lambda z, context=None: (z + 1, z[:, 0])
        z = torch.randn(3, 4)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                x, _ = flow.inverse(z)
                between = z
                for other in list(flow.layers)[:0:-1]:
                    between, _ = other.inverse(between)
                torch.testing.assert_close(x, between + 1)


@pytest.mark.parametrize("hook", ["forward", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_what_a_layer_of_an_mlp_returned_stays(hook, everywhere):
    """Its ReLU works in place, but not on what somebody else may hold."""
    torch.manual_seed(0)
    flow, x, kept = RealNVP(4, transforms=2, hidden_features=(8,), batch_norm=False), torch.randn(5, 4), []
    layer = flow.layers[0].conditioner.layers[0]
    keep = lambda module, *values: kept.append(values[-1]) if module is layer else None
    name = f"register_{hook}_hook"
    handle = (
        getattr(torch.nn.modules.module, name.replace("register_", "register_module_"))(keep) if everywhere else getattr(layer, name)(keep)
    )
    try:
        flow.log_prob(x).sum().backward()
    finally:
        handle.remove()
    assert len(kept) == 1
    if hook == "forward":
        assert (kept[0] < 0).any()


def test_a_layer_of_an_mlp_whose_gradient_needs_its_output():
    class Squashed(Dense):
        def forward(self, x, context=None):
            return torch.tanh(super().forward(x, context))

    torch.manual_seed(0)
    flow, x = RealNVP(4, transforms=2, hidden_features=(8,), batch_norm=False), torch.randn(5, 4)
    flow.layers[0].conditioner.layers[0] = Squashed(2, 8)
    flow.log_prob(x).sum().backward()
    assert all(p.grad is not None for p in flow.parameters())
