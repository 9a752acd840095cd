"""Fixed maps from the user's x to what the flow sees, whose log-determinants count in every density that is reported.

Each computes in float64 and gives float64: time stamps or large offsets keep their digits until they are near zero.
"""

import math
from typing import Any

import torch
from torch import Generator, Tensor


class Preprocess:
    """y, logabsdet = forward(x); x = inverse(y). x, y: [rows, features], float64; logabsdet = log|det dy/dx|, [rows], nats."""

    random = False  # whether forward draws noise

    def fit(self, x: Tensor) -> None:
        """Take what is needed from the training rows."""

    def check(self, x: Tensor, name: str) -> None:
        """Refuse rows that the map is not for, with a ValueError that names `name`."""

    def forward(self, x: Tensor, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def inverse(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors to keep with the flow."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the kept tensors back."""


class Identity(Preprocess):
    """y = x."""

    def forward(self, x: Tensor, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        return x, x.new_zeros(len(x))

    def inverse(self, y: Tensor) -> Tensor:
        return y


class Standardize(Preprocess):
    """y = (x - mean) / std with the training rows' mean and standard deviation per feature; logabsdet = -sum log std.

    constant_columns: leave columns that do not vary at std 1 rather than refuse them: right for a context, not for data,
    whose density would be infinite.
    """

    def __init__(self, constant_columns: bool = False) -> None:
        self.constant_columns = constant_columns
        self.mean = self.std = torch.empty(0, dtype=torch.float64)

    def fit(self, x: Tensor) -> None:
        std, mean = torch.std_mean(x, dim=0, correction=0)
        constant = (std == 0) | (x.amax(0) == x.amin(0))
        if self.constant_columns:
            std, constant = torch.where(constant, 1.0, std), torch.zeros_like(constant)
        bad = constant | ~torch.isfinite(std)
        if bad.any():
            column = int(bad.nonzero()[0])
            what = f"constant ({x[0, column]:g}) in the training rows" if torch.isfinite(std[column]) else "too large to standardise"
            raise ValueError(f"data must vary in every column; column {column}, counted from 0, is {what}")
        self.mean, self.std = mean, std

    def forward(self, x: Tensor, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        return (x - self.mean) / self.std, -self.std.log().sum().expand(len(x))

    def inverse(self, y: Tensor) -> Tensor:
        return y * self.std + self.mean

    def state_dict(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "std": self.std}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.mean, self.std = state["mean"], state["std"]


class GreyLevels(Preprocess):
    """Dequantised grey levels through a logit (MAF, Papamakarios et al. 2017, section 4.3; RealNVP, Dinh et al. 2016, section 4.1).

        u = (x + U) / levels,  U uniform in [0, 1);   y = (logit(a + (1 - 2a) u) - mean) / std

    mean and std per pixel are the training images'. The log-determinant is taken with respect to x + U, in grey levels: then the
    mean of log p(x + U) is a lower bound of the log-probability of the image itself, and bits per dimension are
    -log p / (features ln 2) with log2(levels) already in them.
    """

    random = True

    def __init__(self, levels: int, alpha: float) -> None:
        self.levels, self.alpha = levels, alpha
        self._affine = Standardize()

    def fit(self, x: Tensor) -> None:
        noise = torch.rand(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
        self._affine.fit(self._logit(x + noise)[0])

    def check(self, x: Tensor, name: str) -> None:
        bad = (x < 0) | (x > self.levels - 1) | (x != x.round())
        if bad.any():
            row, column = bad.nonzero()[0].tolist()
            raise ValueError(
                f"{name} must hold whole grey levels 0..{self.levels - 1}; "
                f"row {row}, column {column}, counted from 0, is {x[row, column]:g}"
            )

    def forward(self, x: Tensor, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        y, log_derivative = self._logit(x + torch.rand(x.shape, dtype=x.dtype, generator=generator))
        y, logabsdet = self._affine.forward(y)
        return y, logabsdet + log_derivative

    def inverse(self, y: Tensor) -> Tensor:
        """Whole grey levels, 0..levels - 1."""
        p = torch.sigmoid(self._affine.inverse(y))
        return ((p - self.alpha) / (1 - 2 * self.alpha) * self.levels).floor().clamp(0, self.levels - 1)

    def _logit(self, dequantised: Tensor) -> tuple[Tensor, Tensor]:
        p = self.alpha + (1 - 2 * self.alpha) * dequantised / self.levels
        log_p, log_q = torch.log(p), torch.log1p(-p)
        constant = math.log((1 - 2 * self.alpha) / self.levels)
        return log_p - log_q, (constant - log_p - log_q).sum(1)

    def state_dict(self) -> dict[str, Tensor]:
        return self._affine.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._affine.load_state_dict(state)


_KINDS = {"identity": Identity, "standardize": Standardize, "grey_levels": GreyLevels}


def build_preprocess(config: dict[str, Any]) -> Preprocess:
    """The map that a configuration such as {"kind": "grey_levels", "levels": 17, "alpha": 0.01} describes.

    Raises:
        ValueError: the kind is unknown.
    """
    settings = dict(config)
    kind = settings.pop("kind", None)
    if kind not in _KINDS:
        raise ValueError(f"preprocess kind must be one of {', '.join(_KINDS)}; got {kind!r}")
    return _KINDS[kind](**settings)
