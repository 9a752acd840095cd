"""Each flow on a GPU: the CPU's numbers, in all four tasks, and the commands with --device cuda."""

import copy

import numpy as np
import pytest
import torch

from flowkernels.cli import main
from flowkernels.flows import IAF, MAF, NICE, Flow, Glow, RealNVP

FLOWS = {
    "NICE": lambda: NICE(6, hidden_features=(16,)),
    "RealNVP": lambda: RealNVP(6, transforms=3, hidden_features=(16,)),
    "RealNVP, images": lambda: RealNVP((1, 8, 8), hidden_channels=8, blocks=1),
    "Glow": lambda: Glow((2, 8, 8), levels=2, steps=2, hidden_channels=8),
    "MAF": lambda: MAF(6, transforms=3, hidden_features=(16, 16)),
    "IAF": lambda: IAF(6, transforms=3, hidden_features=(16, 16)),
}


def made(name: str) -> Flow:
    torch.manual_seed(0)
    flow = FLOWS[name]()
    flow(torch.randn(32, *flow.shape))  # Glow's first batch initialises it
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return flow.eval()


@pytest.mark.gpu
@pytest.mark.parametrize("name", FLOWS)
class TestOnAGpu:
    def test_density_and_sampling(self, name):
        flow = made(name)
        moved = copy.deepcopy(flow).cuda()
        for batch in (0, 1, 37):
            x = torch.randn(batch, *flow.shape)
            with torch.no_grad():
                torch.testing.assert_close(moved.log_prob(x.cuda()).cpu(), flow.log_prob(x), rtol=1e-3, atol=1e-3)
                z = flow(x)[0]
                for got, want in zip(moved.inverse(z.cuda()), flow.inverse(z), strict=True):
                    torch.testing.assert_close(got.cpu(), want, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("task", ["density", "sampling"])
    @pytest.mark.parametrize("training", [False, True])
    def test_gradients(self, name, task, training, monkeypatch):
        # torch's default for convolutions, by which alone Glow's gradients go beyond what is allowed here
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        found = []
        for device in ("cpu", "cuda"):
            flow = made(name).to(device).train(training)
            if task == "sampling" and training:
                flow.eval()  # batch statistics have no inverse
            x = torch.randn(33, *flow.shape, generator=torch.Generator().manual_seed(1)).to(device)
            z = flow(x)[0]
            loss = -flow.log_prob(x).mean() if task == "density" else sum(t.square().mean() for t in flow.inverse(x.view(33, *z.shape[1:])))
            loss.backward()
            found.append([loss.detach(), *(p.grad for p in flow.parameters() if p.grad is not None)])
        for got, want in zip(found[1], found[0], strict=True):
            torch.testing.assert_close(got.cpu(), want, rtol=1e-3, atol=1e-3 * max(1.0, want.abs().max().item()))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["nice", "realnvp", "maf", "iaf"])
def test_commands(name, tmp_path):
    data, run = str(tmp_path / "x.npy"), str(tmp_path / "run")
    np.save(data, np.random.default_rng(0).normal(size=(200, 4)).astype("float32"))
    assert main(["train", name, "--data", data, "--out", run, "--epochs", "2", "--device", "cuda"]) == 0
    assert main(["sample", run, "-n", "5", "--out", str(tmp_path / "s.npy"), "--device", "cuda"]) == 0
    assert main(["density", run, "--data", data, "--out", str(tmp_path / "d.npy"), "--device", "cuda"]) == 0
    assert np.isfinite(np.load(tmp_path / "s.npy")).all() and np.isfinite(np.load(tmp_path / "d.npy")).all()
