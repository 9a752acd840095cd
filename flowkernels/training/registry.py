"""The flows that can be trained by name. A later flow joins with one entry here: its settings and how it is built."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from .. import ScaleMap
from ..flows import IAF, MAF, NICE, Base, Flow, Glow, RealNVP, StandardLogistic, StandardNormal
from ..layers._sizes import parse_shape
from ..ops import Activation
from .loop import TrainingSettings

# scale maps by name; each with the settings of the paper or library that uses it
SCALES: dict[str, Callable[[], ScaleMap]] = {
    "softclip": ScaleMap.softclip,
    "exp": ScaleMap.exp,
    "exp_clamped": ScaleMap.exp_clamped,
    "sigmoid": lambda: ScaleMap.sigmoid(bias=2.0, floor=1e-3),
    "softplus": lambda: ScaleMap.softplus(floor=1e-3),
}
BASES: dict[str, Callable[[], Base]] = {"logistic": StandardLogistic, "normal": StandardNormal}
ACTIVATIONS = tuple(code.name.lower() for code in Activation if code != Activation.IDENTITY)


@dataclass(frozen=True)
class Setting:
    """One hyper-parameter of a flow: an option of the command line and a key of config.json.

    type: int, float, str or bool; many: a list of them. of: "images" or "tables", where it means nothing for the other.
    """

    name: str
    type: type
    default: Any
    help: str
    many: bool = False
    choices: tuple[str, ...] | None = None
    of: str | None = None


@dataclass(frozen=True)
class FlowEntry:
    """A flow by name.

    summary: what it is. settings: its hyper-parameters. build(shape, context_features, **settings) makes it, where shape is a number of
    features or (C, H, W); it raises ValueError for settings it cannot take. digits: settings, and fields of `TrainingSettings`, that
    suit the digits better than the defaults.
    """

    summary: str
    settings: tuple[Setting, ...]
    build: Callable[..., Flow]
    digits: Mapping[str, Any]

    def choose(self, given: Mapping[str, Any] = MappingProxyType({}), *, digits: bool = False) -> tuple[dict[str, Any], TrainingSettings]:
        """The flow's settings and those of training: what is given, or else what suits the digits, or else the defaults."""
        chosen = {**(self.digits if digits else {}), **given}
        flow = {setting.name: chosen.pop(setting.name, setting.default) for setting in self.settings}
        return flow, TrainingSettings(**chosen)

    def check(self, given: Mapping[str, Any], shape: int | Sequence[int]) -> None:
        """Raises ValueError where a setting is given that means nothing for data of this shape."""
        data = "tables" if isinstance(shape, int) else "images"
        for setting in self.settings:
            if setting.name in given and setting.of not in (None, data):
                option = "--" + setting.name.replace("_", "-")
                raise ValueError(f"{option} is for {setting.of}; the data are {data}, of shape {shape}")


Shape = int | Sequence[int]


def _build_maf(
    shape: Shape, context_features: int, transforms: int, hidden: list[int], batch_norm: bool, activation: str, scale: str
) -> Flow:
    return MAF(
        math.prod(parse_shape(shape)),
        context_features=context_features,
        transforms=transforms,
        hidden_features=hidden,
        batch_norm=batch_norm,
        activation=activation,
        scale=SCALES[scale](),
    )


def _build_iaf(shape: Shape, context_features: int, transforms: int, hidden: list[int], gate: bool, activation: str, scale: str) -> Flow:
    return IAF(
        math.prod(parse_shape(shape)),
        context_features=context_features,
        transforms=transforms,
        hidden_features=hidden,
        gate=gate,
        activation=activation,
        scale=None if gate else SCALES[scale](),
    )


def _build_nice(shape: Shape, context_features: int, couplings: int, hidden: list[int], base: str) -> Flow:
    return NICE(shape, context_features=context_features, couplings=couplings, hidden_features=hidden, base=BASES[base]())


def _build_realnvp(shape: Shape, context_features: int, hidden: list[int], **settings: Any) -> Flow:
    return RealNVP(shape, context_features=context_features, hidden_features=hidden, **settings)


def _build_glow(shape: Shape, context_features: int, **settings: Any) -> Flow:
    if len(parse_shape(shape)) != 3:
        raise ValueError(f"glow is a flow of images; the data has rows of {shape} numbers. Use realnvp or maf")
    return Glow(shape, context_features=context_features, **settings)


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
        {"hidden": [256], "activation": "tanh", "learning_rate": 8e-3, "weight_decay": 2.0, "patience": 20},
    ),
    "iaf": FlowEntry(
        "inverse autoregressive flow (Kingma et al. 2016)",
        (
            Setting("transforms", int, 5, "number of autoregressive steps"),
            Setting("hidden", int, [512, 512], "widths of each step's hidden layers", many=True),
            Setting("gate", bool, False, "the paper's gated step, whose scale is at most 1"),
            Setting("activation", str, "relu", "activation of the hidden layers", choices=ACTIVATIONS),
            Setting("scale", str, "softclip", "scale map sigma(s) of a step without gate", choices=tuple(SCALES)),
        ),
        _build_iaf,
        {"hidden": [256], "activation": "tanh", "learning_rate": 1.5e-2, "weight_decay": 1.0, "patience": 20},
    ),
    "nice": FlowEntry(
        "flow of additive couplings (NICE, Dinh et al. 2014)",
        (
            Setting("couplings", int, 4, "number of additive couplings"),
            Setting("hidden", int, [1000] * 5, "widths of each conditioner's hidden layers", many=True),
            Setting("base", str, "logistic", "base distribution", choices=tuple(BASES)),
        ),
        _build_nice,
        {"hidden": [256], "learning_rate": 5e-3, "weight_decay": 1.0},
    ),
    "realnvp": FlowEntry(
        "flow of affine couplings (RealNVP, Dinh et al. 2016)",
        (
            Setting("batch_norm", bool, True, "flow batch norm after each coupling"),
            Setting("transforms", int, 6, "number of couplings", of="tables"),
            Setting("hidden", int, [256, 256], "widths of each conditioner's hidden layers", many=True, of="tables"),
            Setting("levels", int, 2, "number of scales; height and width are halved between them", of="images"),
            Setting("blocks", int, 8, "residual blocks of each conditioner", of="images"),
            Setting("hidden_channels", int, 64, "channels inside the conditioners of the first scale", of="images"),
        ),
        _build_realnvp,
        {"blocks": 1, "hidden_channels": 16, "epochs": 30, "learning_rate": 5e-3, "weight_decay": 1.0},
    ),
    "glow": FlowEntry(
        "flow of affine couplings and 1x1 convolutions, for images (Glow, Kingma and Dhariwal 2018)",
        (
            Setting("levels", int, 3, "number of scales; each halves height and width"),
            Setting("steps", int, 32, "actnorms, 1x1 convolutions and couplings at each scale"),
            Setting("hidden_channels", int, 512, "channels inside the conditioners"),
            Setting("coupling", str, "affine", "kind of the couplings", choices=("affine", "additive")),
            Setting("parametrization", str, "lu", "of the 1x1 convolutions' weights", choices=("lu", "plain")),
        ),
        _build_glow,
        {"levels": 2, "steps": 12, "hidden_channels": 32, "epochs": 45, "learning_rate": 1e-2, "weight_decay": 2.0},
    ),
}
