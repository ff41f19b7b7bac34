"""Training on images whose rows several processes share (`terrazzo.spatial`), for mmsegmentation's segmentors.

The processes are a mesh of data groups and spatial groups: `ranks` consecutive processes share each image, and the
groups have different images, as in data parallelism. Every process prepares the whole image and keeps its own rows.
Losses and gradients are computed as in one process that has the batches of all groups; docs/spatial.md says what is
tested.

`terrazzo train --spatial R` uses it.
"""

import collections
import contextlib
import math
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm
from mmengine.optim import OptimWrapper
from mmengine.registry import MODEL_WRAPPERS
from mmengine.structures import PixelData
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from terrazzo.errors import InputError
from terrazzo.openmmlab.seeding import configured_ranks
from terrazzo.openmmlab.spatial_labels import is_segmentor
from terrazzo.spatial import Part, Processes, largest_stride, rows
from terrazzo.spatial._entries import find
from terrazzo.spatial._parallelize import replace
from terrazzo.spatial.entries.mmengine_model import no_loss


@MODEL_WRAPPERS.register_module()
class SpatialModel(MMDistributedDataParallel):
    """Trains a segmentor on images whose rows `ranks` processes share.

    Gradients are summed over the processes that share an image, and averaged over the groups. Validation runs on whole
    images: each process has its own images, and the model works alone.

    Args:
        module: an `EncoderDecoder`, with equal weights in all processes.
        ranks: how many consecutive processes share an image.
        stride: each process's first row is a multiple of it; None for the largest stride that the model states.
        device_ids: this process's GPU.
        options: further arguments of `DistributedDataParallel`.

    Raises:
        InputError: the number of processes is no multiple of `ranks`, a part of the model is not known to work on
            shared images (the message names it), or the images have too few rows.
    """

    def __init__(
        self,
        module: nn.Module,
        ranks: int,
        stride: int | None = None,
        device_ids: Any = None,
        broadcast_buffers: bool = False,
        **options: Any,
    ):
        processes, device = torch.distributed.get_world_size(), get_device()
        if processes % ranks:
            raise InputError(f"--spatial {ranks} divides {processes} processes into groups of unequal size")
        problem = _untrainable(module) or _recomputing(module, device)
        if problem:
            raise InputError(f"{problem}; leave --spatial out, so that each process trains on whole images")
        stride = largest_stride(module) if stride is None else stride
        size = getattr(module.data_preprocessor, "size", None)
        if size is not None:
            rows(size[0], ranks, stride)
        if processes == ranks:
            module = revert_sync_batchnorm(module)  # a batch norm takes the sums of all ranks that share the image
        replace(module, True)
        super().__init__(
            module,
            device_ids=None if device == "cpu" else device_ids,
            broadcast_buffers=broadcast_buffers,
            **options,
        )
        mesh = init_device_mesh(device, (processes // ranks, ranks), mesh_dim_names=("data", "spatial"))
        self.ranks_per_image = ranks
        self.group = Processes(mesh.get_group("spatial"))
        self.stride = stride

    def train_step(self, data: Any, optim_wrapper: OptimWrapper) -> dict:
        """mmengine's `train_step` on this rank's rows.

        Returns:
            The losses of the whole images, for the log.
        """
        with optim_wrapper.optim_context(self):
            data = self.module.data_preprocessor(data, training=True)
            height, width = data["inputs"].shape[2:]
            part = Part(self.group, height, width, self.stride)
            with part.entered():
                losses = self._run_forward(_own_rows(part, data), mode="loss")
        share, log_vars = self.module.parse_losses(losses)
        totals = self.group.total(torch.stack([value.detach().float() for value in log_vars.values()]))
        # DistributedDataParallel averages over all processes. If the whole loss is not finite, all ranks see it.
        loss = share * self.ranks_per_image + 0 * totals[0]
        # Activation checkpointing runs layers again in the backward pass. The search for the origin of a loss that is
        # not finite runs the model alone.
        finite = math.isfinite(totals[0])
        with part.entered() if finite else contextlib.nullcontext():
            optim_wrapper.update_params(loss)
        return collections.OrderedDict(zip(log_vars, totals))


def _untrainable(model: nn.Module) -> str | None:
    """Why a model cannot be trained on shared images; None if it can."""
    if not is_segmentor(model):
        return f"the model is a {type(model).__name__}, and only segmentors (EncoderDecoder) train on shared images"
    for name, module in model.named_modules():
        kind = type(module).__name__
        if getattr(module, "loss_decode", None) is not None and module.sampler is not None:
            return f"{name} chooses pixels by a {type(module.sampler).__name__}, which sees one rank's pixels alone"
        entry = find(type(module), {})
        if entry is not None and entry.run is no_loss:
            return f"{name} is a {kind}, which is not a mean over pixels"
        if kind == "CrossEntropyLoss" and (module.use_mask or module.reduction == "none"):
            return f"{name} is a {kind} with use_mask or without a reduction"
    return None


def _recomputing(model: nn.Module, device: str) -> str | None:
    """Why a model's activation checkpointing cannot be used; None if it can."""
    if device != "cpu" and any(getattr(module, "grad_checkpointing", False) is True for module in model.modules()):
        return "with_cp recomputes layers in a thread of PyTorch that does not know the image; set with_cp=False"
    return None


def spatial_config(cfg: Config, ranks: int) -> None:
    """Makes a config train on shared images, in place; `seed_config` has seen it, and its hooks are complete.

    The config may be of a run that shared images, also among another number of processes. With one rank, each process
    trains on whole images.

    Raises:
        InputError: the training data are not drawn by a sampler that is known to give groups the same images.
    """
    loader = cfg.train_dataloader
    sampler = (loader.get("sampler") or {}) if isinstance(loader, dict) else {}
    if sampler.get("type") != "SeededSampler":
        raise InputError("--spatial gives groups of processes the same images, and needs train_dataloader.sampler")
    if (cfg.get("auto_scale_lr") or {}).get("base_batch_size"):
        # mmengine multiplies the batch size by the number of processes.
        cfg.auto_scale_lr.base_batch_size = cfg.auto_scale_lr.base_batch_size // configured_ranks(cfg) * ranks
    if ranks == 1:
        sampler.pop("ranks_per_image", None)
        cfg.pop("model_wrapper_cfg", None)
        return
    sampler.ranks_per_image = ranks
    cfg.model_wrapper_cfg = ConfigDict(
        type="SpatialModel", ranks=ranks, find_unused_parameters=cfg.get("find_unused_parameters", False)
    )


def _own_rows(part: Part, data: dict) -> dict:
    """Images, and maps of labels of their size, cut to the rank's rows."""
    start, end = part.image.rows[part.rank]
    samples = []
    for sample in data["data_samples"]:
        own = sample.new()
        for name, value in sample.items():
            if isinstance(value, PixelData) and value.shape == (part.image.height, part.image.width):
                own.set_field(value[start:end, :], name, dtype=PixelData)
        samples.append(own)
    return {"inputs": part.scatter(data["inputs"]).contiguous(), "data_samples": samples}
