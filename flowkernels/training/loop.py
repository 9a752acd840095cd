"""Maximum likelihood with early stopping. Everything that decides what comes next is in `Trainer.state_dict`."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from .._wide import wide
from ..data import Split
from ..flows import Flow
from ..layers import FlowBatchNorm, InvertibleConv1x1
from ..layers._sizes import parse_count
from .model import DataModel, rows_in_flight

VALIDATION_DRAWS = 3  # fixed dequantisations of the held-out images
HISTORY = ("epoch", "learning_rate", "train_nats", "validation_nats")


@dataclass(frozen=True)
class TrainingSettings:
    """How to train.

    epochs: at most so many passes over the training rows. patience: stop after so many epochs without a better held-out
    likelihood. weight_decay: decoupled, of matrices and kernels alone. schedule: "cosine" lets the learning rate fall to zero over the
    epochs, "constant" keeps it. averaging: decay per step of the average of the weights, which is what is evaluated and kept; 0 for
    none. clip_norm: largest norm of a gradient.
    """

    epochs: int = 100
    batch_size: int = 100
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    schedule: str = "cosine"
    averaging: float = 0.99
    clip_norm: float = 20.0
    patience: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("epochs", 1), ("batch_size", 2), ("patience", 1), ("seed", 0)):
            parse_count(name, getattr(self, name), low)
        for name in ("learning_rate", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be at least 0; got {self.weight_decay}")
        if not 0 <= self.averaging < 1:
            raise ValueError(f"averaging must be at least 0 and less than 1; got {self.averaging}")
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule must be 'cosine' or 'constant'; got {self.schedule!r}")


@torch.no_grad()
def set_training_statistics(flow: Flow, x: Tensor, context: Tensor | None = None, rows: int | None = None) -> None:
    """Give each batch norm the statistics of the training set under the weights that the flow has now.

    A flow whose only batch norms are layers of its own gets those of the whole set, layer by layer, as in MAF's evaluation. Where
    conditioners have batch norms too, or scales hold layers of theirs, they are the means over batches of one pass in training mode.

    Args:
        flow: the flow; it is left in evaluation mode.
        x: the training rows as the flow sees them, [samples, *shape]; context: theirs.
        rows: rows in flight at once; `model.rows_in_flight` by default.
    """
    flow.eval()
    rows = rows_in_flight(flow) if rows is None else rows
    norms = [module for module in flow.modules() if isinstance(module, FlowBatchNorm | _BatchNorm)]
    own = [layer for layer in flow.layers if isinstance(layer, FlowBatchNorm)]
    parts = math.ceil(len(x) / rows)
    contexts = [None] * parts if context is None else context.tensor_split(parts)
    if len(own) == len(norms):
        for layer in flow.layers[: 1 + max((i for i, layer in enumerate(flow.layers) if layer in own), default=-1)]:
            if layer in own:
                layer.set_statistics(x)
            x = torch.cat([layer(*part)[0] for part in zip(x.tensor_split(parts), contexts, strict=True)])
        return
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)
    momenta = [norm.momentum for norm in norms]
    try:
        for i, chosen in enumerate(order.tensor_split(parts)):
            for norm in norms:
                norm.train()
                norm.momentum = 1 / (i + 1)
            flow(x[chosen], None if context is None else context[chosen])
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        flow.eval()


def _decayed_weights_alone(flow: Flow, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups in which only the matrices and kernels of networks decay: no biases, scales of maps or weights to be inverted.

    Of normalised kernels it is the gain that decays (RealNVP, Dinh et al. 2016, section 4.1): their own length changes nothing.
    """
    inverted = {p for module in flow.modules() if isinstance(module, InvertibleConv1x1) for p in module.parameters()}
    weights = [p for p in flow.parameters() if p.dim() >= 2 and p not in inverted]
    others = [p for p in flow.parameters() if p.dim() < 2 or p in inverted]
    groups = [{"params": weights, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class Trainer:
    """Trains the flow of a model, an epoch at a time.

    After each epoch `state_dict()` holds the whole state; a trainer made anew that loads it goes on to the same bits on a CPU
    (with the same number of threads).

    Args:
        model: the flow with its fitted preprocessing.
        split: training and validation rows.
        settings: how to train.

    Raises:
        ValueError: there are no training rows, or none to validate on, or no parameter that may change.
    """

    def __init__(self, model: DataModel, split: Split, settings: TrainingSettings) -> None:
        for name, rows in (("train", split.train), ("validation", split.validation)):
            if not len(rows):
                raise ValueError(f"split.{name} must have at least one row; got none")
        if not any(p.requires_grad for p in model.flow.parameters()):
            raise ValueError("the flow must have parameters to train; all of them are frozen, requires_grad=False, or there are none")
        self.model, self.split, self.settings = model, split, settings
        self.average = DataModel(copy.deepcopy(model.flow), model.preprocess, model.context_map)
        # one kernel for all parameters: a loop over them takes longer than a small flow's whole forward and backward pass
        groups = _decayed_weights_alone(model.flow, settings.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.history: list[list[float]] = []
        self.best_nats, self.best_epoch = -math.inf, 0
        self.best = copy.deepcopy(model.flow.state_dict())

    @property
    def epoch(self) -> int:
        """Number of finished epochs."""
        return len(self.history)

    @property
    def finished(self) -> bool:
        """Whether the epochs are used up or the held-out likelihood has stopped rising."""
        return self.epoch >= self.settings.epochs or self.epoch - self.best_epoch >= self.settings.patience

    @property
    def steps_per_epoch(self) -> int:
        return len(self._batch_starts())

    def _batch_starts(self) -> range:
        rows = len(self.split.train)
        starts = range(0, rows, self.settings.batch_size)
        # a last batch of one row has no batch statistics
        return starts[:-1] if len(starts) > 1 and rows - starts[-1] < 2 else starts

    def _learning_rate(self) -> float:
        if self.settings.schedule == "constant":
            return self.settings.learning_rate
        passed = min(self.epoch / self.settings.epochs, 1.0)  # of the epochs; whoever goes on beyond them trains no further
        return self.settings.learning_rate * 0.5 * (1 + math.cos(math.pi * passed))

    def run_epoch(self, on_step: Callable[[], None] = lambda: None) -> dict[str, float]:
        """One pass over the training rows, with fresh dequantisation noise where there is any, and the held-out likelihood after it.

        Returns:
            The epoch's row of the history.

        Raises:
            ValueError: the loss is no longer finite, or the held-out likelihood is not.
        """
        flow, settings = self.model.flow, self.settings
        learning_rate = self._learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        y, logabsdet, context = self.model.prepare(self.split.train, self.generator)
        order = torch.randperm(len(y), generator=self.generator).to(y.device)
        flow.train()
        total, seen = 0.0, 0
        for step, start in enumerate(self._batch_starts()):
            rows = order[start : start + settings.batch_size]
            z, flow_logabsdet = flow(y[rows], None if context is None else context[rows])
            nats = flow.base.log_prob(z) + flow_logabsdet
            self.optimizer.zero_grad()
            (-nats.mean()).backward()
            torch.nn.utils.clip_grad_norm_(flow.parameters(), settings.clip_norm)
            self.optimizer.step()
            self._follow(step)
            total += wide(nats.detach()).sum().item() + logabsdet[rows].sum().item()
            seen += len(rows)
            if not math.isfinite(total):
                raise ValueError(f"the loss is {-total} in epoch {self.epoch + 1}; learning_rate {settings.learning_rate} may be too large")
            on_step()
        for mine, theirs in zip(self.average.flow.buffers(), flow.buffers(), strict=True):
            mine.copy_(theirs)
        set_training_statistics(self.average.flow, y, context)
        validation = self.validate()
        if not math.isfinite(validation):
            self._refuse_validation()
        if validation > self.best_nats:
            self.best_nats, self.best_epoch = validation, self.epoch + 1
            self.best = copy.deepcopy(self.average.flow.state_dict())
        self.history.append([self.epoch + 1, learning_rate, total / seen, validation])
        return dict(zip(HISTORY, self.history[-1], strict=True))

    @torch.no_grad()
    def _follow(self, step: int) -> None:
        """Move the averaged weights; early on the average is short, so that it forgets the initial weights."""
        steps = self.epoch * self.steps_per_epoch + step + 1
        decay = min(self.settings.averaging, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(list(self.average.flow.parameters()), list(self.model.flow.parameters()), 1 - decay)

    def validate(self) -> float:
        """Mean log-density of the held-out rows in nats, under the averaged weights and always the same noise."""
        return self._held_out().mean().item()

    def _held_out(self) -> Tensor:
        return self.average.log_prob(self.split.validation, torch.Generator().manual_seed(0), VALIDATION_DRAWS)

    def _refuse_validation(self) -> None:
        nats = self._held_out()
        row = int((~torch.isfinite(nats)).nonzero()[0])
        raise ValueError(
            f"the held-out log p(x) is {nats[row].item()} for row {row}, counted from 0, in epoch {self.epoch + 1}: it may lie too far "
            f"from the training rows, or learning_rate {self.settings.learning_rate} may be too large"
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that a continuation needs, as tensors and plain values; a copy, which training on does not change."""
        return copy.deepcopy(self._state())

    def _state(self) -> dict[str, Any]:
        return {
            "flow": self.model.flow.state_dict(),
            "average": self.average.flow.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "torch_generator": torch.get_rng_state(),
            "history": self.history,
            "best_epoch": self.best_epoch,
            "best_nats": self.best_nats,
            "best": self.best,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            KeyError, RuntimeError, ValueError, TypeError: the state is not this trainer's.
        """
        self.model.flow.load_state_dict(state["flow"])
        self.average.flow.load_state_dict(state["average"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # which would write into what it is given
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_generator"])
        self.history = [list(row) for row in state["history"]]
        self.best_epoch, self.best_nats, self.best = state["best_epoch"], state["best_nats"], copy.deepcopy(state["best"])
