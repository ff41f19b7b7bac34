"""MCTF: DeiT with blocks that merge tokens by similarity, informativeness and size, before they attend.

Paper: Multi-criteria Token Fusion with One-step-ahead Attention for Efficient Vision Transformers, CVPR 2024,
arXiv 2403.10030.
Official code: github.com/mlvlab/MCTF, MIT licence; weights by the authors. Merging adds no parameters, so weights of
any DeiT or plain ViT of timm load, too.

Additions are dense maps (`terrazzo.backbones._tokens`), any input size, and a few details where the official code fails
or leaves the choice open: among equal attractions, the lowest index comes first, and with fewer than 11 tokens nothing
is merged.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import generate_default_cfgs
from torch import nn

from terrazzo.backbones._checks import number, numbers, whole, wholes
from terrazzo.backbones._deit import BASE, SMALL, TINY, DeiT, cfg, from_official
from terrazzo.backbones._registration import register_variants
from terrazzo.backbones._tokens import Reducer, TokenState
from terrazzo.backbones._weights import any_prefix
from terrazzo.errors import InputError
from terrazzo.kernels.token_reduction import Plan, attention, merge, plan, prop_bias, unmerge

__all__ = ["MCTF"]

FEWEST = 10  # tokens that are always left


class Fusion(Reducer):
    """Merges tokens in front of some blocks, and attends with attention that was computed one step ahead.

    The attention of the unmerged tokens says how informative each token is, and also serves the merged tokens: rows of
    a group are averaged, columns added up. Averaging the output gives the same result (section 3.4 of the paper), so no
    merged matrix is made. If informativeness does not count, this attention is not computed: the unchanged block runs
    on merged tokens, at less cost.

    Source: arXiv 2403.10030, sections 3.2 to 3.4.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        r: float = 16,
        criteria: Sequence[float] = (1, 20, 40),
        bidirectional: bool = True,
        cells_first: bool = False,
        multiple: int = 1,
        r_eval: float | None = None,
    ):
        """Args:
        blocks: Blocks that merge, counted from 0.
        r: Number of tokens that each block merges (of each window, if there are windows); below 1, the part of the
            tokens.
        criteria: tau of similarity, informativeness and size; 0 leaves a criterion out. Without informativeness tokens
            are averaged by size alone.
        bidirectional: Merge half of r each way.
        cells_first: The first merge is within 2x2 cells of the grid, one-way (for dense maps: even and odd tokens of a
            raster are stripes).
        multiple: Merge fewer than r tokens if needed, so that the number of remaining tokens is a multiple of this.
        r_eval: Replaces r outside of training; None for r.

        Raises:
            InputError: r is less than 0, criteria are not three numbers of at least 0, `multiple` is less than 1, or
                one of these values is not a number.
        """
        super().__init__()
        r, r_eval = number("r", r), None if r_eval is None else number("r_eval", r_eval)
        blocks, criteria, multiple = (
            wholes("blocks", blocks),
            numbers("criteria", criteria),
            whole("multiple", multiple),
        )
        for name, value in (("r", r), ("r_eval", 0 if r_eval is None else r_eval)):
            if value < 0 or (value >= 1 and int(value) != value):
                raise InputError(f"{name} must be a part below 1, or a whole number of tokens, got {value}")
        if len(criteria) != 3 or min(criteria) < 0:
            raise InputError(f"criteria must be three numbers of at least 0, got {criteria}")
        if multiple < 1:
            raise InputError(f"multiple must be at least 1, got {multiple}")
        self.r = r
        self.r_eval = r_eval
        self.blocks = blocks
        self.criteria = criteria
        self.bidirectional = bidirectional
        self.cells_first = cells_first
        self.multiple = multiple

    @staticmethod
    def default_blocks(depth: int) -> Sequence[int]:
        return range(1, depth)

    @staticmethod
    def of_strength(strength: float, depth: int) -> dict[str, Any]:
        return dict(r=strength / 2)

    def begin(self, grid: tuple[int, int], prefix: int, depth: int, maps: bool, r: float | None = None) -> TokenState:
        """Like `Reducer.begin`; `r` replaces the model's number of merged tokens."""
        if r is None:
            r = self.r if self.training or self.r_eval is None else self.r_eval
        state = super().begin(grid, prefix, depth, maps)
        state.r = r
        return state

    def count(self, tokens: int, r: float, prefix: int = 1) -> int:
        """The number of merged tokens among `tokens`, which include `prefix` tokens in front that are not patches."""
        # Branches instead of min and max, so that a compiler can express sizes as sums.
        if tokens <= FEWEST:
            return 0
        part = r < 1
        r = torch.sym_int((tokens - prefix) * r) if part else int(r)
        if tokens - r < FEWEST and not part:
            r = tokens - FEWEST
        if r > (tokens - prefix) // 2:
            r = (tokens - prefix) // 2
        if self.multiple > 1:
            r = max(0, tokens - -(-(tokens - r) // self.multiple) * self.multiple)
        return r

    def attends(self, block: int) -> bool:
        return block in self.blocks and self.criteria[1] != 0

    def forward(self, block: nn.Module, x: torch.Tensor, state: TokenState) -> torch.Tensor:
        r = self.count(x.shape[1], state.r, state.prefix) if state.depth in self.blocks else 0
        if r == 0:
            return super().forward(block, x, state)
        if self.criteria[1] == 0:
            merged, size, assignment = merge(x, self._plan(x, state, r), size=state.size)
            state.reduced(x, merged, assignment, size)
            return super().forward(block, merged, state)
        merged = x

        def ahead(attn: nn.Module, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """Merge tokens by the attention of the unmerged tokens, and apply this attention to the merged tokens."""
            nonlocal merged
            query, key = attn.queries_and_keys(normed, state.rope)
            importance, attend = attention(query, key, prop_bias(state.size))
            weight = importance if state.size is None else importance * state.size / state.size.amax(1, keepdim=True)
            found = self._plan(x, state, r, importance)
            merged, size, assignment = merge(x, found, weight, state.size)
            state.reduced(x, merged, assignment, size)

            normed = block.norm1(merged)
            value = attn.in_heads(unmerge(attn.values(normed), assignment))
            return merge(attend(value).transpose(1, 2).flatten(2), found, weight)[0], normed

        update = block.attended(x, ahead)
        return block.widened(merged + update)

    def _plan(self, x: torch.Tensor, state: TokenState, r: int, importance: torch.Tensor | None = None) -> Plan:
        cells = self.cells_first and x.shape[1] == state.prefix + state.grid[0] * state.grid[1]
        return plan(
            x,
            r=r,
            size=state.size,
            importance=importance,
            criteria=self.criteria,
            protect=state.prefix,
            bidirectional=self.bidirectional and not cells,
            partition="cell2x2" if cells else "even_odd",
            grid=state.grid if cells else None,
        )


class MCTF(DeiT):
    """DeiT that merges tokens."""

    def __init__(
        self,
        r: float = 16,
        blocks: Sequence[int] | None = None,
        criteria: Sequence[float] = (1, 20, 40),
        bidirectional: bool = True,
        cells_first: bool = False,
        multiple: int = 1,
        r_eval: float | None = None,
        depth: int = 12,
        **kwargs,
    ):
        """Args:
        r: Number of tokens that are merged in each of `blocks` (below 1: the part of the tokens); 0 for plain DeiT.
        blocks: Blocks that merge; None for all but the first. With `window`, they must attend within windows.
        criteria, bidirectional, cells_first, multiple, r_eval: See `Fusion`.
        **kwargs: See `DeiT`.
        """
        fusion = Fusion(
            Fusion.default_blocks(depth) if blocks is None else blocks,
            r,
            criteria,
            bidirectional,
            cells_first,
            multiple,
            r_eval,
        )
        super().__init__(fusion, depth=depth, **kwargs)


@any_prefix
def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Like `from_official`, because merging has no parameters."""
    return from_official(state_dict, model)


def _cfg(size: str, top1: str, folder: str | None = None) -> dict[str, Any]:
    by_hand = "" if folder is None else f"; the authors' weights must be fetched by hand from {_DRIVE}/{folder}"
    return cfg(
        size,
        top1,
        origin_url="https://github.com/mlvlab/MCTF",
        paper_name="Multi-criteria Token Fusion with One-step-ahead Attention for Efficient Vision Transformers",
        paper_ids="arXiv:2403.10030",
        description=f"the weights are DeiT's, which were not trained with merging{by_hand}",
    )


_DRIVE = "https://drive.google.com/drive/folders"

default_cfgs = generate_default_cfgs(
    {
        "mctf_deit_tiny": _cfg("tiny", "72.7 (fine-tuned; DeiT 72.2)", "1a7Kr8YTwgWai7ZK6w5fVOn1R_VVYfnHB"),
        "mctf_deit_tiny_fast": _cfg("tiny", "72.7 (fine-tuned; DeiT 72.2)", "16DXTcbnemHUtzx1JXYgUJlSl_aXO5oCQ"),
        "mctf_deit_small": _cfg(
            "small", "80.1 (fine-tuned; 79.2 with DeiT's weights; DeiT 79.8)", "1JFebSnWF77O3MqBE1Dln_W4RAjqi19ro"
        ),
        "mctf_deit_small_fast": _cfg("small", "80.1 (fine-tuned; DeiT 79.8)", "1Ofsab5gtBHJ-TkD8gJbEbTBtB7UX3fXA"),
        "mctf_deit_base": _cfg("base", "none from MCTF's authors; DeiT 81.8"),
        "mctf_deit_base_fast": _cfg("base", "none from MCTF's authors; DeiT 81.8"),
    }
)

_FAST = dict(r=0.35, blocks=(3, 6, 9))


register_variants(
    __name__,
    MCTF,
    {
        "mctf_deit_tiny": TINY,
        "mctf_deit_tiny_fast": dict(TINY, **_FAST),
        "mctf_deit_small": SMALL,
        "mctf_deit_small_fast": dict(SMALL, **_FAST),
        "mctf_deit_base": BASE,
        "mctf_deit_base_fast": dict(BASE, **_FAST),
    },
    out_indices=(2, 5, 8, 11),
)
