"""`check` passes where kernels are right, and names what is wrong where one is not."""

import pytest
import torch

from flowkernels import check
from flowkernels.cli import main
from flowkernels.layers import FlowBatchNorm


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(check, "FLOWS", {name: check.FLOWS[name] for name in ("RealNVP", "MAF")})
    monkeypatch.setattr(check, "BATCHES", (1, 5))


def test_every_flow_is_right_here(monkeypatch):
    monkeypatch.setattr(check, "BATCHES", (3,))
    found = list(check.results("cpu"))
    assert {r.flow for r in found} == set(check.FLOWS) and len(found) == len(check.FLOWS) * len(check.TASKS) * len(check.DTYPES)
    assert all(r.right for r in found), [r for r in found if not r.right]


def test_the_command_prints_a_table(few, capsys):
    assert main(["check"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("cpu, torch.float") for line in table) == 2
    assert [line.split()[0] for line in table if line.endswith(tuple("0123456789"))] == ["RealNVP", "MAF"] * 2


def test_a_wrong_kernel_is_named(few, monkeypatch, capsys):
    right = FlowBatchNorm.inverse

    def wrong(self, z, context=None):
        x, logabsdet = right(self, z, context)
        if z.dtype == torch.float32 and len(x) > 3:  # as if a row were left out
            x = x.index_fill(0, torch.tensor([3]), 0.0)
        return x, logabsdet

    monkeypatch.setattr(FlowBatchNorm, "inverse", wrong)
    assert main(["check", "--device", "cpu"]) == 2
    message = capsys.readouterr().err
    assert "kernels differ from plain PyTorch: RealNVP, sampling, batch 5, torch.float32 on cpu: " in message
    assert "batch 1," not in message and "float64" not in message and "density" not in message


def test_a_value_that_is_no_number_is_wrong():
    assert not check.Result("MAF", "density", 1, torch.float32, float("nan")).right
