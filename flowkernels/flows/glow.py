"""Glow: actnorm, invertible 1x1 convolutions and couplings at several scales."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._torch import has_global_hooks
from ..layers import ActNormConv1x1, AdditiveCoupling, AffineCoupling, FactorOut, Reshape, Squeeze
from ..layers._dtype import check_dtype
from ..layers._plain import is_plain
from ..layers._sizes import parse_count
from ..layers.invertible_conv1x1 import Folded, fold
from ..ops import Form, Part, ScaleMap, glow_step, glow_steps
from ..ops.glow_step.reference import steps_in_turn
from .flow import Flow
from .networks import ConvNet, ZeroConv2d, plain_parameters


class Glow(Flow):
    """Glow (Kingma and Dhariwal 2018, arXiv 1807.03039): a flow of images; both directions are parallel.

        at each level: squeeze, `steps` times (actnorm, 1x1 convolution, coupling), and, but at the last, half of the channels leaves

    The first half of the channels conditions the second: y = (x + shift) * sigmoid(s + 2), or y = x + shift in additive couplings.
    As in the authors' code, channel 2i of the conditioner is the shift and 2i + 1 the raw scale s. What leaves has a learned Gaussian
    prior given what is kept, and the last level has one of its own: they are affine maps to standard noise, (x - mean) / exp(log_scale).
    z is flat: the parts in the order in which they left, then the last level.

    The first batch in training initialises the actnorms; before it, the flow can neither score in evaluation mode nor sample.

    Under autocast the 1x1 convolutions take its dtype too, and with them what passes from step to step: bfloat16 leaves a round trip an
    error of 0.01 and more, and densities one of 0.01 bits per dimension. Score without it.

    Args:
        image_shape: (C, H, W).
        levels: number of scales; each halves H and W.
        steps: actnorms, convolutions and couplings at each level.
        hidden_channels: channels inside the conditioners.
        coupling: "affine" or "additive".
        context_features: width of the context; 0 for none. It joins the input of every conditioner and split prior, as constant
            channels, and the last level's prior is affine in it.
        parametrization: of the 1x1 convolutions, "lu" or "plain"; see `layers.InvertibleConv1x1`.

    Raises:
        ValueError: height or width cannot be halved once for each level, or an argument is out of range.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        levels: int,
        steps: int,
        hidden_channels: int = 512,
        coupling: str = "affine",
        context_features: int = 0,
        parametrization: str = "lu",
    ) -> None:
        levels, steps = parse_count("levels", levels), parse_count("steps", steps)
        hidden_channels = parse_count("hidden_channels", hidden_channels)
        if coupling not in ("affine", "additive"):
            raise ValueError(f"coupling must be 'affine' or 'additive'; got {coupling!r}")
        _check_sizes(image_shape, levels)

        def make_coupling(channels: int) -> nn.Module:
            outputs = channels if coupling == "affine" else channels // 2
            conditioner = ConvNet(channels // 2, hidden_channels, outputs, context_features=context_features)
            if coupling == "additive":
                return AdditiveCoupling(conditioner)
            return AffineCoupling(conditioner, scale=_SCALE, form="shift_scale", interleaved=True)

        def make_level(level: int, c: int, h: int, w: int) -> list[nn.Module]:
            c, h, w = 4 * c, h // 2, w // 2
            layers = [Squeeze(), _Steps([ActNormConv1x1(c, parametrization=parametrization), make_coupling(c)] for _ in range(steps))]
            if level == levels:
                return [*layers, _Prior(c, context_features), Reshape((c, h, w), (c * h * w,))]
            conditioner = ZeroConv2d(c // 2, c, context_features=context_features)
            prior = AffineCoupling(conditioner, scale=ScaleMap.exp(), form="divide", interleaved=True)
            return [*layers, prior, FactorOut((c, h, w), make_level(level + 1, c // 2, h, w))]

        super().__init__(make_level(1, *image_shape), image_shape, context_features=context_features)


class _Steps(nn.Module):
    """The steps of one level. Their matrices, all of one size, are computed in one go before the first.

    On a CPU each affine coupling is joined with the actnorm and the convolution that come next, and channels lie last all the way; where
    the conditioners are Glow's own, all steps are one op. Where a module has hooks, or a coupling is another one, they are called in turn.
    """

    def __init__(self, steps) -> None:
        super().__init__()
        mixings, couplings = zip(*steps, strict=True)
        self.mixings, self.couplings = nn.ModuleList(mixings), nn.ModuleList(couplings)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mixings, couplings = _list(self.mixings), _list(self.couplings)
        if torch.is_grad_enabled() and _begins(mixings, couplings):
            with torch.no_grad():  # initialises; what autograd keeps of the first batch is then what it keeps of any
                self._in_turn(x, context, None)
        folded = _fold(mixings)
        if folded is not None and _joins(x, mixings, couplings):
            return _joined(x, context, mixings, couplings, folded, inverse=False)
        return self._in_turn(x, context, folded)

    def _in_turn(self, x: Tensor, context: Tensor | None, folded: Folded | None) -> tuple[Tensor, Tensor]:
        logabsdets = []
        mixings, couplings = _list(self.mixings), _list(self.couplings)
        for i, (mixing, coupling) in enumerate(zip(mixings, couplings, strict=True)):
            x, a = mixing(x) if folded is None else mixing(x, folded=folded, at=i)
            x, b = coupling(x, context)
            logabsdets += [a, b]
        return x, _total(logabsdets)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mixings, couplings = _list(self.mixings), _list(self.couplings)
        folded = _fold(mixings, inverse=True)
        if folded is not None and _joins(z, mixings, couplings):
            return _joined(z, context, mixings, couplings, folded, inverse=True)
        logabsdets = []
        for i in reversed(range(len(mixings))):
            z, a = couplings[i].inverse(z, context)
            z, b = mixings[i].inverse(z) if folded is None else mixings[i].inverse(z, folded=folded, at=i)
            logabsdets += [a, b]
        return z, _total(logabsdets)


# In what follows modules are asked for their parts without a detour: a small flow feels each.


def _list(modules: nn.ModuleList) -> list[nn.Module]:
    return [*modules._modules.values()]


def _fold(mixings: Sequence[nn.Module], *, inverse: bool = False) -> Folded | None:
    # the first batch changes the matrices, and others than Glow's own parts have to be called
    if has_global_hooks() or not all([type(m) is ActNormConv1x1 and m.folds() and m._modules["actnorm"].ready for m in mixings]):
        return None
    return fold(mixings, inverse=inverse)


def _begins(mixings: Sequence[nn.Module], couplings: Sequence[nn.Module]) -> bool:
    """Whether this is the first batch in training, of parts that are Glow's own: nobody is there to see them called twice."""
    first = mixings[0]
    if type(first) is not ActNormConv1x1 or not first.folds() or first._modules["actnorm"].ready or has_global_hooks():
        return False
    own = all([is_plain(m, ActNormConv1x1) and m.training and m.folds() and not m._modules["actnorm"].ready for m in mixings])
    plain = all([is_plain(c, AffineCoupling) or is_plain(c, AdditiveCoupling) for c in couplings])
    return own and plain and all([plain_parameters(c._modules["conditioner"]) is not None for c in couplings])


def _joins(x: Tensor, mixings: Sequence[nn.Module], couplings: Sequence[nn.Module]) -> bool:
    served = x.is_cpu and x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    if not served or x.dtype != _bias(mixings[0]).dtype:
        return False
    return all([_is_glows(coupling) for coupling in couplings]) and all([is_plain(mixing, ActNormConv1x1) for mixing in mixings])


def _joined(
    x: Tensor,
    context: Tensor | None,
    mixings: Sequence[nn.Module],
    couplings: Sequence[nn.Module],
    folded: Folded,
    *,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    biases = [_bias(mixing) for mixing in mixings]
    conditioners = [coupling._modules["conditioner"] for coupling in couplings]
    networks = [plain_parameters(conditioner) for conditioner in conditioners]
    rows = x.movedim(1, -1)
    if None in networks:
        calls = [partial(_called, conditioner, context) for conditioner in conditioners]
        rows, logabsdet = steps_in_turn(glow_step, rows, calls, folded.weights, biases, inverse=inverse)
    else:
        check_dtype(biases[0], context=context)
        rows, logabsdet = glow_steps(rows, networks, folded.weights, biases, context=context, inverse=inverse)
    return rows.movedim(-1, 1), logabsdet + _sites(x) * folded.logabsdets.sum()


def _bias(mixing: nn.Module) -> Tensor:
    return mixing._modules["actnorm"]._parameters["bias"]


_SCALE = ScaleMap.sigmoid(bias=2.0)


def _is_glows(coupling: nn.Module) -> bool:
    """Whether it is the coupling that `glow_step` computes."""
    if not is_plain(coupling, AffineCoupling) or coupling._parameters["scale_parameter"] is not None or not coupling.interleaved:
        return False
    return coupling.part == Part.SECOND_HALF and coupling.form == Form.SHIFT_SCALE and coupling.scale == _SCALE


def _called(conditioner: nn.Module, context: Tensor | None, x: Tensor) -> Tensor:
    return conditioner(x) if context is None else conditioner(x, context)


def _sites(x: Tensor) -> int:
    return x.shape[2:].numel()


def _total(logabsdets: list[Tensor]) -> Tensor:
    """The sum of tensors [batch]: one op for many."""
    return torch.stack(logabsdets).sum(0)


class _Prior(nn.Module):
    """z = (x - mean) / exp(log_scale), for each channel; mean and log_scale are affine in the context and start at zero."""

    def __init__(self, channels: int, context_features: int = 0) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(2 * channels))
        self.weight = nn.Parameter(torch.zeros(2 * channels, context_features)) if context_features else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mean, log_scale, logabsdet = self._moments(x, context)
        return (x - mean) * (-log_scale).exp(), logabsdet

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mean, log_scale, logabsdet = self._moments(z, context)
        return z * log_scale.exp() + mean, -logabsdet

    def _moments(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        check_dtype(self.bias, x=x, context=context)
        both = self.bias[None] if self.weight is None else F.linear(context, self.weight, self.bias)
        mean, log_scale = both[:, :, None, None].chunk(2, 1)
        logabsdet = -x.shape[2:].numel() * log_scale.to(torch.promote_types(x.dtype, torch.float32)).sum((1, 2, 3))
        return mean, log_scale, logabsdet.expand(x.shape[0])


def _check_sizes(image_shape: Sequence[int], levels: int) -> None:
    if isinstance(image_shape, int) or len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(f"image_shape must be (C, H, W), each at least 1; got {image_shape}")
    _, height, width = image_shape
    if height % 2**levels or width % 2**levels:
        fewer = max(n for n in range(levels) if not (height % 2**n or width % 2**n))
        advice = f"these can be halved {fewer} times" if fewer else "these cannot be halved"
        raise ValueError(
            f"image_shape must have height and width divisible by {2**levels}, to be halved at each of {levels} levels; "
            f"got {height} x {width}: {advice}"
        )
