"""Batch normalisation as a flow layer."""

import torch
from torch import Tensor, nn


class FlowBatchNorm(nn.Module):
    """Invertible batch normalisation (MAF, Papamakarios et al. 2017, section 3.5; RealNVP, Dinh et al. 2016, appendix E).

        z = (x - m) / sqrt(v + eps) * exp(log_gain) + bias,   logabsdet = sum_i (log_gain_i - 1/2 log(v_i + eps))

    In training m and v are the batch's, and gradients flow through them; in evaluation, and in the inverse always, they are the
    running statistics. So in training forward and then inverse is not the identity, by design. `set_statistics` puts the
    statistics of a whole training set in place, as MAF's evaluation does.

    Args:
        features: number of features.
        eps: added to the variance.
        momentum: weight of a new batch in the running statistics.

    Raises:
        ValueError: a training batch of fewer than two rows, which has no variance.
    """

    def __init__(self, features: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.features, self.eps, self.momentum = features, eps, momentum
        self.log_gain = nn.Parameter(torch.zeros(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    @torch.no_grad()
    def set_statistics(self, x: Tensor) -> None:
        """Take mean and variance of x, [samples, features], as the statistics of evaluation."""
        variance, mean = torch.var_mean(x, dim=0, correction=0)
        self.running_mean.copy_(mean)
        self.running_var.copy_(variance)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.training:
            if x.shape[0] < 2:
                raise ValueError(f"x must have at least 2 rows for batch statistics in training; got {x.shape[0]}")
            variance, mean = torch.var_mean(x, dim=0, correction=0)
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)
        else:
            mean, variance = self.running_mean, self.running_var
        log_scale = self.log_gain - 0.5 * torch.log(variance + self.eps)
        z = (x - mean) * torch.exp(log_scale) + self.bias
        return z, log_scale.sum().expand(x.shape[0])

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_scale = self.log_gain - 0.5 * torch.log(self.running_var + self.eps)
        x = (z - self.bias) * torch.exp(-log_scale) + self.running_mean
        return x, -log_scale.sum().expand(z.shape[0])

    def extra_repr(self) -> str:
        return f"features={self.features}, eps={self.eps}, momentum={self.momentum}"
