"""A torch without the insides that we use: everything is computed all the same."""

import subprocess
import sys
from pathlib import Path

import torch

import flowkernels
from flowkernels import _torch

WITHOUT = """
import sys, types
source = open({path!r}).read()
assert "        return reduce(" in source
module = types.ModuleType("flowkernels._torch")
sys.modules["flowkernels._torch"] = module
exec(source.replace("        return reduce(", "        return otherwise or reduce("), vars(module))
assert module.transform_level() == 0 and module.any_autocast()
"""
JOB = """
import torch, flowkernels
from flowkernels import check, ops
torch.manual_seed(0)
outputs = [torch.tensor(flowkernels._extension.has_kernel(op, key)) for op in ("coupling", "autoregressive") for key in ("CPU", "MPS")]
for name, make in check.FLOWS.items():
    flow = make().train()
    x, z = torch.randn(8, *flow.shape), torch.randn(8, flow.features)
    context = torch.randn(8, flow.context_features) if flow.context_features else None
    flow(x, context)
    flow.eval().log_prob(x, context).mean().backward()
    outputs += [p.grad for p in flow.parameters() if p.grad is not None]
    for _ in range(4):
        with torch.no_grad():
            back, logabsdet = flow.inverse(z, context)
    outputs += [back, logabsdet]
outputs += [*ops.slogdet(torch.randn(3, 4, 4))]
torch.save(outputs, sys.argv[1])
"""


def test_everything_is_found_in_this_torch():
    assert _torch.transform_level() is None and _torch.dispatch_mode() is None and _torch.tracing_state() is None
    assert not (_torch.transforms_active() or _torch.any_autocast() or _torch.has_global_hooks() or _torch.forward_mode())
    assert "flowkernels::coupling" in _torch.op_names()


def test_flows_without_them(tmp_path):
    path = str(Path(flowkernels.__file__).parent / "_torch.py")
    for name, code in (("with", "import sys\n" + JOB), ("without", WITHOUT.format(path=path) + JOB)):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=True)
    with_them, without = (torch.load(tmp_path / name) for name in ("with", "without"))
    torch.testing.assert_close(without, with_them, rtol=1e-3, atol=1e-3)
