"""Groups of ranks that share an image: processes, or threads of one process that take turns (virtual ranks)."""

import contextlib
import contextvars
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from terrazzo.errors import InputError


class Group(Protocol):
    """What a rank can do together with the other ranks. All ranks call the same methods in the same order.

    Attributes:
        size: The number of ranks.
        rank: The own number, from 0.
        shares_modules: Whether all ranks call the same module objects.
    """

    size: int
    rank: int
    shares_modules: bool

    def swap(self, parts: Sequence[torch.Tensor], shapes: Sequence[torch.Size]) -> list[torch.Tensor]:
        """Send `parts[i]` to rank i. Returns what each rank sent; `shapes` says its shapes."""
        ...

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks."""
        ...

    def objects(self, value: Any) -> list[Any]:
        """The values of all ranks, without gradients."""
        ...


class Processes:
    """The ranks of a process group of `torch.distributed`; gradients cross processes, too."""

    shares_modules = False

    def __init__(self, group: dist.ProcessGroup | None = None):
        """Args:
        group: None for all processes.

        Raises:
            InputError: No process group has been initialised.
        """
        if not dist.is_initialized():
            raise InputError(
                "there is no process group: start the program with torchrun and call "
                "torch.distributed.init_process_group(), or pass a terrazzo.spatial.LocalGroup"
            )
        self.group: Any = dist.group.WORLD if group is None else group
        self.size = dist.get_world_size(self.group)
        self.rank = dist.get_rank(self.group)

    def swap(self, parts: Sequence[torch.Tensor], shapes: Sequence[torch.Size]) -> list[torch.Tensor]:
        from terrazzo.spatial import _collectives

        received = [shape.numel() for shape in shapes]
        flat = torch.cat([part.reshape(-1) for part in parts])
        flat = _collectives.swap(flat, [part.numel() for part in parts], received, self.group)
        return [part.view(shape) for part, shape in zip(flat.split(received), shapes)]

    def total(self, x: torch.Tensor) -> torch.Tensor:
        from terrazzo.spatial import _collectives

        return _collectives.total(x, self.group)

    def objects(self, value: Any) -> list[Any]:
        found = [None] * self.size
        dist.all_gather_object(found, value, self.group)
        return found


def as_group(group: "dist.ProcessGroup | Group | None") -> Group:
    """A group of this module as it is; a process group of PyTorch, or None for all processes, as `Processes`."""
    return group if hasattr(group, "swap") else Processes(group)  # type: ignore[arg-type, return-value]


class Stopped(BaseException):
    """Ends the threads of the other ranks when a rank has failed; it never leaves this module."""


class LocalGroup:
    """Virtual ranks of one process: threads that take turns, so that one of them runs at a time.

    A rank runs until it needs other ranks' numbers. Then it waits until the others have come to the same place. So a
    layer's temporary tensors exist for one rank at a time, and only its inputs and outputs for all ranks.
    """

    def __init__(self, size: int):
        if size < 1:
            raise InputError(f"a group has at least 1 rank, got {size}")
        self.size = size

    def run(self, function: Callable[[Group], Any]) -> list[Any]:
        """Call `function(group)` for each rank, and return the results.

        Gradients of the results flow through all ranks: call `backward` once, on the sum of all ranks' losses.
        """
        return _Turns(self.size).run(function)


class _Turns:
    """One run of a `LocalGroup`."""

    def __init__(self, size: int):
        self.size = size
        self.changed = threading.Condition()
        self.turn = 0
        self.boxes: dict[int, dict[tuple[int, int], Any]] = {}  # per step: (from, to) -> what was sent
        self.steps = [0] * size  # the step in which each rank waits; steps are counted from 1
        self.posted: dict[int, int] = {}
        self.ended = [False] * size
        self.results: list[Any] = [None] * size
        self.failure: BaseException | None = None

    def run(self, function: Callable[[Group], Any]) -> list[Any]:
        state = _ThreadState()
        threads = [
            threading.Thread(
                target=contextvars.copy_context().run, args=(self._rank, rank, function, state), daemon=True
            )
            for rank in range(self.size)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure
        return self.results

    def _rank(self, rank: int, function: Callable[[Group], Any], state: "_ThreadState") -> None:
        try:
            self._wait(rank)
            with state.entered():
                self.results[rank] = function(_VirtualRank(self, rank))
        except Stopped:
            pass
        except BaseException as error:
            self.failure = self.failure or error
        finally:
            with self.changed:
                self.ended[rank] = True
                self._pass_on(rank)

    def _wait(self, rank: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.turn == rank or self.failure is not None)
            if self.failure is not None:
                raise Stopped

    def _pass_on(self, rank: int) -> None:
        """Give the turn to the next rank that has something to do."""
        order = [(rank + 1 + i) % self.size for i in range(self.size)]
        ready = [r for r in order if not self.ended[r] and self._ready(r)]
        if ready:
            self.turn = ready[0]
        elif not all(self.ended) and self.failure is None:
            self.failure = RuntimeError(
                f"ranks took different ways: they wait in steps {self.steps}, and some have ended: {self.ended}"
            )
        self.changed.notify_all()

    def _ready(self, rank: int) -> bool:
        step = self.steps[rank]
        return step == 0 or self.posted[step] == self.size

    def swap(self, rank: int, parts: Sequence[Any]) -> list[Any]:
        with self.changed:
            self.steps[rank] += 1
            step = self.steps[rank]
            box = self.boxes.setdefault(step, {})
            box.update({(rank, to): part for to, part in enumerate(parts)})
            self.posted[step] = self.posted.get(step, 0) + 1
            self._pass_on(rank)
        del parts
        self._wait(rank)
        # What is taken out is free as soon as its reader has read it.
        return [box.pop((sender, rank)) for sender in range(self.size)]


class _VirtualRank:
    """A rank of a `LocalGroup`, as its thread sees it."""

    shares_modules = True

    def __init__(self, turns: _Turns, rank: int):
        self.turns, self.rank, self.size = turns, rank, turns.size

    def swap(self, parts: Sequence[torch.Tensor], shapes: Sequence[torch.Size]) -> list[torch.Tensor]:
        return self.turns.swap(self.rank, parts)

    def total(self, x: torch.Tensor) -> torch.Tensor:
        first, *others = self.turns.swap(self.rank, [x] * self.size)
        return sum(others, first)

    def objects(self, value: Any) -> list[Any]:
        return self.turns.swap(self.rank, [value] * self.size)


class _ThreadState:
    """PyTorch's settings that belong to a thread: gradients, autocast, the current device and its stream."""

    def __init__(self):
        self.grad, self.inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self.autocast = {
            kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")
        }
        self.stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    def entered(self):
        """A context in which the current thread has these settings."""
        stack = contextlib.ExitStack()
        if self.stream is not None:
            stack.enter_context(torch.cuda.device(self.stream.device))
            stack.enter_context(torch.cuda.stream(self.stream))
        stack.enter_context(torch.inference_mode(self.inference))
        stack.enter_context(torch.set_grad_enabled(self.grad))
        for kind, (enabled, dtype) in self.autocast.items():
            stack.enter_context(torch.autocast(kind, dtype, enabled=enabled) if enabled else contextlib.nullcontext())
        return stack
