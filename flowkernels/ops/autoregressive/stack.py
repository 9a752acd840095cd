"""Several masked autoregressive maps, one after another, in one call: each tile of rows passes through all of them before the next
tile begins, so that what goes from map to map stays in the cache, and a small flow pays for one call rather than for each.
"""

from collections.abc import Sequence
from operator import is_

import torch
from torch import Tensor

from ... import _extension
from ..._backend import rounds_loop_weights, wants_reference
from ..._torch import any_autocast
from .._differentiation import needs_autograd, transformed
from ..scale_map import PoweredMap
from .loop import Lists, Map, in_turn, stack_op
from .map import autoregressive, check_input, check_outputs, checked
from .training import in_parallel, loop_serves, serves, with_gradient

# torch.compile cannot ask
_COMPILED_FOR_CPU, _COMPILED_FOR_CUDA = (_extension.has_kernel("autoregressive_stack", d) for d in ("CPU", "CUDA"))


def autoregressive_stack(x: Tensor, maps: Sequence[Map], context: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Several autoregressive maps, the first one first: y = map_n(... map_1(x)), and the sum of their log|det|s.

    The result is that of calling `autoregressive` map by map; so are its gradients. Where a compiled kernel serves, and the tensors
    are float32 or float64, it is one call of the op, and with a gradient one node of autograd's graph, unless the gradient meets an
    affine map between; elsewhere it is made map by map.

    Args:
        x: [batch, features].
        maps: at least one, all of as many features. A map that takes no context is not given it.
        context: [batch, context features] where a network takes one.

    Returns:
        y like x, and the sum of the maps' log|det|s (nats), [batch].

    Raises:
        ValueError: as `autoregressive`, or there is no map.
    """
    if not maps:
        raise ValueError("maps must hold at least one map; got none")
    if context is not None and not any(m.conditioner.context_weights for m in maps):
        raise ValueError(f"context was given, {list(context.shape)}, but no network takes one")
    if _serves(x, maps) and not any_autocast() and not wants_reference("autoregressive_stack", x.device):
        lists = Lists.of(maps)
        if not _needs_autograd(x, context, maps, lists):
            if rounds_loop_weights(x):
                lists = Lists.of(maps, bfloat16_weights=True)
            y, logabsdet, _ = checked(_check, (x, maps, context), stack_op, x, context, *lists, False)
            return y, logabsdet
        given, maps = maps, [*map(in_parallel, maps)]
        if serves(maps, x):
            lists = lists if all(map(is_, given, maps)) else Lists.of(maps)
            return checked(_check, (x, maps, context), with_gradient, x, context, maps, lists)
    by_itself = lambda x, own, m: autoregressive(x, m.conditioner, own, scale=m.scale, form=m.form, inverse=m.inverse)
    return in_turn(x, context, maps, by_itself)


def _needs_autograd(x: Tensor, context: Tensor | None, maps: Sequence[Map], lists: Lists) -> bool:
    if not torch.is_grad_enabled():
        return needs_autograd(())
    learned = (m.scale.a for m in maps if isinstance(m.scale, PoweredMap))
    networks = (*lists.weights, *lists.biases, *lists.context_weights, *lists.context_biases)
    return needs_autograd((x, context, *networks, *lists.affines, *learned))


def _check(x: Tensor, maps: Sequence[Map], context: Tensor | None) -> None:
    for m in maps:
        check_input(x, m.conditioner, context if m.conditioner.context_weights else None)
        check_outputs(m.conditioner, m.scale, m.form)


def _serves(x: Tensor, maps: Sequence[Map]) -> bool:
    if x.is_cuda or torch.compiler.is_compiling():  # on a CPU a loop serves them all
        for m in maps:
            if not loop_serves(m.conditioner, m.scale, x.is_cuda):
                return False
    if maps[0].conditioner.weights[-1].device != x.device:  # a fake kernel, which refuses nothing, would take weights without data
        return False
    compiled = (_COMPILED_FOR_CPU and x.is_cpu) or (_COMPILED_FOR_CUDA and x.is_cuda)
    return compiled and x.dtype in (torch.float32, torch.float64) and not transformed()
