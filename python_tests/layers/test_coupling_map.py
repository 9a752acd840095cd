"""Couplings of vectors whose network is an MLP: one kernel, and the same function as the conditioner and the coupling apart."""

import copy
import importlib
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import flowkernels.layers._coupling_map as coupling_map
import flowkernels.layers._stack as stack
from flowkernels import ScaleMap, backend
from flowkernels.flows import NICE, RealNVP
from flowkernels.layers import (
    MLP,
    AdditiveCoupling,
    AffineCoupling,
    Chain,
    FlowBatchNorm,
    Inverse,
    MaskedAutoregressive,
    Permute,
    Reshape,
)
from flowkernels.layers.mlp import Dense
from flowkernels.ops import parse_part

KINDS = {
    "additive": {},
    "softclip": {},
    "learned": {"scale_parameter": 0.7},
    "divide": {"form": "divide", "scale": ScaleMap.exp_tanh(2.0)},
    "gate": {"form": "gate", "scale": ScaleMap.sigmoid(2.0)},
}


def coupling(kind, features, part, context=0, hidden=(9, 17)):
    transformed = parse_part(part).count(features)
    outputs = transformed if kind == "additive" else 2 * transformed
    network = MLP(features - transformed, hidden, outputs, context_features=context)
    if kind == "additive":
        return AdditiveCoupling(network, part=part)
    return AffineCoupling(network, part=part, interleaved=True, **KINDS[kind])


@contextmanager
def in_parts():
    compiled, coupling_map._COMPILED = coupling_map._COMPILED, False
    try:
        yield
    finally:
        coupling_map._COMPILED = compiled


def values_and_gradients(layer, x, context, *, inverse=False):
    inputs = [x, *([] if context is None else [context]), *layer.parameters()]
    for t in inputs:
        t.requires_grad_()
    y, logabsdet = (layer.inverse if inverse else layer)(x, context)
    loss = (y * torch.linspace(1, 2, y.shape[1], dtype=y.dtype)).sum() + (logabsdet * torch.linspace(-1, 2, len(y), dtype=y.dtype)).sum()
    return [y, logabsdet, *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("kind", ["additive", "softclip"])
@pytest.mark.parametrize("part", ["even", "odd", "first_half", "second_half"])
@pytest.mark.parametrize("features", [2, 3, 16, 17, 31, 32, 33, 40, 67])
def test_rows_are_split_by_whole_vectors(kind, part, features):
    """And what is beyond the last of them, whatever the layout; the gradients with them."""
    torch.manual_seed(features)
    layer = coupling(kind, features, part)
    inputs = [torch.randn(features, 6).mT, torch.randn(6, features)]
    for x in (x.requires_grad_() for x in inputs):
        tensors = [x, *layer.parameters()]
        got = layer(x)
        with in_parts():
            want = layer(x)
        torch.testing.assert_close(got, want)
        g = torch.randn(6, features)
        gradients = [torch.autograd.grad((g * y).sum() + logabsdet.sum(), tensors) for y, logabsdet in (got, want)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["even", "odd", "first_half", "second_half"])
@pytest.mark.parametrize("context", [0, 3])
def test_is_the_conditioner_and_the_coupling(kind, part, context):
    torch.manual_seed(0)
    for features, batch in ((2, 3), (7, 37), (16, 1)):
        layer = coupling(kind, features, part, context).double()
        x = torch.randn(batch, features, dtype=torch.float64)
        c = torch.randn(batch, context, dtype=torch.float64) if context else None
        for inverse in (False, True):
            assert (layer.as_map(x, inverse=inverse) is None) == (inverse and kind == "gate")
            got = values_and_gradients(layer, x, c, inverse=inverse)
            with in_parts():
                want = values_and_gradients(layer, x, c, inverse=inverse)
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
        got = [t.detach() for t in layer(x, c)]
        with torch.no_grad():
            back, opposite = layer.inverse(got[0], c)
        torch.testing.assert_close(back, x.detach(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(opposite, -got[1].detach(), rtol=1e-9, atol=1e-9)


def test_the_inverse_trains_as_one_kernel_where_it_is_another_form(monkeypatch):
    calls, training = [], importlib.import_module("flowkernels.ops.autoregressive.training")  # whose package has a function of its name
    apply = training.apply_function
    monkeypatch.setattr(training, "apply_function", lambda *args: calls.append(len(args[3])) or apply(*args))
    for kind, parts in {"additive": 1, "softclip": 1, "learned": 1, "divide": 1, "gate": 0}.items():
        layers = [coupling(kind, 6, part) for part in ("even", "odd", "first_half")]
        z = torch.randn(4, 6, requires_grad=True)
        for flow in (layers[0], Chain(layers)):
            calls.clear()
            x, logabsdet = flow.inverse(z)
            assert len(calls) == parts
            (x.sum() + logabsdet.sum()).backward()
            assert kind == "additive" or all(p.grad is not None and p.grad.any() for p in flow.parameters())
        with torch.no_grad():  # as it is without a gradient
            torch.testing.assert_close(Chain(layers).inverse(z), (x, logabsdet))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_gradients_of_the_inverse(kind):
    torch.manual_seed(0)
    layer = coupling(kind, 4, "odd", context=2, hidden=(5,)).double()
    layer.conditioner.layers[0].bias.data.add_(0.3)
    inputs = [torch.randn(3, n, dtype=torch.float64, requires_grad=True) for n in (4, 2)]
    assert torch.autograd.gradcheck(layer.inverse, inputs)
    assert torch.autograd.gradgradcheck(layer.inverse, inputs)


@pytest.mark.parametrize(
    "change",
    [
        "hook",
        "backward hook",
        "global hook",
        "own forward",
        "hook of a layer",
        "subclass",
        "parametrization",
        "half",
        "reference",
        "blocked",
        "image",
        "large",
    ],
)
def test_what_others_have_to_see_is_made_of_parts(change, monkeypatch):
    layer, x = coupling("softclip", 6, "second_half"), torch.randn(20, 6)
    assert layer.as_map(x, inverse=False) is not None
    want = layer(x)
    seen = []
    if change == "hook":
        layer.conditioner.register_forward_hook(lambda *_: seen.append(1))
    elif change == "backward hook":
        layer.conditioner.register_full_backward_hook(lambda *_: seen.append(1))
    elif change == "global hook":
        handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
    elif change == "own forward":
        forward = layer.conditioner.forward
        layer.conditioner.forward = lambda *a: seen.append(1) or forward(*a)
    elif change == "hook of a layer":
        layer.conditioner.layers[1].register_forward_pre_hook(lambda *_: seen.append(1))
    elif change == "subclass":
        layer.conditioner.__class__ = type("Counting", (MLP,), {"forward": lambda self, *a: seen.append(1) or MLP.forward(self, *a)})
    elif change == "parametrization":
        register = nn.utils.parametrize.register_parametrization
        register(layer.conditioner.layers[0], "weight", type("Same", (nn.Module,), {"forward": lambda self, w: seen.append(1) or w})())
        seen.clear()
    elif change == "half":
        layer, x = layer.bfloat16(), x.bfloat16()
        monkeypatch.setattr(coupling_map, "has_half_products", lambda dtype: True)
    elif change == "reference":
        with backend("reference"):
            assert layer.as_map(x, inverse=False) is None
            return
    elif change == "blocked":
        layer.interleaved = False
    elif change == "image":
        assert layer.as_map(x[:, :, None, None], inverse=False) is None
        return
    else:
        layer = coupling("softclip", 6, "second_half", hidden=(1000, 1000))
        with torch.no_grad():
            assert layer.as_map(x[:8], inverse=False) is not None  # few rows, where reading the weights is all there is
    assert layer.as_map(x, inverse=False) is None
    if change == "backward hook":
        layer(x.clone().requires_grad_())[0].sum().backward()
    got = layer(x)
    if change == "global hook":
        seen.clear()
        Chain([MaskedAutoregressive(6, (8,)), layer])(x)
        handle.remove()
        assert len(seen) > 2
    if change not in ("half", "blocked", "large"):
        assert seen and all(torch.allclose(g, w, rtol=1e-4, atol=1e-5) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_float32_rounded_once(dtype, kind, monkeypatch):
    """Where torch's own products of it are slow."""
    monkeypatch.setattr(coupling_map, "has_half_products", lambda dtype: False)
    layer = coupling(kind, 6, "second_half", context=2).to(dtype)
    x, context = torch.randn(20, 6, dtype=dtype), torch.randn(20, 2, dtype=dtype)
    assert layer.as_map(x, inverse=False) is not None
    assert coupling("softclip", 6, "odd", hidden=(1000, 1000)).to(dtype).as_map(x, inverse=False) is not None  # which BLAS would run slowly
    wide = copy.deepcopy(layer).float()
    results = []
    for m, inputs in ((layer, (x, context)), (wide, (x.float(), context.float()))):
        y, logabsdet = m(*inputs)
        (y.float().sum() + logabsdet.sum()).backward()
        with torch.no_grad():
            results.append((y, m.inverse(*inputs)[0], *(p.grad for p in m.parameters())))
        assert logabsdet.dtype == torch.float32
    for half, exact in zip(*results, strict=True):
        assert half.dtype == dtype and torch.equal(half, exact.to(dtype))


def test_bad_input_is_told_alike():
    layer, with_context = coupling("softclip", 6, "odd"), coupling("softclip", 6, "odd", context=2)
    x = torch.randn(4, 6)
    for call, message in (
        (lambda: layer(x[:, :5]), r"mat1 and mat2|x must|conditioner must return"),
        (lambda: layer(x.double()), "x must be torch.float32, like the parameters"),
        (lambda: layer(x, torch.randn(4, 2)), r"context was given, \[4, 2\], but no network takes one"),
        (lambda: with_context(x), r"context is missing: the network takes \[batch, 2\]"),
        (lambda: with_context(x, torch.randn(3, 2)), r"context must have shape \[4, 2\]"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            call()


@pytest.mark.parametrize("way", ["reference", "large", "gradient of the inverse"])
def test_bad_contexts_are_told_by_the_parts_too(way):
    hidden = (1000, 1000) if way == "large" else (9,)
    kind = "gate" if way == "gradient of the inverse" else "softclip"
    plain, taking = coupling(kind, 6, "odd", hidden=hidden), coupling(kind, 6, "odd", context=2, hidden=hidden)
    x = torch.randn(20, 6)
    with backend("reference" if way == "reference" else "auto"):
        for layer, context, message in (
            (plain, torch.randn(20, 2), r"context was given, \[20, 2\], but the network takes none"),
            (taking, None, r"context is missing: the network takes \[batch, 2\]"),
            (taking, torch.randn(1, 2), r"context must have shape \[20, 2\], one row per row of x; got \[1, 2\]"),
        ):
            with pytest.raises(ValueError, match=message):
                (layer.inverse if way == "gradient of the inverse" else layer)(x, context)


def test_caches_do_not_keep_what_a_device_context_makes():
    for features in (8, 9):  # sizes that no other test has
        layer = coupling("softclip", features, "odd", hidden=(features + 20,))
        x = torch.randn(3, features)
        with torch.device("meta"):
            inside = layer(x)
        with in_parts():
            want = layer(x)
        torch.testing.assert_close(inside, want)
        torch.testing.assert_close(layer(x), want)


def test_a_layer_that_changes_the_shape_comes_first():
    chain = Chain([Reshape((4,), (2, 2)), AdditiveCoupling(MLP(2, (8,), 2), part="second_half")])
    assert chain.layers[1].as_map(torch.randn(5, 4), inverse=False) is not None
    assert chain(torch.randn(5, 4))[0].shape == (5, 2, 2)
    flow, x = NICE((1, 2, 3), hidden_features=(9,)), torch.randn(5, 1, 2, 3)
    with in_parts():
        want = flow(x)
    torch.testing.assert_close(flow(x), want)


def test_a_gradient_of_a_gradient_counts_every_path_once():
    """Networks that two layers share, and contexts that depend on what is mapped."""
    torch.manual_seed(0)
    first = coupling("learned", 4, "odd", context=3).double()
    second = AffineCoupling(first.conditioner, part="even", interleaved=True, form="divide").double()
    made = MaskedAutoregressive(4, (9,), context_features=3).double()
    x, c = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    for layers in ([first, second], [made, made], [first, made]):
        chain = Chain(layers)
        inputs = [x.requires_grad_(), c.requires_grad_(), *dict.fromkeys(chain.parameters())]

        def gradients(create, chain=chain, inputs=inputs):
            y, a = chain(x, c + x[:, :3])
            z, b = chain.layers[0](y, c)
            loss = y.sin().sum() + z.cos().sum() + (a * b).sum()
            return torch.autograd.grad(loss, inputs, create_graph=create)

        want = gradients(False)
        torch.testing.assert_close(gradients(True), want, rtol=1e-10, atol=1e-11)
        with in_parts():
            torch.testing.assert_close(gradients(True), want, rtol=1e-10, atol=1e-11)


def flows():
    mixed = Chain(
        [coupling("learned", 6, "even"), FlowBatchNorm(6), Permute.random(6), MaskedAutoregressive(6, (8,)), coupling("additive", 6, "odd")]
    )
    return {
        "NICE": NICE(6, hidden_features=(9,)),
        "RealNVP": RealNVP(6, hidden_features=(9, 8), transforms=5),
        "mixed": mixed,
        "inverted": Chain([Inverse(coupling("learned", 6, "even")), coupling("learned", 6, "odd")]),
    }


@pytest.mark.parametrize("name", ["NICE", "RealNVP", "mixed", "inverted"])
@pytest.mark.parametrize("inverse", [False, True])
def test_a_flow_is_one_call(monkeypatch, name, inverse):
    torch.manual_seed(0)
    flow = flows()[name].double().eval()
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=0.4)
    for layer in flow.modules():
        if isinstance(layer, FlowBatchNorm):
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
    x, calls = torch.randn(11, 6, dtype=torch.float64), []
    real = stack.autoregressive_stack
    monkeypatch.setattr(stack, "autoregressive_stack", lambda x, maps, context: calls.append(len(maps)) or real(x, maps, context))
    with torch.no_grad():
        got = (flow.inverse if inverse else flow)(x)
        assert len(calls) == 1 and calls[0] == sum(
            isinstance(m, (AdditiveCoupling, AffineCoupling, MaskedAutoregressive)) for m in flow.modules()
        )
        want, total = x, 0
        for layer in reversed(flow.layers) if inverse else flow.layers:
            want, logabsdet = (layer.inverse if inverse else layer)(want)
            total = total + logabsdet
    torch.testing.assert_close(got, (want, total), rtol=1e-11, atol=1e-11)


def test_training_reaches_the_same_gradients_as_the_parts():
    torch.manual_seed(0)
    for name in ("NICE", "RealNVP"):
        flow = flows()[name].double().train()
        twin, x = copy.deepcopy(flow), torch.randn(37, 6, dtype=torch.float64)
        (-flow.log_prob(x).mean()).backward()
        with in_parts():
            (-twin.log_prob(x).mean()).backward()
        torch.testing.assert_close([p.grad for p in flow.parameters()], [p.grad for p in twin.parameters()], rtol=1e-9, atol=1e-12)


def test_several_cotangents_at_once():
    for layer in (coupling("learned", 5, "even").double(), MaskedAutoregressive(5, (8,)).double()):
        x = torch.randn(3, 5, dtype=torch.float64)
        f = lambda v, layer=layer: torch.cat([layer(v)[0], layer(v)[1][:, None]], 1)
        one_by_one, at_once = (torch.autograd.functional.jacobian(f, x, vectorize=way) for way in (False, True))
        torch.testing.assert_close(at_once, one_by_one)


def test_a_tensor_in_the_place_of_a_parameter():  # `len(parameters) < 3` dropped: KeyError
    layer, x = coupling("softclip", 6, "odd"), torch.randn(5, 6)
    want = layer(x)
    dense = layer.conditioner.layers[0]
    weight = dense.weight.detach().clone()
    del dense.weight
    dense.weight = weight  # as a hypernetwork does
    torch.testing.assert_close(layer(x), want)


@pytest.mark.parametrize("part", ["even", "odd"])
def test_one_feature_cannot_be_split(part):
    transformed = 1 if part == "even" else 0

    def network(outputs: int) -> MLP:  # which reads as many features as pass, and none is a number here
        mlp = MLP(1, (4,), 1)
        mlp.layers = nn.ModuleList([Dense(1 - transformed, 4), Dense(4, outputs)])
        return mlp

    for layer in (
        AdditiveCoupling(network(transformed), part=part),
        AffineCoupling(network(2 * transformed), part=part, interleaved=True),
    ):
        with pytest.raises(ValueError, match="x must have at least 2 channels"):
            layer(torch.randn(3, 1))


def test_a_feature_too_many():  # the transformed part is as wide as before, what passes is not
    layer = coupling("softclip", 6, "odd")
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError)):
        layer(torch.randn(4, 7))


def test_a_network_half_of_which_is_elsewhere():
    layer = coupling("softclip", 6, "odd")
    layer.conditioner.layers[0].to("meta")
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError)):
        layer(torch.randn(4, 6))


def test_a_scale_for_each_channel():
    network = MLP(3, (9,), 6)
    layer, x = AffineCoupling(network, part="odd", scale_parameter=torch.tensor([0.5, -1.0, 2.0]), interleaved=True), torch.randn(5, 6)
    assert layer.as_map(x, inverse=False) is None
    with in_parts():
        want = layer(x)
    torch.testing.assert_close(layer(x), want)


def test_autocast_reaches_the_network():
    layer, x = coupling("softclip", 6, "odd"), torch.randn(50, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.as_map(x, inverse=False) is None
        got = layer(x)
        with in_parts():
            want = layer(x)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_caches_made_in_inference_mode_serve_gradients_of_gradients():
    layer = coupling("softclip", 10, "odd", hidden=(31,))  # sizes that no other test has
    x = torch.randn(3, 10)
    with torch.inference_mode():
        layer(x)
    x.requires_grad_()
    y, logabsdet = layer(x)
    (g,) = torch.autograd.grad(y.square().sum() + logabsdet.sum(), x, create_graph=True)
    g.sum().backward()
    assert x.grad is not None
