"""Batch normalisation as a flow layer."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .._dtypes import HALF
from ..ops import channel_affine
from ..ops.channel_affine.normalize import log_scale_of, normalize_channels, statistics
from ._sizes import check_channels, parse_count


class FlowBatchNorm(nn.Module):
    """Invertible batch normalisation (MAF, Papamakarios et al. 2017, section 3.5; RealNVP, Dinh et al. 2016, section 3.7).

        z = (x - m) / sqrt(v + eps) * exp(log_gain) + bias,   logabsdet = sites * sum_c (log_gain_c - 1/2 log(v_c + eps))

    m and v are those of each feature, or of each channel of an image over rows and sites. In training they are the batch's, and
    gradients flow through them; in evaluation, and in the inverse always, they are the running statistics. So in training forward and
    then inverse is not the identity, by design. `set_statistics` puts the statistics of a whole training set in place, as MAF's
    evaluation does, and `training.set_training_statistics` those of all layers of a flow; torch's `update_bn` passes this layer over.

    Args:
        features: number of features, or of channels.
        eps: added to the variance.
        momentum: weight of a new batch in the running statistics.
        affine: learn gain and bias, as MAF does; RealNVP has none (`flows.RealNVP` of vectors has them, of images not).

    Shape:
        x, z: [batch, features, *sites]; logabsdet: [batch], in nats.

    Raises:
        ValueError: x has another number of features or another dtype, or a training batch has fewer than two values of each, and so no
            variance; or an argument is out of range.
    """

    map_settings = ("eps", "training")

    def __init__(self, features: int, *, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True) -> None:
        super().__init__()
        features = parse_count("features", features)
        if not eps > 0:
            raise ValueError(f"eps must be positive; got {eps}")
        if momentum is None or not 0 <= momentum <= 1:  # None is torch's for a cumulative average
            raise ValueError(f"momentum must be between 0 and 1; got {momentum}")
        self.features, self.eps, self.momentum = features, eps, momentum
        self.register_parameter("log_gain", nn.Parameter(torch.zeros(features)) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(features)) if affine else None)
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    @torch.no_grad()
    def set_statistics(self, x: Tensor) -> None:
        """Take mean and variance of x, [samples, features, *sites], as the statistics of evaluation."""
        variance, mean = statistics(x)
        self.running_mean.copy_(mean)
        self.running_var.copy_(variance)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check("x", x)
        if self.training:
            if x.numel() < 2 * self.features:
                raise ValueError(f"x must have at least 2 rows for batch statistics in training; got {x.shape[0]}")
            z, logabsdet, variance, mean = normalize_channels(x, self.log_gain, self.bias, self.eps)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)
            return z, logabsdet
        return channel_affine(x, -self.running_mean, self._log_scale(), bias=self.bias)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check("z", z)
        return channel_affine(z, -self.running_mean, self._log_scale(), bias=self.bias, inverse=True)

    def _log_scale(self) -> Tensor:
        return log_scale_of(self.running_var, self.log_gain, self.eps)

    def _check(self, name: str, x: Tensor) -> None:
        check_channels(name, x, self.features)
        dtype = self.running_var.dtype
        if x.dtype != dtype and (x.dtype not in HALF or dtype != torch.float32):
            raise ValueError(f"{name} must be {dtype}, like the layer's statistics; got {x.dtype}")

    def extra_repr(self) -> str:
        return f"features={self.features}, eps={self.eps}, momentum={self.momentum}, affine={self.bias is not None}"


def evaluation_affines(layers: Sequence[FlowBatchNorm], *, inverse: bool, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Evaluation of several layers of as many features, as numbers a feature: a, [layers, 3, features], such that
    y = (x + a[l, 0]) * a[l, 1] + a[l, 2]; and the sum of their log|det|s. At once: by itself each takes eight small ops. out: where a
    is written, without gradient."""
    # from the dictionaries: attributes of modules cost a small flow half a microsecond each
    buffers, parameters = [layer._buffers for layer in layers], [layer._parameters for layer in layers]
    mean = torch.stack([b["running_mean"] for b in buffers])
    variance = torch.stack([b["running_var"] for b in buffers])
    eps = [layer.eps for layer in layers]
    variance = variance + (eps[0] if eps.count(eps[0]) == len(eps) else variance.new_tensor(eps)[:, None])
    log_scale, bias = -0.5 * torch.log(variance), None
    if any(p["bias"] is not None for p in parameters):
        none = torch.zeros_like(mean[0])
        given = lambda name: torch.stack([none if p[name] is None else p[name] for p in parameters])
        log_scale, bias = given("log_gain") + log_scale, given("bias")
    bias = torch.zeros_like(mean) if bias is None else bias
    if inverse:
        log_scale = -log_scale
        parts = [-bias, log_scale.exp(), mean]
    else:
        parts = [-mean, log_scale.exp(), bias]
    return torch.stack(parts, 1, out=out), log_scale.sum()
