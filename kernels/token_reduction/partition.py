"""Which tokens may be merged (sources) and into which (destinations): static index arithmetic, equal for all images."""

import torch


def sizes(count: int, protect: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    """The numbers of sources and of destinations among `count` tokens; arguments as in `is_destination`."""
    if grid is None:
        destinations = (count + protect % 2) // 2
    else:
        destinations = (grid[0] // 2) * (grid[1] // 2)
    return count - destinations, destinations


def is_destination(
    count: int, protect: int, grid: tuple[int, int] | None, device: torch.device | None = None
) -> torch.Tensor:
    """Whether each of the `count` tokens behind the protected tokens is a destination, (count,).

    Without a grid ("even_odd"), destinations are the odd positions of the whole sequence, so the class token in front
    counts as even. With a grid ("cell2x2"), destinations are the upper left tokens of the raster's 2x2 cells; a last
    odd row or column has no destinations.
    """
    position = torch.arange(count, device=device)
    if grid is None:
        return (position + protect) % 2 == 1
    row, column = position // grid[1], position % grid[1]
    inside = (row < grid[0] // 2 * 2) & (column < grid[1] // 2 * 2)
    return inside & (row % 2 == 0) & (column % 2 == 0)


def order(
    count: int, protect: int, grid: tuple[int, int] | None, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the sources, then of the destinations, both ascending, and the place of each token in this order."""
    target = is_destination(count, protect, grid, device)
    sources, _ = sizes(count, protect, grid)
    place = torch.where(target, sources + target.long().cumsum(0) - 1, (~target).long().cumsum(0) - 1)
    if grid is None:
        first = protect % 2
        listed = torch.cat(
            [torch.arange(first, count, 2, device=device), torch.arange(1 - first, count, 2, device=device)]
        )
    else:
        listed = torch.argsort(place)
    return listed, place
