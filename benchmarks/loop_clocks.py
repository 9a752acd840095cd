"""Where the sequential loop's time goes on a GPU: cycles of the first consumer and the first producer of block 0, by what they do.

    NVCC_APPEND_FLAGS=-DFK_LOOP_CLOCKS FORCE_CUDA=1 python setup.py build_ext --inplace
    python -m benchmarks.loop_clocks

The times beside are of this build, which reads the clocks.
"""

import ctypes

import torch

from flowkernels import _extension
from flowkernels.flows import MAF

CASES = ((784, (1024, 1024), 100), (784, (1024, 1024), 2000), (63, (512, 512), 1000), (63, (512, 512), 100_000), (6, (50, 50), 10_000))
LAPS = ("begin", "panel", "push", "produce", "landing", "waiting", "end", "panels", "pushes")  # Lap of csrc/cuda/autoregressive_loop.cuh
TRANSFORMS = 5


def main() -> None:
    path = _extension.status().cuda_library
    if path is None:
        raise SystemExit("the CUDA library was not built")
    library = ctypes.CDLL(str(path))
    if not hasattr(library, "fk_take_loop_clocks"):
        raise SystemExit(f"{path} reads no clocks: build it with NVCC_APPEND_FLAGS=-DFK_LOOP_CLOCKS")
    laps = ((ctypes.c_ulonglong * len(LAPS)) * 2)()
    for features, hidden, batch in CASES:
        torch.manual_seed(0)
        flow = MAF(features, transforms=TRANSFORMS, hidden_features=hidden).cuda().eval()
        z = torch.randn(batch, features, device="cuda")
        for direction, run in (("inverse", flow.inverse), ("forward", flow)):
            with torch.inference_mode():
                for _ in range(2):
                    run(z)
                library.fk_take_loop_clocks(laps)
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run(z)
                stop.record()
                torch.cuda.synchronize()
            if error := library.fk_take_loop_clocks(laps):
                raise SystemExit(f"CUDA error {error}")
            print(f"{direction}, D={features}, H={hidden[0]}x{len(hidden)}, batch {batch:,}: {start.elapsed_time(stop):.3f} ms")
            for who, own in zip(("consumer", "producer"), laps, strict=True):
                parts = [f"{name} {count:,}" for name, count in zip(LAPS, own, strict=True) if count]
                print(f"  {who:9}{', '.join(parts)}")


if __name__ == "__main__":
    main()
