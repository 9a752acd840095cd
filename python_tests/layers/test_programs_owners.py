"""What layers keep of their calls belongs to the module, its classes and its tensors."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from flowkernels.layers import MaskedAutoregressive
from flowkernels.ops import Conditioner
from flowkernels.ops.autoregressive.kept import CAN_KEEP
from python_tests.layers.programs import both, equal, fresh, learn, make, programs

pytestmark = pytest.mark.skipif(not CAN_KEEP, reason="no compiled library")


def test_a_module_that_was_given_all_attributes_of_another():
    module, other, x = make("MAF"), make("MAF"), torch.randn(5, 4)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.3)
    learn(module, x)
    replica = type(module).__new__(type(module))
    replica.__dict__ = vars(module) | {"_modules": {"layers": other.layers}}  # as nn.DataParallel makes replicas
    want = both(fresh(other), x)
    for _ in range(3):
        equal(both(replica, x), want)


class Watched(nn.Parameter):
    """A parameter whose ops somebody looks at."""

    seen: list = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_parameters_of_a_subclass_are_not_kept():
    layer, x = make("layer"), torch.randn(5, 4)
    part = layer.layers[0]
    part.weight = Watched(part.weight.detach().clone())
    want = both(layer, x)
    for _ in range(5):
        equal(both(layer, x), want)
    assert not programs(layer)


@pytest.mark.parametrize("name", ["weight", "bias", "context_weight", "context_bias"])
def test_what_pruning_makes_for_every_call_is_not_kept(name):
    plain = MaskedAutoregressive(4, (9,), context_features=3).conditioner()
    biases = [torch.randn(len(visible)) for visible in plain.visible]
    layer, args = MaskedAutoregressive.of(Conditioner(*plain[:-1], biases)), (torch.randn(5, 4), torch.randn(5, 3))
    prune.random_unstructured(layer.layers[0], name, 0.4)
    for _ in range(4):
        before = both(layer, *args)
    with torch.no_grad():
        getattr(layer.layers[0], f"{name}_orig").add_(1.0)
    want = both(fresh(layer), *args)
    assert not torch.equal(want[0], before[0])
    equal(both(layer, *args), want)


@pytest.mark.parametrize("name", ["MAF with batch norm", "RealNVP with batch norm"])
def test_back_to_training(name):
    module, x = make(name), torch.randn(50, 4) * 3 + 1
    learn(module, x)
    copied = fresh(module)
    for m in (module, copied):
        m.train()
    with torch.no_grad():
        equal(module(x), copied(x))
    equal([*module.buffers()], [*copied.buffers()])


@pytest.mark.parametrize("kind", ["conditioner", "conditioner of its class", "as_map"])
def test_a_method_of_its_own_is_asked_at_every_call(kind):  # what it gives today is made of the module's own tensors
    class Subclass(MaskedAutoregressive):
        pass

    of_class, kind = kind.endswith("class"), kind.split()[0]
    if kind == "conditioner":
        module = layer = (Subclass if of_class else MaskedAutoregressive)(4, (9, 9, 9))
    else:
        module = make("RealNVP")
        layer = module.layers[1]
    x, changed = torch.randn(5, 4), []
    with torch.no_grad():
        for p in module.parameters():
            nn.init.normal_(p, std=0.3)
    whole = getattr(layer, kind)
    if kind == "conditioner":

        def own():
            network = whole()
            a, b, c, d = network.biases
            return network._replace(biases=[a, c, b, d]) if changed else network
    else:

        def own(x, *, inverse):
            map_ = whole(x, inverse=inverse)
            return map_._replace(form=type(map_.form).DIVIDE) if changed else map_

    if of_class:
        Subclass.conditioner = lambda self: own()
    else:
        setattr(layer, kind, own)
    for _ in range(5):
        before = both(module, x)
    changed.append(1)
    assert not torch.equal(both(module, x)[0], before[0])


def test_a_context_weight_that_is_no_parameter():  # a hypernetwork sets it anew at every call
    layer, args = MaskedAutoregressive(4, (9,), context_features=3), (torch.randn(5, 4), torch.randn(5, 3))
    with torch.no_grad():
        for p in layer.parameters():
            nn.init.normal_(p, std=0.3)
    part = layer.layers[0]
    weight = part.context_weight.detach().clone()
    del part.context_weight
    part.context_weight = weight
    for _ in range(5):
        before = both(layer, *args)
    part.context_weight = 2 * weight
    assert not torch.equal(both(layer, *args)[0], before[0])
