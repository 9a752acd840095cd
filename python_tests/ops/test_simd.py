"""The vector functions of csrc/cpu/simd_math.h, on every instruction set that this machine has."""

import ctypes
import math
import mmap

import numpy as np
import pytest
import torch

from flowkernels.ops import Activation
from python_tests.battery import TESTS_LIBRARY, WITHOUT_TESTS_LIBRARY

if not TESTS_LIBRARY:
    pytest.skip(WITHOUT_TESTS_LIBRARY, allow_module_level=True)

TARGETS = torch.ops.flowkernels._math_targets().split()
if not TARGETS:
    pytest.skip("this CPU has none of AVX2+FMA, AVX-512 and NEON", allow_module_level=True)

INF, NAN = math.inf, math.nan


def run(function: str, x: torch.Tensor, target: str) -> torch.Tensor:
    return torch.ops.flowkernels._elementwise(x, function, target, [])


def softplus(x: torch.Tensor) -> torch.Tensor:
    return torch.log1p(torch.exp(-x.abs())) + x.clamp(min=0)


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    e = torch.exp(-x.abs())  # torch's own is 0 where the value is subnormal
    return torch.where(x > 0, 1.0, e) / (1.0 + e)


REFERENCE = {
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log": torch.log,
    "tanh": torch.tanh,
    "sigmoid": sigmoid,
    "softplus": softplus,
    "erf": torch.erf,
    "atan": torch.atan,
}

# units in the last place; what simd_math.h states, rounded up
LARGEST_ERROR = {
    "exp": 1.0,
    "expm1": 1.8,
    "log": 1.0,
    "tanh": 2.5,
    "sigmoid": 2.5,
    "softplus": 2.1,
    "erf": 1.9,
    "atan": 1.9,
}

FUNCTIONS = list(REFERENCE)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_float_errors(function: str, target: str) -> None:
    stride = 4093  # a prime: a million floats of every exponent
    x = torch.from_numpy(np.arange(0, 2**32, stride, dtype=np.uint32).view(np.float32))
    exact = REFERENCE[function](x.double())
    y = run(function, x, target)
    rounded = exact.float()
    assert torch.equal(y.isnan(), rounded.isnan())
    finite = rounded.isfinite()
    # where the exact value rounds to infinity, the largest float is one unit away
    assert ((y == rounded) | (y.abs() >= torch.finfo(torch.float32).max))[~finite & ~rounded.isnan()].all()
    y, exact = y[finite], exact[finite]
    assert torch.equal(torch.signbit(y), torch.signbit(exact))
    unit = torch.from_numpy(np.spacing(exact.float().abs().numpy())).double()
    # np.spacing is that of the rounded value, which may have reached the next power of two
    unit = torch.where(exact.abs() < exact.float().abs(), torch.minimum(unit, exact.abs() * 2.0**-23), unit).clamp(min=2.0**-149)
    error = (y.double() - exact).abs() / unit
    assert error[y.isfinite()].max() < LARGEST_ERROR[function]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_double_errors(function: str, target: str) -> None:
    mpmath = pytest.importorskip("mpmath")
    exact = {
        "sigmoid": lambda v: 1 / (1 + mpmath.exp(-v)),
        "softplus": lambda v: mpmath.log1p(mpmath.exp(v)),
    }.get(function) or getattr(mpmath, function)
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(1000, generator=generator, dtype=torch.float64)
    x = torch.cat([normal, normal * 10.0, normal * 100.0, normal * torch.exp2(-40.0 * torch.rand(1000, generator=generator).double())])
    if function == "log":
        x = x.abs()
    x = torch.cat([x, x.new_tensor([700.0, 709.7, 1e-308, 3e-310])])
    y = run(function, x, target)
    with mpmath.workdps(40):
        for value, got in zip(x.tolist(), y.tolist(), strict=True):
            want = exact(mpmath.mpf(value))
            assert abs(got - want) <= LARGEST_ERROR[function] * max(math.ulp(float(want)), 2.0**-1074), (value, got)


SPECIAL = {
    "exp": [(0.0, 1.0), (INF, INF), (-INF, 0.0), (1e30, INF), (-1e30, 0.0)],
    "expm1": [(0.0, 0.0), (-0.0, -0.0), (INF, INF), (-INF, -1.0), (1e-44, 1e-44), (-1e-44, -1e-44)],
    "log": [(0.0, -INF), (-0.0, -INF), (INF, INF), (-1.0, NAN), (-INF, NAN), (1.0, 0.0)],
    "tanh": [(0.0, 0.0), (-0.0, -0.0), (INF, 1.0), (-INF, -1.0), (1e30, 1.0), (-1e-44, -1e-44)],
    "sigmoid": [(0.0, 0.5), (INF, 1.0), (-INF, 0.0)],
    "softplus": [(INF, INF), (-INF, 0.0), (1e30, 1e30)],
    "erf": [(0.0, 0.0), (-0.0, -0.0), (INF, 1.0), (-INF, -1.0)],
    "atan": [(0.0, 0.0), (-0.0, -0.0), (INF, math.pi / 2), (-INF, -math.pi / 2), (-1e-44, -1e-44)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("function", SPECIAL)
def test_special_values(function: str, target: str, dtype: torch.dtype) -> None:
    cases = [*SPECIAL[function], (NAN, NAN)]
    x, want = (torch.tensor(column, dtype=dtype) for column in zip(*cases, strict=True))
    y = run(function, x, target)
    assert torch.equal(y.isnan(), want.isnan())
    number = ~want.isnan()
    assert torch.equal(y[number], want[number])
    assert torch.equal(torch.signbit(y[number]), torch.signbit(want[number]))


@pytest.mark.parametrize("target", TARGETS)
def test_gradual_underflow_and_overflow(target: str) -> None:
    x = torch.tensor([-100.0, -103.0, -87.5, 88.72, 88.73])
    assert torch.equal(run("exp", x, target), torch.exp(x.double()).float())
    assert run("sigmoid", x[:1], target).item() == pytest.approx(3.8e-44, rel=0.02)
    assert run("log", torch.tensor([1e-40]), target).item() == pytest.approx(math.log(1e-40), rel=1e-4)
    x = torch.tensor([-740.0, -745.0, -708.5, 709.78, 709.79], dtype=torch.float64)
    want = torch.tensor([math.exp(value) for value in x[:-1].tolist()] + [INF], dtype=torch.float64)
    torch.testing.assert_close(run("exp", x, target), want, rtol=1e-15, atol=5e-324)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("target", TARGETS)
def test_the_exponential_of_what_is_not_positive_has_the_bits_of_the_exponential(target: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    ties = (0.5 - torch.arange(1100.0, dtype=torch.float64)) * math.log(2)
    far = -torch.rand(200_000, generator=generator, dtype=torch.float64) * (110.0 if dtype == torch.float32 else 760.0)
    near = -torch.exp2(-1080.0 * torch.rand(10_000, generator=generator, dtype=torch.float64))
    x = torch.cat([ties[1:], far, near, torch.tensor([0.0, -0.0, -1e30, -INF, NAN], dtype=torch.float64)]).to(dtype)
    x = torch.cat([x, torch.nextafter(x, torch.zeros_like(x)), torch.nextafter(x, torch.full_like(x, -INF))])
    x = torch.where(x > 0, -x, x)
    bits = torch.int32 if dtype == torch.float32 else torch.int64
    ours, exp = (run(function, x, target).view(bits) for function in ("exp_of_nonpositive", "exp"))
    assert torch.equal(ours, exp)
    assert (exp.view(dtype) == 0).any() and ((exp.view(dtype) > 0) & (exp.view(dtype) < torch.finfo(dtype).tiny)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_same_bits_in_every_lane_and_on_every_target(function: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x = 5.0 * torch.randn(257, generator=generator, dtype=dtype)
    x = x.abs() if function == "log" else x
    first = run(function, x, TARGETS[0])
    for target in TARGETS:
        assert torch.equal(run(function, x, target), first)
        for offset in range(1, 17):
            assert torch.equal(run(function, x[offset:].clone(), target), first[offset:])
        one_by_one = torch.cat([run(function, value.clone(), target) for value in x.split(1)])
        assert torch.equal(one_by_one, first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("target", TARGETS)
def test_partial_vectors_touch_nothing_else(target: str, dtype: torch.dtype) -> None:
    """A page that may not be touched begins where x and the output end."""
    page, size, identity = mmap.PAGESIZE, dtype.itemsize, [float(Activation.IDENTITY)]
    memory = mmap.mmap(-1, 4 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for forbidden in (1, 3):
        assert libc.mprotect(ctypes.c_void_p(address + forbidden * page), ctypes.c_size_t(page), 0) == 0
    try:
        for n in range(34):
            source = torch.frombuffer(memory, dtype=dtype, count=page // size)[page // size - n :]
            out = torch.frombuffer(memory, dtype=dtype, count=page // size, offset=2 * page)
            out.fill_(-1.0)
            source.copy_(torch.arange(n))
            torch.ops.flowkernels._elementwise_out(source, out[page // size - n :], "activation", target, identity)
            assert torch.equal(out[page // size - n :], torch.arange(n).to(dtype))
            out.fill_(-1.0)
            torch.ops.flowkernels._elementwise_out(source, out[:n], "activation", target, identity)
            assert torch.equal(out[:n], torch.arange(n).to(dtype))
            assert (out[n:] == -1.0).all()
    finally:
        for forbidden in (1, 3):
            libc.mprotect(ctypes.c_void_p(address + forbidden * page), ctypes.c_size_t(page), 3)


def test_unknown_names_are_refused() -> None:
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match="knows no function cosh"):
        run("cosh", x, TARGETS[0])
    with pytest.raises(RuntimeError, match="FLOWKERNELS_ISA must name an instruction set that this machine has"):
        run("exp", x, "sse2")
