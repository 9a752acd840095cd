"""The examples run, and find what they say they find."""

import runpy
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def main_of(name: str):
    return runpy.run_path(str(FOLDER / f"{name}.py"))["main"]


def test_intervals_of_posteriors_hold_what_they_should():
    found = main_of("posterior")(steps=200, batch=200, observations=200, samples=500)
    assert ((found > 0.8) & (found < 0.98)).all()


def test_the_constant_of_a_density_is_found():
    assert abs(main_of("unnormalised")(steps=200, samples=20_000) - 7.0) < 0.1


def test_a_flow_of_nflows_keeps_its_densities():
    pytest.importorskip("nflows.flows")
    assert main_of("from_nflows")(features=4, samples=50) < 1e-4


def test_every_example_is_tested():
    assert {path.stem for path in FOLDER.glob("*.py")} == {"posterior", "unnormalised", "from_nflows"}
