"""`train FLOW`: maximum likelihood on a file or on the digits, in a run folder that a second start continues."""

import argparse
from dataclasses import fields

from ..training import FLOWS, Setting, Trainer, TrainingSettings, load_split, make_config, train_run
from ..training.progress import TerminalProgress
from .common import add_device, check_device, positive_float, positive_int, seed

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


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Help with defaults, but for options that are off by default."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "train",
        help="train a flow by maximum likelihood",
        description="Train a flow by maximum likelihood. Ctrl-C keeps what is done; the same command again goes on from there. "
        "See `train FLOW --help` for the settings of a flow.",
    )
    flows = parser.add_subparsers(title="flows", metavar="FLOW", required=True, dest="flow")
    for name, entry in FLOWS.items():
        flow = flows.add_parser(name, help=entry.summary, description=f"Train a {entry.summary}.", formatter_class=_Defaults)
        flow.set_defaults(run=run)
        _add_data(flow)
        group = flow.add_argument_group("the flow")
        for setting in entry.settings:
            _add_setting(group, setting)
        _add_training(flow.add_argument_group("training"))


def _add_data(parser: argparse.ArgumentParser) -> None:
    quiet = argparse.SUPPRESS  # as default: no "(default: None)" in the help
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        required=True,
        default=quiet,
        metavar="digits|FILE",
        help="digits (scikit-learn's), or a .npy, .npz (arrays x, context) or .csv file",
    )
    group.add_argument("--context", default=None, metavar="FILE", help="context of the rows, one row each, where --data does not hold it")
    group.add_argument("--out", required=True, default=quiet, metavar="RUN", help="run folder, new or to go on in")
    group.add_argument("--validation", type=positive_float, default=0.1, metavar="X", help="fraction of a file's rows to hold out")
    group.add_argument(
        "--no-standardize", action="store_true", help="take a file's columns as they are, not at zero mean and unit variance"
    )


def _add_setting(group: argparse._ArgumentGroup, setting: Setting) -> None:
    flag = "--" + setting.name.replace("_", "-")
    if setting.type is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=setting.default, help=setting.help)
        return
    kind = {int: positive_int, float: float, str: str}[setting.type]
    extra = {"choices": setting.choices} if setting.choices else {"metavar": "N" if setting.type is int else "X"}
    group.add_argument(flag, type=kind, nargs="+" if setting.many else None, default=setting.default, help=setting.help, **extra)


def _add_training(group: argparse._ArgumentGroup) -> None:
    for name, kind, metavar, text in _TRAINING:
        group.add_argument("--" + name.replace("_", "-"), type=kind, default=_DEFAULTS[name], metavar=metavar, help=text)
    group.add_argument(
        "--schedule",
        choices=("cosine", "constant"),
        default=_DEFAULTS["schedule"],
        help="learning rate over the epochs: falling to 0, or kept",
    )
    add_device(group)


def run(options: argparse.Namespace) -> None:
    device = check_device(options.device)
    training = TrainingSettings(**{name: getattr(options, name) for name in _DEFAULTS})
    split = load_split(options.data, options.context, options.validation, options.seed)
    settings = {setting.name: getattr(options, setting.name) for setting in FLOWS[options.flow].settings}
    config = make_config(options.flow, settings, split, training, standardize=not options.no_standardize)
    shape = config["flow"]
    context = f" given {shape['context_features']} of context" if shape["context_features"] else ""
    print(f"{options.flow}: {shape['features']} features{context}; {len(split.train)} rows to train on, {len(split.validation)} held out")
    trainer = train_run(options.out, config, split, device=device, progress=TerminalProgress())
    report(trainer)
    print(f"kept in {options.out}: config.json, checkpoint.pt, metrics.csv")


def report(trainer: Trainer) -> None:
    """What training came to."""
    bits = trainer.model.bits_per_dim(trainer.best_nats)
    more = "" if bits is None else f" ({bits:.3f} bits per dimension)"
    print(f"trained {trainer.epoch} epochs; best is epoch {trainer.best_epoch}: held-out log p(x) {trainer.best_nats:.3f} nats{more}")
