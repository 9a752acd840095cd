"""Properties of the masked ops over thousands of random shapes, strides, dtypes, degrees and activations.

A failure prints the case, shrunk, and the seed: run it again with `--hypothesis-seed=SEED`, or with the decorator that is printed.
"""

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from flowkernels import backend
from flowkernels.ops import Activation, masked_linear
from python_tests.battery import LAYOUTS
from python_tests.ops.test_autoregressive import FORMS, GATED, RESIDUAL, SCALES, WIRED, example


def cases(number: int) -> settings:
    # not derandomized, also where CI is detected: every run is another sample
    return settings(max_examples=number, deadline=None, derandomize=False, print_blob=True, suppress_health_check=list(HealthCheck))


layouts = st.sampled_from([lambda t: t, *LAYOUTS.values()])
seeds = st.integers(0, 2**31)
# most cases small, where edges are, and some with several panels of columns and chunks of the sum
sizes = st.one_of(st.integers(0, 9), st.integers(0, 40), st.sampled_from([255, 256, 257, 300, 520]))


@st.composite
def linear_case(draw):
    """x, weight, bias or None, dy, visible."""
    g = torch.Generator().manual_seed(draw(seeds))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
    inputs, outputs = draw(sizes), draw(sizes)
    rows = draw(st.one_of(st.tuples(sizes), st.tuples(st.integers(0, 3), st.integers(0, 5))))
    kind = draw(st.sampled_from(["steps", "random", "all", "none"]))
    top = {"steps": min(inputs, 3), "random": inputs, "all": 0, "none": 0}[kind]
    visible = torch.randint(0, top + 1, (outputs,), generator=g).sort().values.to(torch.int32)
    visible = visible * (inputs // 3) if kind == "steps" and inputs >= 3 else visible + (inputs if kind == "all" else 0)
    visible = draw(st.sampled_from([visible, visible.repeat_interleave(2)[::2]]))
    values = lambda *shape: draw(layouts)(torch.randn(shape, generator=g).to(dtype))
    bias = draw(st.sampled_from([None, torch.randn(2 * outputs, generator=g).to(dtype)[::2]]))
    return values(*rows, inputs), values(inputs, outputs), bias, values(*rows, outputs), visible


def assert_near(got: torch.Tensor, want: torch.Tensor, magnitude: torch.Tensor, terms: int) -> None:
    """Within the bound of any sum of so many products in this dtype's compute dtype (Higham 2002, section 3.1), rounded once."""
    compute = torch.promote_types(got.dtype, torch.float32)
    allowed = (terms + 2) * torch.finfo(compute).eps * magnitude
    if compute != got.dtype:
        allowed = allowed + torch.finfo(got.dtype).eps * want.abs() + torch.finfo(got.dtype).tiny
    assert got.shape == want.shape
    assert ((got.double() - want).abs() <= allowed).all()


@given(linear_case())
@cases(1000)
def test_masked_linear(case):
    x, weight, bias, dy, visible = case
    leaves = [t.detach().requires_grad_() for t in (x, weight)] + ([] if bias is None else [bias.detach().requires_grad_()])
    y = masked_linear(*leaves[:2], None if bias is None else leaves[2], visible)
    dx, dweight, *dbias = torch.autograd.grad(y, leaves, dy)
    for got, of in ((y, x), (dx, x), (dweight, weight)):
        assert got.dtype == of.dtype

    inputs, outputs = weight.shape
    mask = torch.arange(inputs)[:, None] < visible
    x, w, dy = x.double().flatten(0, -2), torch.where(mask, weight.double(), 0), dy.double().flatten(0, -2)
    b = x.new_zeros(outputs) if bias is None else bias.double()
    assert_near(y.flatten(0, -2), x @ w + b, x.abs() @ w.abs() + b.abs(), inputs)
    assert_near(dx.flatten(0, -2), dy @ w.T, dy.abs() @ w.abs().T, outputs)
    assert_near(dweight, torch.where(mask, x.T @ dy, 0), x.abs().T @ dy.abs(), len(x))
    assert dweight[~mask].eq(0).all()
    if dbias:
        assert_near(dbias[0], dy.sum(0), dy.abs().sum(0), len(x))


@st.composite
def network_case(draw):
    """Makes the map and its inverse, and how many rows, in which layouts."""
    features = draw(st.integers(1, 7))
    degrees = draw(st.one_of(st.none(), st.lists(st.integers(1, features), min_size=features, max_size=features).map(sorted)))
    context = draw(st.sampled_from([0, 0, 1, 3]))
    parts = draw(st.lists(st.integers(1, 20), max_size=3))
    if draw(st.integers(0, 2)) == 0:
        parts = draw(st.sampled_from([RESIDUAL, GATED])) if context else WIRED
    options = {
        "rule": draw(st.sampled_from(["even", "cycling", "random"])),
        "context": context,
        "activation": draw(st.sampled_from(list(Activation))).name.lower(),
        "scale": draw(st.sampled_from(SCALES)),
        "form": draw(st.sampled_from(FORMS)),
        "order": draw(st.one_of(st.none(), st.permutations(range(features)))),
        "degrees": degrees,
        "narrow": draw(st.booleans()),
    }
    layout_of_rows, layout_of_parameters = draw(layouts), draw(st.sampled_from([lambda t: t, LAYOUTS["sliced columns"]]))

    def make(dtype, inverse):
        rows, parameters, *functions = example(features, parts, inverse=inverse, **options)(batch, dtype)
        return [layout_of_rows(t) for t in rows], [layout_of_parameters(t) for t in parameters], *functions

    batch = draw(st.sampled_from([0, 1, 2, 3, 5, 8, 13, 30]))
    return make


@given(network_case())
@cases(400)
def test_the_inverse_undoes_the_forward_map(make):
    rows, parameters, forward, *_ = make(torch.float64, False)
    inverse = make(torch.float64, True)[2]
    with torch.no_grad():
        z, logabsdet = forward(rows, parameters)
        x, opposite = inverse([z, *rows[1:]], parameters)
    torch.testing.assert_close(x, rows[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(opposite, -logabsdet, rtol=1e-6, atol=1e-6)


@given(network_case(), st.sampled_from([torch.float64, torch.float32]), st.booleans())
@cases(400)
def test_autoregressive(make, dtype, inverse):
    """Against the reference in float64, within a few times what a last bit of each input moves the reference in this dtype."""
    rows, parameters, op, oracle, *_ = make(dtype, inverse)
    g = torch.Generator().manual_seed(4)
    move = lambda t: t * (1 + torch.finfo(dtype).eps * torch.randint(-1, 2, t.shape, generator=g, dtype=dtype))
    with torch.no_grad():
        exact = oracle([t.double() for t in rows], [t.double() for t in parameters])
        moved_outputs = oracle([move(t) for t in rows], [move(t) for t in parameters])
        assume(all(t.isfinite().all() for t in moved_outputs))  # a random network's inverse may overflow
        for got, moved, want in zip(op(rows, parameters), moved_outputs, exact, strict=True):
            if want.numel():
                allowed = 8 * (moved - want).abs().max() + 64 * torch.finfo(dtype).eps * (1 + want.abs().max())
                assert got.dtype == dtype and (got - want).abs().max() <= allowed


@given(network_case(), st.booleans(), seeds)
@cases(300)
def test_gradients_are_those_of_the_composed_path(make, inverse, seed):
    rows, parameters, op, *_ = make(torch.float64, inverse)
    leaves = [t.detach().requires_grad_() for t in (*rows, *parameters)]
    outputs = op(leaves[: len(rows)], leaves[len(rows) :])
    g = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(o.shape, generator=g, dtype=o.dtype) for o in outputs]
    got = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True, materialize_grads=True)
    with backend("reference"):
        outputs = op(leaves[: len(rows)], leaves[len(rows) :])
    want = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True, materialize_grads=True)
    # a random network's inverse may overflow, and where a scale does, by which step is each path's own affair
    assume(all(t.isfinite().all() for t in want) and all((o.detach().abs() < 700).all() for o in outputs[-1:]))
    largest = max([1.0, *(w.abs().max().item() for w in want if w.numel())])
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10 * largest)
