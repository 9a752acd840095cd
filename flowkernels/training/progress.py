"""What training shows: a bar on a terminal, plain lines without tqdm, nothing elsewhere."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .loop import Trainer


class Progress:
    """Shows nothing; `TerminalProgress` shows all.

    epochs: how many were trained in this start.
    """

    def __init__(self) -> None:
        self.epochs = 0

    def note(self, text: str) -> None:
        """One line of news."""

    @contextmanager
    def training(self, trainer: Trainer) -> Iterator[None]:
        """Around the whole training."""
        yield

    def step(self) -> None:
        """After each batch."""

    def epoch(self, row: dict[str, float], trainer: Trainer) -> None:
        """After each epoch, with its row of the history."""
        self.epochs += 1


class TerminalProgress(Progress):
    """A tqdm bar over the batches on standard error, or a line every ten epochs where tqdm is missing; silent where it is no terminal."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: Any = None
        self._terminal = sys.stderr.isatty()

    def note(self, text: str) -> None:
        print(text, flush=True)

    @contextmanager
    def training(self, trainer: Trainer) -> Iterator[None]:
        if self._terminal:
            try:
                from tqdm import tqdm
            except ModuleNotFoundError:
                pass
            else:
                steps = trainer.steps_per_epoch
                total = trainer.settings.epochs * steps
                self._bar = tqdm(total=total, initial=trainer.epoch * steps, unit=" batches", dynamic_ncols=True, leave=False)
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.close()
                self._bar = None

    def step(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def epoch(self, row: dict[str, float], trainer: Trainer) -> None:
        super().epoch(row, trainer)
        text = f"epoch {row['epoch']}: held-out {row['validation_nats']:.2f} nats, best {trainer.best_nats:.2f} at {trainer.best_epoch}"
        if self._bar is not None:
            self._bar.set_description(text, refresh=False)
        elif self._terminal and (row["epoch"] % 10 == 0 or trainer.finished):
            print(text, file=sys.stderr, flush=True)
