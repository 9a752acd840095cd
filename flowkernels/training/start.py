"""From data and settings to a trained run folder: what `train` and `demo` both do."""

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..data import DIGITS, Split, load_digits, load_table, split_rows
from ..data.digits import LEVELS
from .loop import Trainer, TrainingSettings
from .progress import Progress
from .registry import FLOWS
from .run import FORMAT, RunFolder, build_model

# alpha keeps the logit finite; files have RealNVP's for colour images
ALPHA_OF_DIGITS = 0.01
LEVELS_OF_FILES, ALPHA_OF_FILES = 256, 0.05
_WRITING_SHARE = 0.05  # of the time, at most, goes to checkpoints


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while training; the message says what is kept."""


def load_split(source: str, context: str | None = None, validation: float = 0.1, seed: int = 0, *, unconditional: bool = False) -> Split:
    """The digits with their own fixed split, or a user's file with some rows held out.

    unconditional: leave the context out, the digits' classes or a file's.

    Raises:
        FileNotFoundError, ValueError: as `data.load_table`; context with the digits, which bring their classes, or with unconditional.
    """
    if context is not None and unconditional:
        raise ValueError(f"context must not be given with --unconditional; got {context}")
    if source == DIGITS:
        if context is not None:
            raise ValueError(f"context must not be given with --data digits, whose classes are the context; got {context}")
        split = load_digits()
    else:
        table = load_table(source, context)
        train, held_out = split_rows(len(table), validation, seed)
        split = Split(table.rows(train), table.rows(held_out))
    return split.without_context() if unconditional else split


def make_config(
    flow: str,
    flow_settings: dict[str, Any],
    split: Split,
    training: TrainingSettings,
    *,
    standardize: bool = True,
    grey_levels: int | None = None,
    alpha: float | None = None,
    unconditional: bool = False,
) -> dict[str, Any]:
    """All that a run is made of, as plain values for config.json.

    Args:
        flow: name in `FLOWS`; flow_settings: its settings.
        split: the data.
        training: how to train.
        standardize: for a user's tables: zero mean and unit variance in every column of the training rows, and of their context.
        grey_levels, alpha: for images; see `data.GreyLevels`. By default 17 and 0.01 for the digits, 256 and 0.05 for images in files.
        unconditional: whether a context that came with the data was left out.

    Raises:
        ValueError: no such flow is known, or a setting is for tables and the data are images, or the other way round.
    """
    if flow not in FLOWS:
        raise ValueError(f"flow must be one of {', '.join(FLOWS)}; got {flow!r}")
    x, context, image_shape = split.train.x, split.train.context, split.train.image_shape
    digits = split.train.name == DIGITS
    if image_shape is None:
        for name, value in (("grey_levels", grey_levels), ("alpha", alpha)):
            if value is not None:
                raise ValueError(f"{name} must be given for images alone; {split.train.name} is a table of numbers, got {name} {value}")
        preprocess = {"kind": "standardize" if standardize else "identity"}
    else:
        if not standardize:
            raise ValueError(f"standardize must not be switched off for images, such as {split.train.name}: their logits are standardised")
        usual = (LEVELS, ALPHA_OF_DIGITS) if digits else (LEVELS_OF_FILES, ALPHA_OF_FILES)
        preprocess = {
            "kind": "grey_levels",
            "levels": usual[0] if grey_levels is None else grey_levels,
            "alpha": usual[1] if alpha is None else alpha,
        }
    with_context_map = context is not None and standardize and not digits
    config = {
        "format": FORMAT,
        "flow": {
            "name": flow,
            "shape": x.shape[1] if image_shape is None else list(image_shape),
            "context_features": 0 if context is None else context.shape[1],
            **flow_settings,
        },
        "training": asdict(training),
        "preprocess": preprocess,
        "context_map": {"kind": "standardize", "constant_columns": True} if with_context_map else None,
        "data": {
            "source": split.train.name,
            "columns": split.train.columns,
            "context_columns": split.train.context_columns,
            "fingerprint": _fingerprint(split),
            "unconditional": unconditional,
        },
    }
    return json.loads(json.dumps(config))  # as the next start will read it


def _fingerprint(split: Split) -> str:
    digest = hashlib.sha256()
    for part in (split.train, split.validation):
        digest.update(str(part.x.shape).encode())
        digest.update(part.x.numpy().tobytes())
        if part.context is not None:
            digest.update(part.context.numpy().tobytes())
    return digest.hexdigest()


def train_run(path: str | Path, config: dict[str, Any], split: Split, *, device: str = "cpu", progress: Progress | None = None) -> Trainer:
    """Train in a run folder, from where it stands, until it is finished.

    Checkpoints are written at the ends of epochs, and left out only where they would take more than a twentieth of the time. A
    continuation redoes what came after the last one, to the same bits on a CPU.

    Returns:
        The trainer; its model holds the best weights.

    Raises:
        RunError: the folder holds something else, other settings, or a damaged checkpoint, or another process trains in it.
        OSError: the disk is full or read-only.
        Interrupted: Ctrl-C.
    """
    settings = TrainingSettings(**config["training"])
    model = build_model(config)
    model.fit_preprocess(split.train)
    model.check(split.validation)
    model.flow.to(device)
    folder, progress = RunFolder(path), progress or Progress()
    with folder.in_use(), _seeded(settings.seed, torch.device(device)):
        begun = folder.open(config)
        return _train(folder, Trainer(model, split, settings), begun, progress)


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's generators begin with a seed, and go on afterwards where the caller had them."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _train(folder: RunFolder, trainer: Trainer, begun: bool, progress: Progress) -> Trainer:
    path = folder.path
    if begun:
        finished = folder.resume(trainer)
        progress.note(f"{path} is finished" if finished else f"going on in {path} after epoch {trainer.epoch}")
        if finished:
            return trainer
    kept = trainer.epoch
    try:
        with progress.training(trainer):
            next_write = 0.0
            while not trainer.finished:
                progress.epoch(trainer.run_epoch(progress.step), trainer)
                if trainer.finished or time.monotonic() >= next_write:
                    began = time.monotonic()
                    folder.save(trainer)
                    kept = trainer.epoch
                    next_write = time.monotonic() + (time.monotonic() - began) / _WRITING_SHARE
    except KeyboardInterrupt:
        raise Interrupted(f"{path} is kept up to epoch {kept}; start the same command again to go on") from None
    trainer.model.flow.load_state_dict(trainer.best)
    return trainer
