"""Run folders: config.json says what is trained, checkpoint.pt how far it is, metrics.csv how it went."""

import contextlib
import io
import json
import os
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..data import atomic_write, build_preprocess
from ..data.files import is_temporary
from .loop import HISTORY, Trainer
from .model import DataModel
from .registry import FLOWS

FORMAT = 1
SECTIONS = ("flow", "training", "preprocess", "data")  # of config.json, beside context_map, which may be null


class RunError(RuntimeError):
    """A run folder cannot be used; the message says why, and what to do."""


class RunFolder:
    """The files of one run.

    Args:
        path: the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_path = self.path / "config.json"
        self.checkpoint_path = self.path / "checkpoint.pt"
        self.metrics_path = self.path / "metrics.csv"

    def open(self, config: dict[str, Any]) -> bool:
        """Begin a run in this folder, or find it begun; while it is `in_use`, or another process may do the same.

        Returns:
            Whether there is a checkpoint to go on from.

        Raises:
            RunError: the folder holds something else, or a checkpoint of a run with other settings (they are named).
            OSError: the folder cannot be made or written.
        """
        self._make()
        if any(not is_temporary(path) for path in self.path.iterdir()):
            if not self.config_path.exists():
                raise RunError(f"run folder {self.path} must be new, empty or a run's; it holds other files and no config.json")
            different = _differences(self.read_config(), config)
            if not different:
                return self.checkpoint_path.exists()
            if self.checkpoint_path.exists():
                raise RunError(f"run folder {self.path} was begun with other settings: {'; '.join(different)}. Use those, or another --out")
            # a run that ended before its first checkpoint, as with too large a learning rate: nothing is lost
        atomic_write(self.config_path, (json.dumps(config, indent=2) + "\n").encode())
        return False

    def _make(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"run folder {self.path} must be a folder; it is a file")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(error.errno, f"cannot make run folder {self.path}: {error.strerror}") from error

    def read_config(self) -> dict[str, Any]:
        """config.json, checked as far as a reader needs.

        Raises:
            RunError: the folder is missing, is no run, or holds a run of a flow or format that is not known here.
        """
        if not self.path.is_dir():
            raise RunError(f"run folder {self.path} does not exist")
        try:
            config = json.loads(self.config_path.read_text())
        except FileNotFoundError:
            raise RunError(f"{self.path} is no run folder: it has no config.json") from None
        except (ValueError, OSError) as error:
            raise RunError(f"{self.config_path} cannot be read: {error}") from None
        found = config.get("format") if isinstance(config, dict) else config
        if found != FORMAT:
            raise RunError(f"{self.config_path} must have format {FORMAT}; got {found!r}")
        missing = [section for section in SECTIONS if not isinstance(config.get(section), dict)]
        if missing:
            raise RunError(f"{self.config_path} is damaged: it has no {', '.join(missing)}")
        name = config["flow"].get("name")
        if not isinstance(name, str) or name not in FLOWS:
            raise RunError(f"{self.config_path} is of flow {name!r}; known here: {', '.join(FLOWS)}")
        return config

    def read_checkpoint(self) -> dict[str, Any]:
        """checkpoint.pt, loaded with weights only: a file from a stranger runs no code.

        Raises:
            RunError: there is none yet, it is damaged, or it holds anything but tensors and plain values.
        """
        if not self.checkpoint_path.exists():
            advice = "start its train command again, with other settings where those ended it"
            raise RunError(f"run folder {self.path} has no checkpoint yet; {advice}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of files that it then refuses
                checkpoint = torch.load(self.checkpoint_path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            refused = "Unsupported" in str(error) or "not an allowed global" in str(error) or "GLOBAL" in str(error)
            what = "holds more than tensors and plain values and was refused: it could run code" if refused else "is damaged"
            raise RunError(f"{self.checkpoint_path} {what}") from None
        except OSError as error:
            raise RunError(f"{self.checkpoint_path} cannot be read: {error.strerror or error}") from None
        except Exception as error:  # a damaged file raises nearly anything
            raise RunError(f"{self.checkpoint_path} is damaged ({type(error).__name__})") from None
        if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
            raise RunError(f"{self.checkpoint_path} is no checkpoint of this program")
        return checkpoint

    def save(self, trainer: Trainer) -> None:
        """Write checkpoint.pt, then metrics.csv, each atomically.

        A finished run keeps only what its users need: the best weights and the history.

        Raises:
            OSError: the disk is full or read-only; the checkpoint before is whole.
        """
        state = trainer.state_dict()
        if trainer.finished:
            state = {key: state[key] for key in ("history", "best_epoch", "best_nats", "best")}
        context_map = trainer.model.context_map
        state |= {
            "format": FORMAT,
            "finished": trainer.finished,
            "preprocess": trainer.model.preprocess.state_dict(),
            "context_map": {} if context_map is None else context_map.state_dict(),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        atomic_write(self.checkpoint_path, buffer.getbuffer())
        self._write_metrics(trainer)

    def _write_metrics(self, trainer: Trainer) -> None:
        lines = [",".join(HISTORY)] + [",".join(map(str, row)) for row in trainer.history]
        data = ("\n".join(lines) + "\n").encode()
        if not self.metrics_path.exists() or self.metrics_path.read_bytes() != data:
            atomic_write(self.metrics_path, data)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """While training runs: nobody else may train here, where the system has locks.

        Raises:
            RunError: somebody else does, or the folder is a file.
            OSError: it cannot be made.
        """
        self._make()
        try:
            import fcntl
        except ImportError:
            yield
            return
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"run folder {self.path} is in use: another process trains in it") from None
            except OSError:
                pass  # a file system without locks
            for written in (
                self.config_path,
                self.checkpoint_path,
                self.metrics_path,
            ):  # what a process left that was killed while it wrote
                for path in self.path.glob(f".{written.name}.*"):
                    if is_temporary(path):
                        path.unlink(missing_ok=True)
            yield
        finally:
            os.close(descriptor)

    def resume(self, trainer: Trainer) -> bool:
        """Load the checkpoint into a trainer, or, where the run is finished, its best weights into the model.

        Returns:
            Whether the run is finished.

        Raises:
            RunError: the checkpoint is damaged or does not fit.
        """
        checkpoint = self.read_checkpoint()
        finished = bool(checkpoint.get("finished"))
        with _fitting(self):
            if finished:
                trainer.model.flow.load_state_dict(checkpoint["best"])
                trainer.average.flow.load_state_dict(checkpoint["best"])
                trainer.history = [list(row) for row in checkpoint["history"]]
                trainer.best_epoch, trainer.best_nats, trainer.best = (checkpoint[key] for key in ("best_epoch", "best_nats", "best"))
            else:
                trainer.load_state_dict(checkpoint)
        if finished:
            self._write_metrics(trainer)  # which may not have been written after the last checkpoint
        return finished


class _fitting:
    """Turns whatever a state that does not fit raises into one RunError."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, (KeyError, RuntimeError, ValueError, TypeError, AttributeError)):
            raise RunError(f"{self.folder.checkpoint_path} does not fit {self.folder.config_path}: it is of another run") from error


def build_model(config: dict[str, Any]) -> DataModel:
    """The untrained model that a configuration describes.

    Raises:
        ValueError: a setting is out of range.
    """
    settings = dict(config["flow"])
    entry = FLOWS[settings.pop("name")]
    context_map = build_preprocess(config["context_map"]) if config["context_map"] else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config["training"]["seed"])
        return DataModel(entry.build(**settings), build_preprocess(config["preprocess"]), context_map)


def load_model(path: str | Path) -> tuple[DataModel, dict[str, Any], dict[str, Any]]:
    """The trained model of a run folder, with the best weights so far.

    Returns:
        The model, its configuration, and of the checkpoint `finished`, `history`, `best_epoch` and `best_nats`.

    Raises:
        RunError: the folder is missing, of an unknown flow, half-written or damaged.
    """
    folder = RunFolder(path)
    config = folder.read_config()
    checkpoint = folder.read_checkpoint()
    with _fitting(folder):
        model = build_model(config)
        model.flow.load_state_dict(checkpoint["best"])
        model.preprocess.load_state_dict(checkpoint["preprocess"])
        if model.context_map is not None:
            model.context_map.load_state_dict(checkpoint["context_map"])
        progress = {key: checkpoint[key] for key in ("finished", "history", "best_epoch", "best_nats")}
    model.flow.eval()
    return model, config, progress


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Settings that differ, as `name was a, now b`. Where the data came from may differ, and its columns' names, as long as its content is
    the same."""
    found = []
    for section in (*SECTIONS, "context_map"):
        before, now = old.get(section) or {}, new[section] or {}
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) == now.get(key) or key in ("source", "context", "columns", "context_columns"):
                continue
            if key == "fingerprint":
                found.append("the content of the data was other, or its split")
            else:
                found.append(f"{key} was {before.get(key)}, now {now.get(key)}")
    return found
