"""AS-ViT: DeiT that drops tokens of low class attention by learned thresholds, a different number for each image.

Paper: Adaptive Sparse ViT: Towards Learnable Adaptive Token Pruning by Fully Exploiting Self-Attention, IJCAI 2023,
arXiv 2209.13802.
Official code: github.com/Cydia2018/AS-ViT, without a licence, so nothing of it is used here; no weights are published.

This is a reimplementation from the formulas of the paper and of the official code. It differs from the official code:
an image keeps the same tokens in a batch as alone (the official code keeps the batch's mean number for each image), any
input size runs, and masks of later stages are multiplied by earlier masks. Maps have every position: a dropped token
keeps the features that it had when it was dropped.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs
from torch import nn

from terrazzo.backbones import _deit, _lvvit
from terrazzo.backbones._checks import numbers, wholes
from terrazzo.backbones._deit import SMALL, TINY, DeiT, cfg, from_official
from terrazzo.backbones._layers import dimensioned, learned_number, take_scalars
from terrazzo.backbones._lvvit import LVViT
from terrazzo.backbones._registration import register_variants
from terrazzo.backbones._rotary import taken, with_front
from terrazzo.backbones._tokens import Reducer, State
from terrazzo.backbones._weights import any_prefix
from terrazzo.errors import InputError
from terrazzo.kernels.dispatch.exporting import is_exporting
from terrazzo.kernels.token_reduction import compose, prune, prune_packed, unmerge
from terrazzo.kernels.varlen_attention import first_weights, varlen_attention

__all__ = ["ASViT"]

FORMS = ("auto", "masked", "packed", "fixed")
TEMPERATURE = 1e-4  # of the sigmoid that gives thresholds a gradient
EPSILON = 1e-6  # of the masked softmax
NEAREST = 5  # kept tokens whose mean update a dropped token gets: with 1 to 20, maps are about equally good
PIECE = 2**22  # similarities that are computed at a time


class Dropped(NamedTuple):
    """What is remembered of a stage, so that its dropped tokens can be updated in maps.

    Attributes:
        full: (B, T, C), features of every position when the stage began.
        kept: (B, T), which positions still have their token after it.
        count: How many positions have no token, if all images have the same number.
    """

    full: torch.Tensor
    kept: torch.Tensor
    count: int | None = None


class PrunedState(State):
    """The state beside the tokens (B, T, C), or packed tokens (sum of T, C).

    Attributes:
        stages: The stages so far, if maps will be needed.
        score: Each token's score by the block before: the tokens' shape without channels.
        keep: Masked, from the first stage on: (B, T), 1 for a kept token, with the thresholds' gradient.
        full: Features of every position (B, T, C), flat if packed; only the features of dropped tokens are read.
        map: Fixed: (B, T) to the remaining tokens, -1 for a dropped token.
        place: The place of each token in `full`: packed (sum of T,); fixed (B, T), in its image.
        lengths: Packed: the number of remaining tokens of each image.
        cu_seqlens: Packed: (B + 1,) int32, where the tokens of each image begin.
    """

    stages: tuple[Dropped, ...] = ()
    score: torch.Tensor | None = None
    keep: torch.Tensor | None = None
    full: torch.Tensor | None = None
    map: torch.Tensor | None = None
    place: torch.Tensor | None = None
    lengths: tuple[int, ...] | None = None
    cu_seqlens: torch.Tensor | None = None

    def followed(self, rope: torch.Tensor) -> torch.Tensor:
        if self.lengths is not None:
            return with_front(rope, self.prefix)[..., self.place % (self.prefix + rope.shape[-2]), :]
        return rope if self.map is None else taken(rope, self.place[:, self.prefix :] - self.prefix)


def masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, keep: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in which a dropped token is seen only by itself, and the class token's row of weights.

    The mask multiplies exponentials after subtracting the maximum over all keys, and all keys get a share of 1e-6. So
    dropped tokens have a gradient, and thresholds can decrease again.

    Args:
        query, key, value: (B, H, T, D).
        keep: (B, T), 1 or 0.

    Returns:
        (B, H, T, D) and (B, H, T).

    Source: arXiv 2209.13802, section 3.3.
    """
    count = query.shape[2]
    score = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    score = score.to(torch.promote_types(score.dtype, torch.float32))
    itself = torch.eye(count, dtype=score.dtype, device=score.device)
    keep = keep.to(score.dtype)[:, None, None]
    part = (score - score.amax(-1, keepdim=True)).exp() * (keep + (1 - keep) * itself)
    weight = (part + EPSILON / count) / (part.sum(-1, keepdim=True) + EPSILON)
    return weight.to(value.dtype) @ value, weight[:, :, 0]


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention, and the class token's row of weights in float32 at least: see `masked_attention`."""
    logits = (query[:, :, :1] * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    row = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).squeeze(2)
    return F.scaled_dot_product_attention(query, key, value), row


def token_scores(context: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """Class attention; each head is weighted by the norm of its output for the token.

    (B, H, T, D) and (B, H, T) to (B, T); packed, (sum of T, H, D) and (sum of T, H) to (sum of T,).

    Source: arXiv 2209.13802, section 3.2.
    """
    norm = torch.linalg.vector_norm(context.to(row.dtype), dim=-1)
    return (norm / (norm.sum(1, keepdim=True) + 1e-8) * row).sum(1)


def carried(x: torch.Tensor, stages: Sequence[Dropped], prefix: int) -> torch.Tensor:
    """Give dropped tokens the mean of the later updates of the kept tokens that were most similar to them.

    The papers do not say what a map has at the position of a dropped token. Its features from an early block alone are
    of little use: with DINOv2 ViT-S/14 and 70, 50 and 35 % kept, final maps had a mean cosine of 0.47 to the unpruned
    model's; with updates it is 0.92.

    Args:
        x: (B, T, C), the remaining tokens at their positions; a dropped token with its features from when it was
            dropped.
        stages: From first to last. The kept tokens of a stage may be dropped by a later one.
        prefix: Number of tokens in front, which are not patches and update no other token.

    Returns:
        (B, T, C).
    """
    for full, kept, count in reversed(stages):
        rows = None if count is None else kept.to(torch.int8).topk(count, largest=False, sorted=False).indices
        moved = _update(x - full, full, kept, rows, prefix)
        if rows is None:
            x = torch.where(kept.unsqueeze(-1), x, full + moved)
        else:
            x = x.scatter(1, rows.unsqueeze(-1).expand_as(moved), unmerge(full, rows) + moved)
    return x


def _update(
    update: torch.Tensor, full: torch.Tensor, kept: torch.Tensor, rows: torch.Tensor | None, prefix: int
) -> torch.Tensor:
    """The mean update of the most similar kept patches: (B, M, C) for the positions `rows` (B, M), or for all."""
    unit = F.normalize(full.to(torch.promote_types(full.dtype, torch.float32)), dim=-1)
    candidates, hidden = unit[:, prefix:].transpose(1, 2), ~kept[:, None, prefix:]

    def mean(asking: torch.Tensor) -> torch.Tensor:
        similar = (asking @ candidates).masked_fill(hidden, -torch.inf)
        best, index = similar.topk(min(NEAREST, similar.shape[2]), -1)
        weight = (best > -torch.inf).to(update.dtype)  # an image may have fewer kept patches
        near = unmerge(update, index.flatten(1) + prefix).unflatten(1, index.shape[1:])  # B M K C
        return (near * weight.unsqueeze(-1)).sum(2) / weight.sum(2, keepdim=True).clamp(min=1)

    asking = unit if rows is None else unmerge(unit, rows)
    if is_exporting() or torch.compiler.is_compiling():
        return mean(asking)
    return torch.cat([mean(part) for part in asking.split(PIECE // full.shape[1] + 1, 1)], 1)


class Pruning(Reducer):
    """Drops tokens in front of some blocks, by the scores from the block before.

    In training, and whenever a gradient or a static graph is needed, dropped tokens are masked. Otherwise they are
    removed, and images are packed one after another. The results agree within 2e-6.
    """

    by_class_token = True
    full_last = 1

    def __init__(
        self,
        blocks: Sequence[int],
        form: str = "auto",
        keep: Sequence[float] = (0.7, 0.5, 0.35),
        thresholds: Sequence[float] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Args:
        blocks: Blocks in front of which tokens are dropped, counted from 0.
        form: "masked", "packed", "auto" for the suitable form of the two, or "fixed": every image keeps the same
            number of tokens, for engines with static shapes.
        keep: With "fixed": the part of the patches that is kept at each stage.
        thresholds: Initial value of each stage's parameter; scores are about 1 / tokens. None for 0.001, 0.002, ...

        Raises:
            InputError: `form` is unknown, a stage is in front of the first block, or `keep` or `thresholds` do not fit.
        """
        super().__init__()
        if form not in FORMS:
            raise InputError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
        blocks, keep = wholes("blocks", blocks), numbers("keep", keep)
        if any(block < 1 for block in blocks):
            raise InputError(f"tokens are scored by the block before, so stages begin at block 1, got {blocks}")
        if form == "fixed" and (len(keep) != len(blocks) or any(not 0 <= part <= 1 for part in keep)):
            raise InputError(f"keep must hold a part of 0 to 1 for each of {len(blocks)} stages, got {keep}")
        if thresholds is None:
            thresholds = [0.001 * (i + 1) for i in range(len(blocks))]
        thresholds = numbers("thresholds", thresholds)
        if len(thresholds) != len(blocks):
            raise InputError(f"thresholds must hold a number for each of {len(blocks)} stages, got {thresholds}")
        self.blocks = blocks
        self.form = form
        self.keep = keep
        # "fixed" does not read the thresholds, so they get no gradient, for which parallel processes would wait.
        self.thresholds = nn.ParameterList(
            learned_number(value, requires_grad=form != "fixed", device=device, dtype=dtype) for value in thresholds
        )
        self.thresholds.register_load_state_dict_pre_hook(take_scalars)

    @staticmethod
    def default_blocks(depth: int) -> Sequence[int]:
        return tuple(depth * k // 4 + 1 for k in (1, 2, 3))

    @staticmethod
    def of_strength(strength: float, depth: int) -> dict[str, Any]:
        return dict(form="fixed", keep=tuple((1 - strength) ** k for k in (1, 2, 3)))

    def begin(self, grid: tuple[int, int], prefix: int, depth: int, maps: bool) -> PrunedState:
        return PrunedState(grid=grid, prefix=prefix, depth=depth, maps=maps, reducer=self)

    def form_of(self, x: torch.Tensor) -> str:
        """The form for these tokens, if `form` is "auto"."""
        if self.form != "auto":
            return self.form
        static = torch.compiler.is_compiling() or is_exporting() or x.device.type == "meta"
        return "masked" if self.training or torch.is_grad_enabled() or static else "packed"

    def attends(self, block: int) -> bool:
        return block + 1 >= min(self.blocks, default=block + 2)

    def forward(self, block: nn.Module, x: torch.Tensor, state: PrunedState) -> torch.Tensor:
        if state.depth in self.blocks:
            prune_ = getattr(self, f"_{self.form_of(x)}")
            x = prune_(x, state, self.blocks.index(state.depth))
        scored = state.depth + 1 in self.blocks
        if state.lengths is None and state.keep is None and not scored:
            return block.placed(x, state.where(), state.rope)

        def among_kept(attn: nn.Module, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """Attention to the kept tokens; it also scores them."""
            if state.lengths is not None:
                context, score = self._packed_context(attn, normed, state, scored)
            else:
                context, score = self._context(attn, normed, state)
            state.score = score if scored else None
            return context, normed

        return block.widened(x + block.attended(x, among_kept))

    @staticmethod
    def _context(attn: nn.Module, normed: torch.Tensor, state: PrunedState):
        """The attention's output (B, T, C), and scores (B, T)."""
        query, key, value = attn.prepared(normed, state.rope)
        if state.keep is None:
            context, row = attention(query, key, value)
        else:
            context, row = masked_attention(query, key, value, state.keep)
        return context.transpose(1, 2).flatten(2), token_scores(context, row)

    @staticmethod
    def _packed_context(attn: nn.Module, normed: torch.Tensor, state: PrunedState, scored: bool):
        """Like `_context` for packed tokens (sum of T, C); scores only if `scored`."""
        query, key, value = (x.transpose(0, 1) for x in attn.prepared(normed, state.rope, front=0))
        context = varlen_attention(query, key, value, state.cu_seqlens, max(state.lengths))
        score = token_scores(context, first_weights(query, key, state.cu_seqlens)) if scored else None
        return context.flatten(1), score

    def _masked(self, x: torch.Tensor, state: PrunedState, stage: int) -> torch.Tensor:
        """Mask tokens with a straight-through estimator: the mask is hard, its gradient is a steep sigmoid's."""
        above = state.score - self.thresholds[stage].to(state.score.dtype)
        soft = (above / TEMPERATURE).sigmoid()
        keep = (above > 0).to(soft.dtype) - soft.detach() + soft
        keep = keep if state.keep is None else keep * state.keep
        # Ones whose sizes come from the graph: the older ONNX exporter makes a constant of torch.ones.
        keep = torch.cat([keep[:, : state.prefix].detach() * 0 + 1, keep[:, state.prefix :]], 1)
        state.full = x if state.full is None else self.restored(x, state, "copy")
        state.keep = keep
        self._remember(state, state.full)
        return x

    def _packed(self, x: torch.Tensor, state: PrunedState, stage: int) -> torch.Tensor:
        """Remove dropped tokens; the host reads the number of remaining tokens."""
        cu_seqlens, place, full = state.cu_seqlens, state.place, state.full
        if cu_seqlens is None:
            images, count = x.shape[:2]
            cu_seqlens = torch.arange(images + 1, dtype=torch.int32, device=x.device) * count
            x = full = x.flatten(0, 1)
            place = torch.arange(x.shape[0], device=x.device)
        else:
            full = full.index_copy(0, place, x)
        x, cu_seqlens, index = prune_packed(x, state.score.flatten(), self.thresholds[stage], cu_seqlens, state.prefix)
        state.full, state.place, state.cu_seqlens = full, place[index], cu_seqlens
        state.lengths = tuple(cu_seqlens.diff().tolist())
        state.moved()
        self._remember(state, full.unflatten(0, (len(state.lengths), -1)))
        return x

    def _fixed(self, x: torch.Tensor, state: PrunedState, stage: int) -> torch.Tensor:
        """Keep the best tokens of each image, the same number for all images; thresholds are not used."""
        patches = state.grid[0] * state.grid[1]
        kept = min(int(patches * self.keep[stage]), x.shape[1] - state.prefix)
        state.full = x if state.full is None else self.restored(x, state, "copy")
        x, assignment, _ = prune(x, state.score, k=kept, protect=state.prefix)
        state.map = assignment if state.map is None else compose(assignment, state.map)
        if state.ropes is not None:
            # The positions that have a token, in order, because all others are sorted behind them.
            state.place = torch.where(state.map < 0, state.map.shape[1], state.map).argsort(1)[:, : x.shape[1]]
            state.moved()
        self._remember(state, state.full, state.full.shape[1] - x.shape[1])
        return x

    def _remember(self, state: PrunedState, full: torch.Tensor, count: int | None = None) -> None:
        if state.maps:
            state.stages = (*state.stages, Dropped(full, self.kept(state), count))

    def left(self, x: torch.Tensor, state: PrunedState) -> torch.Tensor:
        """A token for every position, because images keep different numbers of tokens.

        A dropped patch is replaced by the first kept patch, so that a maximum over patches is a maximum over kept
        patches; if no patch is kept, by the class token.
        """
        kept = self.kept(state)
        if kept is None:
            return x
        x = self.restored(x, state, "copy")
        order = torch.arange(x.shape[1], 0, -1, device=x.device)
        first = torch.where(kept, order, 0).narrow(1, state.prefix, x.shape[1] - state.prefix).max(1)
        first = torch.where(first.values > 0, first.indices + state.prefix, 0)
        return torch.where(kept.unsqueeze(-1), x, unmerge(x, first.unsqueeze(1)))

    def assignment(self, state: PrunedState) -> torch.Tensor | None:
        kept = self.kept(state)
        return None if kept is None else torch.where(kept, kept.cumsum(1) - 1, -1)

    @staticmethod
    def kept(state: PrunedState) -> torch.Tensor | None:
        """Which positions still have their token, (B, T); None before anything was dropped."""
        if state.lengths is not None:
            kept = torch.zeros(state.full.shape[0], dtype=torch.bool, device=state.full.device)
            return kept.index_fill(0, state.place, True).unflatten(0, (len(state.lengths), -1))
        if state.keep is not None:
            return state.keep > 0.5
        return None if state.map is None else state.map >= 0

    def restored(self, x: torch.Tensor, state: PrunedState, mode: str) -> torch.Tensor:
        """A token for every position: see `carried`; with "copy" a dropped token keeps its features."""
        if state.lengths is not None:
            x = state.full.index_copy(0, state.place, x).unflatten(0, (len(state.lengths), -1))
        elif state.keep is not None:
            x = torch.where(state.keep.unsqueeze(-1) > 0.5, x, state.full)
        elif state.map is not None:
            x = unmerge(x, state.map, state.full)
        return x if mode == "copy" else carried(x, state.stages, state.prefix)


class ASLVViT(LVViT):
    """LV-ViT that drops tokens."""

    def __init__(
        self,
        blocks: Sequence[int] | None = None,
        form: str = "auto",
        keep: Sequence[float] = (0.7, 0.5, 0.35),
        depth: int = 16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs,
    ):
        """Args:
        blocks: None for three evenly spread blocks.
        form, keep: See `Pruning`.
        **kwargs: See `LVViT`.
        """
        factory = dict(device=device, dtype=dtype)
        blocks = Pruning.default_blocks(depth) if blocks is None else blocks
        super().__init__(Pruning(blocks, form, keep, **factory), depth=depth, **factory, **kwargs)


class ASViT(DeiT):
    """DeiT that drops tokens."""

    def __init__(
        self,
        blocks: Sequence[int] | None = None,
        form: str = "auto",
        keep: Sequence[float] = (0.7, 0.5, 0.35),
        depth: int = 12,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs,
    ):
        """Args:
        blocks: None for three evenly spread blocks.
        form, keep: See `Pruning`.
        **kwargs: See `DeiT`.
        """
        factory = dict(device=device, dtype=dtype)
        blocks = Pruning.default_blocks(depth) if blocks is None else blocks
        super().__init__(Pruning(blocks, form, keep, **factory), depth=depth, **factory, **kwargs)


NAMES = [(r"^score_predictor\.(\d+)\.keep_threshold$", r"reducer.thresholds.\1")]


@any_prefix
def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Like `from_official`. A plain ViT's checkpoint leaves the thresholds; pooling removes the second classifier."""
    own = {name: value for name, value in model.state_dict().items() if name.startswith("reducer.")}
    host = _lvvit if isinstance(model, LVViT) else _deit
    state_dict = own | dimensioned(from_official(state_dict, model, [*NAMES, *host.NAMES]), model)
    return state_dict if model.head.token else {k: v for k, v in state_dict.items() if not k.startswith("head.aux.")}


def _cfg(size: str, top1: str) -> dict[str, Any]:
    return cfg(
        size,
        top1,
        origin_url="https://github.com/Cydia2018/AS-ViT",
        paper_name="Adaptive Sparse ViT: Towards Learnable Adaptive Token Pruning by Fully Exploiting Self-Attention",
        paper_ids="arXiv:2209.13802",
        description="the weights are DeiT's, with thresholds at their initial values; the authors published no weights",
    )


def _lv_cfg(file: str, top1: str) -> dict[str, Any]:
    by_hand = f"LV-ViT's weights must be fetched by hand from github.com/zihangJiang/TokenLabeling: {file}"
    heads = ("head.fc", "head.aux")
    own = dict(url="", first_conv="stem.patches.conv1", classifier=heads, description=by_hand)
    return {**_cfg("small", top1), **own}


default_cfgs = generate_default_cfgs(
    {
        "asvit_deit_tiny": _cfg("tiny", "none from AS-ViT's authors; DeiT 72.2"),
        "asvit_deit_small": _cfg("small", "79.6 at 65 % of the cost, 78.7 at 50 % (fine-tuned; DeiT 79.8)"),
        "asvit_lvvit_small": _lv_cfg(
            "lvvit_s-224-83.3.pth.tar", "83.1 at 70 % of the cost, 82.6 at 60 % (fine-tuned; LV-ViT 83.3)"
        ),
        "asvit_lvvit_medium": _lv_cfg("lvvit_m-56M-224-84.0.tar", "none from AS-ViT's authors; LV-ViT 84.0"),
    }
)


register_variants(__name__, ASViT, {"asvit_deit_tiny": TINY, "asvit_deit_small": SMALL}, out_indices=(2, 5, 8, 11))
register_variants(
    __name__,
    ASLVViT,
    {
        "asvit_lvvit_small": dict(_lvvit.SMALL, out_indices=(3, 7, 11, 15)),
        "asvit_lvvit_medium": dict(_lvvit.MEDIUM, out_indices=(4, 9, 14, 19)),
    },
)
