"""The joined Glow step in plain PyTorch, and its vector-Jacobian product."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..._backend import chosen
from ..conv_net.reference import conv_net_reference, conv_net_training_reference, per_network
from ..coupling.part import Part
from ..coupling.reference import Coupling, coupling_backward_reference, coupling_reference
from ..scale_map import Form, ScaleMap

SCALE = ScaleMap.sigmoid(bias=2.0)


def may_lie_first(x: Tensor) -> bool:
    """Whether channels may lie first in memory: not for a CPU's kernels."""
    return x.is_cuda or chosen() == "triton"


def like_x(x: Tensor, channels: int) -> Tensor:
    """Empty, [batch, *sites, channels]; channels lie first in memory where those of x do, and may."""
    if x.is_contiguous() or not may_lie_first(x):
        return x.new_empty((*x.shape[:-1], channels))
    return x.new_empty((x.shape[0], channels, *x.shape[1:-1])).movedim(1, -1)


def laid_out(x: Tensor, t: Tensor) -> Tensor:
    """t if it lies in memory as `like_x` does, else a copy that does."""
    like = like_x(x, t.shape[-1])
    return t if t.stride() == like.stride() else like.copy_(t)


def glow_step_reference(
    x: Tensor, raw: Tensor | None, weight: Tensor | None, bias: Tensor | None, inverse: bool, passes: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """y, log|det| of the coupling, and, if `passes`, the first half of y's channels; x and raw are [batch, *sites, channels]."""
    h, logabsdet = _couple(x, raw, inverse)
    y = h if weight is None else h @ weight.mT - bias if inverse else (h + bias) @ weight.mT
    return y, logabsdet, y[..., : y.shape[-1] // 2].clone() if passes else y.new_empty(0)


def steps_in_turn(
    step: Callable[..., tuple[Tensor, Tensor, Tensor]],
    x: Tensor,
    networks: Sequence[Callable[[Tensor], Tensor]],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """The steps of a level one after another, by `glow_step` or its reference. networks: of images [batch, channels, H, W]."""
    logabsdets = []
    if inverse:
        passing = x[..., : x.shape[-1] // 2]
        for i in reversed(range(len(weights))):
            raw = networks[i](passing.movedim(-1, 1)).movedim(1, -1)
            x, logabsdet, passing = step(x, raw, weights[i], biases[i], inverse=True, passes=i > 0)
            logabsdets.append(logabsdet)
    else:
        x, _, passing = step(x, None, weights[0], biases[0], inverse=False)
        for network, weight, bias in zip(networks, [*weights[1:], None], [*biases[1:], None], strict=True):
            raw = network(passing.movedim(-1, 1)).movedim(1, -1)
            x, logabsdet, passing = step(x, raw, weight, bias, inverse=False, passes=weight is not None)
            logabsdets.append(logabsdet)
    return x, torch.stack(logabsdets).sum(0)  # one op for many


def with_context(x: Tensor, context: Tensor | None) -> Tensor:
    """x, [batch, channels, H, W], and the context as channels of constant value."""
    return x if context is None else torch.cat([x, context[:, :, None, None].expand(*context.shape, *x.shape[2:])], 1)


def networks_of(parameters: Iterable[Sequence[Tensor]], context: Tensor | None, conv_net: Callable) -> list[Callable[[Tensor], Tensor]]:
    """Networks for `steps_in_turn`, by `conv_net` or its reference, from the parameters of each."""
    return [lambda x, own=own: conv_net(with_context(x, context), *own) for own in parameters]


def glow_steps_reference(
    x: Tensor, context: Tensor | None, networks: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor], inverse: bool
) -> tuple[Tensor, Tensor]:
    """networks: the tensors of one for each step, as `conv_net` takes them."""
    nets = networks_of(per_network(networks), context, conv_net_reference)
    return steps_in_turn(glow_step_reference, x, nets, weights, biases, inverse=inverse)


def glow_steps_training_reference(
    x: Tensor, context: Tensor | None, networks: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor], inverse: bool
) -> tuple[Tensor, ...]:
    """The same, and what the gradient asks for of each step, [steps, batch, H, W, ...]: the rows that its coupling is given, what its
    network returns and is given, and the two hidden layers. The inverse begins with the last step, whose rows are x and not among them."""
    own = per_network(networks)
    kept: dict[int, tuple[Tensor, ...]] = {}
    rows: list[Tensor] = []

    def network(i: int, images: Tensor) -> Tensor:
        given = with_context(images, context)
        raw, first, second = conv_net_training_reference(given, *own[i])
        kept[i] = tuple(t.movedim(1, -1) for t in (raw, given, first, second))
        return raw

    def step(x: Tensor, raw: Tensor | None, *rest, **options: bool) -> tuple[Tensor, Tensor, Tensor]:
        if raw is not None:
            rows.append(x)
        return glow_step_reference(x, raw, *rest, **options)

    nets = [partial(network, i) for i in range(len(weights))]
    y, logabsdet = steps_in_turn(step, x, nets, weights, biases, inverse=inverse)
    if inverse:
        rows = rows[:0:-1]
    others = (torch.stack([kept[i][k] for i in range(len(weights))]) for k in range(4))
    return y, logabsdet, torch.stack(rows) if rows else x.new_empty(0, *x.shape), *others


def glow_step_backward_reference(
    dy: Tensor,
    dlogabsdet: Tensor,
    dpassing: Tensor | None,
    x: Tensor,
    raw: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    inverse: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients to x, raw, weight and bias."""
    if dpassing is not None:
        dy = dy + torch.nn.functional.pad(dpassing, (0, dpassing.shape[-1]))
    dh, dweight, dbias = dy, None, None
    if weight is not None:
        h, _ = _couple(x, raw, inverse)
        dh = dy @ weight
        sites = tuple(range(dy.dim() - 1))
        dbias = -dy.sum(sites) if inverse else dh.sum(sites)
        dweight = dy.flatten(0, -2).mT @ (h if inverse else h + bias).flatten(0, -2)
    if raw is None:
        return dh, None, dweight, dbias
    dh, x, raw = (t.movedim(-1, 1) for t in (dh, x, raw))
    dx, dshift, ds, _ = coupling_backward_reference(dh, dlogabsdet, x, raw[:, 0::2], raw[:, 1::2], None, _options(inverse), False)
    draw = torch.stack([dshift, ds], 2).flatten(1, 2)
    return dx.movedim(1, -1), draw.movedim(1, -1), dweight, dbias


def _options(inverse: bool) -> Coupling:
    return Coupling(Part.SECOND_HALF, SCALE, Form.SHIFT_SCALE, inverse)


def _couple(x: Tensor, raw: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
    if raw is None:
        return x, x.new_zeros(x.shape[:1])
    x, raw = x.movedim(-1, 1), raw.movedim(-1, 1)
    h, logabsdet = coupling_reference(x, raw[:, 0::2], raw[:, 1::2], None, _options(inverse))
    return h.movedim(1, -1), logabsdet
