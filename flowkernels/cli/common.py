"""Options and steps that several commands share."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..data import DIGITS, Table, load_digits, load_table, save_array
from ..training import DataModel, RunError, load_model


def counted(n: int, noun: str) -> str:
    """1 row, 2 rows."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def positive_int(text: str) -> int:
    """An argparse type."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {text}")
    if value >= 2**63:
        raise argparse.ArgumentTypeError(f"must be below 2^63; got {text}")
    return value


def positive_float(text: str) -> float:
    """An argparse type."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number; got {text}")
    return value


def seed(text: str) -> int:
    """An argparse type."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be between 0 and 2^63 - 1; got {text}")
    return value


# argparse names a type in its errors: "invalid whole number value: 'x'"
positive_int.__name__, positive_float.__name__, seed.__name__ = "whole number", "number", "whole number"


def add_run(parser: argparse.ArgumentParser) -> None:
    """The run folder and the device."""
    parser.add_argument("run_folder", metavar="RUN", help="run folder that `train` made")
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="where to compute: cpu, cuda, cuda:1, ...")


def add_data(parser: argparse.ArgumentParser) -> None:
    """The rows to work on."""
    parser.add_argument(
        "--data", required=True, metavar="digits|FILE", help="digits, or a .npy, .npz (arrays x, context) or .csv file, as for train"
    )
    parser.add_argument("--context", metavar="FILE", help="context of the rows, one row each, where --data does not hold it")
    parser.add_argument(
        "--split", choices=("train", "validation", "test"), default="test", help="part of the digits (default: test); files are taken whole"
    )
    parser.add_argument(
        "--seed", type=seed, default=0, help="seed of what is drawn, such as the dequantisation noise of grey levels (default: 0)"
    )


def add_output(parser: argparse.ArgumentParser, default: str, kinds: str = ".npy or .csv") -> None:
    parser.add_argument("--out", metavar="FILE", help=f"where to write, {kinds} (default: {default} in the run folder)")


def check_device(name: str) -> str:
    """The device's name, if this machine has it; a ValueError otherwise."""
    try:
        torch.empty(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return name


def open_run(options: argparse.Namespace) -> tuple[DataModel, dict[str, Any]]:
    """The model of the run folder, on its device, and its configuration; says so where training is not over."""
    device = check_device(options.device)
    model, config, progress = load_model(options.run_folder)
    if not progress["finished"]:
        print(f"training is not finished; using the best weights so far, of epoch {progress['best_epoch']}")
    model.flow.to(device)
    return model, config


def load_rows(options: argparse.Namespace, model: DataModel, config: dict[str, Any]) -> Table:
    """The rows of --data and --context, checked against the run."""
    if options.data == DIGITS:
        if config["data"]["source"] != DIGITS:
            raise RunError(f"run folder {options.run_folder} was trained on {config['data']['source']}, not on the digits")
        if options.context is not None:
            raise ValueError(f"context must not be given with --data digits, whose classes are the context; got {options.context}")
        split = load_digits()
        table = getattr(split if model.flow.context_features else split.without_context(), options.split)
    else:
        table = load_table(options.data, options.context)
        check_columns(f"data file {options.data}", table.columns, config["data"].get("columns"))
        check_columns(f"context file {options.context}", table.context_columns, config["data"].get("context_columns"))
        if config["data"].get("unconditional") and options.context is None:
            table = replace(table, context=None)  # as --unconditional did in training
    model.check(table)
    return table


def check_columns(source: str, columns: tuple[str, ...] | None, trained: list[str] | None) -> None:
    """Refuse columns that are named otherwise than in training, with a ValueError. Columns without names are taken as they are."""
    if trained and columns and [*columns] != trained:
        raise ValueError(f"{source} must have the columns {', '.join(trained)}, in the order of training; got {', '.join(columns)}")


def image_shape(config: dict[str, Any]) -> tuple[int, int, int] | None:
    """(C, H, W) of a run on images; None for one on a table."""
    shape = config["flow"]["shape"]
    return None if isinstance(shape, int) else tuple(shape)


def output_path(options: argparse.Namespace, default: str, suffixes: tuple[str, ...] = (".npy", ".csv")) -> Path:
    """Where to write, checked before anything is computed."""
    path = Path(options.out) if options.out else Path(options.run_folder) / default
    if path.suffix not in suffixes:
        raise ValueError(f"--out must end in {' or '.join(suffixes)}; got {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"folder {path.parent} of --out does not exist")
    return path


def save_images_or_rows(path: Path, x: torch.Tensor, model: DataModel, config: dict[str, Any], columns: int) -> None:
    """Write what a run makes, [n, features]: as a .png, as images in a .npy (uint8, [n, C, H, W]), or one row each."""
    shape = image_shape(config)
    if shape is None:
        save_array(path, x, header=config["data"].get("columns"))
        return
    images = x.to(torch.uint8).view(-1, *shape)
    if path.suffix == ".png":
        from ..plots import save_images

        ink = config["data"]["source"] == DIGITS
        save_images(path, images, columns=columns, levels=model.preprocess.levels, ink=ink)
    else:
        save_array(path, images if path.suffix == ".npy" else images.flatten(1))


def noise(options: argparse.Namespace) -> torch.Generator:
    return torch.Generator().manual_seed(options.seed)
