"""The rows of an image that one rank owns, and the exchange of rows that all operators share."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from terrazzo.errors import InputError
from terrazzo.spatial._cuts import Level, rows
from terrazzo.spatial._groups import Group

Needs = Sequence[tuple[int, int]]
"""For each rank, the first row that it needs and the row after the last; rows outside of the map are padding."""

_active: contextvars.ContextVar["Part | None"] = contextvars.ContextVar("terrazzo_part", default=None)


class Part:
    """An image that a group shares, as one of its ranks sees it.

    A map is known by its local size. Each operator that changes the size registers the new size, and all ranks register
    the same sizes in the same order. So all ranks know at once if a size stands for two different maps on any rank;
    from then on they compare the sizes of all ranks, which tell maps apart. Operators take plain local tensors.

    Attributes:
        group: The ranks; `group.rank` is the own number.
        image: The size of the image.
        at: The name of the module that runs, for messages.
        tokens: The size of the map whose pixels are tokens, after the stem of a plain model.
        prefix: The number of tokens in front of them, which all ranks have.
        depth: How many modules that were replaced run within each other.
    """

    def __init__(self, group: Group, height: int, width: int, stride: int = 32):
        """Args:
        height, width: Size of the whole image.
        stride: The model's largest stride: each rank's first row is a multiple of it.

        Raises:
            InputError: The image has too few rows for the group.
        """
        self.group = group
        self.rank = group.rank
        self.at, self.depth = "the image", 0
        self.tokens: Level | None = None
        self.prefix = 0
        self._known: list[Level] = []
        self._doubtful = False
        self.image = self.add(Level(width, rows(height, group.size, stride)))

    # Sizes

    def add(self, level: Level) -> Level:
        """Register a size of maps.

        Raises:
            InputError: A rank would have no row, or all ranks together could not tell these maps from others.
        """
        if level in self._known:
            return level
        for rank, (start, end) in enumerate(level.rows):
            if end <= start:
                raise InputError(
                    f"{self.at} makes a map of {level}, and rank {rank} has no row of it: use fewer ranks or parts"
                )
        for other in self._known:
            alike = [one == two for one, two in zip(level.sizes, other.sizes)]
            if all(alike):
                raise InputError(
                    f"{self.at} makes a map of {level}, and there are maps of {other} of which each rank has as many "
                    "rows and columns, too: use another number of ranks or another size of images"
                )
            self._doubtful |= any(alike)
        self._known.append(level)
        return level

    def whole(self, height: int, width: int) -> Level:
        """Register a size of maps that each rank has as a whole."""
        return self.add(Level(width, ((0, height),) * self.group.size))

    def strided(self, level: Level, stride: int, height: int, width: int) -> Level:
        """Register the maps that an operator with a stride makes.

        Args:
            level: The operator's input.
            height, width: Size of its output.

        Raises:
            InputError: A rank's first row is no multiple of the stride.
        """
        if level.whole:
            return self.whole(height, width)
        for rank, (start, _) in enumerate(level.rows):
            if start % stride:
                raise InputError(
                    f"{self.at} has stride {stride}, and rank {rank} begins at row {start} of {level.height}: pass a "
                    f"larger `stride`, a multiple of all strides of the model"
                )
        ends = [start // stride for start, _ in level.rows[1:]]
        return self.add(Level(width, tuple(zip([0, *ends], [*ends, height]))))

    def enlarged(self, level: Level, factor: int, height: int, width: int) -> Level:
        """Register the maps that an operator makes with `factor` rows per row."""
        if level.whole:
            return self.whole(height, width)
        ends = [start * factor for start, _ in level.rows[1:]]
        return self.add(Level(width, tuple(zip([0, *ends], [*ends, height]))))

    def level(self, x: torch.Tensor, dim: int = 2) -> Level:
        """The size of the whole map whose rows are dimension `dim` of `x`, and whose columns follow.

        All ranks must call it at the same places: it may exchange sizes.

        Raises:
            InputError: No map of the image has this size.
        """
        return self.of_size(x.shape[dim], x.shape[dim + 1])

    def of_size(self, height: int, width: int) -> Level:
        """The size of the whole map of which this rank has so many rows and columns.

        Raises:
            InputError: No map of the image has this size.
        """
        own = (height, width)
        if self._doubtful:
            sizes = tuple(tuple(size) for size in self.group.objects(own))
            found = [level for level in self._known if level.sizes == sizes]
        else:
            found = [level for level in self._known if level.sizes[self.rank] == own]
        if not found:
            raise InputError(
                f"{self.at} got {height} rows and {width} columns on rank {self.rank}, a part of no map that is known "
                f"here ({', '.join(map(str, self._known))}): the code that makes this map needs an entry "
                "(docs/spatial.md)"
            )
        return found[0]

    def levels(self) -> list[Level]:
        """All sizes, in the order of their registration."""
        return list(self._known)

    # Exchanges

    def exchange(self, x: torch.Tensor, dim: int, level: Level, needs: Needs, fill: float = 0.0) -> torch.Tensor:
        """The rows that this rank needs; rows outside of the map are `fill`.

        Args:
            x: The rank's rows of a map.
            dim: The dimension of the rows.
            level: The map's size.
            needs: Rows for each rank.
        """
        first, last = needs[self.rank]
        inside = [(max(0, low), min(level.height, high)) for low, high in needs]
        pieces = self._rows(x, dim, level, inside)
        above, below = inside[self.rank][0] - first, last - inside[self.rank][1]
        shape = list(x.shape)
        for count, at in ((above, 0), (below, len(pieces) + 1)):
            if count > 0:
                shape[dim] = count
                pieces.insert(at, x.new_full(shape, fill))
        if not pieces:
            return x.narrow(dim, 0, 0)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)

    def _rows(self, x: torch.Tensor, dim: int, level: Level, inside: Needs) -> list[torch.Tensor]:
        """Pieces of rows within the map, in their order."""
        rank = self.rank
        start = level.rows[rank][0]
        if level.whole:
            return [x.narrow(dim, inside[rank][0], inside[rank][1] - inside[rank][0])]

        def common(owner: int, reader: int) -> tuple[int, int]:
            """The first row that the reader needs of the owner's rows, and how many rows."""
            low = max(level.rows[owner][0], inside[reader][0])
            return low, max(0, min(level.rows[owner][1], inside[reader][1]) - low)

        ranks = range(self.group.size)
        low, count = common(rank, rank)
        own = x.narrow(dim, low - start, count) if count else None
        if not any(common(owner, reader)[1] for owner in ranks for reader in ranks if owner != reader):
            return [] if own is None else [own]
        parts, shapes = [], []
        for other in ranks:
            low, count = common(rank, other) if other != rank else (start, 0)
            parts.append(x.narrow(dim, low - start if count else 0, count))
            received = list(x.shape)
            received[dim] = common(other, rank)[1] if other != rank else 0
            shapes.append(torch.Size(received))
        found = self.group.swap(parts, shapes)
        if own is not None:
            found[rank] = own
        # Empty pieces stay: the backward pass of a rank that only sends must take part in the exchange, too.
        return found

    def extended(
        self, x: torch.Tensor, dim: int, level: Level, needs: Needs, run: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Run a function on more rows than the own rows, and keep the own rows of its result.

        Args:
            needs: Rows for each rank; rows outside of the map are left out.
            run: Maps rows to as many rows, in the same dimension.
        """
        needs = [(max(0, low), min(level.height, high)) for low, high in needs]
        start, end = level.rows[self.rank]
        out = run(self.exchange(x, dim, level, needs))
        above = start - needs[self.rank][0]
        return out if out.shape[dim] == end - start else out.narrow(dim, above, end - start)

    def gathered(self, x: torch.Tensor, dim: int, level: Level) -> torch.Tensor:
        """The whole map, on every rank."""
        return self.exchange(x, dim, level, [(0, level.height)] * self.group.size)

    def rolled(self, x: torch.Tensor, dim: int, level: Level, shift: int) -> torch.Tensor:
        """The own rows of `torch.roll(map, shift, dim)`, for shifts that are shorter than the map."""
        height = level.height
        inside, across = [], []
        for start, end in level.rows:
            low, high = start - shift, end - shift  # rows of the map, beyond its ends by the wrapped part
            inside.append((max(0, min(low, height)), max(0, min(high, height))))
            if shift > 0:
                across.append((min(low, 0) + height, min(high, 0) + height))
            else:
                across.append((max(low, height) - height, max(high, height) - height))
        pieces = [self.exchange(x, dim, level, needs) for needs in (inside, across)]
        return torch.cat(pieces if shift < 0 else pieces[::-1], dim)

    def stacked(self, x: torch.Tensor) -> torch.Tensor:
        """The tensors of all ranks, which have one shape: (ranks, ...)."""
        others = self.group.swap([x] * self.group.size, [x.shape] * self.group.size)
        return torch.stack(list(others))

    def joined(self, x: torch.Tensor, dim: int, counts: Sequence[int]) -> torch.Tensor:
        """The tensors of all ranks, one after another; `counts` are their lengths in dimension `dim`."""
        shapes = [torch.Size([*x.shape[:dim], count, *x.shape[dim + 1 :]]) for count in counts]
        return torch.cat(list(self.group.swap([x] * self.group.size, shapes)), dim)

    def passed_on(self, x: torch.Tensor, dim: int, count: int) -> torch.Tensor:
        """Give a tensor to the next rank, and take the tensor of the rank before.

        Args:
            count: The length of the other rank's tensor in dimension `dim`.
        """
        size = self.group.size
        parts = [x if rank == (self.rank + 1) % size else x.narrow(dim, 0, 0) for rank in range(size)]
        shapes = [
            torch.Size([*x.shape[:dim], count if rank == (self.rank - 1) % size else 0, *x.shape[dim + 1 :]])
            for rank in range(size)
        ]
        return self.group.swap(parts, shapes)[(self.rank - 1) % size]

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks."""
        return x if self.group.size == 1 else self.group.total(x)

    def mean(self, x: torch.Tensor, dim: int = 2, keepdim: bool = True) -> torch.Tensor:
        """The mean over rows and columns of the whole map, on every rank.

        Args:
            dim: The dimension of the rows; the columns follow.
        """
        level = self.level(x, dim)
        if level.whole:
            return x.mean((dim, dim + 1), keepdim)
        return self.total(x.sum((dim, dim + 1), keepdim=keepdim)) / (level.height * level.width)

    # The image and the results

    def scatter(self, image: torch.Tensor) -> torch.Tensor:
        """The own rows of a whole image (B, C, H, W)."""
        start, end = self.image.rows[self.rank]
        if image.shape[2:] != (self.image.height, self.image.width):
            raise InputError(f"the image must be {self.image}, got {image.shape[2]}x{image.shape[3]}")
        return image[:, :, start:end]

    def gather(self, y: Any, dim: int = 2) -> torch.Tensor:
        """The whole map of a local map, on every rank; its rows are dimension `dim` (1 for B H W C)."""
        return self.gathered(y, dim, self.level(y, dim))

    @contextlib.contextmanager
    def entered(self) -> Iterator["Part"]:
        """Modules that were parallelized work on this part inside the `with` block (this thread only)."""
        token = _active.set(self)
        try:
            yield self
        finally:
            _active.reset(token)


def active() -> Part | None:
    """The part on which this thread works; None outside of a forward pass."""
    return _active.get()
