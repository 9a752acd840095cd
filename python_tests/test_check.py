"""`check` passes where kernels are right, and names what is wrong where one is not."""

import pytest
import torch

from flowkernels import check
from flowkernels.cli import main
from flowkernels.layers import FlowBatchNorm


def test_many_rows_are_right_here(monkeypatch):
    """By more of them than a kernel's tile; and a gradient that a rounding turned to a ReLU's other side is no fault."""
    monkeypatch.setattr(check, "BATCHES", (300,))
    monkeypatch.setattr(check, "FLOWS", {name: check.FLOWS[name] for name in ("RealNVP of images", "MAF")})
    wrong = [r for r in check.results("cpu") if not r.right]
    assert not wrong, wrong


def test_other_rows_are_asked_where_one_gradient_is_a_little_off(monkeypatch):
    errors = iter([0.01, 1e-5, 1e-5, 1e-5, 0.5])
    monkeypatch.setattr(check, "FLOWS", {"MAF": check.FLOWS["MAF"]})
    monkeypatch.setattr(check, "BATCHES", (1,))
    monkeypatch.setattr(check, "_error_of", lambda *_, seed=0: next(errors, 1e-12))
    found = list(check.results("cpu"))
    assert [r.error for r in found[:2]] == [1e-5, 0.5] and not found[1].right


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(check, "FLOWS", {name: check.FLOWS[name] for name in ("RealNVP", "MAF")})
    monkeypatch.setattr(check, "BATCHES", (1, 5))


def test_every_flow_is_right_here(monkeypatch):
    monkeypatch.setattr(check, "BATCHES", (3,))
    found = list(check.results("cpu"))
    assert {r.flow for r in found} == set(check.FLOWS) and len(found) == len(check.FLOWS) * len(check.TASKS) * len(check.DTYPES)
    assert all(r.right for r in found), [r for r in found if not r.right]


def test_convolutions_are_not_rounded(few, monkeypatch):
    switch, seen, right = torch.backends.cudnn.conv, set(), check._run
    before = switch.fp32_precision

    def run(flow, *others):
        seen.add((next(flow.parameters()).dtype, switch.fp32_precision))
        return right(flow, *others)

    monkeypatch.setattr(check, "_run", run)
    assert all(r.right for r in check.results("cpu")) and switch.fp32_precision == before
    assert (torch.float32, "ieee") in seen and (torch.float32, before) not in seen - {(torch.float32, "ieee")}


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


@pytest.mark.parametrize("spoilt", ["z", "logabsdet"])
def test_a_value_that_is_no_number_is_wrong(few, monkeypatch, capsys, spoilt):
    right = check._run

    def wrong(flow, task, rows, context):
        results = right(flow, task, rows, context)
        if rows.dtype == torch.float32 and task == "density":
            results[spoilt == "logabsdet"].view(-1)[-1] = float("nan")
        return results

    monkeypatch.setattr(check, "_run", wrong)
    assert main(["check", "--device", "cpu"]) == 2
    printed = capsys.readouterr()
    assert "MAF, density, batch 5, torch.float32 on cpu: nan" in printed.err and "sampling" not in printed.err
    assert printed.out.count(" nan ") == 2


def test_rows_that_are_asked_instead_must_give_numbers(monkeypatch):
    errors = iter([0.01, 1e-5, float("nan"), 1e-5])
    monkeypatch.setattr(check, "FLOWS", {"MAF": check.FLOWS["MAF"]})
    monkeypatch.setattr(check, "BATCHES", (1,))
    monkeypatch.setattr(check, "_error_of", lambda *_, seed=0: next(errors, 1e-12))
    assert not next(iter(check.results("cpu"))).right
