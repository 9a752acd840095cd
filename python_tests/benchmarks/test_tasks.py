"""The table of the four tasks, from rows whose slopes are known."""

from benchmarks.bench_tasks import AGAINST_D, FLOWS, LIBRARY, PLAIN, TASKS, summary


def test_cells_that_grow_with_a_loop_are_marked():
    def row(competitor, task, features):
        power = 1.3 if competitor == "MAF" + PLAIN and task == "sampling" else 0.3
        return {
            "competitor": competitor,
            "wrong": False,
            "seconds": 1e-3 * features**power,
            "sweep": {"name": f"{task}{AGAINST_D}", "value": features},
        }

    rows = [row(name + kind, task, d) for name in FLOWS for kind in ("", LIBRARY[name], PLAIN) for task in TASKS for d in (10, 100)]
    table = summary(rows)
    marked = [line for line in table.splitlines() if line.startswith("| ") and ")*" in line]
    assert len(marked) == 1 and marked[0].startswith("| plain PyTorch |") and marked[0].count(")*") == 1
    assert "3.98 ms (0.30) | 398 ms (1.30)* | 3.98 ms (0.30)" in marked[0]
    lines = table.splitlines()
    maf = lines.index(next(line for line in lines if line.startswith("| **MAF** |")))
    assert lines[maf + 1].startswith("| nflows |") and lines[maf + 2] == marked[0]
