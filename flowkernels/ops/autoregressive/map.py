"""The op `autoregressive`: one map, in either direction."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..._backend import rounds_loop_weights, wants_reference
from ..._dtypes import HALF
from ..._torch import any_autocast
from .._autocast import cast
from .._differentiation import needs_autograd, transformed
from ..masked_linear import masked_linear
from ..masked_linear.reference import masked_linear_dense
from ..scale_map import Form, PoweredMap, ScaleKind, ScaleMap, parse_form, parse_scale
from .conditioner import Conditioner, context_features
from .implicit import inverse_with_gradient
from .loop import Lists, Map, autoregressive_op, stack_op
from .reference import autoregressive_reference, is_coupling
from .training import in_parallel, loop_serves, serves, with_gradient


def autoregressive(
    x: Tensor,
    conditioner: Conditioner,
    context: Tensor | None = None,
    *,
    scale: ScaleMap | PoweredMap | None = None,
    form: str | Form = "scale_shift",
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Affine autoregressive map with a masked network as its conditioner (Papamakarios et al. 2017, section 3).

    Forward, z_i = x_i * sigma(s_i) + shift_i for form "scale_shift", where (shift_i, s_i) depend on the features generated before
    feature i and on the context; `inverse` undoes it, in one fused loop where a kernel serves, in D passes of the network
    elsewhere. So is its gradient, which is one more loop, or D vector-Jacobian products of one graph. Features for which the network
    has no output pass unchanged: a coupling whose network reads those is the same loop in one step.

    Half precision is computed in float32 and rounded once. Under autocast x and context take the dtype of the weights, so a float32
    network stays in float32, in both directions. A GPU's loop rounds weights only where `flowkernels.loop_weights` asks for it.

    Args:
        x: input of the map that is applied: data, or noise with `inverse`; [batch, features].
        conditioner: the network, plain, residual or gated by the context; `check_conditioner` tells whether it is autoregressive.
        context: [batch, context features] where the network takes one. On a CPU, rows of the same context that stand together share what
            is made of it.
        scale: scale map from raw scale to sigma; `ScaleMap.softclip()` by default. With `ScaleMap.unit()` the network gives shifts alone.
        form: "scale_shift" x*sigma + shift, "shift_scale" (x + shift)*sigma, "divide" (x - shift)/sigma, or
            "gate" sigma*x + (1 - sigma)*shift.
        inverse: undo the map.

    Returns:
        The mapped tensor, with the shape and dtype of x, and log|det| of the map just applied (nats), [batch], in float32, or
        float64 for float64 inputs.

    Raises:
        ValueError: a shape, dtype or device does not fit, the context is missing, unexpected or of another batch, scale is no scale map,
            or form is unknown.
    """
    if any_autocast() and torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            x, context = (cast(t, conditioner.weights[-1].dtype) for t in (x, context))
            return autoregressive(x, conditioner, context, scale=scale, form=form, inverse=inverse)
    if not isinstance(scale, PoweredMap):
        scale = parse_scale(scale)
    form = parse_form(form)
    last, dtype = conditioner.weights[-1], x.dtype
    compute, is_bfloat16 = _COMPUTE.get(dtype), False
    if dtype != compute or last.dtype != compute or x.device != last.device:
        _check(x, conditioner, context, scale, form)
        is_bfloat16 = x.is_cuda and all(w.dtype is torch.bfloat16 for w in (*conditioner.weights, *conditioner.context_weights))
        x, conditioner = x.to(compute), conditioner.to(compute)
        context = None if context is None else context.to(compute)
        if isinstance(scale, PoweredMap):
            scale = scale._replace(a=scale.a.to(compute))

    weights, biases, _, _, context_weights, _, _, context_biases = conditioner
    learned = scale.a if isinstance(scale, PoweredMap) else None
    if needs_autograd((x, context, learned, *weights, *biases, *context_weights, *context_biases)):
        _check(x, conditioner, context, scale, form)
        maps = [in_parallel(Map(conditioner, scale, form, inverse))]
        if serves(maps, x):
            y, logabsdet = with_gradient(x, context, maps, Lists.of(maps))
        elif inverse and _passes_are_many(conditioner, scale, x.device):
            y, logabsdet = inverse_with_gradient(x, conditioner, context, scale, form)
        else:
            linear = masked_linear_dense if transformed() else masked_linear
            y, logabsdet = autoregressive_reference(x, conditioner, context, scale, form, inverse, linear=linear)
    elif wants_reference("autoregressive", x.device) or not loop_serves(conditioner, scale, x.is_cuda):
        _check(x, conditioner, context, scale, form)
        y, logabsdet = autoregressive_reference(x, conditioner, context, scale, form, inverse)
    else:
        subject = x, conditioner, context, scale, form
        if is_bfloat16 or rounds_loop_weights(x):
            lists = Lists.of([Map(conditioner, scale, form, inverse)], bfloat16_weights=True)
            y, logabsdet, _ = checked(_check, subject, stack_op, x, context, *lists, False)
        else:
            y, logabsdet = checked(_check, subject, autoregressive_op, x, context, conditioner, scale, form, inverse)
    return (y if dtype == compute else y.to(dtype)), logabsdet


def _passes_are_many(conditioner: Conditioner, scale: ScaleMap | PoweredMap, device: torch.device) -> bool:
    """Whether an inverse is not to be differentiated through the passes that the reference makes: they are more than one, and nobody has
    to look into them."""
    if transformed() or torch.compiler.is_compiling() or wants_reference("autoregressive", device):
        return False
    return not is_coupling(conditioner, conditioner.passing(scale))


# the loop computes in float64 for float64, in float32 for everything narrower
_COMPUTE = {torch.float64: torch.float64} | dict.fromkeys((torch.float32, *HALF), torch.float32)


def checked(check: Callable[..., None], subject: tuple, op: Callable, *args):
    """op(*args). What does not fit is told by check(*subject), which is asked where the op refuses: a small flow's checks take as long as
    its loop. Ops check what would corrupt memory."""
    if torch.compiler.is_compiling():
        check(*subject)
        return op(*args)
    try:
        return op(*args)
    except RuntimeError:
        check(*subject)
        raise


def _check(x: Tensor, conditioner: Conditioner, context: Tensor | None, scale: ScaleMap | PoweredMap, form: Form) -> None:
    check_input(x, conditioner, context)
    check_outputs(conditioner, scale, form)


def check_input(x: Tensor, conditioner: Conditioner, context: Tensor | None) -> None:
    last, features = conditioner.weights[-1], conditioner.features
    if x.dim() != 2 or x.shape[1] != features:
        raise ValueError(f"x must have shape [batch, {features}], one column per feature; got {list(x.shape)}")
    if x.dtype not in _COMPUTE:
        raise ValueError(f"x must be float64, float32, float16 or bfloat16; got {x.dtype}")
    if x.device != last.device:
        raise ValueError(f"x must be on {last.device}, like the weights; got {x.device}")
    if x.dtype != last.dtype and not (x.dtype in HALF and last.dtype is torch.float32):
        raise ValueError(f"x must be {last.dtype}, like the weights; got {x.dtype}")
    wanted = context_features(conditioner)
    if context is None:
        if wanted:
            raise ValueError(f"context is missing: the network takes [batch, {wanted}]")
        return
    if not wanted:
        raise ValueError(f"context was given, {list(context.shape)}, but the network takes none")
    if context.shape != (x.shape[0], wanted):
        raise ValueError(f"context must have shape [{x.shape[0]}, {wanted}], one row per row of x; got {list(context.shape)}")
    if context.device != x.device or context.dtype != x.dtype:
        raise ValueError(f"context must be {x.dtype} on {x.device}, like x; got {context.dtype} on {context.device}")


def check_outputs(conditioner: Conditioner, scale: ScaleMap | PoweredMap, form: Form) -> None:
    conditioner.passing(scale)
    if scale.kind == ScaleKind.UNIT and form == Form.GATE:
        raise ValueError("form must not be 'gate' where sigma is 1: its shift would have no weight")
    if not isinstance(scale, PoweredMap):
        return
    if scale.kind != ScaleKind.EXP_TANH or scale.a.numel() != 1:
        raise ValueError(f"a learned scale must be one number over an exp_tanh map; got {list(scale.a.shape)} over {scale.scale!r}")
    if scale.a.dtype != conditioner.weights[-1].dtype:
        raise ValueError(f"a learned scale must be {conditioner.weights[-1].dtype}, like the weights; got {scale.a.dtype}")
