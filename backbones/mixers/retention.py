"""ViR's retention: attention without softmax in which weights decay with the distance between tokens.

Paper: ViR: Vision Retention Networks, 2023, arXiv 2310.19731. The authors' code has no licence; this file follows the
formulas. There is no official code for maps.
"""

import math

import torch

from terrazzo.backbones._place import Place
from terrazzo.backbones.mixers._mixer import Host, Mixer
from terrazzo.errors import InputError
from terrazzo.kernels.dispatch import arguments
from terrazzo.kernels.dispatch.dtypes import accumulator, without_autocast
from terrazzo.kernels.dispatch.exporting import pieces
from terrazzo.kernels.ssd import ssd

FORMS = ("parallel", "chunked", "recurrent")


class Retention(Mixer):
    """out_n = sum over m of g^(distance of n and m) (q_n . k_m) v_m / sqrt(D), over tokens m that come before n.

    With `dims=2` a patch m comes before n if it stands neither below nor on the right of n, and the distance is that
    of rows plus that of columns. With `dims=1` tokens come in raster order, so the distance of neighbouring rows grows
    with the width. Head t has g = 1 - exp(x_t), where x runs from ln(1/32) for the first head to ln(1/512) for the
    last. Tokens behind the patches come after them; tokens in front come last of all, in reverse order. So the class
    token sees all tokens, and no patch sees it. On maps such tokens stand under the last column, one below the other.
    Nothing is normalised, and there are no parameters. All sums are in float32 at least.

    A direction is a flip of the map. Head t takes direction t modulo `directions`: as it is, flipped in rows and
    columns, in columns, in rows. So four heads see all patches.

    All forms give the same numbers. Costs of a head: "parallel" N^2 D, with N^2 numbers in memory, and fastest for
    maps up to about 32 x 32. "recurrent" N D^2, a token after another, for checks. "chunked" N D (chunk + D) with
    `dims=1`, by `terrazzo.kernels.ssd`; with `dims=2` it takes blocks of rows, for N D (chunk W + W D / chunk + D).

    The authors' "parallel" mode applies a softmax to the masked products, so that it is neither causal nor equal to
    their recurrent mode. It is not offered.

    Source: arXiv 2310.19731, section 3. The four directions for dense features are ours.
    """

    def __init__(
        self,
        host: Host,
        dims: int = 2,
        form: str = "chunked",
        directions: int = 4,
        chunk: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Args:
        dims: 1 for sequences, 2 for maps.
        form: "parallel", "chunked" or "recurrent".
        directions: 1, 2 or 4. 1 is the paper's model.
        chunk: Tokens of a chunk with `dims=1` (None for 64), rows of a chunk with `dims=2` (None for 8).
        """
        super().__init__(host)
        if dims not in (1, 2):
            raise InputError(f"dims must be 1 or 2, got {dims!r}")
        if form not in FORMS:
            raise InputError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
        if directions not in (1, 2, 4):
            raise InputError(f"directions must be 1, 2 or 4, got {directions!r}")
        chunk = {1: 64, 2: 8}[dims] if chunk is None else arguments.whole(chunk, "chunk", 1)
        self.dims, self.form, self.directions, self.chunk = dims, form, directions, chunk

    def mix(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> torch.Tensor:
        dtype = accumulator(query, key, value)
        with without_autocast(value):
            return self._retained(*(x.to(dtype) for x in (query, key, value)), place, self.form).to(value.dtype)

    def weights(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> torch.Tensor:
        own = torch.eye(query.shape[2], dtype=query.dtype, device=query.device).expand(*query.shape[:2], -1, -1)
        return self._retained(query, key, own, place, "parallel")

    def _retained(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place, form: str
    ) -> torch.Tensor:
        given, front = [query, key, value], place.prefix
        if front:
            given = [torch.cat([x[:, :, front:], x[:, :, :front].flip(2)], 2) for x in given]
        given = [self._turned(x, place.grid) for x in given]
        given[0] = given[0] * query.shape[-1] ** -0.5
        decay = decays(self.host.heads, given[0])
        if self.dims == 1:
            out = retain_sequence(*given, decay, form, self.chunk)
        else:
            out = retain_map(*given, decay, place.grid, form, self.chunk)
        out = self._turned(out, place.grid)
        return torch.cat([out[:, :, -front:].flip(2), out[:, :, :-front]], 2) if front else out

    def _turned(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Flip the patches of each head into its direction; a second time turns them back."""
        if self.directions == 1:
            return x
        count = grid[0] * grid[1]
        direction = torch.tensor([head % self.directions for head in range(self.host.heads)], device=x.device)
        direction = direction[:, None, None, None]
        patches = x[:, :, :count].unflatten(2, grid)
        patches = torch.where((direction == 1) | (direction == 3), patches.flip(2), patches)
        patches = torch.where((direction == 1) | (direction == 2), patches.flip(3), patches).flatten(2, 3)
        return patches if x.shape[2] == count else torch.cat([patches, x[:, :, count:]], 2)


def decays(heads: int, like: torch.Tensor) -> torch.Tensor:
    """(heads,), the logarithm of the factor for a step, for each head."""
    missing = torch.linspace(math.log(1 / 32), math.log(1 / 512), heads, dtype=like.dtype, device=like.device).exp()
    return torch.log1p(-missing)


def retain_sequence(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: torch.Tensor, form: str, chunk: int = 64
) -> torch.Tensor:
    """Retention of a sequence (B, heads, N, D); `decay` is (heads,)."""
    if form == "parallel":
        steps = torch.arange(query.shape[2], device=query.device)
        return _masked(query, key, value, _weights(steps[:, None] - steps, decay))
    if form == "chunked":
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        out = ssd(value, torch.ones_like(value[..., 0]), decay, key, query, chunk=chunk)
        return out.transpose(1, 2)
    factor = decay.exp()[:, None, None]
    state, out = 0, []
    for q, pair in _steps(query, key, value):
        state = pair + factor * state
        out.append(q @ state)
    return torch.cat(out, 2)


def retain_map(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    grid: tuple[int, int],
    form: str,
    chunk: int = 8,
) -> torch.Tensor:
    """Retention of a map (B, heads, N, D): H W patches in raster order, then tokens that see all tokens before."""
    if form == "recurrent":
        return _recurrent(query, key, value, decay, grid)
    count = grid[0] * grid[1]
    if form == "parallel":
        return _masked(query, key, value, _weights(_distances(grid, query.shape[2] - count, query.device), decay))
    patches = _in_rows(*(x[:, :, :count].unflatten(2, grid) for x in (query, key, value)), decay, chunk).flatten(2, 3)
    if query.shape[2] == count:
        return patches
    distance = _distances(grid, query.shape[2] - count, query.device, count)
    return torch.cat([patches, _masked(query[:, :, count:], key, value, _weights(distance, decay))], 2)


def _weights(distance: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """Weights (heads, ...) of keys at distances (...); a negative distance says that a query does not see the key."""
    decay, distance = decay.view(-1, *(1 for _ in distance.shape)), distance.to(decay.dtype)
    return torch.where(distance < 0, 0, (decay * distance.clamp(min=0)).exp())


def _masked(query, key, value, weights) -> torch.Tensor:
    """Retention by its definition."""
    return ((query @ key.transpose(-1, -2)) * weights) @ value


def _distances(grid: tuple[int, int], more: int, device: torch.device, first: int = 0) -> torch.Tensor:
    """Distances of tokens from `first` on to all tokens, -1 to tokens that come later: patches, then `more` tokens."""
    rows, columns = (torch.arange(length, device=device) for length in grid)
    row, column = rows[:, None].expand(grid).flatten(), columns.expand(grid).flatten()  # exporters cannot divide by W
    if more > 0:
        row = torch.cat([row, grid[0] + torch.arange(more, device=device)])
        column = torch.cat([column, columns[-1:].expand(more)])
    down, right = row[first:, None] - row, column[first:, None] - column
    return torch.where((down >= 0) & (right >= 0), down + right, -1)


def _in_rows(query, key, value, decay, chunk: int) -> torch.Tensor:
    """Retention of a map (B, heads, H, W, D) in blocks of rows.

    A block passes on a state D x D for each column, which holds all patches above that are not on the right. There is
    no loop, so that one graph serves maps of any size.
    """
    height, width = query.shape[2:4]
    # Rows are picked by index, because exporters cannot prove the sizes of padding by open sizes.
    count = pieces(height, chunk)
    rows = torch.arange(count * chunk, device=query.device).view(count, chunk)
    real = rows < height
    query, key, value = (x[:, :, torch.where(real, rows, 0)] for x in (query, key, value))  # B heads blocks rows W D
    key = torch.where(real[:, :, None, None], key, 0)  # rows past the last add nothing
    near = _weights(_distances((chunk, width), 0, query.device), decay)[:, None]
    out = _masked(*(x.flatten(3, 4) for x in (query, key, value)), near).unflatten(3, (chunk, width))

    steps, columns, blocks = (torch.arange(n, device=query.device) for n in (chunk, width, count))
    to_end, from_start = (_weights(n, decay)[:, None, :, None, None] for n in (chunk - 1 - steps, steps + 1))
    pairs = (key * to_end).permute(0, 1, 2, 4, 5, 3) @ value.transpose(3, 4)  # B heads blocks W D D
    added = _weights(columns[:, None] - columns, decay)[:, None] @ pairs.flatten(4)  # B heads blocks W D*D
    before = _weights(chunk * (blocks[:, None] - blocks - 1), decay) @ added.flatten(3)  # B heads blocks W*D*D
    above = (query * from_start).transpose(3, 4) @ before.unflatten(3, pairs.shape[3:])  # B heads blocks W rows D
    return (out + above.transpose(3, 4)).flatten(2, 3).index_select(2, torch.arange(height, device=query.device))


def _steps(query, key, value):
    """Each token's query (B, heads, 1, D) and the product of its key and value (B, heads, D, D)."""
    for q, k, v in zip(*(x.split(1, 2) for x in (query, key, value))):
        yield q, k.transpose(2, 3) @ v


def _recurrent(query, key, value, decay, grid: tuple[int, int]) -> torch.Tensor:
    """Retention of a map, a token after another: a state for the row, and a state for each column."""
    factor = decay.exp()[:, None, None]
    columns, out, row = [0] * grid[1], [], 0
    for step, (q, pair) in enumerate(_steps(query, key, value)):
        if step < grid[0] * grid[1]:
            column = step % grid[1]
            row = pair + (factor * row if column else 0)
            columns[column] = row + factor * columns[column]
        else:
            columns[-1] = pair + factor * columns[-1]
            column = -1
        out.append(q @ columns[column])
    return torch.cat(out, 2)
