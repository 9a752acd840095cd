"""`train FLOW`: maximum likelihood on a file or on the digits, in a run folder that a second start continues."""

import argparse
from dataclasses import fields
from typing import Any

from ..data import DIGITS
from ..data.digits import LEVELS
from ..training import FLOWS, FlowEntry, Setting, Trainer, TrainingSettings, load_split, make_config, train_run
from ..training.progress import TerminalProgress
from ..training.start import ALPHA_OF_DIGITS, ALPHA_OF_FILES, LEVELS_OF_FILES
from . import vae
from .common import add_device, check_device, counted, positive_float, positive_int, seed

_DEFAULTS = {field.name: field.default for field in fields(TrainingSettings)}
_TRAINING = (
    ("epochs", positive_int, "N", "at most so many passes over the training rows"),
    ("batch_size", positive_int, "N", "rows in a step"),
    ("learning_rate", positive_float, "X", "of Adam"),
    ("weight_decay", float, "X", "of Adam, decoupled"),
    ("averaging", float, "X", "decay of the averaged weights, which are what is kept; 0: none"),
    ("clip_norm", positive_float, "X", "largest norm of a gradient"),
    ("patience", positive_int, "N", "stop after so many epochs without a better held-out likelihood"),
    ("seed", seed, "N", "of the weights, the batches and the split"),
)


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "train",
        help="train a flow by maximum likelihood",
        description="Train a flow by maximum likelihood. Ctrl-C keeps what is done; the same command again goes on from there. "
        "See `train FLOW --help` for the settings of a flow.",
    )
    flows = parser.add_subparsers(title="flows", metavar="FLOW", required=True, dest="flow")
    for name, entry in FLOWS.items():
        flow = flows.add_parser(
            name, help=entry.summary, description=f"Train {'an' if entry.summary[0] in 'aeiou' else 'a'} {entry.summary}."
        )
        flow.set_defaults(run=run)
        _add_data(flow)
        group = flow.add_argument_group("the flow")
        for setting in entry.settings:
            _add_setting(group, setting, entry)
        _add_training(flow.add_argument_group("training"), entry)
    vae.add_parser(flows)


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        required=True,
        metavar="digits|FILE",
        help="digits (scikit-learn's), or a .npy, .npz (arrays x, context) or .csv file; images are uint8, [N, H, W] or with channels",
    )
    group.add_argument("--context", metavar="FILE", help="context of the rows, one row each, where --data does not hold it")
    group.add_argument("--unconditional", action="store_true", help="leave the context out: the digits' classes, or the file's")
    group.add_argument("--out", required=True, metavar="RUN", help="run folder, new or to go on in")
    group.add_argument(
        "--validation", type=positive_float, default=0.1, metavar="X", help="fraction of a file's rows to hold out (default: 0.1)"
    )
    group.add_argument(
        "--no-standardize", action="store_true", help="take a table's columns as they are, not at zero mean and unit variance"
    )
    group.add_argument(
        "--grey-levels",
        type=positive_int,
        metavar="N",
        help=f"images: number of grey levels (default: {LEVELS_OF_FILES}; digits: {LEVELS})",
    )
    group.add_argument(
        "--alpha",
        type=positive_float,
        metavar="X",
        help=f"images: the logit is of alpha + (1 - 2 alpha) x (default: {ALPHA_OF_FILES}; digits: {ALPHA_OF_DIGITS})",
    )


def _add_setting(group: argparse._ArgumentGroup, setting: Setting, entry: FlowEntry) -> None:
    flag = "--" + setting.name.replace("_", "-")
    text = f"{f'{setting.of}: ' if setting.of else ''}{setting.help} ({_defaults(setting.name, setting.default, entry)})"
    if setting.type is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        return
    kind = {int: positive_int, float: float, str: str}[setting.type]
    extra = {"choices": setting.choices} if setting.choices else {"metavar": "N" if setting.type is int else "X"}
    group.add_argument(flag, type=kind, nargs="+" if setting.many else None, help=text, **extra)


def _add_training(group: argparse._ArgumentGroup, entry: FlowEntry) -> None:
    for name, kind, metavar, text in _TRAINING:
        defaults = _defaults(name, _DEFAULTS[name], entry)
        group.add_argument("--" + name.replace("_", "-"), type=kind, metavar=metavar, help=f"{text} ({defaults})")
    group.add_argument(
        "--schedule",
        choices=("cosine", "constant"),
        help=f"learning rate over the epochs: falling to 0, or kept ({_defaults('schedule', _DEFAULTS['schedule'], entry)})",
    )
    add_device(group)


def _defaults(name: str, default: Any, entry: FlowEntry) -> str:
    show = lambda value: " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"default: {show(default)}" + (f"; digits: {show(entry.digits[name])}" if name in entry.digits else "")


def run(options: argparse.Namespace) -> None:
    device, entry = check_device(options.device), FLOWS[options.flow]
    names = [*_DEFAULTS, *(setting.name for setting in entry.settings)]
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    settings, training = entry.choose(given, digits=options.data == DIGITS)
    split = load_split(options.data, options.context, options.validation, training.seed, unconditional=options.unconditional)
    data = {name: getattr(options, name) for name in ("grey_levels", "alpha", "unconditional")}
    config = make_config(options.flow, settings, split, training, standardize=not options.no_standardize, **data)
    entry.check(given, config["flow"]["shape"])
    width = config["flow"]["context_features"]
    context = f" given {width} of context" if width else ""
    rows = f"{counted(len(split.train), 'row')} to train on, {len(split.validation)} held out"
    print(f"{options.flow}: {_what(config['flow']['shape'])}{context}; {rows}")
    trainer = train_run(options.out, config, split, device=device, progress=TerminalProgress())
    report(trainer)
    print(f"kept in {options.out}: config.json, checkpoint.pt, metrics.csv")


def _what(shape: int | list[int]) -> str:
    return counted(shape, "feature") if isinstance(shape, int) else f"images of {' x '.join(map(str, shape))}"


def report(trainer: Trainer) -> None:
    """What training came to."""
    bits = trainer.model.bits_per_dim(trainer.best_nats)
    more = "" if bits is None else f" ({bits:.3f} bits per dimension)"
    trained = f"trained {counted(trainer.epoch, 'epoch')}; best is epoch {trainer.best_epoch}"
    print(f"{trained}: held-out log p(x) {trainer.best_nats:.3f} nats{more}")
