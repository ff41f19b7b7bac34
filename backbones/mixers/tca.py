"""TCA: attention to some keys of each small block of keys, fewer where the keys of a block are alike.

Paper: Training-free Context-adaptive Attention for Efficient Long Context Modeling, arXiv 2512.09238. No official code
is known; what the paper leaves open is chosen here and stated.
"""

import math

import torch

from terrazzo.backbones._checks import number
from terrazzo.backbones._place import Place
from terrazzo.backbones.mixers._mixer import Host
from terrazzo.backbones.mixers._selector import Selector, Tokens, listed, positive, ranked
from terrazzo.errors import InputError
from terrazzo.kernels.block_sparse_attention import Plan, Segment, block_sparse_attention
from terrazzo.kernels.dispatch import arguments


class TCA(Selector):
    """Softmax attention to a list of keys that is the same for all queries of a head.

    Blocks are tiles of b = edge x edge patches, and each keeps k of 1, 2, 4, ... b keys. A head has a profile
    p_k ~ exp(-(log2 k - mu)^2 / (2 sigma^2)), the part of its blocks that keep k. Blocks are ranked by redundancy, the
    mean cosine of a block's keys to their mean: the most redundant blocks keep the fewest. A block keeps the key
    nearest to its mean, and then the keys farthest from it. The cost is N^2 sum_k p_k k / b.

    The paper states the profiles and the budgets. The score, the choice within a block, rounding (largest remainders)
    and `mass` are ours. The mixer has no parameters and is meant for models that are trained already.

    Source: arXiv 2512.09238, section 3.

    Args:
        mu, sigma: the profile of all heads until `calibrate` chooses one for each head.
        edge: patches on a side of a block, a power of two.
        mass: whether a kept key counts for its part of the block: its logit gets ln(patches of the block / k).
        dense_up_to: maps up to this number of patches have softmax attention.
    """

    def __init__(
        self,
        host: Host,
        mu: float = 2.0,
        sigma: float = 1.0,
        edge: int = 4,
        mass: bool = True,
        dense_up_to: int = 1024,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(host, dense_up_to)
        self.edge, self.mass = arguments.whole(edge, "edge", 1), mass
        if self.edge & (self.edge - 1):
            raise InputError(f"edge must be a power of two, got {edge!r}")
        self.start = number("mu", mu), positive("sigma", sigma)
        self.register_buffer("profile", torch.empty(host.heads, len(self.budgets), device=device, dtype=dtype))
        self.reset()

    @property
    def budgets(self) -> list[int]:
        """The numbers of keys that a block may keep."""
        return [2**i for i in range(2 * int(math.log2(self.edge)) + 1)]

    def edges(self, grid: tuple[int, int]) -> tuple[int, ...]:
        return (self.edge,)

    def plan(self, tokens: Tokens) -> Plan:
        rank, budget = kept_keys(tokens.key, self.edge**2, self.profile, tokens.real())
        kept = (rank < budget.unsqueeze(-1)).flatten(2)
        bias = None
        if self.mass:
            counts = tokens.tiles.counts(self.edge, budget.device)
            counts = self.edge**2 if counts is None else counts
            bias = (counts / budget.to(tokens.query.dtype)).log().repeat_interleave(self.edge**2, 2)
        index = listed(kept.unsqueeze(2))
        return Plan([*tokens.front(), Segment("token", index, bias=bias)])

    def reset(self) -> None:
        self.profile.copy_(torch.tensor(profile(*self.start, len(self.budgets))).expand_as(self.profile))

    @torch.no_grad()
    def calibrate(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place, error: float = 0.05
    ) -> None:
        """Give each head the profile with the fewest keys whose output is near softmax attention's, at least its own.

        Args:
            query, key, value, place: as `forward` takes them.
            error: the largest |out - dense| / |dense|, norms over all queries of a head.
        """
        positive("error", error)
        tokens = self.tokens(query, key, value, place)
        given, levels = (tokens.query, tokens.key, tokens.value), len(self.budgets)
        everything = Plan([*tokens.front(), Segment("all", key_mask=tokens.real())])
        wanted = tokens.tiles.restore(block_sparse_attention(*given, everything)[0])
        steps = [i / 2 for i in range(2 * levels - 1)]
        choices = [profile(mu, sigma, levels) for mu in steps for sigma in (0.25, 1.0)]
        choices.sort(key=lambda choice: _part(choice, self.budgets))
        open_heads = torch.ones(len(self.profile), dtype=torch.bool, device=self.profile.device)
        for choice in choices:
            found = tokens.tiles.restore(block_sparse_attention(*given, self.plan(tokens))[0])
            far = (found - wanted).pow(2).sum((0, 2, 3)).sqrt() / wanted.pow(2).sum((0, 2, 3)).sqrt() > error
            open_heads &= far
            if not open_heads.any():
                return
            next_profile = self.profile.new_tensor(choice)
            budgets = self.profile.new_tensor(self.budgets)
            more = (next_profile * budgets).sum() > (self.profile * budgets).sum(1)
            self.profile.copy_(torch.where((open_heads & more).unsqueeze(1), next_profile, self.profile))


def profile(mu: float, sigma: float, levels: int) -> list[float]:
    """The part of the blocks that keep 1, 2, 4, ... keys."""
    weights = [-((i - mu) ** 2) / (2 * sigma**2) for i in range(levels)]
    weights = [math.exp(weight - max(weights)) for weight in weights]
    return [weight / sum(weights) for weight in weights]


def _part(choice: list[float], budgets: list[int]) -> float:
    return sum(p * k for p, k in zip(choice, budgets)) / budgets[-1]


@torch.no_grad()
def kept_keys(
    key: torch.Tensor, size: int, profiles: torch.Tensor, real: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rank of each key in its block (B, heads, blocks, size), and how many each block keeps, (B, heads, blocks).

    Args:
        key: (B, heads, slots, D).
        size: slots of a block.
        profiles: (heads, levels), the part of the blocks that keep 1, 2, 4, ... keys.
        real: (1, slots) bool, slots with a key; None for all.
    """
    dtype = torch.promote_types(key.dtype, torch.float32)
    key = key.to(dtype).unflatten(2, (-1, size))
    real = torch.ones(1, key.shape[2] * size, dtype=torch.bool, device=key.device) if real is None else real
    real = real[0].unflatten(0, (-1, size))  # blocks size
    counts = real.sum(1)
    mean = key.sum(3, keepdim=True) / counts[:, None, None]
    cosine = torch.nn.functional.cosine_similarity(key, mean, dim=-1)
    redundancy = cosine.masked_fill(~real, 0).sum(3) / counts
    distance = (key - mean).pow(2).sum(-1).masked_fill(~real, -1)
    nearest = distance.masked_fill(~real, torch.inf).argmin(3, keepdim=True)
    rank = distance.scatter(3, nearest, torch.inf).argsort(dim=-1, descending=True).argsort(dim=-1)

    blocks = _blocks_of(profiles.to(dtype), key.shape[2])  # heads levels
    place = redundancy.argsort(dim=2, descending=True).argsort(dim=2)  # 0 for the most redundant block
    level = (place.unsqueeze(-1) >= blocks.cumsum(1)[:, None, :]).sum(-1)
    return rank, torch.minimum(2**level, counts)


def _blocks_of(profiles: torch.Tensor, blocks: int) -> torch.Tensor:
    """How many blocks keep 1, 2, 4, ... keys: profiles (heads, levels) to whole numbers that add up to `blocks`."""
    wanted = profiles / profiles.sum(1, keepdim=True) * blocks
    found = wanted.floor()
    rank = ranked(wanted - found)[1].argsort(dim=1)
    return (found + (rank < blocks - found.sum(1, keepdim=True))).long()
