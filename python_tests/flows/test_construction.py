"""Flows built without memory, on the meta device, and given a trained flow's tensors."""

import copy

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from flowkernels.flows import IAF, MAF, NICE, Flow, Glow, RealNVP
from flowkernels.layers import InvertibleConv1x1, MaskedAutoregressive, MaskedLinear, Permute

MAKE = {
    "NICE": lambda: NICE(4, hidden_features=(8,)),
    "RealNVP": lambda: RealNVP(4, hidden_features=(8,)),
    "RealNVP of images": lambda: RealNVP((1, 4, 4), levels=1, blocks=1, hidden_channels=4),
    "Glow": lambda: Glow((3, 4, 4), levels=1, steps=2, hidden_channels=4),
    "MAF": lambda: MAF(4, hidden_features=(8,), context_features=2, batch_norm=True),
    "residual": lambda: MAF(4, hidden_features=(8, 8), residual=True),
    "IAF": lambda: IAF(4, hidden_features=(8,), gate=True),
    "layers": lambda: Flow([Permute("descending", 4), InvertibleConv1x1(4, parametrization="plain"), Permute.random(4)], 4),
}


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_built_on_the_meta_device(make, assign):
    torch.manual_seed(0)
    real = make()
    x = torch.randn(5, *real.shape)
    context = (torch.randn(5, real.context_features),) if real.context_features else ()
    real.train()(x, *context)  # initialises actnorms
    with torch.device("meta"):
        flow = make()
    assert all(t.is_meta for t in flow.state_dict().values())
    if not assign:
        flow.to_empty(device="cpu")
    flow.load_state_dict(copy.deepcopy(real.state_dict()), assign=assign)
    with torch.no_grad():
        want = real.eval()(x, *context)
        torch.testing.assert_close(flow.eval()(x, *context), want, rtol=0, atol=0)
        torch.testing.assert_close(flow.inverse(want[0], *context), real.inverse(want[0], *context), rtol=0, atol=0)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_shapes_are_found_on_the_meta_device(make, grad):
    with torch.device("meta"):
        flow, x = make().eval(), torch.randn(5, *make().shape)
    context = (torch.empty(5, flow.context_features, device="meta"),) if flow.context_features else ()
    with torch.set_grad_enabled(grad):
        z, logabsdet = flow(x, *context)
        assert z.is_meta and z.shape == (5, flow.features) and logabsdet.shape == (5,)
        assert flow.inverse(z, *context)[0].shape == x.shape


@pytest.mark.parametrize(
    "make", [lambda: NICE(7, hidden_features=(13,)), lambda: RealNVP((1, 4, 12), levels=1, blocks=1, hidden_channels=4)]
)
def test_what_has_no_data_is_not_kept(make):
    flow = make().eval()  # of sizes that no other test has
    x = torch.randn(5, *flow.shape)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        assert type(flow(x)[0]) is FakeTensor
    with torch.no_grad():
        assert type(flow(x)[0]) is torch.Tensor


@pytest.mark.parametrize("name", ["NICE", "MAF", "Glow"])
def test_what_has_no_data_is_not_computed_with(name):
    with torch.device("meta"):
        flow = MAKE[name]()
    x = torch.randn(5, *flow.shape)
    context = (torch.randn(5, flow.context_features),) if flow.context_features else ()
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError), match="meta"):
        flow.eval()(x, *context)
    assert flow(x.to("meta"), *(c.to("meta") for c in context))[0].is_meta


def test_an_op_refuses_a_part_without_data():
    layer = MaskedAutoregressive(4, (8,))
    layer.layers[0].visible = layer.layers[0].visible.to("meta")
    with torch.no_grad(), pytest.raises(RuntimeError, match="autoregressive got tensors on cpu and tensors on the meta device"):
        layer(torch.randn(5, 4))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda order: MaskedAutoregressive(3, (4,), order=order), "order"),
        (lambda order: Permute(order, 3), "permutation"),
    ],
)
@pytest.mark.parametrize("order", [[0, 1], [0, 1, 1], [1, 2, 3], [[0, 1, 2]]])
def test_an_order_that_is_none(call, name, order):
    with pytest.raises(ValueError, match=rf"^{name} must be a permutation of 0\.\.2; got \["):
        call(order)


@pytest.mark.parametrize(
    ("given", "make"),
    [
        (torch.tensor([2, 0, 1]), lambda order: MaskedAutoregressive(3, (4,), order=order).order),
        (torch.tensor([2, 0, 1]), lambda permutation: Permute(permutation).permutation),
        (torch.tensor([0, 1, 3], dtype=torch.int32), lambda visible: MaskedLinear(visible, 3).visible),
    ],
    ids=["order", "permutation", "visible"],
)
def test_a_tensor_that_a_layer_is_made_of_stays_its_givers(given, make):
    before, kept = given.clone(), make(given)
    given.zero_()
    assert torch.equal(kept, before)


@pytest.mark.parametrize("name", ["NICE", "RealNVP", "RealNVP of images", "Glow", "MAF", "IAF"])
def test_another_dtype_is_named(name):
    torch.manual_seed(0)
    flow = MAKE[name]()
    x, context = torch.randn(5, *flow.shape), (torch.randn(5, flow.context_features),) if flow.context_features else ()
    z, _ = flow.train()(x, *context)  # initialises actnorms
    for call in (
        lambda: flow(x.double(), *(c.double() for c in context)),
        lambda: flow.inverse(z.double(), *(c.double() for c in context)),
    ):
        with pytest.raises(ValueError, match=r"(x|z|context|log_scale|shift) must be torch.float(32|64)"):
            call()


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_many_models_as_one(make):
    """The recipe of torch.func for ensembles: each model by itself, and all in one call on a model without memory."""
    models = [make().eval() for _ in range(3)]
    x = torch.randn(5, *models[0].shape)
    context = (torch.randn(5, models[0].context_features),) if models[0].context_features else ()
    for model in models:
        model.train()(x, *context)  # initialises actnorms
        model.eval()
    parameters, buffers = torch.func.stack_module_state(models)
    empty = copy.deepcopy(models[0]).to("meta")
    got = torch.func.vmap(lambda p, b: torch.func.functional_call(empty, (p, b), (x, *context)))(parameters, buffers)
    want = [torch.stack(parts) for parts in zip(*(model(x, *context) for model in models), strict=True)]
    torch.testing.assert_close(got, tuple(want))


def test_numbers_of_numpy():
    for flow in (MAF, IAF, NICE, RealNVP):
        assert flow(np.int64(4), hidden_features=(np.int64(8),)).shape == (4,)
        assert type(flow(4, hidden_features=(8,), context_features=np.int64(2)).context_features) is int
