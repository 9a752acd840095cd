"""Files written whole or not at all."""

import contextlib
import csv
import io
import os
import re
import secrets
from pathlib import Path

import numpy as np
from torch import Tensor


def atomic_write(path: str | Path, data: bytes | memoryview) -> None:
    """Write a file so that a reader, or a crash, meets the old content or the new one and nothing between.

    The bytes go to a temporary file in the same folder, are synced to the disk, and take the old file's place, and its permissions, in
    one step.

    Raises:
        OSError: the disk is full, read-only or broken. The old file is untouched and no temporary file is left.
    """
    path = Path(os.path.realpath(path))  # what a link names, not the link
    stem = path.name.encode()[:150].decode(errors="ignore")  # names have up to 255 bytes
    temporary = path.with_name(f".{stem}.{secrets.token_hex(8)}.tmp")  # no other writer's
    try:
        with open(temporary, "xb") as file:
            if path.exists():
                os.chmod(temporary, path.stat().st_mode & 0o7777)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        # also for Ctrl-C: whatever stopped the write, nothing half-written stays
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}; what was there before is unchanged") from error
        raise
    _sync_folder(path.parent)


_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")


def is_temporary(path: Path) -> bool:
    """Whether a process that was killed may have left this file of `atomic_write` behind."""
    return _TEMPORARY.fullmatch(path.name) is not None


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    with contextlib.suppress(OSError):
        os.fsync(descriptor)
    os.close(descriptor)


def save_array(path: str | Path, array: Tensor | np.ndarray, header: list[str] | None = None) -> None:
    """Write an array as .npy, or one of one or two dimensions as .csv (numbers that read back to the same bits), atomically.

    Raises:
        ValueError: the name ends in something else, or a .csv cannot hold the array.
        OSError: as `atomic_write`.
    """
    path = Path(path)
    array = array.numpy() if isinstance(array, Tensor) else np.asarray(array)
    if path.suffix == ".npy":
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        atomic_write(path, buffer.getbuffer())
    elif path.suffix == ".csv":
        if array.ndim not in (1, 2):
            raise ValueError(f"array must have one or two dimensions to be written as .csv; got shape {list(array.shape)}")
        rows = array[:, None] if array.ndim == 1 else array
        text = io.StringIO()
        if header:
            csv.writer(text, lineterminator="\n").writerow(header)  # names may hold commas
        text.writelines(",".join(str(value) for value in row) + "\n" for row in rows)
        atomic_write(path, text.getvalue().encode())
    else:
        raise ValueError(f"output file must end in .npy or .csv; got {path}")
