"""Several processes, also on machines without a GPU, which mmengine's launchers lack."""

import os

import torch
from mmengine.config import Config, ConfigDict

from terrazzo.errors import InputError

LAUNCHERS = ("none", "pytorch", "slurm", "mpi")
NEEDED = {
    "pytorch": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_NODELIST"),
    "mpi": ("OMPI_COMM_WORLD_RANK",),
}
LOCAL_RANKS = {"pytorch": "LOCAL_RANK", "slurm": "SLURM_LOCALID", "mpi": "OMPI_COMM_WORLD_LOCAL_RANK"}


def check_launcher(launcher: str) -> None:
    """Checks that the launcher has really started this process.

    Raises:
        InputError: if the launcher is unknown, or its environment is missing.
    """
    if launcher not in LAUNCHERS:
        raise InputError(f"launcher '{launcher}' is unknown; choose one of {', '.join(LAUNCHERS)}")
    missing = [name for name in NEEDED.get(launcher, ()) if name not in os.environ]
    if missing:
        start = {
            "pytorch": "torchrun --nproc-per-node N --no-python terrazzo train ... --launcher pytorch",
            "slurm": "srun terrazzo train ... --launcher slurm",
            "mpi": "mpirun terrazzo train ... --launcher mpi",
        }[launcher]
        raise InputError(f"launcher {launcher} has not started this process ({missing[0]} is not set); use: {start}")


def is_first_here(launcher: str) -> bool:
    """Whether this is the launcher's first process on this machine; only it needs to check files that all read."""
    return launcher == "none" or os.environ.get(LOCAL_RANKS[launcher], "0") == "0"


def launch(cfg: Config, launcher: str) -> None:
    """Sets the launcher of a config; without a GPU, also connects the processes by gloo.

    mmengine's own start chooses a GPU for each process, and its DistributedDataParallel names a GPU.

    Args:
        cfg: a config, changed in place.
        launcher: one of `LAUNCHERS`.
    """
    check_launcher(launcher)
    cfg.launcher = launcher
    if launcher == "none" or torch.cuda.is_available():
        return
    if launcher != "pytorch":
        raise InputError(f"launcher {launcher} needs GPUs, and PyTorch sees none here; torchrun works without GPUs")
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    wrapper = cfg.get("model_wrapper_cfg") or ConfigDict(
        type="MMDistributedDataParallel", find_unused_parameters=cfg.get("find_unused_parameters", False)
    )
    if wrapper.get("type") == "MMDistributedDataParallel":
        wrapper.device_ids = None
        wrapper.setdefault("broadcast_buffers", False)
    cfg.model_wrapper_cfg = wrapper
