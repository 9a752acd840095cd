"""Training: maximum likelihood with early stopping, run folders that a second start continues, models that speak the user's units."""

from .loop import Trainer, TrainingSettings, set_training_statistics
from .model import DataModel
from .registry import FLOWS, FlowEntry, Setting
from .run import RunError, RunFolder, load_model
from .start import Interrupted, load_split, make_config, train_run
from .variational import Normalizer, log_normalizer, reverse_kl, train_reverse_kl

__all__ = [
    "FLOWS",
    "DataModel",
    "FlowEntry",
    "Interrupted",
    "Normalizer",
    "RunError",
    "RunFolder",
    "Setting",
    "Trainer",
    "TrainingSettings",
    "load_model",
    "load_split",
    "log_normalizer",
    "make_config",
    "reverse_kl",
    "set_training_statistics",
    "train_reverse_kl",
    "train_run",
]
