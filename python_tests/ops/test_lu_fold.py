"""Weights composed of LU factors and scales, and their inverses, against the definition in float64."""

import pytest
import torch

from flowkernels import backend
from flowkernels.ops import lu_fold
from python_tests.battery import assert_same_bits

SIZES = [(1, 1), (2, 3), (7, 2), (12, 8), (33, 2), (48, 3)]


def definition(factors, log_diagonal, sign, row, log_scale, inverse):
    weights, logs = [], []
    for i, f in enumerate(factors):
        lower = f.tril(-1) + torch.eye(len(f), dtype=f.dtype)
        upper = f.triu(1) + torch.diag(sign[i] * log_diagonal[i].exp())
        weight = (lower @ upper)[row[i]]
        weight = weight * log_scale[i].exp() if log_scale else weight
        weights.append(torch.linalg.inv(weight) if inverse else weight)
        logs.append(torch.linalg.slogdet(weights[-1])[1])
    return torch.stack(weights), torch.stack(logs)


def lists(n, layers, dtype=torch.float64, scaled=True):
    g = torch.Generator().manual_seed(n)
    random = lambda *shape: [(0.3 * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype) for _ in range(layers)]
    factors, log_diagonal, log_scale = random(n, n), random(n), random(n)
    factors = [f / n**0.5 for f in factors]
    sign = [s.sign() for s in random(n)]
    row = [torch.randperm(n, generator=g) for _ in range(layers)]
    return factors, log_diagonal, sign, row, log_scale if scaled else []


def call(f, given, inverse):
    """The outputs of f and the gradients of a sum in which every output has another weight."""
    factors, log_diagonal, sign, row, log_scale = given
    inputs = [[t.detach().requires_grad_() for t in each] for each in (factors, log_diagonal, log_scale)]
    outputs = f(inputs[0], inputs[1], sign, row, inputs[2], inverse=inverse)
    loss = sum((o * torch.linspace(-1, 2, o.numel(), dtype=o.dtype).view_as(o)).sum() for o in outputs)
    return [*outputs, *torch.autograd.grad(loss, [t for each in inputs for t in each])]


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_equals_the_definition(inverse, scaled):
    for n, layers in SIZES:
        for dtype in (torch.float64, torch.float32):
            given = lists(n, layers, dtype, scaled)
            exact = [[t.double() if t.is_floating_point() else t for t in each] for each in given]
            got, want = call(lu_fold, given, inverse), call(definition, exact, inverse)
            for g, w in zip(got, want, strict=True):
                assert g.dtype == dtype and g.shape == w.shape
                assert (g - w).abs().max() <= 20 * n * torch.finfo(dtype).eps * (w.abs().max() + 1), n


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_gradients(inverse, scaled):
    factors, log_diagonal, sign, row, log_scale = lists(4, 2, scaled=scaled)
    inputs = [t.requires_grad_() for each in (factors, log_diagonal, log_scale) for t in each]
    f = lambda *t: lu_fold(t[:2], t[2:4], sign, row, t[4:], inverse=inverse)
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)
    # torch.func sees the mathematics itself
    first = lambda t: f(t, *inputs[1:])[0].square().sum()
    torch.testing.assert_close(torch.func.grad(first)(inputs[0].detach()), torch.autograd.grad(first(inputs[0]), inputs[0])[0])


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_many_cotangents_at_once(inverse, scaled):
    factors, log_diagonal, sign, row, log_scale = lists(4, 2, scaled=scaled)
    inputs = [t.requires_grad_() for each in (factors, log_diagonal, log_scale) for t in each]
    outputs = lu_fold(factors, log_diagonal, sign, row, log_scale, inverse=inverse)
    cotangents = [torch.randn(3, *o.shape, dtype=torch.float64) for o in outputs]
    pull = lambda *v, **options: torch.autograd.grad(outputs, inputs, v, retain_graph=True, **options)
    want = [torch.stack(g) for g in zip(*(pull(*v) for v in zip(*cotangents, strict=True)), strict=True)]
    torch.testing.assert_close(pull(*cotangents, is_grads_batched=True), tuple(want))
    torch.testing.assert_close(torch.func.vmap(pull)(*cotangents), tuple(want))


@pytest.mark.parametrize("inverse", [False, True])
def test_bits(inverse):
    """Twice the same; a layer alone, and on several threads, as among others."""
    given = lists(48, 8, torch.float32)
    found = lu_fold(*given, inverse=inverse)
    assert_same_bits(lu_fold(*given, inverse=inverse), found)
    assert_same_bits(lu_fold(*([each[5]] for each in given), inverse=inverse), [t[5:6] for t in found])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert_same_bits(call(lu_fold, given, inverse), [t.detach() for t in call(lu_fold, given, inverse)])
    alone = call(lu_fold, given, inverse)
    torch.set_num_threads(3)
    assert_same_bits(call(lu_fold, given, inverse), alone)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("inverse", [False, True])
def test_backends_opcheck_and_compile(inverse):
    given = lists(5, 3)
    with backend("reference"):
        reference = call(lu_fold, given, inverse)
    torch.testing.assert_close(call(lu_fold, given, inverse), reference)
    factors, log_diagonal, sign, row, log_scale = given
    for scales in (log_scale, []):
        arguments = (factors, log_diagonal, scales, sign, row, inverse)
        torch.library.opcheck(torch.ops.flowkernels.lu_fold.default, arguments)
        weight, logabsdet = lu_fold(factors, log_diagonal, sign, row, scales, inverse=inverse)
        torch.library.opcheck(torch.ops.flowkernels.lu_fold_backward.default, (weight * 2, logabsdet + 1, weight, *arguments))
    torch._dynamo.reset()
    compiled = torch.compile(lu_fold, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(call(compiled, given, inverse), reference)


def test_any_layout_of_the_factors():
    given = lists(6, 2, torch.float32)
    turned = [[t.mT.contiguous().mT if t.dim() == 2 else t.repeat_interleave(2)[::2] for t in each] for each in given]
    for inverse in (False, True):
        want, leaves = lu_fold(*given, inverse=inverse), [[t.requires_grad_(t.is_floating_point()) for t in each] for each in turned]
        got = lu_fold(*leaves, inverse=inverse)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        got[0].sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    given = lists(6, 2, dtype)
    widened = [[t.float() if t.is_floating_point() else t for t in each] for each in given]
    for inverse in (False, True):
        weight, logabsdet = lu_fold(*widened, inverse=inverse)
        torch.testing.assert_close(lu_fold(*given, inverse=inverse), (weight.to(dtype), logabsdet), rtol=0, atol=0)


def test_the_inverse_of_float32_factors_is_rounded_once():
    given = lists(24, 2, torch.float32)
    exact = [[t.double() if t.is_floating_point() else t for t in each] for each in given]
    got, want = lu_fold(*given, inverse=True)[0], lu_fold(*exact, inverse=True)[0]
    assert (got - want).abs().max() <= torch.finfo(torch.float32).eps * want.abs().max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, d, s, r, e: ([], d, s, r, e), "factors must hold at least one layer; got none"),
        (lambda f, d, s, r, e: ([f[0][0, 0]], d, s, r, e), r"factors must be floating-point, \[n, n\]; got torch.float64, \[\]"),
        (lambda f, d, s, r, e: ([t.long() for t in f], d, s, r, e), r"factors must be floating-point, .* got torch.int64, \[5, 5\]"),
        (lambda f, d, s, r, e: (f, d[1:], s, r, e), "log_diagonal must hold a tensor for each of 3 layers; got 2"),
        (lambda f, d, s, r, e: (f, d, [], r, e), "sign must hold a tensor for each of 3 layers; got 0"),
        (lambda f, d, s, r, e: (f, d, s, r, e[1:]), "log_scale must hold a tensor for each of 3 layers; got 2"),
        (
            lambda f, d, s, r, e: ([f[0], f[1], f[2][:4]], d, s, r, e),
            r"factors must be torch.float64, \[5, 5\]; got torch.float64, \[4, 5\]",
        ),
        (lambda f, d, s, r, e: (f, d, s, [t[:4] for t in r], e), r"row must be torch.int64, \[5\]; got torch.int64, \[4\]"),
        (lambda f, d, s, r, e: (f, d, s, [t.int() for t in r], e), r"row must be torch.int64, \[5\]; got torch.int32, \[5\]"),
        (lambda f, d, s, r, e: (f, d, s, r, [t.float() for t in e]), r"log_scale must be torch.float64, \[5\]; got torch.float32"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        lu_fold(*change(*lists(5, 3)))
