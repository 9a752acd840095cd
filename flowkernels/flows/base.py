"""Base distributions of flows. Ours have no parameters; a learned prior is a last affine layer."""

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .._torch import any_autocast


class Base(Protocol):
    """Noise with independent features of mean 0 and standard deviation `std`.

    What a flow asks of a base of your own is `log_prob` and `sample`, without `generator` where none was given; `std` is what the command
    line's `infer` says beside what it found. One with parameters is a torch.nn.Module, and the flow's optimizer has them.
    """

    std: float

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density (nats) of each row of z, [batch, features] -> [batch]."""

    def sample(self, n: int, features: int, *, like: Tensor, generator: Generator | None = None) -> Tensor:
        """[n, features], with the dtype and device of `like`."""


class StandardNormal:
    """Independent standard normal noise."""

    std = 1.0

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density (nats) of each row of z, [batch, features] -> [batch]."""
        if any_autocast() and torch.is_autocast_enabled(z.device.type):  # which takes dot products in half precision
            with torch.autocast(z.device.type, enabled=False):
                return self.log_prob(z)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        return torch.rsub(torch.linalg.vecdot(z, z), -0.5 * math.log(2 * math.pi) * z.shape[-1], alpha=0.5)

    def sample(self, n: int, features: int, *, like: Tensor, generator: Generator | None = None) -> Tensor:
        """[n, features], with the dtype and device of `like`."""
        return torch.randn(n, features, dtype=like.dtype, device=like.device, **_drawn_by(generator))


class StandardLogistic:
    """Independent standard logistic noise: log p(z) = -softplus(z) - softplus(-z) (NICE, Dinh et al. 2014, section 3.4)."""

    std = math.pi / math.sqrt(3)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density (nats) of each row of z, [batch, features] -> [batch]."""
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        return (F.logsigmoid(z) + F.logsigmoid(-z)).sum(-1)

    def sample(self, n: int, features: int, *, like: Tensor, generator: Generator | None = None) -> Tensor:
        """[n, features], with the dtype and device of `like`."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        uniform = torch.rand(n, features, dtype=dtype, device=like.device, **_drawn_by(generator))
        # 0 comes up once in 2^24 draws of float32, and its logit is infinite
        return torch.logit(uniform, torch.finfo(dtype).eps / 4).to(like.dtype)


def _drawn_by(generator: Generator | None) -> dict[str, Generator]:
    """What torch's functions are told of a generator: nothing where there is none, as they take no symbolic sizes beside one."""
    return {} if generator is None else {"generator": generator}
