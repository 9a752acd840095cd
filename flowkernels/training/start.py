"""From data and settings to a trained run folder: what `train` and `demo` both do."""

import hashlib
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..data import DIGITS, Split, load_digits, load_table, split_rows
from ..data.digits import LEVELS, SIDE
from .loop import Trainer, TrainingSettings
from .progress import Progress
from .run import FORMAT, RunFolder, build_model

ALPHA = 0.01  # keeps the logit of the digits finite
_WRITING_SHARE = 0.05  # of the time, at most, goes to checkpoints


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while training; the message says what is kept."""


def load_split(source: str, context: str | None = None, validation: float = 0.1, seed: int = 0) -> Split:
    """The digits with their own fixed split, or a user's file with some rows held out.

    Raises:
        FileNotFoundError, ValueError: as `data.load_table`; context with the digits, which bring their classes.
    """
    if source == DIGITS:
        if context is not None:
            raise ValueError(f"context must not be given with --data digits, whose classes are the context; got {context}")
        return load_digits()
    table = load_table(source, context)
    train, held_out = split_rows(len(table), validation, seed)
    return Split(table.rows(train), table.rows(held_out))


def make_config(
    flow: str, flow_settings: dict[str, Any], split: Split, training: TrainingSettings, *, standardize: bool = True
) -> dict[str, Any]:
    """All that a run is made of, as plain values for config.json.

    Args:
        flow: name in `FLOWS`; flow_settings: its settings.
        split: the data.
        training: how to train.
        standardize: for a user's data: zero mean and unit variance in every column of the training rows, and of their context.
    """
    x, context = split.train.x, split.train.context
    digits = split.train.name == DIGITS
    if digits:
        preprocess = {"kind": "grey_levels", "levels": LEVELS, "alpha": ALPHA}
    else:
        preprocess = {"kind": "standardize" if standardize else "identity"}
    with_context_map = context is not None and standardize and not digits
    return {
        "format": FORMAT,
        "flow": {
            "name": flow,
            "features": x.shape[1],
            "context_features": 0 if context is None else context.shape[1],
            **flow_settings,
        },
        "training": asdict(training),
        "preprocess": preprocess,
        "context_map": {"kind": "standardize", "constant_columns": True} if with_context_map else None,
        "data": {"source": split.train.name, "fingerprint": _fingerprint(split), "image_shape": [SIDE, SIDE] if digits else None},
    }


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
        RunError: the folder holds something else, other settings, or a damaged checkpoint.
        OSError: the disk is full or read-only.
        Interrupted: Ctrl-C.
    """
    settings = TrainingSettings(**config["training"])
    model = build_model(config)
    model.fit_preprocess(split.train)
    model.check(split.validation)
    model.flow.to(device)
    folder, progress = RunFolder(path), progress or Progress()
    begun = folder.open(config)
    torch.manual_seed(settings.seed)
    trainer = Trainer(model, split, settings)
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
    model.flow.load_state_dict(trainer.best)
    return trainer
