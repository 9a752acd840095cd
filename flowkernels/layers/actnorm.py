"""Activation normalisation: a scale and a shift for each channel, initialised from data."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._torch import is_wrapped, times_written, unwrapped
from .._wide import wide
from ..ops import channel_affine
from ._sizes import check_channels, parse_count


class ActNorm(nn.Module):
    """Actnorm (Glow, Kingma & Dhariwal 2018, section 3.1).

        z[:, c] = (x[:, c] + bias_c) * exp(log_scale_c),   logabsdet = sites * sum_c log_scale_c

    The first batch in training sets bias and log_scale so that each channel leaves with zero mean and unit variance; where
    torch.distributed is initialised, the batches of all ranks together do. A channel that does not vary keeps scale 1. The buffer
    `initialised` says that this was done, and is saved, loaded and copied with the layer; `initialise` does it anew.

    Args:
        channels: number of channels C.

    Shape:
        x, z: [batch, C, *sites], any number of site dimensions; logabsdet: [batch], in nats.

    Raises:
        ValueError: another channel count, or a first batch that is empty or not finite.
        RuntimeError: used in evaluation, or in the inverse direction, before it was initialised.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = parse_count("channels", channels)
        self.bias = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialised", torch.tensor(False))
        # The buffer that was found true, and how often it had been written into: a call must not read it back from the device. That of a
        # functional call is another one, and who writes False into it asks for another first batch.
        self._seen: Tensor | None = None
        self._seen_at = 0

    @property
    def ready(self) -> bool:
        """Whether the layer was initialised. The buffer is read only as long as it was not: others may have copied into it."""
        flag = self._buffers["initialised"]
        if torch.compiler.is_compiling():
            return self._seen is not None or flag.is_meta or bool(flag)
        if flag.is_meta:  # it has no value there, and shapes alone are asked for
            return True
        if flag is self._seen and times_written(flag) == self._seen_at:
            return True
        if type(flag) is not Tensor:  # nor has a fake one
            return self._seen is not None
        if not _is_true(flag):
            return False
        self._see(flag)
        return True

    def _see(self, flag: Tensor | None) -> None:
        self._seen, self._seen_at = flag, 0 if flag is None else times_written(flag)

    def prepare(self, x: Tensor) -> None:
        """Check x, and initialise from it if this is the first batch in training."""
        check_channels("x", x, self.channels)
        if self.ready:
            return
        if not x.is_floating_point():
            raise ValueError(f"x must be floating-point; got {x.dtype}")
        if not self.training:
            raise RuntimeError(
                "ActNorm was used in evaluation before it was initialised: pass a batch in training mode, or load a checkpoint"
            )
        self.initialise(x)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Set bias and log_scale from x, [batch, channels, *sites], and the batches of all other ranks."""
        values = wide(x.detach().transpose(0, 1).flatten(1))
        count = _sum_over_ranks(values.new_tensor([values.shape[1]]))
        if not count:
            raise ValueError("x must not be empty: it is the first batch, which initialises ActNorm")
        # in two passes: the mean of squares less the squared mean would cancel
        mean = _sum_over_ranks(values.sum(1)) / count
        std = (_sum_over_ranks((values - mean[:, None]).square().sum(1)) / count).sqrt()
        if not (mean + std).isfinite().all():
            raise ValueError("x must be finite: it is the first batch, which initialises ActNorm; got NaN, infinity or an overflow")
        # what is left of a constant channel is rounding, of x and of the mean
        kind = torch.finfo(x.dtype)
        varies = std > torch.clamp(min(8 * kind.eps, 1e-6) * mean.abs(), min=kind.tiny)
        self.bias.copy_(-mean)
        self.log_scale.copy_(torch.where(varies, -std.log(), 0.0))
        self.initialised.fill_(True)
        self._see(self.initialised)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.prepare(x)
        return channel_affine(x, self.bias, self.log_scale)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.prepare_inverse(z)
        return channel_affine(z, self.bias, self.log_scale, inverse=True)

    def prepare_inverse(self, z: Tensor) -> None:
        """Check z; noise cannot initialise the layer."""
        if not self.ready:
            raise RuntimeError(
                "ActNorm was inverted before it was initialised: pass a batch of data in training mode, or load a checkpoint"
            )
        check_channels("z", z, self.channels)

    def _load_from_state_dict(self, *arguments) -> None:
        super()._load_from_state_dict(*arguments)
        self._see(self.initialised if not self.initialised.is_meta and bool(self.initialised) else None)

    def extra_repr(self) -> str:
        return f"channels={self.channels}"


def _is_true(flag: Tensor) -> bool:
    """For every member of an ensemble, where torch.func batches them."""
    while is_wrapped(flag):
        flag = unwrapped(flag)
    return bool(flag.all())


def _sum_over_ranks(t: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(t)
    return t
