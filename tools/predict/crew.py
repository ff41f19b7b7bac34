"""Processes that share the rows of each picture.

The first process reads pictures, prepares them, gives each process its rows and puts the labels together (`Crew`). The
others wait for rows (`serve`).
"""

import contextlib
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from terrazzo.errors import InputError, TerrazzoError, first_line
from terrazzo.spatial import Part, Processes, largest_stride


def serve(model: nn.Module) -> None:
    """Compute own rows for the first process until it says that there are no more."""
    group, stride = Processes(), largest_stride(model)
    while True:
        (task,) = _broadcast(None)
        if task is None:
            break
        shape, dtype, metas = task
        with contextlib.suppress(InputError):  # the first process says it
            part = Part(group, *shape[2:], stride)
            start, end = part.image.rows[group.rank]
            device = next(model.parameters()).device
            images = torch.empty(*shape[:2], end - start, shape[3], dtype=dtype, device=device)
            dist.recv(images, 0)
            for labels in _labels(part, model, images, metas):
                dist.send(labels, 0)
    dist.destroy_process_group()


def _broadcast(task: Any) -> list[Any]:
    """The first process's task, in all processes."""
    holder = [task]
    dist.broadcast_object_list(holder, 0)
    return holder


def _labels(part: Part, model: nn.Module, images: torch.Tensor, metas: Sequence[dict]) -> list[torch.Tensor]:
    from terrazzo.openmmlab.spatial_labels import own_labels

    return [labels.contiguous() for labels in own_labels(part, model, images, metas)]


class Crew:
    """A segmentor that runs in several processes, as the first process sees it: it takes the place of the model.

    Args:
        model: the segmentor.
        processes: the other processes, if this process started them.
    """

    def __init__(self, model: nn.Module, processes: Sequence[BaseProcess]):
        self.model, self.processes, self.broken = model, processes, False
        self.num_classes = model.num_classes

    def test_step(self, data: dict) -> list:
        """As the segmentor's; the samples have `pred_sem_seg` and no logits.

        Raises:
            TerrazzoError: another process has ended.
        """
        from mmengine.structures import PixelData

        from terrazzo.openmmlab.spatial_labels import label_rows

        prepared = self.model.data_preprocessor(data, False)
        images, samples = prepared["inputs"], prepared["data_samples"]
        group, stride = Processes(), largest_stride(self.model)
        if min(images.shape[2] // stride, *(sample.ori_shape[0] for sample in samples)) < group.size:
            return self.model.test_step(data)  # too few rows to share
        metas = [sample.metainfo for sample in samples]
        with self.told():
            _broadcast((tuple(images.shape), images.dtype, metas))
            part = Part(group, *images.shape[2:], stride)
            for rank in range(1, group.size):
                start, end = part.image.rows[rank]
                dist.send(images[:, :, start:end].contiguous(), rank)
            own = part.scatter(images).contiguous()
            del images, prepared
            for sample, labels in zip(samples, _labels(part, self.model, own, metas)):
                maps = [labels]
                for start, end in label_rows(sample.metainfo, group.size)[1:]:
                    maps.append(labels.new_empty(1, end - start, labels.shape[2]))
                    dist.recv(maps[-1], len(maps) - 1)
                sample.pred_sem_seg = PixelData(data=torch.cat(maps, 1))
        return samples

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Remembers a failure inside the block; the failure of another process is told in one line."""
        try:
            yield
        except BaseException as error:
            self.broken = True
            if isinstance(error, RuntimeError):
                self._tell(error)
            raise

    def _tell(self, error: RuntimeError) -> None:
        """Raises an error of one line if another process has ended; it was the cause."""
        for process in self.processes:
            process.join(2)
        codes = [process.exitcode for process in self.processes if process.exitcode]
        if codes:
            raise TerrazzoError(
                f"a process that shared the picture ended with exit code {codes[0]} ({first_line(error)}); if the "
                "memory was full, use more processes or smaller pictures"
            ) from error

    def end(self) -> None:
        """Ends the other processes, at once after a failure."""
        if self.broken:
            for process in self.processes:
                process.kill()
        else:
            with contextlib.suppress(RuntimeError):  # one of them has ended by itself
                _broadcast(None)
        for process in self.processes:
            process.join(10)
        if dist.is_initialized():
            dist.destroy_process_group()
