"""Users' files: what can be read is read whole, what cannot is refused with its place."""

import io
import pickle

import numpy as np
import pytest
import torch

from flowkernels.data import Split, Table, load_table, read_array, split_rows

X = np.array([[1.0, 2.5], [3.0, -4.0], [5.0, 6.25]])


class Hostile:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def csv(folder, text):
    path = folder / "x.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def npy(folder, array):
    np.save(folder / "x.npy", array)
    return folder / "x.npy"


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.int64, np.uint8, np.bool_])
def test_npy_of_any_real_dtype_becomes_float64(tmp_path, dtype):
    table = load_table(npy(tmp_path, np.array([[1, 0], [0, 1]], dtype=dtype)))
    assert table.context is None
    assert torch.equal(table.x, torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("shape", "image_shape", "last"),
    [
        ((5, 6, 7), (1, 6, 7), False),
        ((5, 3, 6, 7), (3, 6, 7), False),
        ((5, 6, 7, 3), (3, 6, 7), True),
        ((5, 28, 28, 1), (1, 28, 28), True),
        ((5, 3, 3, 3), (3, 3, 3), False),
    ],
)
def test_images_are_flattened_channels_first(tmp_path, shape, image_shape, last):
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "x.npz", x=images, context=np.eye(5))
    table = load_table(tmp_path / "x.npz")
    assert table.image_shape == image_shape and table.x.dtype == torch.uint8
    wanted = np.moveaxis(images, -1, 1) if last else images
    assert np.array_equal(table.x.numpy(), wanted.reshape(5, -1))
    some = table.rows(torch.tensor([3, 1]))
    assert some.image_shape == image_shape and torch.equal(some.x, table.x[[3, 1]]) and torch.equal(some.context, table.context[[3, 1]])


def test_npz_brings_its_context(tmp_path):
    labels = np.array(["a", None, 3], dtype=object)  # a pickle, which nobody asks for
    np.savez(tmp_path / "x.npz", x=X, context=X[:, :1], labels=labels)
    table = load_table(tmp_path / "x.npz")
    assert torch.equal(table.x, torch.from_numpy(X))
    assert torch.equal(table.context, torch.from_numpy(X[:, :1]))


@pytest.mark.parametrize(
    "text",
    [
        "1,2.5\n3,-4\n5,6.25\n",
        "a,b\n1,2.5\n3,-4\n5,6.25",
        "1,2.5\n  \n3,-4\n5,6.25\n \t\n",
        "\ufeffa,b\r\n1,2.5\r\n\r\n3,-4\r\n 5 ,6.25e0\r\n",
        '\n"a\n of it",b\n1,2.5\n3,-4\n5,6.25\n',
    ],
)
def test_csv_with_and_without_names(tmp_path, text):
    assert torch.equal(load_table(csv(tmp_path, text)).x, torch.from_numpy(X))


def test_context_comes_from_a_file_of_its_own(tmp_path):
    np.savez(tmp_path / "c.npz", context=X)
    table = load_table(npy(tmp_path, X), tmp_path / "c.npz")
    assert torch.equal(table.context, torch.from_numpy(X))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("a,b\n", "holds no rows"),
        ("1,2\n3,four\n", "line 2, column 2 is 'four'"),
        ("1,2\n3,\n", "line 2, column 2 is ''"),
        ("a,1\n3,4\n", "line 1, column 1 is 'a'"),
        ("1,2\n3,4\na,b\n", "line 3, column 1 is 'a'"),
        ("1,2\n3\n", "must have 2 columns in every line; line 2 has 1"),
        ("a,b\n1,2,3\n4,5,6\n", "must have 2 columns, as many as names; line 2 has 3"),  # rows that are written with their number
        ("a,b,c\n1,2\n", "must have 3 columns, as many as names; line 2 has 2"),
        (",a,b\n0,1,2\n", "must have a name for each column; line 1, column 1 is ''"),
        (",,\n1,2,3\n", "must have a name for each column; line 1, column 1 is ''"),
        ("1,2\n3,nan\n", "must be finite; row 1, column 1, counted from 0, is nan"),
        ("1,inf\n-inf,4\n", "row 0, column 1, counted from 0, is inf (and 1 more)"),
        (b"\xff\xfe1\x00,\x002\x00", "cannot be read as .csv"),
    ],
)
def test_a_bad_csv_is_refused_with_the_place(tmp_path, text, message):
    with pytest.raises(ValueError) as refusal:
        load_table(csv(tmp_path, text))
    assert message in str(refusal.value) and "x.csv" in str(refusal.value)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([["a", "b"]]), "must be numeric; got an array of <U1"),
        (np.array([[1j, 0]]), "must be numeric"),
        (np.zeros(4), "must have shape [rows, columns]; got [4]"),
        (np.zeros((0, 4)), "at least one row and one column; got [0, 4]"),
        (np.zeros((4, 0)), "at least one row and one column"),
        (np.array([[0.0], [np.nan]]), "row 1, column 0"),
        (np.zeros((3, 4, 4)), "must hold images as uint8 grey levels; got float64 of shape [3, 4, 4]"),
        (np.zeros((3, 0, 4), np.uint8), "at least one row and no empty image; got [3, 0, 4]"),
        (np.zeros((3, 8, 8, 9), np.uint8), "[rows, C, H, W] or [rows, H, W, C] with C at most 4; got [3, 8, 8, 9]"),
        (np.zeros((3, 2, 1, 8, 8), np.uint8), "must have shape [rows, columns]"),
    ],
)
def test_a_bad_array_is_refused(tmp_path, array, message):
    with pytest.raises(ValueError) as refusal:
        load_table(npy(tmp_path, array))
    assert message in str(refusal.value)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_a_hostile_pickle_is_refused_unread(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(ValueError, match="no plain numeric array"):
        load_table(path)
    hostile = np.array([Hostile()], dtype=object)
    np.save(path, hostile, allow_pickle=True) if suffix == ".npy" else np.savez(path, x=hostile)
    with pytest.raises(ValueError, match="no plain numeric array"):
        load_table(path)


def test_a_truncated_file_is_refused(tmp_path):
    for save, name in ((np.save, "x.npy"), (lambda file, x: np.savez(file, x=x), "x.npz")):
        buffer = io.BytesIO()
        save(buffer, np.zeros((50, 4)))
        for size in (3, 60, len(buffer.getvalue()) // 2):
            (tmp_path / name).write_bytes(buffer.getvalue()[:size])
            with pytest.raises(ValueError, match=name):
                load_table(tmp_path / name)


def test_missing_and_unknown_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.npy does not exist"):
        load_table(tmp_path / "gone.npy")
    with pytest.raises(ValueError, match="must end in .npy, .npz or .csv; got .*x.txt"):
        load_table(tmp_path / "x.txt")
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        load_table(tmp_path / "folder.npy")
    np.savez(tmp_path / "x.npz", data=X)
    with pytest.raises(ValueError, match="must hold an array named x; it holds data"):
        load_table(tmp_path / "x.npz")


def test_context_of_other_rows_or_twice_is_refused(tmp_path):
    np.save(tmp_path / "c.npy", X[:2])
    with pytest.raises(ValueError, match="context must have 3 rows, one per row of .*; got 2"):
        load_table(npy(tmp_path, X), tmp_path / "c.npy")
    np.savez(tmp_path / "xc.npz", x=X, context=X)
    with pytest.raises(ValueError, match="context must come once"):
        load_table(tmp_path / "xc.npz", tmp_path / "c.npy")
    with pytest.raises(FileNotFoundError, match="context file .*gone.csv does not exist"):
        read_array(tmp_path / "gone.csv", "context")


def test_a_split_without_context():
    rows = Table(torch.zeros(2, 3), torch.ones(2, 1), "made up")
    plain = Split(rows, rows).without_context()
    assert plain.train.context is None and plain.validation.context is None and plain.test is None and rows.context is not None


def test_split_is_a_partition_that_a_seed_decides():
    train, held_out = split_rows(100, 0.2, seed=3)
    assert len(held_out) == 20 and torch.equal(torch.cat([train, held_out]).sort().values, torch.arange(100))
    again, other = split_rows(100, 0.2, seed=3), split_rows(100, 0.2, seed=4)
    assert torch.equal(train, again[0]) and not torch.equal(train, other[0])
    with pytest.raises(ValueError, match="at least 2 rows to train on"):
        split_rows(2, 0.1, seed=0)
    with pytest.raises(ValueError, match="between 0 and 1; got 1.5"):
        split_rows(10, 1.5, seed=0)
