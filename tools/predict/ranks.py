"""`terrazzo infer --spatial R`: starts the processes that share the rows of each picture, and connects them.

A launcher such as torchrun may have started all processes; else the first process starts the others. `crew` says what
they do together.
"""

import datetime
import multiprocessing.connection
import os
import signal
import warnings
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import click
import torch
import torch.distributed as dist
from torch import nn

from terrazzo.errors import InputError
from terrazzo.spatial._parallelize import replace
from terrazzo.tools.predict.crew import Crew, serve
from terrazzo.tools.predict.predictor import Predictor

WAIT = datetime.timedelta(minutes=30)
"""How long a process waits for the others."""


def share(predictor: Predictor, ranks: int, *source: str | Path | None) -> None:
    """Make a predictor compute each picture in `ranks` processes, until the current command ends.

    A process that a launcher started as another than the first serves the first, and then ends.

    Args:
        predictor: of the segmentor of a config.
        ranks: the number of processes.
        source: the config and the checkpoint that the predictor was made of.

    Raises:
        InputError: the model is no segmentor, has a module that is not known to work on a part of the rows, or there
            are not enough GPUs, or a launcher started another number of processes.
    """
    shared = _shareable(predictor)
    device = next(shared.parameters()).device
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--spatial runs on CPUs and NVIDIA or AMD GPUs, and the device is {device}; use --device cpu")
    crew = _launched(shared, device, ranks) if "RANK" in os.environ else _started(shared, device, ranks, *source)
    predictor.engine.model = crew


def _launched(model: nn.Module, device: torch.device, ranks: int) -> Crew:
    """The processes that a launcher started; only the first comes back."""
    launched, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    if launched != ranks:
        raise InputError(f"--spatial {ranks} shares pictures among {ranks} processes, and {launched} were started")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if device.type == "cuda" else device
    model.to(device)
    _join(device, rank, ranks, None)
    context = click.get_current_context()
    if rank:
        serve(model)
        context.exit(0)
    crew = Crew(model, [])
    context.call_on_close(crew.end)
    return crew


def _started(model: nn.Module, device: torch.device, ranks: int, name: str, checkpoint: str | Path | None) -> Crew:
    """Processes that are started here, each with a GPU of its own if there are GPUs."""
    places = ["cpu"] * ranks
    if device.type == "cuda":
        if ranks > torch.cuda.device_count():
            raise InputError(
                f"--spatial {ranks} needs {ranks} GPUs, and PyTorch sees {torch.cuda.device_count()}; use --device cpu"
            )
        places = [f"cuda:{rank}" for rank in range(ranks)]
    store = dist.TCPStore("localhost", 0, ranks, is_master=True, wait_for_workers=False)
    start = multiprocessing.get_context("spawn").Process
    processes = [
        start(target=_helper, args=(name, checkpoint, places[rank], rank, ranks, store.port), daemon=True)
        for rank in range(1, ranks)
    ]
    for process in processes:
        process.start()
    crew = Crew(model.to(places[0]), processes)
    click.get_current_context().call_on_close(crew.end)
    with crew.told():
        _wait(store, processes)
        _join(torch.device(places[0]), 0, ranks, store)
    return crew


def _shareable(predictor: Predictor) -> nn.Module:
    """The model of a segmentor; its modules get forms for a part of the rows, and still work alone."""
    model = getattr(predictor.engine, "model", None)
    if not isinstance(model, nn.Module) or not hasattr(model, "decode_head"):
        raise InputError("--spatial is only for segmentors of OpenMMLab configs; leave it out")
    from terrazzo.openmmlab.spatial_labels import unpredictable

    problem = unpredictable(model)
    if problem:
        raise InputError(f"{problem}; or leave --spatial out")
    replace(model, True)
    return model


def _wait(store: dist.TCPStore, processes: Sequence[BaseProcess]) -> None:
    """Wait until the other processes have built their models."""
    while not store.check([f"ready {rank + 1}" for rank in range(len(processes))]):
        ended = multiprocessing.connection.wait([process.sentinel for process in processes], timeout=0.05)
        if ended:
            raise RuntimeError("it could not build the model")


def _join(device: torch.device, rank: int, ranks: int, store: dist.Store | None) -> None:
    """Connect this process to the others; without a store, in the way that the launcher says."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=WAIT)


def _helper(model: str, checkpoint: str | Path | None, device: str, rank: int, ranks: int, port: int) -> None:
    """A process that was started for the rows of one rank."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends this process
    warnings.simplefilter("ignore")
    shared = _shareable(Predictor(model, checkpoint, device=device))
    store = dist.TCPStore("localhost", port, ranks, is_master=False)
    store.set(f"ready {rank}", "")
    _join(torch.device(device), rank, ranks, store)
    serve(shared)
