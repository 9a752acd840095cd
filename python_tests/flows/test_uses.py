"""What torch's users do with modules besides calling them: functional calls, many cotangents at once, half precision, odd arguments."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from flowkernels import ops
from flowkernels.flows import IAF, MAF, NICE, ConvNet, Flow, Glow, RealNVP, ResNet, ZeroConv2d
from flowkernels.layers import (
    MLP,
    AdditiveCoupling,
    AffineCoupling,
    Dequantize,
    DiagonalScale,
    FactorOut,
    FlowBatchNorm,
    Inverse,
    InvertibleConv1x1,
    MaskedAutoregressive,
    MaskedLinear,
    Permute,
    Reshape,
    Squeeze,
    Unitwise,
)
from flowkernels.ops.autoregressive import training
from flowkernels.ops.glow_step import steps
from python_tests.battery import assert_same_bits


def test_a_functional_call_says_nothing_of_the_module_itself():
    x, made = torch.randn(16, 3, 8, 8), lambda: Glow((3, 8, 8), levels=1, steps=2, hidden_channels=8)
    ready, other = ready_glow(made(), x), made().eval()
    torch.testing.assert_close(torch.func.functional_call(other, ready.state_dict(), (x,)), ready(x))
    with pytest.raises(RuntimeError, match="used in evaluation before it was initialised"):
        other(x)
    with pytest.raises(RuntimeError, match="used in evaluation before it was initialised"):
        torch.func.functional_call(ready, other.state_dict(), (x,))
    other.train()(x)  # the first batch
    assert all(flag for name, flag in other.named_buffers() if name.endswith("initialised"))
    assert copy.deepcopy(other).eval()(x)[0].isfinite().all() and ready(x)[0].isfinite().all()


def ready_glow(flow: Glow, x: torch.Tensor) -> Glow:
    flow(x)
    return flow.eval()


def test_a_state_without_an_actnorms_flag_may_be_assigned_to_a_meta_module():
    made = lambda: Glow((3, 8, 8), levels=1, steps=1, hidden_channels=8)
    state = ready_glow(made(), torch.randn(16, 3, 8, 8)).state_dict()
    with torch.device("meta"):
        flow = made()
    flag = next(name for name in state if name.endswith("initialised"))
    without = {name: value for name, value in state.items() if name != flag}
    assert flow.load_state_dict(without, assign=True, strict=False).missing_keys == [flag]


def test_a_flow_returns_flat_noise():
    with pytest.raises(ValueError, match=r"the last layer must return flat noise, \[batch, 4\]; got \[6, 4, 1, 1\]: add a layers.Reshape"):
        Flow([Squeeze()], (1, 2, 2)).log_prob(torch.randn(6, 1, 2, 2))


@pytest.mark.parametrize("name", ["order", "visible"])
def test_integers_that_were_written_between_forward_and_backward(name):
    flow, x = MAF(5, transforms=2, hidden_features=(16,)), torch.randn(4, 5)
    loss = flow(x)[0].sum()
    layer = flow.layers[0]
    written = layer.order if name == "order" else layer.layers[0].visible
    written.copy_(written.clone())
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_batch_norm_of_half_precision_trains(dtype):
    torch.manual_seed(0)
    norm, x = FlowBatchNorm(4).to(dtype), torch.randn(50, 4, dtype=dtype)
    z, logabsdet = norm(x)
    (z.float().square().sum() - logabsdet.sum()).backward()
    assert z.dtype == dtype and norm.bias.grad.dtype == dtype
    torch.testing.assert_close(z.float().mean(0), torch.zeros(4), atol=0.02, rtol=0)
    torch.testing.assert_close(z.float().std(0), torch.ones(4), atol=0.03, rtol=0)


@pytest.mark.parametrize("parametrization", ["lu", "plain"])
def test_many_cotangents_at_once(parametrization):
    x = torch.randn(4, 3, 8, 8)
    flow = ready_glow(Glow((3, 8, 8), levels=1, steps=2, hidden_channels=8, parametrization=parametrization), x)
    parameters = [flow.layers[1].mixings[0].conv.get_parameter("factors" if parametrization == "lu" else "plain_weight")]
    together = torch.autograd.grad(flow.log_prob(x), parameters, torch.eye(4), is_grads_batched=True)[0]
    each = [torch.autograd.grad(flow.log_prob(x)[i], parameters)[0] for i in range(4)]
    torch.testing.assert_close(together, torch.stack(each), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "flow",
    [
        lambda: MAF(3, transforms=1, hidden_features=(8,), activation="tanh"),
        lambda: RealNVP(3, transforms=2, hidden_features=(8,), batch_norm=False),
        lambda: NICE(3, couplings=2, hidden_features=(8,)),
    ],
    ids=["maf", "realnvp", "nice"],
)
def test_a_vectorized_hessian(flow):
    torch.manual_seed(0)
    flow = flow().double()
    x = torch.randn(2, 3, dtype=torch.float64)
    of = lambda vectorize: torch.autograd.functional.hessian(lambda x: flow.log_prob(x).sum(), x, vectorize=vectorize)
    torch.testing.assert_close(of(True), of(False))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MAF(4, context_features=True), "context_features must be a whole number of at least 0; got True"),
        (lambda: NICE(4, context_features=False), "context_features must be a whole number of at least 0; got False"),
        (lambda: NICE((True, 4, 4)), r"shape must be a number of features or .*; got \(True, 4, 4\)"),
        (lambda: NICE(True), "shape must be a number of features or .*; got True"),
        (lambda: MAF(4, hidden_features=(8, True)), r"hidden_features must be widths, whole numbers of at least 1; got \(8, True\)"),
        (lambda: MAF(4, hidden_features=None), r"hidden_features must be widths, whole numbers of at least 1; got \(None,\)"),
        (lambda: MAF(3, transforms=2.5), "transforms must be a whole number of at least 1; got 2.5"),
        (lambda: Glow((1, 8, 8), levels=1, steps=1, hidden_channels="8"), "hidden_channels must be a whole number of at least 1; got '8'"),
        (lambda: MLP(0, (8,), 4), "features must be a whole number of at least 1; got 0"),
        (lambda: MLP(2, (8,), 0), "outputs must be a whole number of at least 1; got 0"),
        (lambda: ResNet(0, 8, 4, 1), "channels must be a whole number of at least 1; got 0"),
        (lambda: ResNet(2, 0, 4, 1), "hidden_channels must be a whole number of at least 1; got 0"),
        (lambda: ResNet(2, 8, 0, 1), "outputs must be a whole number of at least 1; got 0"),
        (lambda: ResNet(2, 8, 4, -1), "blocks must be a whole number of at least 0; got -1"),
        (lambda: ConvNet(0, 8, 4), "channels must be a whole number of at least 1; got 0"),
        (lambda: ConvNet(1, 0, 4), "hidden_channels must be a whole number of at least 1; got 0"),
        (lambda: ConvNet(1, 8, 0), "outputs must be a whole number of at least 1; got 0"),
        (lambda: ZeroConv2d(0, 4), "inputs must be a whole number of at least 1; got 0"),
        (lambda: ZeroConv2d(4, 0), "outputs must be a whole number of at least 1; got 0"),
        (lambda: Unitwise(1.5), "units must be a whole number of at least 1; got 1.5"),
        (lambda: masked(2.5), "context_features must be a whole number of at least 0; got 2.5"),
        (lambda: MaskedLinear(torch.tensor([1, 2]), 2.5), "in_features must be a whole number of at least 0; got 2.5"),
        (lambda: MaskedLinear(torch.tensor([0.5, 1.5]), 2), r"visible must be of whole numbers, .*; got torch.float32, \[2\]"),
        (lambda: MaskedLinear(torch.tensor([[1, 2]]), 2), r"visible must be of whole numbers, .*; got torch.int64, \[1, 2\]"),
        (lambda: Permute([0, 1, 1]), r"permutation must be a permutation of 0..2; got \[0, 1, 1\]"),
        (lambda: Permute(torch.tensor([0.0, 1.0, 2.9])), "permutation must be a permutation of 0..2"),
        (lambda: masked()(torch.randn(2, 3)), r"context is missing: the network takes \[batch, 2\]"),
        (lambda: masked()(torch.randn(2, 3), torch.randn(1, 2)), r"context must have shape \[2, 2\]"),
        (lambda: masked(0)(torch.randn(2, 3), torch.randn(2, 2)), r"context was given, \[2, 2\], but the network takes none"),
    ],
)
def test_errors_of_sizes_and_contexts(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("method", ["forward", "inverse", "log_prob"])
def test_what_is_no_tensor_is_refused(method):
    flow = MAF(3, hidden_features=(8,), context_features=2)
    with pytest.raises(TypeError, match=r"must be a torch.Tensor; got numpy.ndarray"):
        getattr(flow, method)(np.zeros((4, 3), np.float32), torch.zeros(4, 2))
    with pytest.raises(TypeError, match=r"context must be a torch.Tensor; got builtins.list"):
        getattr(flow, method)(torch.zeros(4, 3), [[0.0, 0.0]] * 4)
    with pytest.raises(TypeError, match=r"value must be a torch.Tensor; got builtins.list"):
        flow.distribution(torch.zeros(2)).log_prob([[0.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AffineCoupling(None), "conditioner must be a module, or something else that can be called; got None"),
        (lambda: AdditiveCoupling("mlp"), "conditioner must be a module, or something else that can be called; got 'mlp'"),
        (lambda: Inverse(nn.Linear(2, 2)), r"layer must have forward\(x, context\) and inverse\(z, context\), .*; got Linear"),
        (lambda: MaskedLinear([1, 2], 3), "visible must be a torch.Tensor, .*; got list"),
    ],
)
def test_what_is_no_layer_or_network_is_refused(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def masked(context_features: int = 2) -> MaskedLinear:
    return MaskedLinear(torch.tensor([1, 2, 3], dtype=torch.int32), 3, context_features=context_features)


def test_widths_may_come_from_a_generator():
    for kind in (MAF, IAF, NICE, RealNVP):
        assert kind(3, hidden_features=(8 for _ in range(2)))(torch.randn(4, 3))[0].shape == (4, 3)


def freed(t: torch.Tensor) -> torch.Tensor:
    """As tools for sharding leave what is not to be used for now."""
    t.detach().untyped_storage().resize_(0)
    return t


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", [MAF, IAF, NICE, RealNVP])
def test_a_parameter_whose_memory_was_freed(kind, grad):
    flow, x = kind(4, hidden_features=(8, 8)), torch.randn(5, 4)
    with torch.set_grad_enabled(grad):
        flow.log_prob(x)
        freed([p for p in flow.parameters() if p.dim() == 2][1])
        with pytest.raises(RuntimeError, match="memory was freed|not allocated"):
            flow.log_prob(x)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: ops.coupling(x, torch.zeros(4, 2), torch.zeros(4, 2)),
        lambda x: ops.channel_affine(x, torch.zeros(4), torch.zeros(4)),
        lambda x: ops.masked_linear(x, torch.ones(4, 3), None, torch.tensor([1, 2, 3], dtype=torch.int32)),
        lambda x: ops.slogdet(x),
        lambda x: FlowBatchNorm(4)(x),
        lambda x: ops.glow_step(x.view(4, 1, 4), None, torch.eye(4), torch.zeros(4)),
    ],
    ids=["coupling", "channel_affine", "masked_linear", "slogdet", "batch_norm", "glow_step"],
)
def test_an_input_whose_memory_was_freed(call):
    call(torch.randn(4, 4))
    with pytest.raises(RuntimeError, match="memory was freed|not allocated"):
        call(freed(torch.randn(4, 4)))


class WithoutSum(nn.Module):
    """Forgets that log|det| is one number for each row."""

    def __init__(self, *, keepdim=False):
        super().__init__()
        self.keepdim = keepdim

    def forward(self, x, context=None):
        logs = torch.zeros_like(x)
        return x, logs.sum(1, keepdim=True) if self.keepdim else logs

    inverse = forward


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(("keepdim", "got"), [(False, "4, 4"), (True, "4, 1")])
def test_a_log_determinant_for_each_feature_is_refused(keepdim, got, grad):
    flow = Flow([MaskedAutoregressive(4, (8,)), WithoutSum(keepdim=keepdim)], 4)
    with torch.set_grad_enabled(grad):
        for call in [flow.log_prob, flow.inverse] * 4:  # by what is kept of the layers too
            with pytest.raises(ValueError, match=rf"WithoutSum must return log\|det\| of each row beside its output, \[4\]; got \[{got}\]"):
                call(torch.randn(4, 4))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(("returned", "got"), [(lambda x: x, "Tensor"), (lambda x: (x,) * 3, "3 things"), (lambda x: None, "NoneType")])
def test_a_layer_that_returns_no_log_determinant_is_refused(returned, got, grad):
    class Forgetful(nn.Module):
        def forward(self, x, context=None):
            return returned(x)

        inverse = forward

    flow = Flow([MaskedAutoregressive(4, (8,)), Forgetful()], 4)
    with torch.set_grad_enabled(grad):
        for call in [flow.log_prob, flow.inverse] * 4:  # by what is kept of the layers too
            with pytest.raises(ValueError, match=rf"Forgetful must return two things, its output and log\|det\| of each row; got {got}"):
                call(torch.randn(2, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_float64_is_refused_under_autocast_too(dtype, device):
    """Which leaves it as it is."""
    x = torch.randn(5, 6, dtype=torch.float64, device=device)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32)
    with autocast, pytest.raises(ValueError, match="must be torch.float32"):
        RealNVP(6).to(device)(x)


def test_parameters_are_contiguous():
    flows = [make() for make in FROZEN.values()] + [Glow((3, 4, 4), levels=1, steps=1, hidden_channels=4, parametrization="plain")]
    for flow in flows:
        assert all(p.is_contiguous() for p in flow.parameters())


FROZEN = {
    "NICE": lambda: NICE(6, couplings=2, hidden_features=(12,)),
    "RealNVP": lambda: RealNVP(6, transforms=2, hidden_features=(12,), context_features=2),
    "Glow": lambda: Glow((2, 4, 4), levels=1, steps=2, hidden_channels=8),
    "MAF": lambda: MAF(6, hidden_features=(12, 12), context_features=2),
    "residual": lambda: MAF(6, hidden_features=(12, 12), residual=True),
    "IAF": lambda: IAF(6, hidden_features=(12,), context_features=2),
}


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("make", FROZEN.values(), ids=FROZEN)
def test_gradients_by_inputs_through_a_frozen_flow(make, inverse):
    """As scores and samplers ask for them: the same bits, and nothing for the parameters."""
    torch.manual_seed(0)
    flow = make()
    context = torch.randn(5, flow.context_features, requires_grad=True) if flow.context_features else None
    flow.train()(torch.randn(5, *flow.shape), context)  # initialises actnorms
    flow.eval()
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(5, *((flow.features,) if inverse else flow.shape), requires_grad=True)
    inputs = [t for t in (x, context) if t is not None]

    def gradients(by):
        y, logabsdet = (flow.inverse if inverse else flow)(x, context)
        return torch.autograd.grad(y.square().sum() + logabsdet.sum(), by)

    one = next(flow.parameters())
    *by_inputs, by_one = gradients([*inputs, one])
    assert_same_bits(gradients(inputs), tuple(by_inputs))  # which asks for none of the parameters'
    flow.requires_grad_(False)
    assert_same_bits(gradients(inputs), tuple(by_inputs))
    one.requires_grad_()
    assert_same_bits(gradients([one]), (by_one,))


def test_parameters_that_a_pass_does_not_ask_for_cost_nothing(monkeypatch):
    """A gradient by x alone of a flow that is not frozen, in each of the ways to ask for one, and later passes through the same graph."""
    asked = []
    op = training._backward
    monkeypatch.setattr(training, "_backward", lambda *a: asked.append(a[-1]) or op(*a))
    flow = MAF(4, transforms=1, hidden_features=(8,))
    x, one = torch.randn(5, 4, requires_grad=True), next(flow.parameters())
    total = flow.log_prob(x).sum()
    (dx,) = torch.autograd.grad(total, x, retain_graph=True)
    total.backward(inputs=[x], retain_graph=True)
    assert asked == [False, False] and one.grad is None and torch.equal(x.grad, dx)
    _, by_one = torch.autograd.grad(total, [x, one], retain_graph=True)
    doubled = torch.autograd.grad((2 * one).sum() + total, [x, one], retain_graph=True)  # a leaf that another node reads too
    assert torch.equal(doubled[1], by_one + 2)
    total.backward()
    assert asked == [False, False, True, True, True] and torch.equal(one.grad, by_one)
    pulled, wanted = training.pulled_back, []
    monkeypatch.setattr(training, "pulled_back", lambda *a, **o: wanted.append(len(a[2])) or pulled(*a, **o))
    (dx,) = torch.autograd.grad(flow.log_prob(x).sum(), x, create_graph=True)
    dx.square().sum().backward()  # a score and its gradient by the parameters
    assert wanted[0] == 1


def test_networks_of_a_glow_that_a_pass_does_not_ask_for_cost_nothing(monkeypatch):
    asked = []
    op = steps.conv_net_backward
    monkeypatch.setattr(steps, "conv_net_backward", lambda *a: asked.append(a[-1]) or op(*a))
    flow = FROZEN["Glow"]()
    flow(torch.randn(5, 2, 4, 4))
    x, one = torch.randn(5, 2, 4, 4, requires_grad=True), flow.layers[1].couplings[0].conditioner.conv_in.weight
    total = flow.log_prob(x).sum()
    torch.autograd.grad(total, x, retain_graph=True)
    torch.autograd.grad(total, [x, one], retain_graph=True)
    for p in flow.layers[1].couplings.parameters():
        p.requires_grad_(False)
    torch.autograd.grad(flow.log_prob(x).sum(), [x, flow.layers[1].mixings[0].actnorm.bias])
    assert asked == [False, False, True, True, False, False]


def test_flows_of_sequences_and_volumes():
    for shape in ((2, 5), (2, 3, 3, 2)):
        conditioner = torch.nn.Conv1d(1, 2, 3, padding=1) if len(shape) == 2 else torch.nn.Conv3d(1, 2, 3, padding=1)
        flow = Flow([AffineCoupling(conditioner), Reshape(shape, (math.prod(shape),))], shape)
        x, log_prob = flow.sample_and_log_prob(4)
        assert x.shape == (4, *shape)
        torch.testing.assert_close(flow.log_prob(x), log_prob)
    with pytest.raises(ValueError, match=r"a number of features or \(C, \*sites\), whole numbers of at least 1; got \(\)"):
        Flow([DiagonalScale(3)], ())
    with pytest.raises(ValueError, match=r"a number of features or \(C, H, W\), whole numbers of at least 1; got \(4, 4\)"):
        RealNVP((4, 4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: AffineCoupling(torch.nn.Identity(), scale=ops.ScaleMap.exp(), scale_parameter=1.0),
            "must be an exp_tanh map",
        ),
        (lambda: Dequantize(2.5), "levels must be a whole number of at least 2; got 2.5"),
        (lambda: Permute("descending", 3.5), "features must be a whole number of at least 1; got 3.5"),
        (lambda: Reshape((3,), (3, True)), r"after must be a shape, such as .*; got \(3, True\)"),
        (lambda: Reshape(3, (3,)), "before must be a shape, such as"),
        (lambda: FactorOut(4, [DiagonalScale(2)]), "shape must be a shape, such as"),
    ],
)
def test_layers_refuse_settings_when_they_are_built(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_scale_says_which_width_is_wrong():
    layer, x = DiagonalScale(3), torch.randn(2, 4)
    for name, call in (("x", layer), ("z", layer.inverse)):
        with pytest.raises(ValueError, match=rf"{name} must have shape \[batch, 3, \*sites\]; got \[2, 4\]"):
            call(x)


def test_freezing_a_convolution_gives_it_back():
    layer = InvertibleConv1x1(3)
    assert layer.freeze() is layer
