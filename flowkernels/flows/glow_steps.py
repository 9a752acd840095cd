"""The steps of one level of Glow, and which of them run as one op."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .._dtypes import HALF
from .._torch import has_global_hooks, has_half_products
from ..layers import ActNormConv1x1, AdditiveCoupling, AffineCoupling
from ..layers._dtype import check_dtype
from ..layers._fold import Folded, fold
from ..layers._plain import is_plain
from ..ops import Form, Part, glow_step, glow_steps
from ..ops._differentiation import as_dtype
from ..ops.glow_step import runs_in_triton
from ..ops.glow_step.reference import SCALE, steps_in_turn
from .networks import plain_parameters


class GlowSteps(nn.Module):
    """The steps of one level. Their matrices, all of one size, are computed in one go before the first.

    Each affine coupling is joined with the actnorm and the convolution that come next. On a CPU channels lie last all the way, and where
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
    """Whether this is the first batch, of parts that are Glow's own: nobody is there to see them called twice."""
    first = mixings[0]
    if type(first) is not ActNormConv1x1 or not first.folds() or first._modules["actnorm"].ready or has_global_hooks():
        return False
    own = all([is_plain(m, ActNormConv1x1) and m.folds() and not m._modules["actnorm"].ready for m in mixings])
    plain = all([is_plain(c, AffineCoupling) or is_plain(c, AdditiveCoupling) for c in couplings])
    return own and plain and all([plain_parameters(c._modules["conditioner"]) is not None for c in couplings])


def _joins(x: Tensor, mixings: Sequence[nn.Module], couplings: Sequence[nn.Module]) -> bool:
    served = (x.is_cpu or runs_in_triton(x)) and (x.dtype in (torch.float32, torch.float64) or _widens(x))
    if not served or torch.is_autocast_enabled(x.device.type) or x.dtype != _bias(mixings[0]).dtype:
        return False
    if not all([_is_glows(coupling) for coupling in couplings]) or not all([is_plain(mixing, ActNormConv1x1) for mixing in mixings]):
        return False
    return x.dtype not in HALF or all([plain_parameters(coupling._modules["conditioner"]) is not None for coupling in couplings])


def _widens(x: Tensor) -> bool:
    """Whether half precision is computed in float32: where torch's own convolutions of it are slow."""
    return x.is_cpu and x.dtype in HALF and not has_half_products(x.dtype)


def _joined(
    x: Tensor,
    context: Tensor | None,
    mixings: Sequence[nn.Module],
    couplings: Sequence[nn.Module],
    folded: Folded,
    *,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    weights, biases = folded.weights, [_bias(mixing) for mixing in mixings]
    conditioners = [coupling._modules["conditioner"] for coupling in couplings]
    networks = [plain_parameters(conditioner) for conditioner in conditioners]
    rows = x.movedim(1, -1)
    if None in networks:
        calls = [partial(_called, conditioner, context) for conditioner in conditioners]
        rows, logabsdet = steps_in_turn(glow_step, rows, calls, weights, biases, inverse=inverse)
    else:
        check_dtype(biases[0], context=context)
        if x.dtype in HALF:
            widen = lambda tensors: [t.float() for t in tensors]
            (rows,), weights, biases, networks = widen([rows]), widen(weights), widen(biases), [*map(widen, networks)]
            context = None if context is None else context.float()
        rows, logabsdet = glow_steps(rows, networks, weights, biases, context=context, inverse=inverse)
        rows = as_dtype(rows, x.dtype)
    return rows.movedim(-1, 1), logabsdet + _sites(x) * folded.logabsdets.sum()


def _bias(mixing: nn.Module) -> Tensor:
    return mixing._modules["actnorm"]._parameters["bias"]


def _is_glows(coupling: nn.Module) -> bool:
    """Whether it is the coupling that `glow_step` computes."""
    if not is_plain(coupling, AffineCoupling) or coupling._parameters["scale_parameter"] is not None or not coupling.interleaved:
        return False
    return coupling.part == Part.SECOND_HALF and coupling.form == Form.SHIFT_SCALE and coupling.scale == SCALE


def _called(conditioner: nn.Module, context: Tensor | None, x: Tensor) -> Tensor:
    return conditioner(x) if context is None else conditioner(x, context)


def _sites(x: Tensor) -> int:
    return x.shape[2:].numel()


def _total(logabsdets: list[Tensor]) -> Tensor:
    """The sum of tensors [batch]: one op for many."""
    return torch.stack(logabsdets).sum(0)
