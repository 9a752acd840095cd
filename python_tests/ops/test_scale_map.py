"""Scale maps and affine forms: formulas, stability, gradients, and the compiled ones against the reference."""

import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from flowkernels.ops.scale_map import Form, ScaleKind, ScaleMap, apply_form, invert_form, parse_form
from python_tests.battery import TESTS_LIBRARY, WITHOUT_TESTS_LIBRARY

# each map, and its sigma as papers and libraries write it
MAPS = [
    (ScaleMap.exp(), torch.exp),
    (ScaleMap.exp_half(), lambda s: torch.exp(0.5 * s)),
    (ScaleMap.exp_half(limit=2.0), lambda s: torch.exp(0.5 * s)),
    (ScaleMap.exp_clamped(), lambda s: torch.exp(s.clamp(-5.0, 3.0))),
    (ScaleMap.exp_tanh(2.0, 2.0), lambda s: torch.exp(2.0 * torch.tanh(s / 2.0))),
    (ScaleMap.exp_tanh(bound=0.7), lambda s: torch.exp(0.7 * torch.tanh(s))),
    (ScaleMap.exp_atan(1.9), lambda s: torch.exp(1.9 * 0.636 * torch.atan(s))),
    (ScaleMap.softclip(), lambda s: torch.exp(s / (1.0 + (s / math.log(1e-3)).abs()))),
    (ScaleMap.sigmoid(), torch.sigmoid),
    (ScaleMap.sigmoid(bias=2.0), lambda s: torch.sigmoid(s + 2.0)),
    (ScaleMap.sigmoid(bias=2.0, floor=1e-3), lambda s: torch.sigmoid(s + 2.0) + 1e-3),
    (ScaleMap.softplus(), lambda s: F.softplus(s, threshold=700.0)),
    (ScaleMap.softplus(floor=1e-3), lambda s: F.softplus(s, threshold=700.0) + 1e-3),
    (ScaleMap.softplus(floor=1e-3, ceiling=3.0), lambda s: (F.softplus(s, threshold=700.0) + 1e-3).clamp(0.0, 3.0)),
    (ScaleMap.softplus(ceiling=0.5), lambda s: F.softplus(s, threshold=700.0).clamp(0.0, 0.5)),
]
ONLY_MAPS = [scale_map for scale_map, _ in MAPS]
every_map = pytest.mark.parametrize("scale_map", ONLY_MAPS, ids=str)


def grid(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.cat([torch.linspace(-100.0, 100.0, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30])]).to(dtype)


@every_map
def test_is_a_plain_value(scale_map: ScaleMap) -> None:
    for same in (eval(repr(scale_map)), pickle.loads(pickle.dumps(scale_map)), ScaleMap.from_packed(scale_map.kind, *scale_map.packed)):
        assert same == scale_map
        assert hash(same) == hash(scale_map)
    assert len(set(ONLY_MAPS)) == len(ONLY_MAPS)


def test_repr_reads_well() -> None:
    assert repr(ScaleMap.sigmoid(bias=2, floor=1e-3)) == "ScaleMap.sigmoid(bias=2.0, floor=0.001)"
    assert repr(ScaleMap.softplus()) == "ScaleMap.softplus(floor=0.0, ceiling=None)"


def test_codes_are_those_of_the_kernels() -> None:
    kinds = ["exp", "exp_half", "exp_clamped", "exp_tanh", "exp_atan", "softclip", "sigmoid", "softplus", "unit"]
    assert [(kind.name.lower(), int(kind)) for kind in ScaleKind] == [(name, i) for i, name in enumerate(kinds)]
    assert [(form.name.lower(), int(form)) for form in Form] == [("scale_shift", 0), ("shift_scale", 1), ("divide", 2), ("gate", 3)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScaleMap.exp_half(math.inf), "limit must be finite; got inf"),
        (lambda: ScaleMap.exp_clamped(1.0, 1.0), "high must be greater than 1; got 1.0"),
        (lambda: ScaleMap.exp_tanh(0.0), "bound must be greater than 0; got 0.0"),
        (lambda: ScaleMap.exp_tanh(1.0, inner=-1.0), "inner must be greater than 0; got -1.0"),
        (lambda: ScaleMap.exp_atan(math.nan), "bound must be greater than 0; got nan"),
        (lambda: ScaleMap.softclip(1.0), "slope must be greater than 0 and less than 1; got 1.0"),
        (lambda: ScaleMap.sigmoid(floor=-1e-3), "floor must be 0 or at least 2e-38, a normal number in float32; got -0.001"),
        (lambda: ScaleMap.softplus(floor=1.0, ceiling=0.5), "ceiling must be greater than 1; got 0.5"),
    ],
)
def test_parameters_are_checked(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
    with pytest.raises(TypeError, match="bias must be a number; got 'two'"):
        ScaleMap.sigmoid(bias="two")


@pytest.mark.parametrize(("scale_map", "sigma"), MAPS, ids=[repr(m) for m, _ in MAPS])
def test_formulas(scale_map: ScaleMap, sigma) -> None:
    s = torch.linspace(-30.0, 30.0, 601, dtype=torch.float64)
    exact = sigma(s)
    torch.testing.assert_close(scale_map.sigma(s), exact, rtol=1e-13, atol=0.0)
    torch.testing.assert_close(scale_map.log_sigma(s), exact.log(), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(scale_map.complement(s), 1.0 - exact, rtol=1e-12, atol=1e-13)
    if scale_map.kind == ScaleKind.EXP_HALF:
        reciprocal = torch.exp(torch.minimum(-0.5 * s, s.new_tensor(scale_map.params[0])))
    else:
        reciprocal = 1.0 / exact
    torch.testing.assert_close(scale_map.reciprocal(s), reciprocal, rtol=1e-13, atol=0.0)
    torch.testing.assert_close(scale_map.log_reciprocal(s), reciprocal.log(), rtol=1e-11, atol=1e-13)


@every_map
@pytest.mark.parametrize("method", ["sigma", "log_sigma", "reciprocal", "log_reciprocal", "complement"])
def test_float32_is_right_and_its_gradient_finite_far_out(scale_map: ScaleMap, method: str) -> None:
    s = grid(torch.float32).requires_grad_()
    s64 = s.detach().double().requires_grad_()
    y, exact = getattr(scale_map, method)(s), getattr(scale_map, method)(s64)
    largest = torch.finfo(torch.float32).max
    inside = exact.abs() < 0.99 * largest
    error = (y.double() - exact).abs()[inside]
    assert (error <= 1e-6 * (1.0 + exact.abs()[inside])).all()
    if method in ("sigma", "reciprocal"):  # relatively right, too, down to the smallest normal float
        normal = exact.abs()[inside] > 1e-37
        assert (error[normal] <= 1e-6 * exact.abs()[inside][normal]).all()
    (slope,) = torch.autograd.grad(y.sum(), s, create_graph=True)
    (exact_slope,) = torch.autograd.grad(exact.sum(), s64)
    inside &= exact_slope.abs() < 0.99 * largest
    assert ((slope.double() - exact_slope).abs()[inside] <= 2e-6 * (1.0 + exact_slope.abs()[inside])).all()
    if slope.requires_grad:
        (curvature,) = torch.autograd.grad(slope.sum(), s)
        assert not curvature.isnan().any()


def test_never_log_of_an_underflowed_sigma() -> None:
    s = torch.tensor([-100.0, 100.0])
    for scale_map in (ScaleMap.sigmoid(), ScaleMap.softplus()):
        assert scale_map.log_sigma(s)[0].item() == pytest.approx(-100.0, abs=1e-4)
    assert ScaleMap.softplus().log_sigma(s)[1].item() == pytest.approx(math.log(100.0), rel=1e-6)
    floor = ScaleMap.sigmoid(floor=1e-3).log_sigma(s)
    assert floor[0].item() == pytest.approx(math.log(1e-3), rel=1e-6)
    assert floor[1].item() == pytest.approx(math.log1p(1e-3), rel=1e-6)


@every_map
def test_gradients_of_both_orders(scale_map: ScaleMap) -> None:
    # away from kinks; a straight-through gradient is not the derivative, so stay inside the clamp
    inside = torch.linspace(-4.3, 2.7, 8, dtype=torch.float64).requires_grad_()
    for method in (scale_map.sigma, scale_map.log_sigma, scale_map.reciprocal, scale_map.log_reciprocal, scale_map.complement):
        assert torch.autograd.gradcheck(method, inside)
        assert torch.autograd.gradgradcheck(method, inside)


def test_gradients_where_models_clamp() -> None:
    s = torch.tensor([-10.0, 10.0, math.inf], dtype=torch.float64, requires_grad=True)
    clamped = ScaleMap.exp_clamped()
    torch.testing.assert_close(clamped.log_sigma(s), s.new_tensor([-5.0, 3.0, 3.0]))
    (slope,) = torch.autograd.grad(clamped.log_sigma(s).sum(), s)
    assert slope[:2].tolist() == [1.0, 1.0]  # straight through, as Pyro
    for method in (ScaleMap.softplus(1e-3, 3.0).sigma, ScaleMap.softplus(1e-3, 3.0).log_sigma):
        (slope,) = torch.autograd.grad(method(s[:2]).sum(), s)
        assert slope[1] == 0.0  # as nflows
        assert slope[0] > 0.0
    half = ScaleMap.exp_half()
    s = torch.tensor([-30.0], dtype=torch.float64, requires_grad=True)
    assert half.sigma(s).item() == pytest.approx(math.exp(-15.0))  # limited in the inverse direction alone
    assert half.reciprocal(s).item() == pytest.approx(math.exp(10.0))
    assert torch.autograd.grad(half.reciprocal(s).sum(), s)[0].item() == 0.0


@every_map
def test_functional_transforms_and_compile(scale_map: ScaleMap) -> None:
    s = torch.linspace(-4.3, 2.7, 29, dtype=torch.float64)
    leaf = s.clone().requires_grad_()
    (want,) = torch.autograd.grad(scale_map.sigma(leaf).sum(), leaf, create_graph=True)
    (want2,) = torch.autograd.grad(want.sum(), leaf)
    grad = torch.func.grad(scale_map.sigma)
    torch.testing.assert_close(torch.func.vmap(grad)(s), want.detach())
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(grad))(s), want2)
    torch.testing.assert_close(torch.func.jacrev(scale_map.sigma)(s).diagonal(), want.detach())

    def everything(s: torch.Tensor) -> torch.Tensor:
        return scale_map.sigma(s) + scale_map.log_sigma(s) + scale_map.reciprocal(s) + scale_map.complement(s)

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(everything, fullgraph=True, backend="aot_eager")(s), everything(s))


@pytest.mark.parametrize("form", list(Form))
@every_map
def test_forms_and_their_log_derivatives(form: Form, scale_map: ScaleMap) -> None:
    generator = torch.Generator().manual_seed(0)
    x, shift, s = (torch.randn(200, generator=generator, dtype=torch.float64) for _ in range(3))
    x.requires_grad_()
    y, log_derivative = apply_form(form, x, shift, s, scale_map)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slope.log(), log_derivative)
    formula = {
        Form.SCALE_SHIFT: lambda sigma: x * sigma + shift,
        Form.SHIFT_SCALE: lambda sigma: (x + shift) * sigma,
        Form.DIVIDE: lambda sigma: (x - shift) / sigma,
        Form.GATE: lambda sigma: sigma * x + (1.0 - sigma) * shift,
    }[form]
    torch.testing.assert_close(y, formula(scale_map.sigma(s)))
    back, log_inverse = invert_form(form, y, shift, s, scale_map)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(log_inverse, -log_derivative)


def test_parse_form() -> None:
    for form in Form:
        assert parse_form(form.name.lower()) is form
        assert parse_form(form) is form
    for unknown in ("affine", None, 0, []):
        with pytest.raises(ValueError, match="form must be one of 'scale_shift', 'shift_scale', 'divide', 'gate'; got"):
            parse_form(unknown)


TARGETS = torch.ops.flowkernels._math_targets().split() if TESTS_LIBRARY else []
compiled = pytest.mark.skipif(not TARGETS, reason=f"{WITHOUT_TESTS_LIBRARY}; or this CPU has no instruction set of ours")


def packed(scale_map: ScaleMap) -> list[float]:
    return [float(scale_map.kind), *scale_map.packed]


@compiled
@every_map
@pytest.mark.parametrize("target", TARGETS or [None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_maps(dtype: torch.dtype, target: str, scale_map: ScaleMap) -> None:
    s = grid(dtype)
    s64 = s.double().requires_grad_()
    largest, unit = torch.finfo(dtype).max, torch.finfo(dtype).eps
    slopes = {"dsigma": scale_map.sigma, "dlog_sigma": scale_map.log_sigma}
    # exp turns the rounding of its argument into a relative error
    steep = 1.0 + scale_map.log_sigma(s64).abs() if scale_map.kind <= ScaleKind.SOFTCLIP else torch.ones_like(s64)
    for name in ("sigma", "log_sigma", "reciprocal", "log_reciprocal", "complement", *slopes):
        if name in slopes:
            (exact,) = torch.autograd.grad(slopes[name](s64).sum(), s64)
        else:
            exact = getattr(scale_map, name)(s64).detach()
        y = torch.ops.flowkernels._elementwise(s, name, target, packed(scale_map))
        inside = exact.abs() < 0.99 * largest
        assert torch.equal(y.double().abs() > 0.99 * largest, ~inside)
        error = (y.double() - exact).abs()
        assert (error <= 3.0 * unit * steep * (1.0 + exact.abs()))[inside].all()
        if name in ("sigma", "reciprocal"):
            assert (error <= 3.0 * unit * steep * exact)[inside & (exact > 1e-36)].all()
    nan = torch.ops.flowkernels._elementwise(torch.full((3,), math.nan, dtype=dtype), "log_sigma", target, packed(scale_map))
    assert nan.isnan().all()


@compiled
@pytest.mark.parametrize("target", TARGETS or [None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale_map", [ScaleMap.sigmoid(), ScaleMap.softplus()], ids=repr)
def test_compiled_log_of_an_underflowed_sigma(dtype: torch.dtype, target: str, scale_map: ScaleMap) -> None:
    s = torch.tensor([-100.0, -200.0, -1000.0], dtype=dtype)
    torch.testing.assert_close(torch.ops.flowkernels._elementwise(s, "log_sigma", target, packed(scale_map)), s)


@compiled
@pytest.mark.parametrize("floor", [0.0, 1e-3])
@pytest.mark.parametrize("target", TARGETS or [None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_log_of_a_sigmoid_near_one_loses_nothing(dtype: torch.dtype, target: str, floor: float) -> None:
    """Of log(1 + d) the sum would round d away."""
    scale_map, s = ScaleMap.sigmoid(floor=floor), torch.linspace(0, 30, 3001, dtype=dtype)
    below = torch.sigmoid(-s.double())
    for name, sign in (("log_sigma", 1), ("log_reciprocal", -1)):
        log = sign * torch.ops.flowkernels._elementwise(s, name, target, packed(scale_map)).double()
        assert ((log - torch.log1p(floor - below)).abs() <= 6 * torch.finfo(dtype).eps * (floor + below)).all()


@compiled
@every_map
@pytest.mark.parametrize("form", list(Form))
@pytest.mark.parametrize("target", TARGETS or [None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_forms(dtype: torch.dtype, target: str, form: Form, scale_map: ScaleMap) -> None:
    generator = torch.Generator().manual_seed(0)
    x, shift, s = (2.0 * torch.randn(101, generator=generator, dtype=torch.float64) for _ in range(3))
    x, shift, s = x.to(dtype), shift.to(dtype), s.to(dtype)
    for inverse, reference in ((False, apply_form), (True, invert_form)):
        want = reference(form, x.double(), shift.double(), s.double(), scale_map)
        got = torch.ops.flowkernels._affine_form(x, shift, s, target, int(form), inverse, packed(scale_map))
        scale = torch.exp(want[1]).clamp(min=1.0) * (1.0 + x.abs() + shift.abs()).double()
        assert ((got[0].double() - want[0]).abs() <= 8.0 * torch.finfo(dtype).eps * scale).all()
        assert ((got[1].double() - want[1]).abs() <= 6.0 * torch.finfo(dtype).eps * (1.0 + want[1].abs())).all()
