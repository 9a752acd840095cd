"""The flows that can be trained by name. A later flow joins with one entry here: its settings and how it is built."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .. import ScaleMap
from ..flows import MAF, Flow
from ..ops import Activation

# scale maps by name; each with the settings of the paper or library that uses it
SCALES: dict[str, Callable[[], ScaleMap]] = {
    "softclip": ScaleMap.softclip,
    "exp": ScaleMap.exp,
    "exp_clamped": ScaleMap.exp_clamped,
    "sigmoid": lambda: ScaleMap.sigmoid(bias=2.0, floor=1e-3),
    "softplus": lambda: ScaleMap.softplus(floor=1e-3),
}
ACTIVATIONS = tuple(code.name.lower() for code in Activation if code != Activation.IDENTITY)


@dataclass(frozen=True)
class Setting:
    """One hyper-parameter of a flow: an option of the command line and a key of config.json.

    type: int, float, str or bool; many: a list of them.
    """

    name: str
    type: type
    default: Any
    help: str
    many: bool = False
    choices: tuple[str, ...] | None = None


@dataclass(frozen=True)
class FlowEntry:
    """A flow by name. build(features, context_features, **settings) makes it; it raises ValueError for settings it cannot take."""

    summary: str
    settings: tuple[Setting, ...]
    build: Callable[..., Flow]


def _build_maf(
    features: int, context_features: int, transforms: int, hidden: list[int], batch_norm: bool, activation: str, scale: str
) -> Flow:
    return MAF(
        features,
        context_features=context_features,
        transforms=transforms,
        hidden_features=tuple(hidden),
        batch_norm=batch_norm,
        activation=activation,
        scale=SCALES[scale](),
    )


FLOWS: dict[str, FlowEntry] = {
    "maf": FlowEntry(
        "masked autoregressive flow (Papamakarios et al. 2017)",
        (
            Setting("transforms", int, 5, "number of autoregressive layers"),
            Setting("hidden", int, [512, 512], "widths of each layer's hidden layers", many=True),
            Setting("batch_norm", bool, False, "flow batch norm after each autoregressive layer"),
            Setting("activation", str, "relu", "activation of the hidden layers", choices=ACTIVATIONS),
            Setting("scale", str, "softclip", "scale map sigma(s)", choices=tuple(SCALES)),
        ),
        _build_maf,
    ),
}
