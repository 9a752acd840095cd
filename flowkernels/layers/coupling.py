"""Coupling layers: one part of x is transformed by what a network makes of the rest."""

import torch
from torch import Tensor, nn

from .._torch import kept
from ..ops import Form, Map, Part, ScaleMap, autoregressive_stack, coupling, parse_part
from ..ops.scale_map import ScaleKind, parse_form, parse_scale
from ._coupling_map import UNIT, coupling_map


@kept
def _mask(part: Part, height: int, width: int, device: torch.device) -> Tensor:
    """Where a checkerboard transforms, [height, width]: what the conditioner must not see. Eight small ops, so they run once."""
    with torch.inference_mode(False):
        return part.mask(torch.empty(height, width, device=device))


class _Coupling(nn.Module):
    """What both couplings share: calling the conditioner, and checking what it returns."""

    _outputs: tuple[str, ...]  # what the conditioner returns, in its order

    def __init__(self, conditioner: nn.Module, part: str) -> None:
        super().__init__()
        if not callable(conditioner):
            raise TypeError(f"conditioner must be a module, or something else that can be called; got {conditioner!r}")
        self.conditioner = conditioner
        self.part = parse_part(part)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(x, context, inverse=False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(z, context, inverse=True)

    def _run(self, x: Tensor, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
        map_ = self.as_map(x, inverse=inverse)
        if map_ is not None:
            return autoregressive_stack(x, [map_], context)
        return self._apply_map(x, context, inverse=inverse)

    def as_map(self, x: Tensor, *, inverse: bool) -> Map | None:
        """The layer as a map of `ops.autoregressive_stack`, for x; None where it has to be made of its parts."""
        raise NotImplementedError

    def _apply_map(self, x: Tensor, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _condition(self, x: Tensor, context: Tensor | None) -> Tensor:
        part, shape = self.part, x.shape
        checkerboard = part >= Part.CHECKERBOARD_EVEN
        if len(shape) < 2 or (shape[1] < 2 and not checkerboard):
            raise ValueError(f"x must have at least 2 channels, [batch, channels, *sites], to split; got {list(shape)}")
        if 0 in shape[2:] or not x.is_floating_point():  # before the conditioner stumbles over it
            raise ValueError(f"x must be floating-point and have at least one site; got {x.dtype}, {list(shape)}")
        written = None
        if checkerboard and len(shape) == 4 and not torch.compiler.is_compiling():
            untouched = torch.where(_mask(part, *shape[2:], x.device), 0, x)
        else:
            untouched = part.untouched(x)
        if not checkerboard:  # of which there is a copy; others look into x
            if torch.compiler.is_compiling() or untouched.is_inference():  # nobody counts what is written into such a tensor
                untouched = untouched.clone()
            else:
                written = untouched._version
        out = self.conditioner(untouched) if context is None else self.conditioner(untouched, context)
        if written is not None and untouched._version != written:
            raise ValueError(
                "conditioner must not write into its input, which is the untouched part of x and part of the result; "
                "an op in place does, such as nn.ReLU(inplace=True) as its first layer"
            )
        expected = (shape[0], len(self._outputs) * part.count(shape[1]), *shape[2:])
        if not isinstance(out, Tensor):
            raise ValueError(
                f"conditioner must return one tensor, {' and '.join(self._outputs)} along dimension 1; got {type(out).__name__}"
            )
        if out.shape != expected:
            raise ValueError(
                f"conditioner must return {' and '.join(self._outputs)} of the {self._part_name()} part of x, {list(expected)}; "
                f"got {list(out.shape)}"
            )
        if out.device != x.device or (out.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type)):
            raise ValueError(f"conditioner must return {x.dtype} on {x.device}, like x; got {out.dtype} on {out.device}")
        return out

    def _part_name(self) -> str:
        return self.part.name.lower()

    def extra_repr(self) -> str:
        return f"part={self._part_name()}"


class AdditiveCoupling(_Coupling):
    """Additive coupling (NICE, Dinh et al. 2014, section 3.2); volume-preserving.

        z = x + shift on the transformed part,   shift = conditioner(untouched part, context);   z = x on the rest

    With a `layers.MLP` as conditioner of vectors on a CPU, network and coupling are one kernel, in both directions and with gradients, and
    a `Chain` of such layers is one call.

    Args:
        conditioner: any module. It is called with the untouched part, and the context where there is one, and returns the shift,
            [batch, transformed channels, *sites]. For a checkerboard it sees all of x with the transformed sites zeroed, and what it
            returns at the other sites is ignored.
        part: the part that is transformed; see `ops.coupling`.

    Shape:
        x, z: [batch, channels, *sites]; context: what the conditioner takes; logabsdet: zeros, [batch].

    Raises:
        ValueError: x has fewer than two channels to split, no sites or no floating-point dtype, or the conditioner returns another
            shape, dtype or device.
        TypeError: the conditioner cannot be called.
    """

    _outputs = ("shift",)
    map_settings = ("part",)

    def __init__(self, conditioner: nn.Module, *, part: str = "second_half") -> None:
        super().__init__(conditioner, part)

    def as_map(self, x: Tensor, *, inverse: bool) -> Map | None:
        return coupling_map(x, self.part, self.conditioner, UNIT, None, Form.SCALE_SHIFT, inverse)

    def _apply_map(self, x: Tensor, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
        return coupling(x, self._condition(x, context), part=self.part, inverse=inverse)


class AffineCoupling(_Coupling):
    """Affine coupling (RealNVP, Dinh et al. 2016, section 3.2; Glow, Kingma and Dhariwal 2018, section 3.3), in one kernel.

        z = x * sigma(s) + shift on the transformed part,   (shift, s) = conditioner(untouched part, context);   z = x on the rest

    With a `layers.MLP` as conditioner of vectors on a CPU and `interleaved`, network and coupling are one kernel, in both directions and
    with gradients (those of the inverse with forms "scale_shift" and "divide"), and a `Chain` of such layers is one call.

    Args:
        conditioner: any module. It is called with the untouched part, and the context where there is one, and returns shift and raw
            scale s blocked along dimension 1, shift first, [batch, 2 * transformed channels, *sites]. For a checkerboard it sees all
            of x with the transformed sites zeroed, and what it returns at the other sites is ignored.
        part: the part that is transformed; see `ops.coupling`.
        scale: scale map sigma; `ScaleMap.softclip()` by default, `ScaleMap.exp_tanh(1.0)` with a scale_parameter.
        form: affine form; see `ops.coupling`.
        scale_parameter: initial value of RealNVP's learned a in sigma = exp(a * tanh(s)): a number, or a tensor of one value for each
            transformed channel. None for a map without one.
        interleaved: channel 2i of what the conditioner returns is the shift and 2i + 1 the raw scale, as in Glow.

    Shape:
        x, z: [batch, channels, *sites]; context: what the conditioner takes; logabsdet: [batch], in nats.

    Raises:
        ValueError: scale, form or part is none, or scale takes no scale_parameter; or x has fewer than two channels to split, no sites or
            no floating-point dtype, or the conditioner returns another shape, dtype or device.
        TypeError: the conditioner cannot be called.
    """

    _outputs = ("shift", "raw scale")
    map_settings = ("part", "scale", "form", "interleaved")

    def __init__(
        self,
        conditioner: nn.Module,
        *,
        part: str = "second_half",
        scale: ScaleMap | None = None,
        form: str = "scale_shift",
        scale_parameter: float | Tensor | None = None,
        interleaved: bool = False,
    ) -> None:
        super().__init__(conditioner, part)
        self.scale = parse_scale(scale, learned=scale_parameter is not None)
        if self.scale.kind == ScaleKind.UNIT:
            raise ValueError("scale must not be ScaleMap.unit(): an AdditiveCoupling has no raw scale")
        self.form = parse_form(form)
        self.interleaved = interleaved
        if scale_parameter is not None:
            if self.scale.kind != ScaleKind.EXP_TANH:
                raise ValueError(f"scale must be an exp_tanh map with a scale_parameter; got {scale!r}")
            initial = torch.as_tensor(scale_parameter, dtype=torch.get_default_dtype())
            scale_parameter = nn.Parameter(torch.atleast_1d(initial).clone())
        self.register_parameter("scale_parameter", scale_parameter)

    def as_map(self, x: Tensor, *, inverse: bool) -> Map | None:
        if not self.interleaved:
            return None
        return coupling_map(x, self.part, self.conditioner, self.scale, self.scale_parameter, self.form, inverse)

    def _apply_map(self, x: Tensor, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
        out = self._condition(x, context)
        shift, raw_scale = (out[:, 0::2], out[:, 1::2]) if self.interleaved else out.chunk(2, 1)
        return coupling(
            x,
            shift,
            raw_scale,
            part=self.part,
            scale=self.scale,
            form=self.form,
            scale_parameter=self.scale_parameter,
            inverse=inverse,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale!r}, form={self.form.name.lower()}, interleaved={self.interleaved}"
