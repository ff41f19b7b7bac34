"""Which rows of a map belong to which rank."""

from typing import NamedTuple

from terrazzo.errors import InputError


class Level(NamedTuple):
    """A size that maps of an image have, for example at one stride.

    Attributes:
        width: Columns.
        rows: For each rank its first row, and the row after its last row. If every rank has all rows (a pooled map),
            they are (0, height) for each.
    """

    width: int
    rows: tuple[tuple[int, int], ...]

    @property
    def height(self) -> int:
        return self.rows[-1][1]

    @property
    def whole(self) -> bool:
        """Whether every rank has all rows."""
        return len(self.rows) > 1 and self.rows[0] == self.rows[-1]

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """For each rank, how many rows and columns it has."""
        return tuple((end - start, self.width) for start, end in self.rows)

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


def rows(height: int, ranks: int, stride: int = 32) -> tuple[tuple[int, int], ...]:
    """Deal the rows of an image to ranks, in whole units of the model's largest stride.

    Every rank gets as many units as the others, or one more; the first ranks get more. Rows that fill no unit belong to
    the last rank, so each rank has at least one whole unit.

    Args:
        height: Rows of the image.
        ranks: The number of ranks.
        stride: The largest stride of the model.

    Returns:
        For each rank its first row, and the row after its last row.

    Raises:
        InputError: There are fewer units than ranks.
    """
    if min(height, ranks, stride) < 1:
        raise InputError(f"height, ranks and stride must be at least 1, got {height}, {ranks} and {stride}")
    units = max(1, height // stride)
    if units < ranks:
        raise InputError(
            f"{height} rows make {units} units of stride {stride}, too few for {ranks} ranks: use at most {units}"
        )
    share, more = divmod(units, ranks)
    ends = [stride * (share * (rank + 1) + min(rank + 1, more)) for rank in range(ranks)]
    return tuple(zip([0, *ends[:-1]], [*ends[:-1], height]))
