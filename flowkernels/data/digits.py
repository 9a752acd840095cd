"""scikit-learn's bundled handwritten digits: 1,797 real images of 8 x 8 pixels, 17 grey levels, 10 classes."""

import torch

from .extras import optional
from .table import Split, Table

DIGITS = "digits"
CLASSES, LEVELS, SIDE = 10, 17, 8
# rows held out of each class's 174 to 183; fixed, so that every run and every figure is about the same images
_HELD_OUT = 30
_SPLIT_SEED = 0


def load_digits() -> Split:
    """The digits, split once and for all: 1,197 images to train on, 300 for validation, 300 to test; 30 of each class in the last two.

    x: grey levels 0..16, uint8 [rows, 64], row by row. context: the class, one-hot, [rows, 10].

    Raises:
        ModuleNotFoundError: scikit-learn is missing; the message names the extra.
    """
    images, labels = optional("sklearn.datasets", "scikit-learn", "the digits data set").load_digits(return_X_y=True)
    x, labels = torch.as_tensor(images).to(torch.uint8), torch.as_tensor(labels, dtype=torch.int64)
    context = one_hot(labels)
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    parts: tuple[list, list, list] = ([], [], [])
    for k in range(CLASSES):
        rows = (labels == k).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        for part, chosen in zip(parts, rows.split([len(rows) - 2 * _HELD_OUT, _HELD_OUT, _HELD_OUT]), strict=True):
            part.append(chosen)
    whole = Table(x, context, DIGITS, (1, SIDE, SIDE))
    return Split(*(whole.rows(torch.cat(part).sort().values) for part in parts))


def one_hot(labels: torch.Tensor) -> torch.Tensor:
    """Classes 0..9 as context, [rows, 10] float64."""
    return torch.nn.functional.one_hot(labels, CLASSES).to(torch.float64)
