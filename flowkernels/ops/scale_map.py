"""Scale maps, sigma(s) of a raw scale s, and the affine forms that use them: the mathematics in plain PyTorch.

csrc/scale_map.h is the same mathematics for the compiled kernels; the integer codes are shared with it by value.
"""

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Form", "PoweredMap", "ScaleKind", "ScaleMap", "apply_form", "default_scale", "invert_form", "parse_form", "parse_scale"]

_LEAST_FLOOR = 2e-38
_SOFTPLUS_THRESHOLD = 40.0  # torch's own 20 is visible in float64
_SOFTPLUS_CUT = 0.0  # below it log softplus(s) is s + log(log1p(u) / u), u = exp(s)
_ATAN_FACTOR = 0.636  # FrEIA's rounding of 2 / pi


class ScaleKind(enum.IntEnum):
    EXP = 0
    EXP_HALF = 1
    EXP_CLAMPED = 2
    EXP_TANH = 3
    EXP_ATAN = 4
    SOFTCLIP = 5
    SIGMOID = 6
    SOFTPLUS = 7
    UNIT = 8


# argument names and defaults of each kind, in the order of `params`
_ARGUMENTS = {
    ScaleKind.EXP: (),
    ScaleKind.EXP_HALF: ("limit",),
    ScaleKind.EXP_CLAMPED: ("low", "high"),
    ScaleKind.EXP_TANH: ("bound", "inner"),
    ScaleKind.EXP_ATAN: ("bound",),
    ScaleKind.SOFTCLIP: ("slope",),
    ScaleKind.SIGMOID: ("bias", "floor"),
    ScaleKind.SOFTPLUS: ("floor", "ceiling"),
    ScaleKind.UNIT: (),
}


def _number(name: str, value: float, *, above: float = -math.inf, at_least: float = -math.inf, below: float = math.inf) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number; got {value!r}") from None
    if not (math.isfinite(number) and number > above and number >= at_least and number < below):
        wanted = [f"greater than {above:g}"] if above > -math.inf else []
        wanted += [f"at least {at_least:g}"] if at_least > -math.inf else []
        wanted += [f"less than {below:g}"] if below < math.inf else []
        raise ValueError(f"{name} must be {' and '.join(wanted) or 'finite'}; got {value!r}")
    return number


@dataclass(frozen=True, repr=False)
class ScaleMap:
    """A positive function sigma(s) of the raw scale s that a conditioner returns.

    Make one with a classmethod, such as ``ScaleMap.sigmoid(bias=2.0, floor=1e-3)``. It is a plain value: hashable, comparable, picklable.
    Each map knows sigma, log sigma and 1 / sigma in forms that neither underflow nor overflow before their value does.
    """

    kind: ScaleKind
    params: tuple[float, ...] = ()
    packed: tuple[float, float] = field(init=False, compare=False)
    """Two numbers that, with ``kind``, say everything: what an op's schema carries."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "packed", (*self.params, 0.0, 0.0)[:2])

    @classmethod
    def exp(cls) -> "ScaleMap":
        """sigma = exp(s)."""
        return cls(ScaleKind.EXP)

    @classmethod
    def exp_half(cls, limit: float = 10.0) -> "ScaleMap":
        """sigma = exp(s / 2), and 1 / sigma = exp(min(-s / 2, limit)) wherever 1 / sigma is taken: MAF's own code."""
        return cls(ScaleKind.EXP_HALF, (_number("limit", limit),))

    @classmethod
    def exp_clamped(cls, low: float = -5.0, high: float = 3.0) -> "ScaleMap":
        """sigma = exp(clamp(s, low, high)), the clamp's gradient being 1 everywhere: Pyro."""
        low = _number("low", low)
        return cls(ScaleKind.EXP_CLAMPED, (low, _number("high", high, above=low)))

    @classmethod
    def exp_tanh(cls, bound: float, inner: float = 1.0) -> "ScaleMap":
        """sigma = exp(bound * tanh(s / inner)): RealNVP with a fixed factor, FrEIA, survae (bound 2, inner 2)."""
        return cls(ScaleKind.EXP_TANH, (_number("bound", bound, above=0.0), _number("inner", inner, above=0.0)))

    @classmethod
    def exp_atan(cls, bound: float) -> "ScaleMap":
        """sigma = exp(bound * 0.636 * atan(s)): FrEIA."""
        return cls(ScaleKind.EXP_ATAN, (_number("bound", bound, above=0.0),))

    @classmethod
    def softclip(cls, slope: float = 1e-3) -> "ScaleMap":
        """sigma = exp(s / (1 + abs(s / log(slope)))), which stays within (slope, 1 / slope): zuko."""
        return cls(ScaleKind.SOFTCLIP, (_number("slope", slope, above=0.0, below=1.0),))

    @classmethod
    def sigmoid(cls, bias: float = 0.0, floor: float = 0.0) -> "ScaleMap":
        """sigma = sigmoid(s + bias) + floor: Glow (bias 2), nflows (bias 2, floor 1e-3)."""
        if floor and not floor >= _LEAST_FLOOR:
            raise ValueError(f"floor must be 0 or at least {_LEAST_FLOOR}, a normal number in float32; got {floor}")
        return cls(ScaleKind.SIGMOID, (_number("bias", bias), _number("floor", floor)))

    @classmethod
    def softplus(cls, floor: float = 0.0, ceiling: float | None = None) -> "ScaleMap":
        """sigma = min(softplus(s) + floor, ceiling), with no gradient beyond the ceiling: nflows (floor 1e-3; ceiling 3 in couplings)."""
        floor = _number("floor", floor, at_least=0.0)
        return cls(ScaleKind.SOFTPLUS, (floor, math.inf if ceiling is None else _number("ceiling", ceiling, above=floor)))

    @classmethod
    def unit(cls) -> "ScaleMap":
        """sigma = 1: an additive map, whose conditioner gives shifts alone (NICE)."""
        return cls(ScaleKind.UNIT)

    @classmethod
    def from_packed(cls, kind: int, p0: float, p1: float) -> "ScaleMap":
        """The map whose ``kind`` and ``packed`` these are."""
        kind = ScaleKind(kind)
        return cls(kind, (p0, p1)[: len(_ARGUMENTS[kind])])

    def __repr__(self) -> str:
        named = zip(_ARGUMENTS[self.kind], self.params, strict=True)
        return f"ScaleMap.{self.kind.name.lower()}({', '.join(f'{name}={None if value == math.inf else value}' for name, value in named)})"

    def sigma(self, s: Tensor) -> Tensor:
        """The scale itself."""
        if self.kind == ScaleKind.SIGMOID:
            bias, floor = self.params
            return torch.sigmoid(s + bias) + floor
        if self.kind == ScaleKind.SOFTPLUS:
            floor, ceiling = self.params
            return (F.softplus(s, threshold=_SOFTPLUS_THRESHOLD) + floor).clamp(max=ceiling)
        return torch.exp(self.log_sigma(s))

    def log_sigma(self, s: Tensor) -> Tensor:
        """log sigma, never by way of a sigma that has underflowed."""
        kind, params = self.kind, self.params
        if kind == ScaleKind.EXP:
            return s
        if kind == ScaleKind.UNIT:
            return torch.zeros_like(s)
        if kind == ScaleKind.EXP_HALF:
            return 0.5 * s
        if kind == ScaleKind.EXP_CLAMPED:
            return _clamp_straight_through(s, *params)
        if kind == ScaleKind.EXP_TANH:
            bound, inner = params  # products by 1 are left out, as forward mode takes 0.3 ms for each
            t = torch.tanh(s if inner == 1.0 else s / inner)
            return t if bound == 1.0 else bound * t
        if kind == ScaleKind.EXP_ATAN:
            return (params[0] * _ATAN_FACTOR) * torch.atan(s)
        if kind == ScaleKind.SOFTCLIP:
            return s / torch.rsub(_abs(s / math.log(params[0])), 1.0, alpha=-1.0)  # 1 + |..|, whose tangent torch would make in Python
        if kind == ScaleKind.SIGMOID:
            return _log_sigmoid_plus(s + params[0], params[1])
        return _log_softplus_plus(s, params[0]).clamp(max=math.log(params[1]))

    def reciprocal(self, s: Tensor) -> Tensor:
        """1 / sigma; `exp_half` limits it."""
        if self.kind == ScaleKind.SIGMOID:
            bias, floor = self.params
            return 1.0 / (torch.sigmoid(s + bias) + floor) if floor else 1.0 + torch.exp(-(s + bias))
        if self.kind == ScaleKind.SOFTPLUS:
            floor, ceiling = self.params
            return (1.0 / self.sigma(s)) if floor else _reciprocal_softplus(s).clamp(min=1.0 / ceiling)
        return torch.exp(self.log_reciprocal(s))

    def log_reciprocal(self, s: Tensor) -> Tensor:
        """log of `reciprocal`: -log sigma, but for the limit of `exp_half`."""
        if self.kind == ScaleKind.EXP_HALF:
            return (-0.5 * s).clamp(max=self.params[0])
        return -self.log_sigma(s)

    def dlog_sigma(self, s: Tensor) -> Tensor:
        """Derivative of `log_sigma`, by formula; sigma' is sigma times it."""
        kind, params = self.kind, self.params
        if kind == ScaleKind.EXP_HALF:
            return torch.full_like(s, 0.5)
        if kind == ScaleKind.EXP_TANH:
            return (params[0] / params[1]) * (1.0 - torch.tanh(s / params[1]).square())
        if kind == ScaleKind.EXP_ATAN:
            return (params[0] * _ATAN_FACTOR) / (1.0 + s.square())
        if kind == ScaleKind.SOFTCLIP:
            return (1.0 + _abs(s / math.log(params[0]))).square().reciprocal()
        if kind == ScaleKind.SIGMOID:
            x, floor = s + params[0], params[1]
            opposite = torch.sigmoid(-x)
            return opposite * (torch.sigmoid(x) / (torch.sigmoid(x) + floor)) if floor else opposite
        if kind == ScaleKind.SOFTPLUS:
            floor, ceiling = params
            dlog = torch.sigmoid(s) / (F.softplus(s, threshold=_SOFTPLUS_THRESHOLD) + floor) if floor else _dlog_softplus(s)
            return torch.where(self.sigma(s) < ceiling, dlog, 0.0)
        if kind == ScaleKind.UNIT:
            return torch.zeros_like(s)
        return torch.ones_like(s)  # exp, and exp_clamped straight through

    def dlog_reciprocal(self, s: Tensor) -> Tensor:
        """Derivative of `log_reciprocal`."""
        if self.kind == ScaleKind.EXP_HALF:
            return torch.where(-0.5 * s <= self.params[0], -0.5, torch.zeros_like(s))
        return -self.dlog_sigma(s)

    def complement(self, s: Tensor) -> Tensor:
        """1 - sigma, what the gate form gives to the shift."""
        if self.kind == ScaleKind.SIGMOID:
            bias, floor = self.params
            return torch.sigmoid(-(s + bias)) - floor
        return 1.0 - self.sigma(s)


class PoweredMap(NamedTuple):
    """The scale map sigma(s)^a: with sigma = exp(tanh(s)) RealNVP's exp(a tanh(s)) (Dinh et al. 2016, section 4.1).

    a: a learned number, or what broadcasts against s.
    """

    scale: ScaleMap
    a: Tensor

    @property
    def kind(self) -> ScaleKind:
        return self.scale.kind

    @property
    def packed(self) -> tuple[float, float]:
        """Those of the `exp_tanh` map that this is while a, of one element, is what it is."""
        if self.kind != ScaleKind.EXP_TANH or self.a.numel() != 1:
            raise ValueError(f"a learned scale must be one number over an exp_tanh map; got {list(self.a.shape)} over {self.scale!r}")
        bound, inner = self.scale.packed
        return bound * self.a.item(), inner

    def log_sigma(self, s: Tensor) -> Tensor:
        return self.a * self.scale.log_sigma(s)

    def log_reciprocal(self, s: Tensor) -> Tensor:
        return -self.log_sigma(s)

    def sigma(self, s: Tensor) -> Tensor:
        return torch.exp(self.log_sigma(s))

    def reciprocal(self, s: Tensor) -> Tensor:
        return torch.exp(self.log_reciprocal(s))

    def complement(self, s: Tensor) -> Tensor:
        return 1.0 - self.sigma(s)

    def dlog_sigma(self, s: Tensor) -> Tensor:
        return self.a * self.scale.dlog_sigma(s)

    def dlog_reciprocal(self, s: Tensor) -> Tensor:
        return -self.dlog_sigma(s)


def _abs(s: Tensor) -> Tensor:
    """|s|. The second derivative of torch.abs is a tensor without memory, and sums with such a one take ten times as long as sums do."""
    return F.leaky_relu(s, -1.0)


def _clamp_straight_through(s: Tensor, low: float, high: float) -> Tensor:
    # s - s.detach() is 0 with gradient 1; at infinity it would be NaN
    straight = torch.where(torch.isfinite(s), s - s.detach(), 0.0)
    return s.clamp(low, high).detach() + straight


def _log_sigmoid_plus(x: Tensor, floor: float) -> Tensor:
    """log(sigmoid(x) + floor)."""
    if not floor:
        return F.logsigmoid(x)
    # for x > 0 the sum is near 1: log1p of what it differs by. Each branch is kept inside its own range, so that neither has a NaN gradient
    above = torch.log1p(floor - torch.sigmoid(-x.clamp(min=0.0)))
    below = torch.log(floor + torch.sigmoid(x.clamp(max=0.0)))
    return torch.where(x > 0.0, above, below)


def _softplus_parts(s: Tensor) -> tuple[Tensor, Tensor]:
    """softplus(s) where s > cut, and softplus(s) / exp(s) where it is not; each is constant outside its range."""
    above = F.softplus(s.clamp(min=_SOFTPLUS_CUT), threshold=_SOFTPLUS_THRESHOLD)
    lowest = math.log(torch.finfo(s.dtype).eps) - 2.0  # below it the ratio rounds to 1, and its second derivative would overflow
    u = torch.exp(s.clamp(lowest, _SOFTPLUS_CUT))
    return above, torch.log1p(u) / u


def _log_softplus_plus(s: Tensor, floor: float) -> Tensor:
    """log(softplus(s) + floor)."""
    if floor:
        return torch.log(F.softplus(s, threshold=_SOFTPLUS_THRESHOLD) + floor)
    above, ratio = _softplus_parts(s)
    return torch.where(s > _SOFTPLUS_CUT, torch.log(above), s + torch.log(ratio))


def _dlog_softplus(s: Tensor) -> Tensor:
    """sigmoid(s) / softplus(s)."""
    above, ratio = _softplus_parts(s)
    return torch.where(s > _SOFTPLUS_CUT, torch.sigmoid(s) / above, torch.sigmoid(-s) / ratio)


def _reciprocal_softplus(s: Tensor) -> Tensor:
    # 1 / softplus itself has a gradient that overflows at s = -52, long before its value does
    above, ratio = _softplus_parts(s)
    return torch.where(s > _SOFTPLUS_CUT, 1.0 / above, torch.exp(-s.clamp(max=_SOFTPLUS_CUT)) / ratio)


class Form(enum.IntEnum):
    """How shift and sigma act on x in a layer's parallel direction."""

    SCALE_SHIFT = 0
    SHIFT_SCALE = 1
    DIVIDE = 2
    GATE = 3

    @property
    def undone_by(self) -> "Form | None":
        """The form that undoes this one with the same shift and sigma, if there is one."""
        return {Form.SCALE_SHIFT: Form.DIVIDE, Form.DIVIDE: Form.SCALE_SHIFT}.get(self)


_SOFTCLIP, _TANH = ScaleMap.softclip(), ScaleMap.exp_tanh(1.0)


def default_scale(*, learned: bool = False) -> ScaleMap:
    """The scale map where none is named; learned: under a scale parameter."""
    # for a compiler from literals: where shapes are dynamic, it takes the numbers of a global for variables, and loses them
    if torch.compiler.is_compiling():
        return ScaleMap(ScaleKind.EXP_TANH, (1.0, 1.0)) if learned else ScaleMap(ScaleKind.SOFTCLIP, (1e-3,))
    return _TANH if learned else _SOFTCLIP


def parse_scale(scale: ScaleMap | None, *, learned: bool = False) -> ScaleMap:
    """The scale map, or the default one.

    Raises:
        ValueError: it is none.
    """
    if scale is None:
        return default_scale(learned=learned)
    if not isinstance(scale, ScaleMap):
        raise ValueError(f"scale must be a ScaleMap, such as ScaleMap.sigmoid(bias=2.0); got {scale!r}")
    return scale


_FORMS = {form.name.lower(): form for form in Form}


def parse_form(name: "str | Form") -> Form:
    """The form of that name.

    Raises:
        ValueError: there is no such form.
    """
    if isinstance(name, Form):
        return name
    try:
        return _FORMS[name]
    except (KeyError, TypeError):
        raise ValueError(f"form must be one of {', '.join(map(repr, _FORMS))}; got {name!r}") from None


def apply_form(form: Form, x: Tensor, shift: Tensor, s: Tensor, scale_map: ScaleMap) -> tuple[Tensor, Tensor]:
    """Apply an affine form elementwise.

    Args:
        form: scale_shift x * sigma + shift, shift_scale (x + shift) * sigma, divide (x - shift) / sigma, or
            gate sigma * x + (1 - sigma) * shift.
        x: what is transformed.
        shift: the shift.
        s: raw scale, from which ``scale_map`` makes sigma.
        scale_map: sigma(s).

    Returns:
        y and log|dy/dx|.
    """
    if form == Form.DIVIDE:
        reciprocal, log_reciprocal = _with_log(scale_map.reciprocal, scale_map.log_reciprocal, scale_map.kind, s)
        return (x - shift) * reciprocal, log_reciprocal
    sigma, log_sigma = _with_log(scale_map.sigma, scale_map.log_sigma, scale_map.kind, s)
    if form == Form.SCALE_SHIFT:
        return x * sigma + shift, log_sigma
    if form == Form.SHIFT_SCALE:
        return (x + shift) * sigma, log_sigma
    return sigma * x + scale_map.complement(s) * shift, log_sigma


def invert_form(form: Form, y: Tensor, shift: Tensor, s: Tensor, scale_map: ScaleMap) -> tuple[Tensor, Tensor]:
    """Undo `apply_form`: x and log|dx/dy|."""
    if form == Form.DIVIDE:
        sigma, log_sigma = _with_log(scale_map.sigma, scale_map.log_sigma, scale_map.kind, s)
        return y * sigma + shift, log_sigma
    reciprocal, log_reciprocal = _with_log(scale_map.reciprocal, scale_map.log_reciprocal, scale_map.kind, s)
    if form == Form.SCALE_SHIFT:
        return (y - shift) * reciprocal, log_reciprocal
    if form == Form.SHIFT_SCALE:
        return y * reciprocal - shift, log_reciprocal
    return (y - scale_map.complement(s) * shift) * reciprocal, log_reciprocal


def _with_log(value: Callable[[Tensor], Tensor], log: Callable[[Tensor], Tensor], kind: ScaleKind, s: Tensor) -> tuple[Tensor, Tensor]:
    """value(s) and log(s), the one as exponential of the other but for sigmoid and softplus, which are computed without a logarithm."""
    log_of_s = log(s)
    return (value(s) if kind in (ScaleKind.SIGMOID, ScaleKind.SOFTPLUS) else torch.exp(log_of_s)), log_of_s
