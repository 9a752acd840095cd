"""Fixed maps from the user's x to what the flow sees, whose log-determinants count in every density that is reported.

Each computes in float64 and gives float64: time stamps or large offsets keep their digits until they are near zero.
"""

from typing import Any

import torch
from torch import Generator, Tensor

from ..layers import Dequantize, Logit

_FITTED = 10_000  # images that mean and std are taken from, at most


class Preprocess:
    """y, logabsdet = forward(x); x = inverse(y). x, y: [rows, features], float64; logabsdet = log|det dy/dx|, [rows], nats.

    Images come as uint8.
    """

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
            if torch.isnan(x[:, column]).any():
                raise ValueError(f"columns must be finite; column {column}, counted from 0, holds NaN")
            if not torch.isfinite(std[column]):
                raise ValueError(
                    f"columns must have a finite standard deviation; column {column}, counted from 0, is too large to standardise"
                )
            raise ValueError(
                f"data must vary in every column; column {column}, counted from 0, is constant ({x[0, column]:g}) in the training rows"
            )
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
    """Dequantised grey levels through a logit, standardised (MAF, Papamakarios et al. 2017, section 4.3; RealNVP, Dinh et al. 2016).

        y = (logit(alpha + (1 - 2 alpha) (x + U) / levels) - mean) / std,   U uniform in [0, 1)

    mean and std per pixel are those of the training images (10,000 of them where there are more). The log-determinant is taken with
    respect to x + U, in grey levels: then the mean of log p(x + U) is a lower bound of the log-probability of the image itself, and
    bits per dimension are -log p / (features ln 2) with log2(levels) already in them.
    """

    random = True

    def __init__(self, levels: int, alpha: float) -> None:
        self._dequantize, self._logit = Dequantize(levels), Logit(alpha)
        self._affine = Standardize()

    @property
    def levels(self) -> int:
        return self._dequantize.levels

    def fit(self, x: Tensor) -> None:
        x = x[:: -(-len(x) // _FITTED)]
        u, _ = self._dequantize(x.double(), generator=torch.Generator().manual_seed(0))
        self._affine.fit(self._logit(u)[0])

    def check(self, x: Tensor, name: str) -> None:
        bad = (x < 0) | ((x if x.is_floating_point() else x.long()) > self.levels - 1)
        if x.is_floating_point():
            bad |= x != x.round()
        if bad.any():
            row, column = bad.nonzero()[0].tolist()
            raise ValueError(
                f"{name} must hold whole grey levels 0..{self.levels - 1}; "
                f"row {row}, column {column}, counted from 0, is {x[row, column]:g}"
            )

    def forward(self, x: Tensor, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        y, total = self._dequantize(x.double(), generator=generator)
        for map_ in (self._logit, self._affine.forward):
            y, logabsdet = map_(y)
            total = total + logabsdet
        return y, total

    def inverse(self, y: Tensor) -> Tensor:
        """Whole grey levels, 0..levels - 1."""
        u, _ = self._logit.inverse(self._affine.inverse(y))
        return self._dequantize.inverse(u)[0]

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
