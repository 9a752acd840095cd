"""A choice of the implementation holds for the gradients of what was called under it, whoever asks for them."""

import threading
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flowkernels import _backend, _extension, _triton, _wide, backend, check, ops
from flowkernels.flows import MAF, Glow, RealNVP
from flowkernels.layers import FlowBatchNorm


class Seen(TorchDispatchMode):
    """The names of our ops that are called."""

    def __enter__(self):
        self.names = set()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "flowkernels":
            self.names.add(function.__name__.removesuffix(".default"))
        return function(*args, **kwargs or {})


def in_another_thread(job):
    results = []
    thread = threading.Thread(target=lambda: results.append(job()))
    thread.start()
    thread.join()
    return results[0]


def leaf(*shape):
    return torch.randn(shape, requires_grad=True)


CALLS = {
    "coupling": lambda: ops.coupling(leaf(3, 4), leaf(3, 2), leaf(3, 2)),
    "channel_affine": lambda: ops.channel_affine(leaf(3, 4), leaf(4), leaf(4)),
    "masked_linear": lambda: ops.masked_linear(leaf(3, 4), leaf(4, 5), leaf(5), torch.tensor([0, 1, 2, 3, 4], dtype=torch.int32)),
    "batch norm": lambda: FlowBatchNorm(4)(leaf(3, 4)),
    "MAF": lambda: MAF(4, hidden_features=(8,))(leaf(3, 4)),
    "sampling a MAF": lambda: MAF(4, hidden_features=(8,)).inverse(leaf(3, 4)),
    "RealNVP": lambda: RealNVP(4, hidden_features=(8,))(leaf(3, 4)),
    "Glow": lambda: Glow((1, 4, 4), levels=1, steps=2, hidden_channels=4)(leaf(3, 1, 4, 4)),
}


def total(name):
    outputs = CALLS[name]()
    return sum(t.square().sum() for t in (outputs if isinstance(outputs, tuple) else (outputs,)))


def ops_of_gradients(loss):
    with Seen() as seen:
        loss.backward()
    return seen.names


@pytest.mark.parametrize("name", CALLS)
def test_gradients_follow_the_choice_of_their_call(name):
    with backend("reference"):
        loss = total(name)
    assert not in_another_thread(lambda: ops_of_gradients(loss))
    loss = total(name)
    with backend("reference"):
        names = ops_of_gradients(loss)
    assert any(n.endswith(("backward", "_dx")) for n in names) or not _extension.has_kernel("coupling", "CPU")


def test_double_backward_follows_the_choice_too():
    x = leaf(3, 4)
    with backend("reference"):
        y = ops.masked_linear(x, leaf(4, 5), None, torch.tensor([0, 1, 2, 3, 4], dtype=torch.int32))

    def job():
        with Seen() as seen:
            (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            dx.square().sum().backward()
        return seen.names

    assert not in_another_thread(job)


def test_a_triton_that_cannot_be_imported_is_named_once(monkeypatch):
    monkeypatch.setattr(_triton, "why_not", lambda *_: "Triton cannot be imported: ImportError: no such symbol")
    _backend._say_once.cache_clear()
    served = {}
    monkeypatch.setattr(_backend.library, "impl", lambda op, serve, key: served.update({op: serve}))
    monkeypatch.setattr(_triton, "add", lambda *_: None)
    monkeypatch.setattr(_triton, "installed", lambda: True)
    _backend.register_triton("some_op", "some.module", lambda x: x + 1)
    with pytest.warns(UserWarning, match="flowkernels: Triton cannot be imported: ImportError: no such symbol. Until then the reference"):
        assert served["some_op"](torch.zeros(())) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert served["some_op"](torch.zeros(())) == 1


class RefusesFloat64(TorchDispatchMode):
    """Fails where a tensor in float64 would be made, as on a device that has none."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for t in result if isinstance(result, tuple | list) else (result,):
            if isinstance(t, torch.Tensor) and t.dtype == torch.float64:
                raise TypeError(f"no float64 here: {function}")
        return result


@pytest.mark.parametrize("name", check.FLOWS)
def test_flows_do_without_float64_where_a_device_has_none(name, monkeypatch):
    torch.manual_seed(0)
    flow = check.FLOWS[name]()
    monkeypatch.setattr(_wide, "WITHOUT_FLOAT64", {"cpu"})
    assert check.dtypes("cpu") == [torch.float32]
    x, context = torch.randn(8, *flow.shape), torch.randn(8, flow.context_features) if flow.context_features else None
    with backend("reference"), RefusesFloat64():
        flow.train()(x, context)
        flow.log_prob(x, context).sum().backward()
        flow.eval()
        with torch.no_grad():
            z, _ = flow(x, context)
            back, _ = flow.inverse(z, context)
            flow.freeze()
            again, _ = flow.inverse(z, context)
    torch.testing.assert_close((back, again), (x, x), rtol=1e-3, atol=1e-3)
