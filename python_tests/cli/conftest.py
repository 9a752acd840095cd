"""Files and runs that tests of the command line work on."""

import pickle

import numpy as np
import pytest
import torch

from flowkernels.cli import main
from python_tests.cli.runs import SMALL


class Hostile:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Flows this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    random = np.random.default_rng(0)
    x, context = random.normal(size=(40, 3)) * 2 + 7, random.normal(size=(40, 2))
    np.save(folder / "x.npy", x)
    np.save(folder / "context.npy", context)
    np.savez(folder / "xc.npz", x=x, context=context)
    np.savetxt(folder / "x.csv", x, delimiter=",", header="a,b,c", comments="")
    np.save(folder / "wide.npy", random.normal(size=(40, 4)))
    np.save(folder / "short.npy", context[:7])
    images = random.integers(0, 16, (40, 6, 4, 3), dtype=np.uint8)
    np.save(folder / "images.npy", images)
    np.savez(folder / "images.npz", x=images, context=np.eye(4)[np.arange(40) % 4])
    bad = x.copy()
    bad[3, 1] = np.nan
    np.save(folder / "nan.npy", bad)
    (folder / "empty.csv").touch()
    (folder / "words.csv").write_text("1,2,3\n4,five,6\n")
    (folder / "hostile.npy").write_bytes(pickle.dumps(Hostile()))
    assert main(["train", "maf", "--data", str(folder / "x.npy"), "--out", str(folder / "run"), *SMALL]) == 0
    assert main(["train", "maf", "--data", str(folder / "xc.npz"), "--out", str(folder / "conditional"), *SMALL]) == 0
    return folder


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    pytest.importorskip("sklearn")
    path = tmp_path_factory.mktemp("digits") / "run"
    assert main(["train", "maf", "--data", "digits", "--out", str(path), *SMALL]) == 0
    return path
