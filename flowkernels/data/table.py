"""Tables of numbers from users' files. A file that cannot be read whole and clean is refused, with the place of the trouble."""

import csv
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SUFFIXES = (".npy", ".npz", ".csv")
_MOST_CHANNELS = 4  # of an image


@dataclass(frozen=True)
class Table:
    """Rows of data, and of context where there is one.

    x: [rows, features], float64, or uint8 for images, flattened. context: [rows, context features], float64, or None. name: where the
    rows come from. image_shape: (C, H, W), or None where the rows are no images. columns, context_columns: their names, where the files
    have them.
    """

    x: Tensor
    context: Tensor | None
    name: str
    image_shape: tuple[int, int, int] | None = None
    columns: tuple[str, ...] | None = None
    context_columns: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.x)

    def rows(self, indices: Tensor) -> "Table":
        """Some of the rows."""
        return replace(self, x=self.x[indices], context=None if self.context is None else self.context[indices])


@dataclass(frozen=True)
class Split:
    """The parts of a data set; test is None where the user keeps it."""

    train: Table
    validation: Table
    test: Table | None = None

    def without_context(self) -> "Split":
        """The same rows, for a flow that takes no context."""
        parts = (self.train, self.validation, self.test)
        return Split(*(None if part is None else replace(part, context=None) for part in parts))


def load_table(path: str | Path, context_path: str | Path | None = None) -> Table:
    """Read data, and the context of its rows, from .npy, .npz or .csv files.

    An array of three or four dimensions is taken as images of whole grey levels, uint8: [rows, H, W], [rows, C, H, W], or
    [rows, H, W, C] where only the last dimension is 4 or less. In an .npz the arrays are `x` and, where there is a context, `context`;
    a context goes there or into a file of its own, not both. A .csv may begin with a line of names, one for each column.

    Returns:
        The table; every number in it is finite.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, not numeric, holds NaN or infinity, pickled objects, or another shape than [rows, columns]
            or that of images.
    """
    arrays, columns = _read(Path(path), "data")
    if "x" not in arrays:
        raise ValueError(f"data file {path} must hold an array named x; it holds {', '.join(sorted(arrays)) or 'none'}")
    is_image = arrays["x"] is not None and arrays["x"].ndim in (3, 4)
    x, image_shape = _images(arrays["x"], f"data file {path}") if is_image else (_checked(arrays["x"], f"data file {path}"), None)
    context = arrays.get("context")
    if context is not None and context_path is not None:
        raise ValueError(f"context must come once; got --context {context_path} and an array named context in {path}")
    if context is not None:
        context = _checked(context, f"context in {path}")
    context_columns = None
    if context is None and context_path is not None:
        context, context_columns = read_array(context_path, "context")
    if context is not None and len(context) != len(x):
        raise ValueError(f"context must have {len(x)} rows, one per row of {path}; got {len(context)}")
    rows = (torch.from_numpy(x), None if context is None else torch.from_numpy(context))
    return Table(*rows, str(path), image_shape, columns, context_columns)


def read_array(path: str | Path, what: str = "data") -> tuple[np.ndarray, tuple[str, ...] | None]:
    """One array from a file, [rows, columns] float64, checked as `load_table` does, and the names of its columns where it has them. In an
    .npz it is the array named `what`, or x."""
    arrays, columns = _read(Path(path), what)
    name = what if what in arrays else "x"
    if name not in arrays:
        raise ValueError(f"{what} file {path} must hold an array named {what}; it holds {', '.join(sorted(arrays)) or 'none'}")
    return _checked(arrays[name], f"{what} file {path}"), columns


def _read(path: Path, what: str) -> tuple[dict[str, np.ndarray], tuple[str, ...] | None]:
    """The arrays by their names, and the names of the columns of a .csv."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{what} file must end in .npy, .npz or .csv; got {path}")
    if not path.exists():
        raise FileNotFoundError(f"{what} file {path} does not exist")
    if not path.is_file():
        raise ValueError(f"{what} file must be a file; {path} is a folder")
    if path.stat().st_size == 0:
        raise ValueError(f"{what} file {path} is empty")
    if path.suffix == ".csv":
        rows, columns = _read_csv(path, what)
        return {"x": rows}, columns
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"x": loaded}, None
        with loaded:
            return {name: loaded[name] for name in loaded.files if name in ("x", "context")} or dict.fromkeys(loaded.files), None
    except (ValueError, EOFError, KeyError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        if "pickle" in str(error) or "Object arrays" in str(error):
            raise ValueError(f"{what} file {path} holds no plain numeric array (pickled objects are never loaded)") from None
        raise ValueError(f"{what} file {path} cannot be read as {path.suffix}: {error}") from None


def _read_csv(path: Path, what: str) -> tuple[np.ndarray, tuple[str, ...] | None]:
    rows: list[list[float]] = []
    columns: tuple[str, ...] | None = None
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            names_may_come = True
            for fields in (reader := csv.reader(file)):
                if not fields or (len(fields) == 1 and not fields[0].strip()):
                    continue
                numbers = [_number(field) for field in fields]
                names_may_come, first = False, names_may_come
                if first and all(number is None for number in numbers):
                    columns = tuple(field.strip() for field in fields)
                    if "" in columns:  # as of rows that are written with their number
                        column = columns.index("") + 1
                        raise ValueError(
                            f"{what} file {path} must have a name for each column; line {reader.line_num}, column {column} is ''"
                        )
                    continue
                if None in numbers:
                    column = numbers.index(None)
                    place = f"line {reader.line_num}, column {column + 1}"
                    raise ValueError(f"{what} file {path} must be numeric; {place} is {fields[column]!r}")
                width = len(rows[0]) if rows else len(columns or numbers)
                if len(numbers) != width:
                    of = "columns in every line" if rows else "columns, as many as names"
                    raise ValueError(f"{what} file {path} must have {width} {of}; line {reader.line_num} has {len(numbers)}")
                rows.append(numbers)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{what} file {path} cannot be read as .csv: {error}") from None
    if not rows:
        raise ValueError(f"{what} file {path} holds no rows of numbers")
    return np.array(rows, dtype=np.float64), columns


def _number(field: str) -> float | None:
    if "_" in field or not field.isascii():  # Python's own spellings
        return None
    try:
        return float(field)
    except ValueError:
        return None


def _images(array: np.ndarray, source: str) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Images as uint8 [rows, C * H * W], and (C, H, W)."""
    if array.dtype != np.uint8:
        raise ValueError(f"{source} must hold images as uint8 grey levels; got {array.dtype} of shape {list(array.shape)}")
    if 0 in array.shape:
        raise ValueError(f"{source} must have at least one row and no empty image; got {list(array.shape)}")
    if array.ndim == 3:
        array = array[:, None]
    elif array.shape[3] <= _MOST_CHANNELS < array.shape[1]:
        array = array.transpose(0, 3, 1, 2)
    if array.shape[1] > _MOST_CHANNELS:
        raise ValueError(
            f"{source} must have shape [rows, H, W], [rows, C, H, W] or [rows, H, W, C] with C at most {_MOST_CHANNELS}; "
            f"got {list(array.shape)}"
        )
    return np.ascontiguousarray(array).reshape(len(array), -1), array.shape[1:]


def _checked(array: np.ndarray | None, source: str) -> np.ndarray:
    """The array as finite float64 [rows, columns]."""
    if array is None or array.dtype.kind not in "fiub":
        raise ValueError(f"{source} must be numeric; got an array of {getattr(array, 'dtype', 'objects')}")
    if array.ndim != 2:
        raise ValueError(f"{source} must have shape [rows, columns]; got {list(array.shape)}")
    if 0 in array.shape:
        raise ValueError(f"{source} must have at least one row and one column; got {list(array.shape)}")
    array = np.ascontiguousarray(array, dtype=np.float64)
    bad = ~np.isfinite(array)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        more = f" (and {bad.sum() - 1} more)" if bad.sum() > 1 else ""
        raise ValueError(f"{source} must be finite; row {row}, column {column}, counted from 0, is {array[row, column]}{more}")
    return array
