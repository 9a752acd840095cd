"""Rows that share a context: the kernels make what belongs to it once for all of them."""

import pytest
import torch

from python_tests.ops.test_autoregressive import GATED, RESIDUAL, SHARED, Part, example, widened


@pytest.mark.parametrize(
    "features, parts, context",
    [
        (5, (11, 8), 2),
        (40, (300, 520), 3),
        (20, (600,), 300),
        (4, RESIDUAL, 3),
        (10, widened(RESIDUAL, 270), 300),
        (4, GATED, 2),
        (10, widened(GATED, 270), 3),
        (5, [*SHARED, Part(0)], 2),
        (5, [Part(9, "relu", context="tanh"), Part(9, "tanh", context="gate"), Part(0)], 2),
        (5, [Part(9, "relu", context="tanh"), Part(9, "relu", context="sigmoid+"), Part(0, context="add")], 2),
    ],
)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_context_for_all_rows(features, parts, context, inverse, dtype):
    """Rows of one context, expanded or written out, have the bits that they have among rows of other contexts."""
    (x, contexts), parameters, op, *_ = example(features, parts, context=context, inverse=inverse)(500, dtype)
    one = contexts[3:4].clone()
    with torch.no_grad():
        # every second row has another context, so that no tile has one alone
        mixed = op([x.repeat_interleave(2, 0), torch.stack([one.expand(500, context), contexts], 1).flatten(0, 1)], parameters)
        for batch in (1, 3, 6, 17, 101, 500):
            expanded = one.expand(batch, context)
            for c in (expanded, expanded.contiguous(), torch.stack([one, one], 2)[..., 0].expand(batch, context)):
                assert all(torch.equal(g, w[::2][:batch]) for g, w in zip(op([x[:batch], c], parameters), mixed, strict=True))
        blocks = op([x, torch.cat([one.expand(230, context), contexts[:40], one.expand(230, context)])], parameters)
        for g, w in zip(blocks, mixed, strict=True):
            assert torch.equal(g[:230], w[::2][:230]) and torch.equal(g[270:], w[::2][270:])
        for r in range(33):  # one row of another, by its last number alone
            c = one.repeat(33, 1)
            c[r, -1] += 1
            got, alone = op([x[:33], c], parameters), op([x[r : r + 1], c[r : r + 1]], parameters)
            for g, a, w in zip(got, alone, mixed, strict=True):
                want = w[::2][:33].clone()
                want[r] = a[0]
                assert torch.equal(g, want)
