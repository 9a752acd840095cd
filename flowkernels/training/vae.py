"""A variational autoencoder for images whose posterior is a diagonal Gaussian or an IAF on top of one (Kingma et al. 2016, section 5).

    q(z | x):  z0 = mu(x) + sigma(x) eps,   z = IAF(z0; h(x)),   log q = log N(eps) - sum log sigma - log|det dz/dz0|
    p(x, z) = N(z; 0, 1) prod_i p(x_i | z),   p(x_i = k | z) = F((k + 1/2 - m_i) / s_i) - F((k - 1/2 - m_i) / s_i)

F is the logistic function: the discretised logistic likelihood of that paper, whose lowest and highest levels take the tails. It is a
probability of whole grey levels, so its nats and bits per dimension are those of the images, to be compared with a flow's bound.

A VAE is no flow: its log p(x) is an integral over z, bounded by the ELBO and estimated by importance sampling from the posterior.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..flows import IAF
from ..flows.base import StandardNormal
from ..layers import MLP

POSTERIORS = ("diagonal", "iaf")
_ROWS = 2**16  # decoded at once when log p(x) is estimated
_PRIOR = StandardNormal()


@dataclass(frozen=True)
class VAESettings:
    """What a VAE is made of and how it is trained.

    posterior: "diagonal" or "iaf". latent: dimensions of z. steps: gated IAF steps. hidden: widths of encoder and decoder;
    iaf_hidden: of each step. context: width of h. free_bits: nats that the KL of a batch, all of z as one group, does not pay for.
    """

    posterior: str = "iaf"
    latent: int = 8
    steps: int = 4
    hidden: tuple[int, ...] = (128, 128)
    iaf_hidden: tuple[int, ...] = (64,)
    context: int = 32
    free_bits: float = 1.0
    epochs: int = 150
    batch_size: int = 100
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.posterior not in POSTERIORS:
            raise ValueError(f"posterior must be one of {', '.join(POSTERIORS)}; got {self.posterior!r}")
        for name in ("latent", "steps", "context", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive; got {self.learning_rate}")
        for name in ("free_bits", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0; got {getattr(self, name)}")


class VAE(nn.Module):
    """Encoder, posterior and decoder.

    Args:
        features: pixels of an image.
        levels: grey levels 0..levels - 1.
        settings: sizes.

    Shape:
        x: [batch, features], whole grey levels; z: [samples, batch, latent].
    """

    def __init__(self, features: int, levels: int, settings: VAESettings) -> None:
        super().__init__()
        self.features, self.levels, self.latent = features, levels, settings.latent
        context = settings.context if settings.posterior == "iaf" else 0
        self.encoder = MLP(features, settings.hidden, 2 * settings.latent + context)
        self.decoder = MLP(settings.latent, settings.hidden[::-1], 2 * features)
        self.iaf = None
        if context:
            self.iaf = IAF(
                settings.latent,
                context_features=context,
                transforms=settings.steps,
                hidden_features=settings.iaf_hidden,
                gate=True,
                activation="elu",
            )

    def posterior(self, x: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        """Samples z of q(z | x) and log q: [samples, batch, latent], [samples, batch]; one pass."""
        made = self.encoder(2 * x.to(self._dtype) / (self.levels - 1) - 1)
        mu, s, h = made.split((self.latent, self.latent, made.shape[1] - 2 * self.latent), 1)
        sigma = F.softplus(s) + 1e-4
        eps = torch.randn(samples, *mu.shape, dtype=mu.dtype, device=mu.device)
        z, log_q = mu + sigma * eps, _PRIOR.log_prob(eps) - sigma.log().sum(-1)
        if self.iaf is None:
            return z, log_q
        rows = h if samples == 1 else h.expand(samples, *h.shape).reshape(-1, h.shape[-1])
        z, logabsdet = self.iaf.inverse(z.view(-1, self.latent), rows)
        return z.view(eps.shape), log_q - logabsdet.view(log_q.shape)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log P(x | z): [samples, batch]."""
        mean, s = self._decode(z)
        x = x.to(mean.dtype)
        upper, lower = (x + 0.5 - mean) / s, (x - 0.5 - mean) / s
        # log(F(upper) - F(lower)) = logsigmoid(upper) + logsigmoid(-lower) + log(1 - exp(lower - upper)), and upper - lower = 1 / s
        inside = F.logsigmoid(upper) + F.logsigmoid(-lower) + torch.log(-torch.expm1(-1 / s))
        tails = torch.where(x < 0.5, F.logsigmoid(upper), F.logsigmoid(-lower))
        return torch.where((x < 0.5) | (x > self.levels - 1.5), tails, inside).sum(-1)

    def elbo(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction log P(x | z) and KL log q(z | x) - log p(z) of one sample of each row, [batch] each, in nats."""
        z, log_q = self.posterior(x, 1)
        return self.log_likelihood(x, z)[0], (log_q - _PRIOR.log_prob(z))[0]

    @torch.no_grad()
    def log_prob(self, x: Tensor, samples: int = 1000) -> Tensor:
        """Importance-weighted log P(x) of each row, log mean p(x, z) / q(z | x) (Burda et al. 2016): a lower bound in the mean, [batch]."""
        if samples < 1:
            raise ValueError(f"samples must be at least 1; got {samples}")
        parts = []
        for rows in x.split(max(1, _ROWS // samples)):
            z, log_q = self.posterior(rows, samples)
            parts.append(torch.logsumexp(self.log_likelihood(rows, z) + _PRIOR.log_prob(z) - log_q, 0) - math.log(samples))
        return torch.cat(parts)

    @torch.no_grad()
    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """Means of p(x | z) for n draws of the prior, as whole grey levels, [n, features]."""
        z = _PRIOR.sample(n, self.latent, like=next(self.parameters()), generator=generator)
        return self._levels(z)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Means of p(x | z) for one z of each row's posterior, as whole grey levels, [batch, features]."""
        return self._levels(self.posterior(x, 1)[0][0])

    def _levels(self, z: Tensor) -> Tensor:
        return self._decode(z)[0].round().clamp(0, self.levels - 1)

    def _decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Location, in grey levels, and scale of the logistics."""
        mean, s = self.decoder(z.reshape(-1, self.latent)).view(*z.shape[:-1], 2 * self.features).chunk(2, -1)
        return (mean + 0.5) * (self.levels - 1), F.softplus(s + 1) + 0.05

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


def train_vae(
    train: Tensor, validation: Tensor, levels: int, settings: VAESettings, on_epoch: Callable[[int, float], None] = lambda epoch, nats: None
) -> VAE:
    """Maximise the ELBO by AdamW, with free bits, the learning rate falling as a cosine; the weights with the best held-out bound are kept.

    Args:
        train, validation: whole grey levels, [rows, features]; the bound is the mean importance-weighted one of 20 samples.
        on_epoch: called with the epoch and the bound, every fifth epoch.

    Raises:
        ValueError: the loss is no longer finite.
    """
    torch.manual_seed(settings.seed)
    vae = VAE(train.shape[1], levels, settings)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs)
    best, kept = -math.inf, vae.state_dict()
    for epoch in range(1, settings.epochs + 1):
        for rows in torch.randperm(len(train)).split(settings.batch_size):
            reconstruction, kl = vae.elbo(train[rows])
            loss = kl.mean().clamp(min=settings.free_bits) - reconstruction.mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 20.0)
            optimizer.step()
        if not torch.isfinite(loss):
            raise ValueError(f"the loss is {loss.item()} in epoch {epoch}; learning_rate {settings.learning_rate} may be too large")
        schedule.step()
        if epoch % 5 == 0 or epoch == settings.epochs:
            nats = vae.log_prob(validation, 20).mean().item()
            if nats > best:
                best, kept = nats, copy.deepcopy(vae.state_dict())
            on_epoch(epoch, nats)
    vae.load_state_dict(kept)
    return vae
