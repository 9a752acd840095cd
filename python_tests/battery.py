"""The tests that every op passes, written once: an op is tested by naming its examples (what to call, on what, and the oracle).

class TestMaskedLinear(OpBattery):
    cases = {"square": lambda batch, dtype: Example(...)}
"""

from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]

# The library of csrc/tests, which conftest.py loads where it is
TESTS_LIBRARY = hasattr(torch.ops.flowkernels, "_elementwise")
WITHOUT_TESTS_LIBRARY = "the tests' library is not there: FLOWKERNELS_TESTS=1 python setup.py build_ext --inplace"
needs_tests_library = pytest.mark.skipif(not TESTS_LIBRARY, reason=WITHOUT_TESTS_LIBRARY)


class Example(NamedTuple):
    """One call of an op: `op(rows, parameters)` and `oracle(rows, parameters)` return the same tuple of batch-first tensors."""

    rows: list[Tensor]
    parameters: list[Tensor]
    op: Callable[[Sequence[Tensor], Sequence[Tensor]], Outputs]
    oracle: Callable[[Sequence[Tensor], Sequence[Tensor]], Outputs]
    schema: Callable[[Sequence[Tensor], Sequence[Tensor]], tuple] | None = None  # arguments of the bare op, for opcheck
    transform: bool = False  # outputs are (y, log|det dy/dx|) with x = rows[0]


LAYOUTS = {
    "sliced rows": lambda t: torch.cat([t, t])[: len(t)],
    "every other row": lambda t: t.repeat_interleave(2, 0)[::2],
    "sliced columns": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "transposed": lambda t: t.mT.contiguous().mT,
    "expanded": lambda t: t[:1].expand_as(t),
}

# beside these, for ops on images: [batch, channels, *sites]
IMAGE_LAYOUTS = {
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.mT.contiguous().mT,
    "interleaved": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "interleaved, channels last": lambda t: IMAGE_LAYOUTS["channels last"](t.repeat_interleave(2, 1))[:, ::2],
    "trailing": lambda t: torch.stack([t, t], -1).unbind(-1)[0],
    "cropped": lambda t: _padded(t)[(..., *[slice(1, -2)] * (t.dim() - 2))],
    "cropped, channels last": lambda t: IMAGE_LAYOUTS["channels last"](_padded(t))[(..., *[slice(1, -2)] * (t.dim() - 2))],
}


def _padded(t: Tensor) -> Tensor:
    return torch.nn.functional.pad(t, (1, 2) * (t.dim() - 2))


def detached(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach() for t in tensors]


def with_grad(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in tensors]


def assert_same_bits(got: Outputs, want: Outputs) -> None:
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype and g.shape == w.shape
        g, w = g.nan_to_num(nan=12345.0), w.nan_to_num(nan=12345.0)
        assert torch.equal(g, w), (g - w).abs().max()
        assert torch.equal(g.signbit(), w.signbit()), "of zeros"


def assert_gradients_do_not_depend_on_threads(example: Example) -> None:
    """Those of an op that returns a tensor and its log|det|."""
    rows, parameters, op, *_ = example
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            inputs = with_grad([*rows, *parameters])
            y, logabsdet = op(inputs[: len(rows)], inputs[len(rows) :])
            results.append(torch.autograd.grad(y.sin().sum() + logabsdet.square().sum(), inputs))
    finally:
        torch.set_num_threads(before)
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


def assert_as_exact_as_eager(example: Example) -> None:
    """Root mean square and 99.9th percentile of the errors in float32, of outputs and gradients, are at most twice the oracle's."""
    rows, parameters, op, oracle, *_ = example
    n, results = len(rows), []
    for f, dtype in ((op, torch.float32), (oracle, torch.float32), (oracle, torch.float64)):
        inputs = with_grad([t.to(dtype) for t in (*rows, *parameters)])
        outputs = f(inputs[:n], inputs[n:])
        loss = sum(o.square().sum() * (o.shape[0] / max(o.numel(), 1)) ** 0.5 for o in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, inputs)])
    for i, (ours, eager, exact) in enumerate(zip(*results, strict=True)):
        (rms, tail), (rms_of_eager, tail_of_eager) = (_rms_and_tail((t - exact).abs()) for t in (ours, eager))
        # few numbers have a noisy error
        floor = torch.finfo(torch.float32).eps * exact.abs().max() if exact.numel() < 1000 else 0
        assert rms <= 2 * rms_of_eager + floor and tail <= 2 * tail_of_eager + floor, (i, rms, rms_of_eager, tail, tail_of_eager)


def _rms_and_tail(error: Tensor) -> tuple[Tensor, Tensor]:
    return error.square().mean().sqrt(), error.flatten().kthvalue(int(0.999 * error.numel()) or 1).values


class OpBattery:
    """Subclass it as Test...; `cases` maps a name to a function (batch, dtype) -> Example."""

    cases: ClassVar[dict[str, Callable[[int, torch.dtype], Example]]] = {}
    implicit: ClassVar[frozenset[str]] = frozenset()  # cases whose backward asks for gradients, which torch.func refuses
    bare_op: ClassVar[Callable | None] = None
    layouts: ClassVar[dict[str, Callable[[Tensor], Tensor]]] = LAYOUTS
    dynamic_shapes: ClassVar[Sequence[bool]] = (False, True)  # with which the op is compiled
    row_bits = True  # a row's result does not depend on its batch mates (not so where BLAS is called)

    def pytest_generate_tests(self, metafunc) -> None:
        metafunc.parametrize("case", list(self.cases.values()), ids=list(self.cases))
        if "layout" in metafunc.fixturenames:
            metafunc.parametrize("layout", list(self.layouts.values()), ids=list(self.layouts))
        if "dynamic" in metafunc.fixturenames:
            metafunc.parametrize("dynamic", self.dynamic_shapes)

    @pytest.mark.parametrize("batch", [0, 1, 3, 37])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_equals_the_oracle_in_float64(self, case, batch, dtype):
        rows, parameters, op, oracle, *_ = case(batch, dtype)
        with torch.no_grad():
            exact = oracle([t.double() for t in rows], [t.double() for t in parameters])
            eager = oracle(rows, parameters)
            for g, e, w in zip(op(rows, parameters), eager, exact, strict=True):
                assert g.dtype == dtype and g.shape == w.shape
                if not w.numel():
                    continue
                # what rounding costs the same mathematics in eager mode, and a few units in the last place of the largest value
                allowed = 4 * (e - w).abs().max() + 16 * torch.finfo(dtype).eps * (1 + w.abs().max())
                assert (g - w).abs().max() <= allowed

    def test_gradients(self, case):
        rows, parameters, op, *_ = case(2, torch.float64)
        n = len(rows)
        inputs = with_grad([*rows, *parameters])
        f = lambda *a: op(a[:n], a[n:])
        # fast mode compares random projections of the Jacobians: the whole of them takes minutes
        assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)

    def test_gradients_equal_those_through_the_oracle(self, case):
        rows, parameters, op, oracle, *_ = case(5, torch.float64)
        inputs = with_grad([*rows, *parameters])
        n = len(rows)
        weigh = lambda outputs: sum(
            (o * torch.linspace(-1, 2, o.numel(), dtype=o.dtype, device=o.device).view_as(o)).sum() for o in outputs
        )
        got = torch.autograd.grad(weigh(op(inputs[:n], inputs[n:])), inputs, allow_unused=True, materialize_grads=True)
        want = torch.autograd.grad(weigh(oracle(inputs[:n], inputs[n:])), inputs, allow_unused=True, materialize_grads=True)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)

    def test_logabsdet_is_that_of_autograds_jacobian(self, case):
        rows, parameters, op, _, _, transform = case(3, torch.float64)
        if not transform:
            pytest.skip("not a transform")
        logabsdet = op(rows, parameters)[1]
        for b in range(3):
            others = [t[b : b + 1] for t in rows[1:]]
            jacobian = torch.autograd.functional.jacobian(lambda v, o=others: op([v[None], *o], parameters)[0][0], rows[0][b])
            n = rows[0][b].numel()
            torch.testing.assert_close(logabsdet[b], torch.linalg.slogdet(jacobian.reshape(n, n))[1], rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("batch", [2, 21])
    def test_layout_does_not_matter(self, case, layout, batch):
        rows, parameters, op, *_ = case(batch, torch.float32)
        strided = [layout(t) for t in rows]
        with torch.no_grad():
            assert_same_bits(op(strided, parameters), op([t.contiguous() for t in strided], parameters))
            want = op(rows, parameters)
            for widened in (LAYOUTS["sliced columns"], IMAGE_LAYOUTS["trailing"]):
                assert_same_bits(op(rows, [widened(t) for t in parameters]), want)

    def test_layout_of_cotangents_does_not_matter(self, case):
        rows, parameters, op, *_ = case(5, torch.float64)
        inputs, g = with_grad([*rows, *parameters]), torch.Generator().manual_seed(6)
        outputs = [o for o in op(inputs[: len(rows)], inputs[len(rows) :]) if o.requires_grad]
        gradients = lambda cotangents: torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True, materialize_grads=True)
        for name, layout in LAYOUTS.items():
            given = [torch.randn(o.shape, generator=g, dtype=o.dtype).to(o.device) for o in outputs]
            strided = [layout(t) if t.dim() > 1 or name != "transposed" else t for t in given]
            torch.testing.assert_close(gradients(strided), gradients([t.contiguous() for t in strided]), rtol=1e-10, atol=1e-10)

    def test_twice_the_same_bits(self, case):
        rows, parameters, op, *_ = case(37, torch.float32)
        with torch.no_grad():
            assert_same_bits(op(rows, parameters), op(rows, parameters))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_a_row_alone_has_the_same_bits(self, case, dtype):
        if not self.row_bits:
            pytest.skip("goes through BLAS, which does not promise it")
        rows, parameters, op, *_ = case(101, dtype)
        with torch.no_grad():
            whole = op(rows, parameters)
            for begin, end in [(0, 1), (3, 5), (7, 10), (10, 14), (40, 53), (0, 60)]:
                assert_same_bits(op([t[begin:end] for t in rows], parameters), tuple(o[begin:end] for o in whole))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("batch", [3, 21])
    def test_a_bad_row_stays_alone(self, case, bad, batch):
        rows, parameters, op, *_ = case(batch, torch.float32)
        with torch.no_grad():
            clean = op(rows, parameters)
            spoilt = [t.clone() for t in rows]
            spoilt[0][1, 0] = bad
            got = op(spoilt, parameters)
        keep = [b for b in range(batch) if b != 1]
        assert not any(torch.isfinite(o[1]).all() for o in got[:1]), "the bad value has vanished"
        for g, w in zip(got, clean, strict=True):
            torch.testing.assert_close(g[keep], w[keep], rtol=0, atol=0 if self.row_bits else 1e-6)

    def test_opcheck(self, case):
        rows, parameters, *_, schema, _ = case(3, torch.float32)
        if schema is None:
            pytest.skip("no bare op")
        torch.library.opcheck(type(self).bare_op, schema(rows, parameters))

    def test_compiles_without_graph_breaks(self, case, dynamic):
        rows, parameters, op, *_ = case(5, torch.float32)
        torch._dynamo.reset()
        n = len(rows)
        compiled = torch.compile(lambda *a: op(a[:n], a[n:]), fullgraph=True, dynamic=dynamic, backend="aot_eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(*rows, *parameters), op(rows, parameters))
        inputs = with_grad([*rows, *parameters])
        total = lambda outputs: sum(o.square().sum() for o in outputs)
        got = torch.autograd.grad(total(compiled(*inputs)), inputs, allow_unused=True)
        want = torch.autograd.grad(total(op(inputs[:n], inputs[n:])), inputs, allow_unused=True)
        torch.testing.assert_close(got, want)

    def test_functorch(self, case):
        rows, parameters, op, *_ = case(4, torch.float64)
        loss = lambda x, *others: sum(o.square().sum() for o in op([x[None], *(t[None] for t in others)], parameters))
        per_row = torch.func.vmap(torch.func.grad(loss))(*rows)
        torch.testing.assert_close(per_row, torch.stack([torch.func.grad(loss)(*(t[b] for t in rows)) for b in range(4)]))
        one = [t[0] for t in rows]
        f = lambda x: op([x[None], *(t[None] for t in one[1:])], parameters)[0][0]
        torch.testing.assert_close(torch.func.jacrev(f)(one[0]), torch.autograd.functional.jacobian(f, one[0]))

    @pytest.mark.parametrize("way", ["vmap", "is_grads_batched"])
    def test_many_cotangents_at_once(self, case, way):
        """Of a graph that was made before."""
        rows, parameters, op, *_ = case(4, torch.float64)
        inputs = with_grad([*rows, *parameters])
        outputs = [o for o in op(inputs[: len(rows)], inputs[len(rows) :]) if o.requires_grad]
        cotangents = [torch.stack([torch.full_like(o, k).cumsum(0) for k in range(3)]) for o in outputs]
        pull = lambda *v, **options: torch.autograd.grad(outputs, inputs, v, retain_graph=True, **options)
        if way == "vmap" and case in [self.cases[name] for name in self.implicit]:
            with pytest.raises(RuntimeError, match=r"requires_grad_\(\) \(or perhaps"):
                torch.func.vmap(pull)(*cotangents)
            return
        got = torch.func.vmap(pull)(*cotangents) if way == "vmap" else pull(*cotangents, is_grads_batched=True)
        want = [pull(*v) for v in zip(*cotangents, strict=True)]
        torch.testing.assert_close(got, tuple(torch.stack(each) for each in zip(*want, strict=True)))
