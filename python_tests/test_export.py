"""torch.export of what flows do, with a batch of any size."""

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from flowkernels.flows import MAF, Flow, RealNVP

FLOWS = {
    "MAF": lambda: MAF(4, context_features=2, transforms=2, hidden_features=(9, 8), batch_norm=True),
    "RealNVP": lambda: RealNVP(4, context_features=2, transforms=2, hidden_features=(6,)),
}


class Call(nn.Module):
    def __init__(self, flow: Flow, call) -> None:
        super().__init__()
        self.flow, self.call = flow, call

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.call(self.flow, x, context)


CALLS = {
    "log_prob": lambda flow, x, context: flow.log_prob(x, context),
    "inverse": lambda flow, x, context: flow.inverse(x, context)[0],
    "log_prob of a distribution": lambda flow, x, context: flow.distribution(context).log_prob(x),
    "samples of each context": lambda flow, x, context: flow.sample(3, context),
    "samples and densities": lambda flow, x, context: flow.sample_and_log_prob(3, context)[1],
    "as many samples as rows": lambda flow, x, context: flow.sample(x.shape[0], context[:1]),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("make", FLOWS.values(), ids=FLOWS)
@torch.no_grad()
def test_any_batch(make, call, strict):
    torch.manual_seed(0)
    flow = make().eval()
    rows = lambda n: (torch.randn(n, 4), torch.randn(n, 2))
    batch = {0: Dim("batch")}
    program = export(Call(flow, call), rows(5), dynamic_shapes=(batch, batch), strict=strict).module()
    for n in (2, 5, 9):
        x, context = rows(n)
        got, want = (torch.random.manual_seed(1) and f(x, context) for f in (program, Call(flow, call)))
        torch.testing.assert_close(got, want)
