"""The data file: one JSON object a line, one line for each competitor of each case."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """Rows of a file; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def replace(path: Path, rows: Iterable[Row], *, benchmark: str, device: str) -> None:
    """Put rows in the place of those of the same benchmark and device; the others stay. The file is never half-written."""
    kept = [row for row in read(path) if (row["benchmark"], row["device"]) != (benchmark, device)]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in [*kept, *rows]))
    os.replace(temporary, path)
