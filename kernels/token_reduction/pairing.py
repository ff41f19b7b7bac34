"""Plans that `plan` does not make: from lists of sources and destinations, or from any map."""

import torch
import torch.nn.functional as F

from terrazzo.errors import InputError
from terrazzo.kernels.dispatch import arguments
from terrazzo.kernels.dispatch.dtypes import accumulator, without_autocast
from terrazzo.kernels.dispatch.exporting import is_exporting
from terrazzo.kernels.token_reduction import portable
from terrazzo.kernels.token_reduction.merging import unmerge
from terrazzo.kernels.token_reduction.planning import Plan


def similarity(metric: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Cosines (B, N, M) of features (B, N, D) and (B, M, D), without a gradient, in float32 at least."""
    with without_autocast(metric):
        dtype = accumulator(metric)
        one, two = (F.normalize(x.detach().to(dtype), dim=-1) for x in (metric, other))
        return one @ two.transpose(1, 2)


def ordered(score: torch.Tensor) -> torch.Tensor:
    """Indices (B, N) by descending score; among equals, the lowest index comes first."""
    if not is_exporting():
        return score.argsort(dim=-1, descending=True, stable=True)
    places = portable.rank(score)
    position = torch.arange(score.shape[-1], device=score.device).expand_as(places)
    return torch.zeros_like(places).scatter(-1, places, position)


def pair(
    metric: torch.Tensor,
    sources: torch.Tensor,
    destinations: torch.Tensor,
    r: int | None = None,
    size: torch.Tensor | None = None,
) -> Plan:
    """Merge sources into their most similar destinations, all of them or the r most similar.

    The result has the tokens that are in neither list, in order, then the remaining sources and then the destinations,
    both in the order of their lists. Among equals, the first of a list comes first.

    Args:
        metric: (B, N, D), the features whose cosine similarity is compared.
        sources, destinations: (B, S) and (B, T), different indices of tokens, with T at least 1.
        r: the number of merged tokens of each image; None for all sources.
        size: (B, N), patches that each token stands for, 0 for padding, which attracts nothing; None for no padding.

    Returns:
        The map, without a gradient.

    Raises:
        InputError: Shapes that do not agree, no destination, or r out of range.

    Source: PiToMe, arXiv 2405.16148.
    """
    arguments.check_together({"metric": metric, "sources": sources, "destinations": destinations}, size=size)
    batch, count = metric.shape[:2]
    (given, held), (other, onto) = sources.shape, destinations.shape
    if metric.dim() != 3 or not given == other == batch:
        raise InputError(
            f"metric must be (B, N, D) and lists (B, S), got {tuple(metric.shape)} and {tuple(sources.shape)}"
        )
    r = held if r is None else arguments.whole(r, "r")
    if onto < 1 or held + onto > count or not 0 <= r <= held:
        raise InputError(f"r must be 0 to the {held} sources, beside 1 or more destinations, got {r} and {onto}")
    alike = similarity(unmerge(metric, sources), unmerge(metric, destinations))  # B S T
    if size is not None:
        real = size > 0
        alike = alike.masked_fill(
            ~(real.gather(1, sources).unsqueeze(2) & real.gather(1, destinations).unsqueeze(1)), -2
        )
    rest, device = count - held - onto, metric.device
    front = rest + held - r  # tokens in front of the destinations
    if held:
        best, into = alike.max(2)
        merged = portable.rank(best) < r
        of_sources = torch.where(merged, front + into, rest + portable.running(~merged) - 1)
    else:
        of_sources = sources
    of_destinations = (front + torch.arange(onto, device=device)).expand(batch, -1)
    listed = torch.zeros(batch, count, dtype=torch.int64, device=device)
    for indices in (sources, destinations):
        listed = listed.scatter(1, indices, torch.ones_like(indices))
    places = portable.running(listed == 0) - 1
    return Plan(places.scatter(1, sources, of_sources).scatter(1, destinations, of_destinations), count - r)


def plan_of(assignment: torch.Tensor, count: int) -> Plan:
    """A plan from a map (B, N) to `count` tokens, each of which must stand for at least one token.

    Raises:
        InputError: The map has another shape or dtype, or a token that is out of range or stands for nothing. Values
            are checked on a CPU only, and not in exports and compiled models.
    """
    arguments.check_together({"assignment": assignment})
    count = arguments.whole(count, "count", 1)
    if assignment.dim() != 2 or assignment.dtype != torch.int64:
        raise InputError(f"a map must be (B, N) of int64, got {tuple(assignment.shape)} of {assignment.dtype}")
    if assignment.device.type == "cpu" and not (torch.compiler.is_compiling() or is_exporting()):
        inside = (assignment >= 0) & (assignment < count)
        if not inside.all():
            raise InputError(f"a map must lead to tokens 0 to {count - 1}, got {assignment[~inside][0].item()}")
        reached = torch.zeros(len(assignment), count, dtype=torch.bool).scatter(1, assignment, True)
        if not reached.all():
            raise InputError(
                f"a map to {count} tokens must reach each of them, got none for token "
                f"{(~reached).nonzero()[0, 1].item()}"
            )
    return Plan(assignment, count)
