"""The baseline for the digits: one Gaussian for each class, or one for all where there are none, with a shrunk covariance."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from .data import Preprocess, Table, optional

_DRAWS = 10  # dequantisations of each training image that the covariances are estimated from


@dataclass(frozen=True)
class ClassGaussian:
    """log p(x | class) = log N(y; mean, covariance) + log|det dy/dx|, y = preprocess(x): the flow's own space and units.

    preprocess: the flow's. mean: [classes, features]; covariance: [classes, features, features]; name: how it was estimated.
    """

    preprocess: Preprocess
    mean: Tensor
    covariance: Tensor
    name: str

    def log_prob(self, table: Table, generator: torch.Generator, draws: int) -> Tensor:
        """log p(x) of each row in nats, the mean over `draws` dequantisations, [rows]."""
        classes = _classes(table)
        density = MultivariateNormal(self.mean[classes], self.covariance[classes])
        total = torch.zeros(len(table), dtype=torch.float64)
        for _ in range(draws):
            y, logabsdet = self.preprocess.forward(table.x, generator)
            total += density.log_prob(y) + logabsdet
        return total / draws


def fit_gaussian(preprocess: Preprocess, train: Table, validation: Table, draws: int) -> ClassGaussian:
    """The better, on the held-out rows, of one covariance per class and one for all; each shrunk as Ledoit and Wolf (2004) do.

    Each is also tried with the shrinkage that one dequantisation, and that ten of them, call for.

    Raises:
        ModuleNotFoundError: scikit-learn is missing; the message names the extra.
    """

    def held_out(candidate: ClassGaussian) -> float:
        return candidate.log_prob(validation, torch.Generator().manual_seed(0), draws).mean().item()

    kinds = (True,) if train.context is None else (False, True)
    return max((_estimate(preprocess, train, pooled, count) for pooled in kinds for count in (1, _DRAWS)), key=held_out)


def _estimate(preprocess: Preprocess, train: Table, pooled: bool, count: int) -> ClassGaussian:
    ledoit_wolf = optional("sklearn.covariance", "scikit-learn", "the Gaussian baseline").LedoitWolf
    generator = torch.Generator().manual_seed(1)
    y = torch.cat([preprocess.forward(train.x, generator)[0] for _ in range(count)])
    classes = _classes(train).repeat(count)
    number = 1 if train.context is None else train.context.shape[1]
    mean = torch.stack([y[classes == k].mean(0) for k in range(number)])
    centred = y - mean[classes]

    def covariance(rows: Tensor) -> Tensor:
        return torch.as_tensor(ledoit_wolf(assume_centered=True).fit(rows.numpy()).covariance_)

    if pooled:
        return ClassGaussian(preprocess, mean, covariance(centred).expand(number, -1, -1), "one covariance for all classes")
    each = torch.stack([covariance(centred[classes == k]) for k in range(number)])
    return ClassGaussian(preprocess, mean, each, "one covariance per class")


def _classes(table: Table) -> Tensor:
    return torch.zeros(len(table), dtype=torch.int64) if table.context is None else table.context.argmax(1)
