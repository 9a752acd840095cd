"""What layers keep of their calls without gradient: the same results, whatever somebody does to their modules between two calls."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from flowkernels import ScaleMap
from flowkernels.flows import NICE, Flow
from flowkernels.layers import MLP, AffineCoupling, Inverse, MaskedAutoregressive
from flowkernels.layers.mlp import Dense
from flowkernels.ops import autoregressive
from flowkernels.ops.autoregressive.kept import CAN_KEEP
from python_tests.layers.programs import (
    MAKE,
    arguments,
    both,
    equal,
    first,
    fresh,
    learn,
    make,
    parametrize,
    programs,
    replace_parameter,
)

pytestmark = pytest.mark.skipif(not CAN_KEEP, reason="no compiled library")


def write_in_place(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1)


def write_data(module):
    for parameter in module.parameters():
        parameter.data = parameter.data + 0.1


def load(module):
    module.load_state_dict({k: v + 0.1 if v.is_floating_point() else v for k, v in module.state_dict().items()})


def assign(module):
    module.load_state_dict({k: v + 0.1 if v.is_floating_point() else v for k, v in module.state_dict().items()}, assign=True)


CHANGES = [replace_parameter, write_in_place, write_data, load, assign, parametrize]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", MAKE)
def test_tensors_change(name, change):
    module, args = make(name), arguments(name)
    learn(module, *args)
    before = both(module, *args)
    change(module)
    want = both(fresh(module), *args)
    assert not torch.equal(want[0], before[0])
    for _ in range(6):
        equal(both(module, *args), want)


def change_scale(layer):
    layer.scale = ScaleMap.exp_tanh(0.5)


def change_form(layer):
    layer.form = type(layer.form).DIVIDE


def change_part(layer):
    kind = type(layer.part)
    layer.part = kind.EVEN if layer.part != kind.EVEN else kind.ODD


def change_interleaved(layer):
    layer.interleaved = False


def change_forward(layer):
    forward = layer.forward
    layer.forward = lambda x, context=None: tuple(2 * t for t in forward(x, context))


def add_hook(layer):
    layer.register_forward_hook(lambda module, args, output: tuple(2 * t for t in output))


def replace_number(layer):
    # equal, but another: what is written into it must be seen
    layer.scale_parameter = nn.Parameter(layer.scale_parameter.detach().clone())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("layer", change_scale),
        ("layer", change_form),
        *(("MAF", change) for change in (change_scale, change_form, change_forward, add_hook)),
        *(("RealNVP", c) for c in (change_scale, change_form, change_part, change_interleaved, change_forward, add_hook, replace_number)),
        ("NICE", change_part),
    ],
)
def test_settings_change(name, change):
    module, args = make(name), arguments(name)
    learn(module, *args)
    before = both(module, *args)
    layer = module if name == "layer" else module.layers[1]
    change(layer)
    if change is replace_number:
        equal(both(module, *args), before)
        with torch.no_grad():
            layer.scale_parameter.add_(1.0)
    want = both(fresh(module), *args)
    assert not torch.equal(want[0], before[0])
    for _ in range(6):
        equal(both(module, *args), want)


def test_hooks_of_parts_run():
    module, x, called = make("RealNVP"), torch.randn(5, 4), []
    learn(module, x)
    first(module, MLP).layers[0].register_forward_hook(lambda *_: called.append("dense"))
    both(module, x)
    assert len(called) == 2
    module = make("MAF")
    learn(module, x)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: called.append("any"))
    try:
        both(module, x)
    finally:
        handle.remove()
    assert called.count("any") > 3


@pytest.mark.parametrize("kind", [Dense, MLP, Inverse])
def test_a_part_is_given_a_forward_of_its_own(kind):
    module, x, called = make("IAF" if kind is Inverse else "RealNVP"), torch.randn(5, 4), []
    learn(module, x)
    part = first(module, kind)
    forward = part.forward
    part.forward = lambda *args: called.append(1) or forward(*args)
    with torch.no_grad():
        module(x)
    assert called == [1]


@pytest.mark.parametrize("name", ["layer", "MAF", "RealNVP"])
def test_computed_weights_are_computed_anew(name):
    module, x = make(name), torch.randn(5, 4)
    parametrize(module)
    for _ in range(5):
        before = both(module, x)
    with torch.no_grad():
        first(module, nn.utils.parametrize.ParametrizationList).original.add_(0.1)
    assert not torch.equal(both(module, x)[0], before[0])
    equal(both(module, x), both(fresh(module), x))


@pytest.mark.parametrize("name", MAKE)
def test_tensors_can_be_swapped(name):
    module, args = make(name), arguments(name)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        learn(module, *args)
        module.double().float()
        learn(module, *args)
        module.load_state_dict(module.state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    equal(both(module, *args), both(fresh(module), *args))


def test_layers_change():
    module, x = make("MAF"), torch.randn(5, 4)
    learn(module, x)
    module.layers[1] = Inverse(make("layer"))
    for change in (lambda: None, lambda: module.layers.append(make("layer")), lambda: module.layers.pop(0)):
        change()
        want = both(fresh(module), x)
        for _ in range(6):
            equal(both(module, x), want)


def test_large_networks_are_run_by_rows():
    torch.manual_seed(0)
    module = NICE(4, hidden_features=(800, 800))
    few, many = torch.randn(3, 4), torch.randn(100, 4)
    learn(module, few)
    kept = dict(programs(module))
    for x in (many, few, many):
        equal(both(module, x), both(fresh(module), x))
    assert programs(module) == kept


def test_a_subclass_is_asked():
    class Shifted(MaskedAutoregressive):
        def conditioner(self):
            return super().conditioner()._replace(biases=[b + 1 for b in (m.bias for m in self.layers)])

    torch.manual_seed(0)
    layer, x = Shifted(4, (9, 7)), torch.randn(5, 4)
    want = both(layer, x)
    for _ in range(6):
        equal(both(layer, x), want)
    assert not programs(layer)


def test_a_layer_is_given_a_network_of_its_own():
    layer, x = make("layer"), torch.randn(5, 4)
    learn(layer, x)
    before, network = both(layer, x), layer.conditioner()
    with torch.no_grad():
        network = network._replace(biases=[b + 1 for b in network.biases])
    layer.conditioner = lambda: network
    want = autoregressive(x, network, scale=layer.scale, form=layer.form)
    for _ in range(6):
        equal(both(layer, x)[:2], want)
    assert not torch.equal(want[0], before[0])


class Loud(nn.Module):
    """A user's layer, equal to all others of its kind."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor, self.calls, self.error = factor, 0, None

    def __eq__(self, other):
        return isinstance(other, Loud)

    __hash__ = nn.Module.__hash__

    def forward(self, x, context=None):
        self.calls += 1
        if self.error is not None:
            raise self.error
        return self.factor * x, x.new_zeros(len(x))

    inverse = forward


def test_layers_of_a_user_are_called_once():
    layers = make("MAF").layers
    flow, x = Flow([layers[0], Loud(), layers[1], Loud()], 4), torch.randn(5, 4)
    learn(flow, x)
    flow.layers[1].calls = 0
    flow.layers[3].error = RuntimeError("as it likes")
    with torch.no_grad(), pytest.raises(RuntimeError, match="as it likes"):
        flow(x)
    assert flow.layers[1].calls == 1 and programs(flow)
    flow.layers[3].error = None
    flow.layers[3] = Loud(3.0)
    equal(both(flow, x), both(fresh(flow), x))
    learn(flow, x)
    flow.layers[1].forward = lambda x, context=None: (x.double(), x.new_zeros(len(x)))  # which the kernel of the next layer refuses
    with torch.no_grad(), pytest.raises(ValueError, match="must be torch.float32"):
        flow(x)


def test_another_class():
    class Additive(AffineCoupling):
        def as_map(self, x, *, inverse):
            return None

        def _apply_map(self, x, context, *, inverse):
            return x, x.new_zeros(len(x))

    module, x = make("RealNVP"), torch.randn(5, 4)
    learn(module, x)
    for layer in module.layers:
        layer.__class__ = Additive
    with torch.no_grad():
        equal(module(x)[0], x)


def test_a_parametrization_that_does_nothing_today():
    layer, x = make("layer"), torch.randn(5, 4)
    nn.utils.parametrize.register_parametrization(layer.layers[0], "weight", nn.Dropout(0.5))
    layer.eval()
    for _ in range(5):
        before = both(layer, x)
    layer.train()
    assert not torch.equal(both(layer, x)[0], before[0])


def test_settings_by_word():
    layer, x = make("layer"), torch.randn(5, 4)
    layer.form = "divide"
    want = both(layer, x)
    for _ in range(4):
        equal(both(layer, x), want)


def test_what_cannot_be_kept_is_looked_at_ever_less(monkeypatch):
    from flowkernels.layers import _programs

    looked, learn_once = [], _programs._learn
    monkeypatch.setattr(_programs, "_learn", lambda *args: looked.append(1) or learn_once(*args))
    layer, x = make("layer"), torch.randn(5, 4)
    parametrize(layer)
    with torch.no_grad():
        for _ in range(200):
            layer(x)
    assert 0 < len(looked) < 10


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_nobody_who_records_ops_sees_a_number():
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function.name())
            return function(*args, **(kwargs or {}))

    seen: list[str] = []
    module, other, x = make("MAF"), make("MAF"), torch.randn(5, 4)
    learn(module, x)
    learn(other, x)
    kept = torch.ops.flowkernels._release_stack(0)
    with torch.no_grad():
        with Names():
            module(x)
            del other
        assert seen and not any("kept" in name or "release" in name for name in seen)
        traced = torch.jit.trace(module, x, check_trace=False)
        assert "kept" not in str(traced.inlined_graph)
        equal(traced(x), module(x))
    learn(make("NICE"), x)
    assert torch.ops.flowkernels._release_stack(0) <= kept - 2


@pytest.mark.parametrize("change", ["form", "layers"])
def test_a_shallow_copy_is_another_module(change):
    layer, x = make("layer"), torch.randn(5, 4)
    learn(layer, x)
    other = copy.copy(layer)
    if change == "form":
        other.form = type(layer.form).DIVIDE
    else:
        other._modules = {"layers": MaskedAutoregressive(4, (9, 7)).layers}
    want = both(fresh(layer), x), both(fresh(other), x)
    for _ in range(6):
        equal((both(layer, x), both(other, x)), want)


def test_every_setting_of_a_layer_is_looked_at():
    """Or is known to change nothing of the map that it is."""
    fixed = {"features", "context_features", "momentum", "training", "layers", "shape", "base"}
    plain = set(vars(nn.Module()))
    for name in MAKE:
        for module in make(name).modules():
            if type(module).__module__.startswith("flowkernels.") and not isinstance(module, Flow):
                settings = {setting for setting in vars(module) if not setting.startswith("_")} - plain
                assert settings <= {*getattr(type(module), "map_settings", ()), *fixed}, type(module)


@pytest.mark.parametrize("name", ["layer", "MAF", "NICE", "RealNVP with batch norm"])
def test_what_is_kept_ends_with_its_module(name):
    module = make(name)
    learn(module, *arguments(name))
    gone = weakref.ref(module)
    gc.disable()
    try:
        del module
        assert gone() is None, "a cycle"
    finally:
        gc.enable()
