"""Base distributions of flows. They have no parameters; a learned prior is a last affine layer."""

import math

import torch
from torch import Tensor


class StandardNormal:
    """Independent standard normal noise."""

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density (nats) of each row of z, [batch, features] -> [batch]."""
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        return -0.5 * z.square().sum(-1) - 0.5 * math.log(2 * math.pi) * z.shape[-1]

    def sample(self, n: int, features: int, *, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """[n, features], with the dtype and device of `like`."""
        return torch.randn(n, features, dtype=like.dtype, device=like.device, generator=generator)
