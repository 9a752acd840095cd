"""The ways to call what keeps its calls without gradient: the same results, clear errors, and nothing that outlives its module."""

import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import flowkernels
from flowkernels.flows import Flow, RealNVP
from flowkernels.layers import FlowBatchNorm
from flowkernels.ops.autoregressive.kept import CAN_KEEP
from python_tests.layers.programs import MAKE, arguments, both, equal, first, fresh, learn, make, programs, replace_parameter

pytestmark = pytest.mark.skipif(not CAN_KEEP, reason="no compiled library")


@pytest.mark.parametrize("rows", [0, 1, 5, 300])
@pytest.mark.parametrize("name", MAKE)
def test_the_same_bits(name, rows):
    module, args = make(name), arguments(name, rows)
    want = both(module, *args)
    learn(module, *args)
    equal(both(module, *args), want)
    equal(both(module, *(torch.randn(2 * rows, a.shape[1] * 2)[::2, ::2].copy_(a) for a in args)), want)


@pytest.mark.parametrize("name", MAKE)
def test_other_parameters_for_one_call(name):
    module, args = make(name), arguments(name)
    learn(module, *args)
    mine = both(module, *args)
    others = {key: p.detach() + 0.1 for key, p in module.named_parameters()}
    changed = fresh(module)
    changed.load_state_dict(others, strict=False)
    want = both(changed, *args)[:2]
    for _ in range(4):
        with torch.no_grad():
            equal(torch.func.functional_call(module, others, args), want)
        equal(both(module, *args), mine)


@pytest.mark.parametrize("name", MAKE)
def test_other_ways_to_call(name):
    module, args = make(name), arguments(name)
    learn(module, *args)
    want = both(module, *args)
    with torch.no_grad():
        with flowkernels.backend("reference"):
            equal(both(module, *args), both(fresh(module), *args))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = module(*args)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            equal(got, fresh(module)(*args))
        rows = torch.func.vmap(lambda *row: module(*(r[None] for r in row)))(*args)
        torch.testing.assert_close(rows[0][:, 0], want[0], rtol=1e-4, atol=1e-5)
        tangents = tuple(torch.randn_like(a) for a in args)
        equal(torch.func.jvp(module, args, tangents), torch.func.jvp(fresh(module), args, tangents))
        other = fresh(module)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert module(*(mode.from_tensor(a) for a in args))[0].shape == (5, 4)
            for _ in range(0 if name.startswith("RealNVP") else 4):  # its learned scale is read, which this mode refuses
                assert other(*args)[0].shape == (5, 4)
        equal(both(other, *args), want)
    with torch.inference_mode():
        equal(both(module, *args), want)
    z, logabsdet = module(*args)
    assert z.requires_grad and logabsdet.requires_grad
    equal(both(pickle.loads(pickle.dumps(module)), *args), want)
    module.double()
    for _ in range(4):
        got = both(module, *(a.double() for a in args))
    torch.testing.assert_close(got, tuple(t.double() for t in want), rtol=1e-4, atol=1e-5)
    with pytest.raises((ValueError, RuntimeError)) as want:
        both(fresh(module), *args)
    with pytest.raises(want.type) as got:
        both(module, *args)
    assert str(got.value) == str(want.value)


class Recorded(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        recorded.append(getattr(function, "__name__", ""))
        return super().__torch_function__(function, types, args, kwargs or {})


recorded: list[str] = []


def test_tensors_of_a_subclass_see_the_parts():
    module, x = make("RealNVP"), torch.randn(5, 4)
    learn(module, x)
    with torch.no_grad():
        module(x.as_subclass(Recorded))
    assert "addmm" in recorded


def test_bad_input_is_named():
    module, args = make("conditional"), arguments("conditional")
    learn(module, *args)
    plain = make("MAF")
    learn(plain, args[0])
    layer = make("layer")
    learn(layer, args[0])
    for call, message in [
        (lambda: module(args[0]), "context is missing"),
        (lambda: module(args[0], args[1][:, :2]), "context must be"),
        (lambda: module(args[0], args[1].double()), "context must be torch.float32"),
        (lambda: plain(*args), "context"),
        (lambda: layer(*args), "context was given"),
        (lambda: layer(args[0][:, :3]), r"x must have shape \[batch, 4\]"),
        (lambda: layer(args[0][0]), r"x must have shape \[batch, 4\]"),
        (lambda: layer(args[0].long()), "x must be float64, float32"),
    ]:
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("name", MAKE)
def test_nothing_outlives_its_module(name):
    module, args = make(name), arguments(name)
    learn(module, *args)
    gone = [weakref.ref(p) for p in module.parameters()]
    gc.collect()
    gc.disable()
    try:
        kept = torch.ops.flowkernels._release_stack(0)
        del module
        assert not any(p() is not None for p in gone)
        assert torch.ops.flowkernels._release_stack(0) <= kept - 2
    finally:
        gc.enable()


def test_a_stack_that_is_not_kept():
    with pytest.raises(RuntimeError, match="no stack has the number 0"):
        torch.ops.flowkernels.autoregressive_kept(torch.randn(5, 4), None, 0)


def test_statistics_are_read_anew():
    module, x = RealNVP(4, hidden_features=(8,), transforms=2), torch.randn(50, 4)
    for training in (True, False, True, False, False):
        module.train(training)
        got = [both(module, x) for _ in range(3)]
        if not training:
            equal(got[2], both(fresh(module), x))
            first(module, FlowBatchNorm).running_mean.data += 0.3
            assert not torch.equal(both(module, x)[0], got[2][0])


def test_tensors_that_change_at_every_call_are_asked_for_ever_less():
    module, x = make("MAF"), torch.randn(5, 4)
    learned = 0
    with torch.no_grad():
        for _ in range(200):
            replace_parameter(module)
            module(x)
            learned += bool(programs(module))
    assert 0 < learned < 10


def test_threads():
    module, x = make("MAF"), torch.randn(5, 4)
    want, wrong = both(module, x), []

    def work():
        for _ in range(100):
            if any(not torch.equal(a, b) for a, b in zip(both(module, x), want, strict=True)):
                wrong.append(1)
            module._programs.clear()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_a_call_that_fails_in_another_thread_meanwhile():
    """Of a layer that is called by itself there is nobody else to ask."""
    for name in ("layer", "MAF", "RealNVP with batch norm"):
        module, x = make(name), torch.randn(5, 4)
        want = both(module, x)
        learn(module, x)
        for program in programs(module).values():
            program.failed = True
        torch.testing.assert_close(both(module, x), want)


@pytest.mark.parametrize("name", MAKE)
def test_a_call_that_does_not_fit_is_no_reason_to_go_by_modules_from_then_on(name):
    module, args = make(name), arguments(name)
    learn(module, *args)
    with torch.no_grad(), pytest.raises(ValueError):
        module(args[0].double(), *args[1:])
    for _ in range(3):
        learn(module, *args)
    assert not any(program.failed for program in programs(module).values())


class Fixed(nn.Module):
    """A layer of a user that returns the log-determinants of one row, whatever it is given."""

    def forward(self, x, context=None):
        return x, torch.zeros(1)

    inverse = forward


def test_log_determinants_that_were_right_for_the_calls_before():
    flow, x = Flow([*make("MAF").layers, Fixed()], 4), torch.randn(5, 4)
    learn(flow, x[:1])
    for call in (flow, flow.inverse):
        with torch.no_grad(), pytest.raises(ValueError, match=r"Fixed must return log\|det\| of each row .*, \[5\]; got \[1\]"):
            call(x)


def test_what_was_replaced_is_let_go_in_both_directions():
    module, x = make("MAF"), torch.randn(5, 4)
    learn(module, x)
    old = [weakref.ref(p) for p in module.parameters()]
    for owner in module.modules():
        for name in [name for name, p in owner._parameters.items() if p is not None]:
            setattr(owner, name, nn.Parameter(owner._parameters[name].detach().clone()))
    with torch.no_grad():
        module(x)
    gc.collect()
    assert not any(ref() is not None for ref in old)


@pytest.mark.parametrize("name", MAKE)
def test_what_was_learned_in_inference_mode_serves_outside(name):
    module, args = make(name), arguments(name)
    with torch.inference_mode():
        for _ in range(4):
            want = both(module, *args)
    assert set(programs(module)) == {False, True}
    equal(both(module, *args), tuple(t.clone() for t in want))
    assert set(programs(module)) == {False, True}
