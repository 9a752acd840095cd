"""Invertible 1x1 convolution, by itself and with the actnorm before it."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from .._torch import any_autocast, has_global_hooks, times_written
from ..ops import glow_step
from ..ops.glow_step import runs_in_triton
from ._building import built_on_cpu
from ._dtype import check_dtype
from ._fold import Folded, Frozen, compose, fold, freeze_weights, logabsdets_of
from ._plain import is_plain
from ._sizes import check_channels, parse_count
from ._structure import Structured
from .actnorm import ActNorm

_Call = Callable[[Tensor], tuple[Tensor, Tensor]]


class InvertibleConv1x1(Structured):
    """Invertible 1x1 convolution (Glow, Kingma & Dhariwal 2018, section 3.2): one C x C matrix at every site.

        z[b, :, site] = W x[b, :, site],   logabsdet = sites * log|det W|

    With parametrization "lu", W = P L (U + diag(sign * exp(log_diagonal))), where the permutation P and the signs stay as they were
    initialised, and log|det W| = sum log_diagonal needs no factorisation. With "plain", W is the parameter itself, and log|det W|
    comes from `ops.slogdet`. W starts as a random rotation.

    The inverse matrix is computed in float64 at every call of `inverse`, unless `freeze` keeps it; training, loading and moving
    drop what is kept, and so does writing into the parameters, where torch counts it: not through `.data`, not by fused optimizers.

    Args:
        channels: number of channels C.
        parametrization: "lu" or "plain".

    Shape:
        x, z: [batch, C, *sites], any number of site dimensions, any memory format; logabsdet: [batch], in nats.

    Raises:
        ValueError: another channel count, or an unknown parametrization.
    """

    @built_on_cpu
    def __init__(self, channels: int, *, parametrization: str = "lu") -> None:
        super().__init__()
        channels = parse_count("channels", channels)
        if parametrization not in ("lu", "plain"):
            raise ValueError(f"parametrization must be 'lu' or 'plain'; got {parametrization!r}")
        self.channels, self.parametrization = channels, parametrization
        self._frozen: Frozen | None = None
        rotation = _random_rotation(channels)
        if parametrization == "plain":
            self.plain_weight = nn.Parameter(rotation.to(torch.get_default_dtype()).contiguous())
            return
        permutation, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        # L strictly below the diagonal, U strictly above it
        self.factors = nn.Parameter((lower.tril(-1) + upper.triu(1)).to(torch.get_default_dtype()))
        self.log_diagonal = nn.Parameter(diagonal.abs().log().to(torch.get_default_dtype()))
        self.register_buffer("sign", diagonal.sign().to(torch.get_default_dtype()))
        self.register_integers("row", permutation.argmax(1))  # row i of W is row row[i] of L U

    def kept(self) -> Frozen | None:
        """What `freeze` keeps; None where a gradient has to reach the parameters."""
        frozen = self._frozen  # looked up once: another thread may freeze or train
        if frozen is None or (torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())):
            return None
        return frozen if self._is_fresh(frozen) else None

    def _is_fresh(self, frozen: Frozen) -> bool:
        """Whether parameters and buffers are those that were frozen, and nobody has written into them. A compiler guards neither."""
        if torch.compiler.is_compiling():
            return True
        kept, now = frozen.versions, self._versions()
        return len(kept) == len(now) and all(p is q and m == n for (p, m), (q, n) in zip(kept, now, strict=True))

    def _versions(self) -> tuple[tuple[Tensor, int], ...]:
        return tuple((t, times_written(t)) for tensors in (self._parameters, self._buffers) for t in tensors.values())

    def __getstate__(self) -> dict:
        frozen = self._frozen
        return self.__dict__ | {"_frozen": frozen if frozen is not None and self._is_fresh(frozen) else None}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if self._frozen is not None:  # a copy's parameters begin a count of their own
            self._frozen = self._frozen._replace(versions=self._versions())

    def weight(self) -> Tensor:
        """W, [channels, channels]."""
        kept = self.kept()
        return compose([self]).weights[0] if kept is None else kept.weight

    def weight_logabsdet(self) -> Tensor:
        """log|det W|, in float32, or float64 for a float64 weight."""
        kept = self.kept()
        return logabsdets_of([self])[0] if kept is None else kept.logabsdet

    def logabsdet_and_inverse(self) -> tuple[Tensor, Tensor]:
        """log|det W| and W^-1, which is computed in float64."""
        kept = self.kept()
        if kept is not None:
            return kept.logabsdet, kept.inverse
        inverses, logabsdets = compose([self], inverse=True)
        return -logabsdets[0], inverses[0]

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        weight = self.weight()
        _check("x", x, weight)
        return conv1x1(x, weight), _over_sites(self.weight_logabsdet(), x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logabsdet, inverse = self.logabsdet_and_inverse()
        _check("z", z, inverse)
        return conv1x1(z, inverse), _over_sites(-logabsdet, z)

    def freeze(self) -> Self:
        """Keep weight, log-determinant and inverse until `train()`, loading, moving or writing into the parameters.

        Raises:
            ValueError: the weight is singular; the message has its condition number.
        """
        freeze_weights({"InvertibleConv1x1": self})
        return self

    def train(self, mode: bool = True) -> Self:
        if mode:
            self._frozen = None
        return super().train(mode)

    def _apply(self, *arguments, **options) -> Self:
        self._frozen = None
        return super()._apply(*arguments, **options)

    def _load_from_state_dict(self, *arguments) -> None:
        self._frozen = None
        super()._load_from_state_dict(*arguments)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, parametrization={self.parametrization!r}"


class ActNormConv1x1(nn.Module):
    """Actnorm and then an invertible 1x1 convolution, as the first two layers of a Glow step, in one product.

        forward:  z = W diag(exp(log_scale)) (x + bias)
        inverse:  x = diag(exp(-log_scale)) W^-1 z - bias

    Actnorm's scale goes into the matrix. Its bias does not: x + bias is small where the mean of x is large, and the product would
    have to cancel what W' x + (W' bias) first makes large (measured: 7 times the error at a mean of 10 standard deviations, 70 at 100).

    Args:
        channels: number of channels C.
        parametrization: of the convolution, "lu" or "plain".

    Shape:
        x, z: [batch, C, *sites]; logabsdet: [batch], in nats.

    Raises:
        ValueError, RuntimeError: as `ActNorm` and `InvertibleConv1x1`.
    """

    def __init__(self, channels: int, *, parametrization: str = "lu") -> None:
        super().__init__()
        self.actnorm = ActNorm(channels)
        self.conv = InvertibleConv1x1(channels, parametrization=parametrization)

    def folds(self) -> bool:
        """Whether its parts are what `fold` computes. Others, and those that somebody watches, are called one after the other."""
        parts = self._modules
        return is_plain(parts["actnorm"], ActNorm) and is_plain(parts["conv"], InvertibleConv1x1)

    def forward(self, x: Tensor, context: Tensor | None = None, *, folded: Folded | None = None, at: int = 0) -> tuple[Tensor, Tensor]:
        """folded: what `fold` made of several layers, of which this is number `at`, where it is known already."""
        if folded is None and (has_global_hooks() or not self.folds()):
            return _in_turn(x, self.actnorm, self.conv)
        self.actnorm.prepare(x)
        weight, logabsdet = _number(at, fold([self]) if folded is None else folded)
        _check("x", x, weight)
        return _actnorm_conv1x1(x, weight, self.actnorm.bias, inverse=False), _over_sites(logabsdet, x)

    def inverse(self, z: Tensor, context: Tensor | None = None, *, folded: Folded | None = None, at: int = 0) -> tuple[Tensor, Tensor]:
        """folded: what `fold(..., inverse=True)` made of several layers, of which this is number `at`, where it is known already."""
        if folded is None and not self.folds():
            return _in_turn(z, self.conv.inverse, self.actnorm.inverse)
        self.actnorm.prepare_inverse(z)
        weight, logabsdet = _number(at, fold([self], inverse=True) if folded is None else folded)
        _check("z", z, weight)
        return _actnorm_conv1x1(z, weight, self.actnorm.bias, inverse=True), _over_sites(logabsdet, z)


def _in_turn(x: Tensor, first: _Call, second: _Call) -> tuple[Tensor, Tensor]:
    x, a = first(x)
    x, b = second(x)
    return x, a + b


def _number(at: int, folded: Folded) -> tuple[Tensor, Tensor]:
    return folded.weights[at], folded.logabsdets[at]


def _actnorm_conv1x1(x: Tensor, weight: Tensor, bias: Tensor, *, inverse: bool) -> Tensor:
    """weight (x + bias), or weight x - bias; one pass on a GPU, where memory is the limit, for an even number of channels."""
    served = runs_in_triton(x) and x.dtype in (torch.float32, torch.float64) and x.shape[1] % 2 == 0
    if served and 0 not in x.shape[2:] and not any_autocast():
        return glow_step(x.movedim(1, -1), None, weight, bias, inverse=inverse, passes=False)[0].movedim(-1, 1)
    return conv1x1(x, weight, after=-bias) if inverse else conv1x1(x, weight, before=bias)


def conv1x1(x: Tensor, weight: Tensor, *, before: Tensor | None = None, after: Tensor | None = None) -> Tensor:
    """y[b, :, site] = weight (x[b, :, site] + before) + after.

    One product by torch: on a CPU it takes the time of its multiply-adds (C=48), and the sum before it 5 percent more, so that a
    kernel of our own has nothing to win.

    Args:
        x: [batch, C, *sites]; the memory format of images is kept.
        weight: [C', C].
        before: [C], or None. after: [C'], or None.

    Returns:
        [batch, C', *sites].
    """
    sites = x.dim() - 2
    if sites and x.movedim(1, -1).is_contiguous() and not x.is_contiguous():  # channels-last
        y = nn.functional.linear(x.movedim(1, -1) if before is None else x.movedim(1, -1) + before, weight, after)
        return y.movedim(-1, 1)
    if not sites:
        return nn.functional.linear(x if before is None else x + before, weight, after)
    if before is not None:
        x = x + before.view((-1,) + (1,) * sites)
    # matmul folds x into one product, and copies it for that, where the weight asks for a gradient, recorded or not
    given = weight if torch.is_grad_enabled() else weight.detach()
    y = torch.matmul(given, x.flatten(2)).unflatten(2, x.shape[2:])
    return y if after is None else y + after.view((-1,) + (1,) * sites)


def _random_rotation(channels: int) -> Tensor:
    """Uniform over rotations (Mezzadri 2007), in float64."""
    q, r = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))
    q = q * r.diagonal().sign()
    if torch.linalg.slogdet(q)[0] < 0:
        q[:, 0].neg_()
    return q


def _check(name: str, x: Tensor, weight: Tensor) -> None:
    check_channels(name, x, len(weight))
    check_dtype(weight, **{name: x})


def _over_sites(logabsdet: Tensor, x: Tensor) -> Tensor:
    return (x.shape[2:].numel() * logabsdet).expand(x.shape[0]).contiguous()  # whoever gets it may add to it
