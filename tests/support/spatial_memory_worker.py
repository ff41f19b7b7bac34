"""One of several processes that share an image: prints the peak memory, in bytes, of a forward and backward pass.

Usage: spatial_memory_worker.py RANK RANKS STORE MODEL SIDE
"""

import sys

import timm
import torch
import torch.distributed as dist

import terrazzo  # noqa: F401  registers the models
from terrazzo import spatial
from terrazzo.tools.inspect.memory import PeakMemory


def main(rank: int, ranks: int, store: str, name: str, side: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    model = timm.create_model(name, features_only=True)
    spatial.parallelize(model)

    def run(height: int, width: int) -> None:
        rows = spatial.rows(height, ranks)[rank]
        maps = model(torch.randn(1, 3, rows[1] - rows[0], width))
        sum(y.square().mean() for y in maps).backward()
        model.zero_grad()

    run(32 * ranks, 64)  # libraries are loaded and kernels compiled
    with PeakMemory(torch.device("cpu")) as peak:
        run(side, side)
    print(peak.bytes)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5]))
