"""Every kernel compiles for GPUs that are not here, spills nothing, and takes what resources.json says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def found() -> dict:
    # a process of its own: in this one Triton may be its interpreter
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, "-m", "python_tests.triton.resources"], cwd=HERE.parents[1], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_no_kernel_spills(found):
    assert len(found["kernels"]) > 20
    assert {name: taken for name, taken in found["kernels"].items() if taken["spilled bytes"] or taken["local bytes"]} == {}


def test_resources_are_as_recorded(found):
    recorded = json.loads((HERE / "resources.json").read_text())
    if found["triton"] != recorded["triton"]:
        pytest.skip(f"recorded with Triton {recorded['triton']}; this is {found['triton']}")
    assert found["kernels"] == recorded["kernels"], "python -m python_tests.triton.resources > python_tests/triton/resources.json"
