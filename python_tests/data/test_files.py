"""Files are written whole or not at all."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from flowkernels.data import atomic_write, load_table, save_array


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("call", "failure", "kind"), [("fsync", full_disk, OSError), ("replace", full_disk, OSError), ("fsync", interrupt, KeyboardInterrupt)]
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call, failure, kind):
    path = tmp_path / "file.bin"
    atomic_write(path, b"old")
    monkeypatch.setattr(os, call, failure)
    with pytest.raises(kind) as stop:
        atomic_write(path, b"new content")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file.bin"]
    if kind is OSError:
        assert stop.value.errno == errno.ENOSPC
        assert f"cannot write {path}: No space left on device; what was there before is unchanged" in str(stop.value)


def test_a_missing_folder_is_an_oserror(tmp_path):
    with pytest.raises(OSError, match="cannot write .*file.bin"):
        atomic_write(tmp_path / "gone" / "file.bin", b"")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8])
def test_csv_reads_back_to_the_same_bits(tmp_path, dtype):
    x = (torch.randn(20, 3, dtype=torch.float64) * 100).abs().to(dtype)
    save_array(tmp_path / "x.csv", x, header=["a", "b", "c"])
    assert torch.equal(torch.from_numpy(np.loadtxt(tmp_path / "x.csv", delimiter=",", skiprows=1)).to(dtype), x)
    save_array(tmp_path / "x.npy", x)
    assert torch.equal(torch.from_numpy(np.load(tmp_path / "x.npy")), x)


def test_names_with_commas_and_quotes_read_back(tmp_path):
    names = ("mass, kg", 'the "b"', "plain", "two\nlines")
    save_array(tmp_path / "x.csv", torch.randn(5, 4), header=list(names))
    assert load_table(tmp_path / "x.csv").columns == names


def test_one_dimension_is_one_column_and_other_names_are_refused(tmp_path):
    save_array(tmp_path / "x.csv", torch.tensor([1.5, 2.0]), header=["log_prob"])
    assert (tmp_path / "x.csv").read_text() == "log_prob\n1.5\n2.0\n"
    with pytest.raises(ValueError, match=r"must end in .npy or .csv; got .*x.txt"):
        save_array(tmp_path / "x.txt", torch.zeros(1))


def test_two_writers_leave_the_content_of_one(tmp_path):
    """Neither tears what the other publishes, nor takes its temporary file away."""
    path, contents = tmp_path / "file.bin", [bytes([i]) * 1_000_000 for i in range(2)]
    with ThreadPoolExecutor(2) as pool:
        writers = [pool.submit(lambda content: [atomic_write(path, content) for _ in range(20)], content) for content in contents]
        while not all(writer.done() for writer in writers):
            if path.exists():
                assert path.read_bytes() in contents
    for writer in writers:
        writer.result()
    assert os.listdir(tmp_path) == ["file.bin"]


def test_a_csv_has_rows_and_columns_alone(tmp_path):
    with pytest.raises(ValueError, match=r"one or two dimensions to be written as .csv; got shape \[2, 2, 2\]"):
        save_array(tmp_path / "x.csv", torch.zeros(2, 2, 2))
    assert not os.listdir(tmp_path)


def test_links_permissions_and_long_names(tmp_path):
    target, link = tmp_path / "real.csv", tmp_path / "link.csv"
    target.write_bytes(b"old")
    target.chmod(0o600)
    link.symlink_to(target)
    atomic_write(link, b"new")
    assert link.is_symlink() and target.read_bytes() == b"new" and target.stat().st_mode & 0o777 == 0o600
    long = tmp_path / ("ä" * 125 + ".csv")
    atomic_write(long, b"new")
    assert long.read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 3
