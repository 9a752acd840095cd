"""Integer buffers that somebody has averaged are found out; all that people do with models leaves them alone."""

import copy
import pickle

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from flowkernels.flows import IAF, MAF, Glow, RealNVP
from flowkernels.layers import Permute
from flowkernels.layers._structure import Structured

FLOWS = {
    "MAF": lambda: MAF(4, transforms=2, hidden_features=(32, 32), batch_norm=True),
    "residual": lambda: MAF(4, transforms=2, hidden_features=(32, 32), residual=True),
    "IAF": lambda: IAF(5, transforms=2, hidden_features=(32, 32), context_features=2),
    "RealNVP": lambda: RealNVP((3, 8, 8)),
    "Glow": lambda: Glow((3, 8, 8), levels=2, steps=2, hidden_channels=8),
}


@pytest.fixture(params=FLOWS.values(), ids=FLOWS)
def flow(request) -> torch.nn.Module:
    torch.manual_seed(0)
    return request.param()


def averaged(flow: torch.nn.Module, **options) -> AveragedModel:
    average = AveragedModel(flow, multi_avg_fn=get_ema_multi_avg_fn(0.9), **options)
    for _ in range(5):
        average.update_parameters(flow)
    return average


@pytest.mark.parametrize("ask", [lambda m: m.eval(), lambda m: m.state_dict()], ids=["eval", "state_dict"])
def test_averages_of_integers_are_refused(flow, ask):
    average = averaged(flow, use_buffers=True)
    with pytest.raises(ValueError, match="averages of weights must leave integer buffers alone"):
        ask(average)
    average.module.load_state_dict(flow.state_dict())
    ask(average)


def test_averages_of_weights_alone_are_the_flow(flow):
    average = averaged(flow, use_buffers=False).eval()
    assert all(torch.equal(a, b) for a, b in zip(average.module.buffers(), flow.buffers(), strict=True))


@pytest.mark.parametrize("decay", [0.999, 0.9999])
def test_averages_of_floating_point_buffers_are_no_change(flow, decay):
    """by hand, which rounds where torch's lerp does not"""
    average = copy.deepcopy(flow)
    for _ in range(300):
        for mine, theirs in zip(average.buffers(), flow.buffers(), strict=True):
            if mine.is_floating_point():
                mine.mul_(decay).add_(theirs, alpha=1 - decay)
    average.eval().state_dict()


def test_means_of_floating_point_buffers_are_no_change(flow):
    """ten tenths of 1 are 1.0000001"""
    for buffer in flow.buffers():
        if buffer.is_floating_point():
            buffer.copy_(sum([buffer / 10] * 10))
    flow.eval().state_dict()


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16().float(),
        lambda m: m.double(),
        lambda m: copy.deepcopy(m),
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: m.share_memory(),
        lambda m: m.to("meta"),
        lambda m: m.to("meta").to_empty(device="cpu"),
        lambda m: m.to_empty(device="cpu"),
    ],
    ids=["half", "bfloat16", "double", "deepcopy", "pickle", "share_memory", "meta", "meta to_empty", "to_empty"],
)
def test_what_people_do_is_no_change(flow, move):
    state = flow.state_dict()
    moved = move(flow).eval()
    assert moved.state_dict().keys() == state.keys()
    moved.load_state_dict(state, assign=any(b.is_meta for b in moved.buffers()))
    moved.eval().state_dict()
    assert not any(t.is_meta for t in moved.buffers())


def test_type_leaves_integers_alone(flow):
    """which would cast all buffers"""
    ours = ("visible", "order", "permutation", "row")
    integers = {name: b.clone() for name, b in flow.named_buffers() if name.endswith(ours)}
    flow.type(torch.bfloat16).type(torch.float64).eval()
    assert integers and {p.dtype for p in flow.parameters()} == {torch.float64}
    torch.testing.assert_close({name: flow.get_buffer(name) for name in integers}, integers)


def test_sums_are_exact_in_half_precision():
    """numbers of units exceed what half precision can tell apart"""
    layer = MAF(3, transforms=1, hidden_features=(2100, 2100)).bfloat16().eval().layers[0].layers[1]
    layer.visible[-1] -= 1
    with pytest.raises(ValueError, match="visible of MaskedLinear must be what it was"):
        layer.eval()


@pytest.mark.parametrize("digit", range(24))
def test_large_sums_are_exact(digit):
    """beyond 2^24 float32 no longer counts by ones"""
    layer = Structured()
    layer.register_integers("numbers", torch.full((1000,), 60_000))
    layer.eval().numbers[3] -= 1 << digit
    with pytest.raises(ValueError, match="numbers of Structured must be what it was"):
        layer.eval()


def test_a_permutation_that_was_cut_off():
    layer = Permute([2, 0, 1])
    layer.permutation.copy_(layer.permutation * 0.9999)
    with pytest.raises(ValueError, match="permutation of Permute must be what it was"):
        layer.eval()
