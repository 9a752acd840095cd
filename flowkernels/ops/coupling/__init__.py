"""Coupling: one part of x is mapped affinely, with shift and scale that a conditioner made of the rest.

    affine (RealNVP, Dinh et al. 2016; Glow, Kingma & Dhariwal 2018)   y = form(x; shift, sigma(raw_scale))   on the transformed part
    additive (NICE, Dinh et al. 2014)                                  y = x + shift                          on the transformed part
                                                                       y = x                                  on the rest

One kernel splits, applies the scale map and the form, copies the rest and sums the log-determinant of each sample.
"""

import torch
from torch import Tensor

from ..._backend import as_called, chosen, register_triton, wants_reference
from ..._dtypes import FLOATING
from ..._library import library, register_fake
from .._differentiation import apply_function, needs_autograd, transformed, vmap_one_by_one
from .._layout import empty_in_layout_of, in_layout_of
from ..scale_map import Form, ScaleKind, ScaleMap, default_scale, parse_form, parse_scale
from .part import Part, parse_part
from .reference import Coupling, coupling_backward_reference, coupling_reference

__all__ = ["Part", "coupling", "parse_part"]

_OPTIONS = "int part, int scale_kind, float scale_p0, float scale_p1, int form, bool inverse"
library.define(f"coupling(Tensor x, Tensor shift, Tensor? raw_scale, Tensor? scale_parameter, {_OPTIONS}) -> (Tensor, Tensor)")
library.define(
    "coupling_backward(Tensor dy, Tensor dlogabsdet, Tensor kept, Tensor shift, Tensor raw_scale, Tensor? scale_parameter, "
    f"{_OPTIONS}, bool from_output) -> (Tensor, Tensor, Tensor, Tensor)"
)

Packed = tuple[int, int, float, float, int, bool]


def _unpack(part: int, kind: int, p0: float, p1: float, form: int, inverse: bool) -> Coupling:
    return Coupling(Part(part), ScaleMap.from_packed(kind, p0, p1), Form(form), inverse)


def _composite(x: Tensor, shift: Tensor, raw_scale: Tensor | None, scale_parameter: Tensor | None, *options) -> tuple[Tensor, Tensor]:
    y, logabsdet = coupling_reference(x, shift, raw_scale, scale_parameter, _unpack(*options))
    return in_layout_of(x, y), logabsdet


def _composite_backward(
    dy: Tensor, dlogabsdet: Tensor, kept: Tensor, shift: Tensor, raw_scale: Tensor, scale_parameter: Tensor | None, *options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *packed, from_output = options
    dx, dshift, draw_scale, dparameter = coupling_backward_reference(
        dy, dlogabsdet, kept, shift, raw_scale, scale_parameter, _unpack(*packed), from_output
    )
    dparameter = shift.new_empty(0) if dparameter is None else dparameter
    return in_layout_of(dy, dx), in_layout_of(shift, dshift), in_layout_of(raw_scale, draw_scale), dparameter


library.impl("coupling", _composite, "CompositeExplicitAutograd")
library.impl("coupling_backward", _composite_backward, "CompositeExplicitAutograd")
register_triton("coupling", f"{__name__}.kernels", _composite)
register_triton("coupling_backward", f"{__name__}.kernels", _composite_backward)
_coupling = torch.ops.flowkernels.coupling.default
_coupling_backward = torch.ops.flowkernels.coupling_backward.default


@register_fake("coupling")
def _(x: Tensor, *_) -> tuple[Tensor, Tensor]:
    return empty_in_layout_of(x), x.new_empty(x.shape[:1], dtype=torch.promote_types(x.dtype, torch.float32))


@register_fake("coupling_backward")
def _(dy: Tensor, dlogabsdet: Tensor, kept: Tensor, shift: Tensor, raw_scale: Tensor, scale_parameter: Tensor | None, *_):
    dparameter = shift.new_empty(0) if scale_parameter is None else torch.empty_like(scale_parameter, memory_format=torch.contiguous_format)
    return empty_in_layout_of(dy), empty_in_layout_of(shift), empty_in_layout_of(raw_scale), dparameter


def _vmap_backward(info, in_dims, *args) -> tuple:
    """Rows of all batches make one larger batch; for a scale_parameter, whose gradient is a sum over rows, the op runs once for each."""
    if args[5] is not None:
        return vmap_one_by_one(_coupling_backward, info, in_dims, *args)
    size = info.batch_size
    rows = [t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0) for t, dim in zip(args[:5], in_dims[:5], strict=True)]
    *gradients, none = _coupling_backward(*(t.flatten(0, 1) for t in rows), *args[5:])
    return (*(g.unflatten(0, (size, rows[0].shape[1])) for g in gradients), none.new_empty(size, 0)), (0,) * 4


torch.library.register_vmap("flowkernels::coupling_backward", _vmap_backward, lib=library)


def _forward(x: Tensor, shift: Tensor, raw_scale: Tensor | None, scale_parameter: Tensor | None, options: Packed) -> tuple[Tensor, Tensor]:
    if wants_reference("coupling", x.device):
        return coupling_reference(x, shift, raw_scale, scale_parameter, _unpack(*options))
    return _coupling(x, shift, raw_scale, scale_parameter, *options)


class _Coupling(torch.autograd.Function):
    @staticmethod
    def forward(x, shift, raw_scale, scale_parameter, keeps_output: bool, options: Packed) -> tuple[Tensor, Tensor]:
        return _forward(x, shift, raw_scale, scale_parameter, options)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, shift, raw_scale, scale_parameter, ctx.keeps_output, ctx.options = inputs
        ctx.backend = chosen()
        if raw_scale is None:
            ctx.mark_non_differentiable(output[1])
        else:
            ctx.save_for_backward(output[0] if ctx.keeps_output else x, shift, raw_scale, scale_parameter)

    @staticmethod
    @as_called
    def backward(ctx, dy: Tensor, dlogabsdet: Tensor):
        saved = ctx.saved_tensors
        if saved:
            return *_backward(dy, dlogabsdet, *saved, ctx.options, ctx.keeps_output), None, None
        return *_additive_backward(dy, ctx.options), None, None, None, None


def _backward(dy, dlogabsdet, kept, shift, raw_scale, scale_parameter, options: Packed, from_output: bool) -> tuple[Tensor | None, ...]:
    tensors = (dy, dlogabsdet, kept, shift, raw_scale, scale_parameter)
    # double backward differentiates the reference once more
    if torch.is_grad_enabled() or wants_reference("coupling_backward", dy.device):
        return coupling_backward_reference(*tensors, _unpack(*options), from_output)
    dx, dshift, draw_scale, dscale_parameter = _coupling_backward(*tensors, *options, from_output)
    return dx, dshift, draw_scale, None if scale_parameter is None else dscale_parameter


def _additive_backward(dy: Tensor, options: Packed) -> tuple[Tensor, Tensor]:
    part, *_, form, inverse = options
    part = Part(part)
    dshift = torch.where(part.mask(dy), dy, 0) if part.is_checkerboard else part.transformed(dy)
    if (form == Form.DIVIDE) != inverse:
        return dy, -dshift
    return dy, dshift.contiguous() if part in (Part.EVEN, Part.ODD) else dshift  # else each matmul of a network's backward copies it


def coupling(
    x: Tensor,
    shift: Tensor,
    raw_scale: Tensor | None = None,
    *,
    part: str | Part = "second_half",
    scale: ScaleMap | None = None,
    form: str | Form = "scale_shift",
    scale_parameter: Tensor | None = None,
    inverse: bool = False,
    keep: str = "input",
) -> tuple[Tensor, Tensor]:
    """Affine coupling (RealNVP, Dinh et al. 2016, section 3; Glow, Kingma & Dhariwal 2018), or additive (NICE, Dinh et al. 2014).

    On the transformed part y = x * sigma(raw_scale) + shift for form "scale_shift", and y = x on the rest; without a raw scale
    y = x + shift. `inverse` undoes it. The gradient runs as one kernel too; gradients of gradients are right.

    Args:
        x: input of the map that is applied, [batch, channels, *sites], in any memory layout.
        shift: like the transformed part: [batch, transformed channels, *sites], or like x for a checkerboard, whose other sites are
            ignored. Read through its strides, so `chunk`, `[:, 0::2]` and `unbind(-1)` of a network's output need no copy.
        raw_scale: like shift; None makes the coupling additive.
        part: the part that is transformed: "first_half", "second_half" (with an odd number of channels the part that passes has
            channels // 2), "even" or "odd" channels, counted from 0, or "checkerboard_even" or "checkerboard_odd", the sites whose
            height + width is even or odd.
        scale: scale map from raw scale to sigma; `ScaleMap.softclip()` by default.
        form: "scale_shift" x*sigma + shift, "shift_scale" (x + shift)*sigma, "divide" (x - shift)/sigma, or
            "gate" sigma*x + (1 - sigma)*shift.
        scale_parameter: RealNVP's learned a in sigma = exp(a * tanh(raw_scale)): a scalar (shape [] or [1]), or one value per
            transformed channel. log sigma of `scale`, an `exp_tanh` map (of bound 1 by default), is multiplied by it.
        inverse: undo the map.
        keep: "input" or "output": which of x and y is kept for backward. The other may be freed. With "output" the input is computed
            from it, to about eps * |shift / sigma|, and gradients that read it are no more exact.

    Returns:
        y, with the shape and dtype of x (channels-last where x is), and log|det| of the map just applied (nats), [batch], in float32,
        or float64 for float64 inputs.

    Raises:
        ValueError: a shape, dtype or device does not fit, there is nothing to split, or part, form or keep is unknown.
    """
    part = parse_part(part)
    form = parse_form(form)
    shape, dtype, device = x.shape, x.dtype, x.device
    expected = _expected_shape(shape, part)
    if dtype not in FLOATING:
        raise ValueError(f"x must be float64, float32, float16 or bfloat16; got {dtype}")
    if shift.shape != expected or shift.dtype != dtype or shift.device != device:
        shift = _fitted("shift", shift, x, expected)
    if raw_scale is None:
        if scale_parameter is not None or scale is not None:
            raise ValueError("raw_scale is missing: without it the coupling is additive, and takes neither scale nor scale_parameter")
        if form == Form.GATE:
            raise ValueError("raw_scale is missing: form 'gate' needs one")
        scale = default_scale()
    else:
        if raw_scale.shape != expected or raw_scale.dtype != dtype or raw_scale.device != device:
            raw_scale = _fitted("raw_scale", raw_scale, x, expected)
        scale = parse_scale(scale, learned=scale_parameter is not None)
        if scale.kind == ScaleKind.UNIT:
            raise ValueError("scale must not be ScaleMap.unit() beside a raw scale; without both the coupling is additive")
        if scale_parameter is not None:
            scale_parameter = _checked_parameter(scale_parameter, scale, x, expected)
    if keep not in ("input", "output"):
        raise ValueError(f"keep must be 'input' or 'output'; got {keep!r}")
    options = (int(part), int(scale.kind), *scale.packed, int(form), inverse)
    if transformed():  # there a function of our own takes milliseconds a call
        return _composite(x, shift, raw_scale, scale_parameter, *options)
    if needs_autograd((x, shift, raw_scale, scale_parameter)):
        return apply_function(_Coupling, x, shift, raw_scale, scale_parameter, keep == "output", options)
    return _forward(x, shift, raw_scale, scale_parameter, options)


def _expected_shape(shape: torch.Size, part: Part) -> tuple[int, ...]:
    """The shape of shift and raw scale, of x with this shape."""
    batch, channels, *sites = shape if len(shape) > 1 else (0, 0, 0)
    if 0 in sites:
        raise ValueError(f"x must have shape [batch, channels, *sites] with at least one site; got {list(shape)}")
    if part >= Part.CHECKERBOARD_EVEN:
        if len(shape) != 4 or channels < 1:
            raise ValueError(f"x must have shape [batch, channels, height, width] for a checkerboard; got {list(shape)}")
        return shape
    if channels < 2:
        raise ValueError(f"x must have at least 2 channels, [batch, channels, *sites], to split; got {list(shape)}")
    return (batch, part.count(channels), *sites)


def _fitted(name: str, value: Tensor, x: Tensor, expected: tuple[int, ...]) -> Tensor:
    """`value` in the dtype of x, where autocast is why it is not; an error where there is another reason."""
    if value.shape != expected:
        raise ValueError(f"{name} must have shape {list(expected)}, like the transformed part of x; got {list(value.shape)}")
    if value.device == x.device and torch.is_autocast_enabled(x.device.type) and value.is_floating_point():
        return value.to(x.dtype)  # a conditioner under autocast returns half precision
    raise ValueError(f"{name} must be {x.dtype} on {x.device}, like x; got {value.dtype} on {value.device}")


def _checked_parameter(a: Tensor, scale: ScaleMap, x: Tensor, expected: tuple[int, ...]) -> Tensor:
    if scale.kind != ScaleKind.EXP_TANH:
        raise ValueError(f"scale must be an exp_tanh map with a scale_parameter; got {scale!r}")
    if a.dim() > 1 or a.numel() not in (1, expected[1]):
        raise ValueError(
            f"scale_parameter must be a scalar or have shape [{expected[1]}], one value per transformed channel; got {list(a.shape)}"
        )
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    if a.device != x.device or a.dtype not in (x.dtype, compute):
        raise ValueError(f"scale_parameter must be {compute} on {x.device}; got {a.dtype} on {a.device}")
    a = a if a.dtype == compute else a.to(compute)
    return a if a.dim() else a.unsqueeze(0)
