"""Training: maximum likelihood with early stopping, run folders that a second start continues, models that speak the user's units."""

from .loop import Trainer, TrainingSettings, set_training_statistics
from .model import DataModel
from .registry import FLOWS, FlowEntry, Setting
from .run import RunError, RunFolder, load_model
from .start import Interrupted, load_split, make_config, train_run

__all__ = [
    "FLOWS",
    "DataModel",
    "FlowEntry",
    "Interrupted",
    "RunError",
    "RunFolder",
    "Setting",
    "Trainer",
    "TrainingSettings",
    "load_model",
    "load_split",
    "make_config",
    "set_training_statistics",
    "train_run",
]
