"""Two processes over gloo: DistributedDataParallel, half of the batch each, and fully_shard have the gradients of one with the whole."""

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from flowkernels.flows import MAF
from flowkernels.layers import masked_autoregressive

PROCESSES = 2

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")


def gradients(call, model: torch.nn.Module, rows: slice) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    x, context = torch.randn(10, 5, generator=g).double()[rows], torch.randn(10, 2, generator=g).double()[rows]
    z, logabsdet = call(x, context)
    (z.square().sum(1) / 2 - logabsdet).mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def flow(seed: int) -> MAF:
    masked_autoregressive.INITIAL_OUTPUTS = 1.0  # as in conftest, which spawned processes do not read
    torch.manual_seed(seed)
    return MAF(5, context_features=2, transforms=3, hidden_features=(16, 12)).double()


def train(rank: int, folder: Path) -> None:
    """What each process does. Its model begins elsewhere: DistributedDataParallel has to spread the first one's parameters."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), PROCESSES)  # a file, so that no port has to be free
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=60))
    try:
        model = flow(seed=rank)
        found = gradients(DistributedDataParallel(model), model, slice(rank * 5, rank * 5 + 5))
        torch.save(found, folder / f"{rank}.pt")
        check_sharded()
    finally:
        dist.destroy_process_group()


def check_sharded() -> None:
    """`log_prob` calls the flow itself; samples and their gradients need `inverse` alone to be told of."""
    whole, x, context = flow(seed=0), torch.linspace(-1, 1, 15).double().view(3, 5), torch.ones(3, 2).double()
    sharded = fully_shard(flow(seed=0), mesh=init_device_mesh("cpu", (PROCESSES,)))
    register_fsdp_forward_method(sharded, "inverse")
    found = []
    for model in (whole, sharded):
        loss = -model.log_prob(x, context).mean()
        samples, log_prob = model.rsample_and_log_prob(4, context, generator=torch.Generator().manual_seed(2))
        (loss + samples.square().mean() + log_prob.mean()).backward()
        grads = [p.grad.full_tensor() if model is sharded else p.grad for p in model.parameters()]
        found.append([loss.detach(), samples.detach(), *grads])
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)


def test_gradients_are_those_of_one_process(tmp_path):
    context = torch.multiprocessing.start_processes(train, (tmp_path,), PROCESSES, join=False, start_method="spawn")
    try:
        assert context.join(timeout=180) or context.join(timeout=10), "the processes did not end"
    finally:
        for process in context.processes:
            process.kill()
    whole = flow(seed=0)
    want = gradients(whole, whole, slice(None))
    for rank in range(PROCESSES):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), want, rtol=1e-10, atol=1e-12)
