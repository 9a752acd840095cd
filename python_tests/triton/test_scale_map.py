"""Scale maps as Triton functions: against float64 over the whole range, and their error against eager PyTorch's."""

import importlib
import math

import pytest
import torch

from flowkernels.ops.scale_map import ScaleKind, ScaleMap
from python_tests.ops.test_scale_map import every_map, grid
from python_tests.triton.device import DEVICE, randn

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter, where something overflows


def evaluate(s: torch.Tensor, scale_map: ScaleMap, divides: bool) -> torch.Tensor:
    """[4, n]: v, log v, (log v)' and 1 - sigma."""
    probe = importlib.import_module("python_tests.triton.scale_map_probe")
    out = s.new_empty((4, len(s)))
    probe.probe[(1,)](s, out, len(s), MAP=probe.Map.of(scale_map), DIVIDES=divides, BLOCK=1 << (len(s) - 1).bit_length())
    return out


def exactly(s: torch.Tensor, scale_map: ScaleMap, divides: bool) -> torch.Tensor:
    v, log = (scale_map.reciprocal, scale_map.log_reciprocal) if divides else (scale_map.sigma, scale_map.log_sigma)
    dlog = scale_map.dlog_reciprocal if divides else scale_map.dlog_sigma
    return torch.stack([v(s), log(s), dlog(s), scale_map.complement(s)])


@every_map
@pytest.mark.parametrize("divides", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_over_the_whole_range(scale_map, divides, dtype):
    s = grid(dtype).to(DEVICE)
    got, want = evaluate(s, scale_map, divides).double(), exactly(s.double(), scale_map, divides)
    largest, unit = torch.finfo(dtype).max, torch.finfo(dtype).eps
    # exp turns the rounding of its argument into a relative error
    steep = 1.0 + scale_map.log_sigma(s.double()).abs() if scale_map.kind <= ScaleKind.SOFTCLIP else 1.0
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        inside = w.abs() < 0.99 * largest
        assert torch.equal(g.abs() > 0.99 * largest, ~inside)
        error = (g - w).abs()
        assert (error <= 4.0 * unit * steep * (1.0 + w.abs()))[inside].all(), i
        if i == 0:
            assert (error <= 4.0 * unit * steep * w)[inside & (w > 1e-36)].all()
    nan = evaluate(torch.full((3,), math.nan, dtype=dtype, device=DEVICE), scale_map, divides)
    assert nan[:2].isnan().all()


@every_map
def test_error_is_at_most_twice_eager_pytorchs(scale_map):
    (s,) = randn((1 << 15,), dtype=torch.float32)
    exact, eager, ours = exactly(s.double(), scale_map, False), exactly(s, scale_map, False), evaluate(s, scale_map, False)
    for name, x, e, o in zip(("sigma", "log sigma", "its derivative"), exact, eager, ours, strict=False):
        rms = [(t - x).square().mean().sqrt() for t in (o, e)]
        assert rms[0] <= 2 * rms[1] + 1e-12, (name, *rms)
