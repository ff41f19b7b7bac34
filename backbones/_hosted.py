"""timm's plain blocks and attention, extended so that a reducer can run a block and a mixer can replace attention.

Callers call the block and its attention as ever; a reducer calls the block's parts. Only classes change: parameters,
their names and all hooks stay.
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Block
from torch import nn

from terrazzo.backbones._bare import rows_of
from terrazzo.backbones._place import Place
from terrazzo.errors import InputError

Attend = Callable[[nn.Module, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Maps the attention module and its input (B, N, C) to the attention's output, heads side by side, (B, M, C), and to
what would be the module's input for these M tokens, which a gate reads."""


class _Hosted(nn.Module):
    """What a reducer and a mixer need of timm's attention modules.

    Attributes:
        mixer: Mixes tokens in place of softmax attention (`terrazzo.backbones.mixers`); None for timm's attention.
    """

    def forward(
        self,
        x: torch.Tensor,
        rope: torch.Tensor | None = None,
        attn_mask: Any = None,
        attend: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Like timm's forward, (B, N, C) to (B, N, C).

        Args:
            rope: Rotary positions of the patches; None for none.
            attn_mask: A mask as in timm, or a `Place`, which tells a mixer where the tokens stand.
            attend: The inner part (see `Attend`) instead of any attention; None for the module's own.
        """
        if attend is not None:
            return self._finished(*attend(self, x))
        if self.mixer is not None:
            return self._mixed(x, rope, self._place(attn_mask))
        if isinstance(attn_mask, Place):
            attn_mask = attn_mask.mask(x.dtype)
        if rope is not None:
            kwargs["rope"] = rope
        return super().forward(x, attn_mask=attn_mask, **kwargs)

    def projected(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values (..., heads, N, D), neither normalised nor rotated; keys may have fewer heads."""
        return tuple(self._by_head(part) for part in self._parts(x, slice(0, 3)))

    def prepared(
        self, x: torch.Tensor, rope: torch.Tensor | None, front: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values (..., heads, N, D) of tokens (..., N, C), as softmax attention takes them.

        Args:
            rope, front: See `turned`.
        """
        query, key, value = self.projected(x)
        return *self._turned_pair(query, key, rope, front), self._spread(value)

    def queries_and_keys(self, x: torch.Tensor, rope: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Like `prepared` without values, which a bare layer does not compute."""
        return self._turned_pair(*(self._by_head(part) for part in self._parts(x, slice(0, 2))), rope)

    def _raw_keys_and_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = (self._by_head(part) for part in self._parts(x, slice(1, 3)))
        return key, self._spread(value)

    def values(self, x: torch.Tensor) -> torch.Tensor:
        """Values of tokens (..., N, C) with heads side by side: see `in_heads`."""
        (value,) = self._parts(x, slice(2, 3))
        return value

    def in_heads(self, value: torch.Tensor) -> torch.Tensor:
        """Values with heads side by side, as (..., heads, N, D) with a head for each query head."""
        return self._spread(self._by_head(value))

    def _parts(self, x: torch.Tensor, parts: slice) -> tuple[torch.Tensor, ...]:
        """Some of queries, keys and values, in this order, with heads side by side (..., N, C)."""
        if self.qkv is None:
            return tuple(layer(x) for layer in (self.q_proj, self.k_proj, self.v_proj)[parts])
        width = self.num_heads * self.head_dim
        rows = slice(parts.start * width, parts.stop * width)
        out = self.qkv(x) if parts == slice(0, 3) else rows_of(self.qkv, x, rows)
        if getattr(self, "q_bias", None) is not None:  # EVA's queries and values have a bias, keys have none
            out = out + torch.cat((self.q_bias, self.k_bias, self.v_bias))[rows]
        return out.split(width, -1)

    def _by_head(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(-3, -2)

    def turned(
        self,
        x: torch.Tensor,
        norm: nn.Module,
        rope: torch.Tensor | None,
        positions: torch.Tensor | None = None,
        front: int | None = None,
    ) -> torch.Tensor:
        """Raw queries or keys (..., heads, N, D), normalised by `norm` and rotated, with a head for each query head.

        Args:
            rope: Sines and cosines of the tokens' rotary positions, (..., N - front, 2 D); None for none.
            positions: (N,), where in `rope` each token stands; None if tokens and `rope` have the same order.
            front: Number of tokens in front without a position; None for the host's number.
        """
        out = norm(x)
        if rope is not None:
            if positions is None:
                front, out = out.tensor_split([self.num_prefix_tokens if front is None else front], -2)
            else:
                front, rope = out[..., :0, :], rope[..., positions, :]
            half = getattr(self, "rotate_half", False)
            out = torch.cat([front, apply_rot_embed_cat(out, rope, half=half)], -2).type_as(x)
        return self._spread(out)

    def _turned_pair(
        self, query: torch.Tensor, key: torch.Tensor, rope: torch.Tensor | None, front: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.turned(query, self.q_norm, rope, front=front), self.turned(key, self.k_norm, rope, front=front)

    def _spread(self, x: torch.Tensor) -> torch.Tensor:
        """Repeat heads of keys or values that several query heads share."""
        return x if x.shape[-3] == self.num_heads else x.repeat_interleave(self.num_heads // x.shape[-3], -3)

    def _finished(self, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The rest of the module after attention, for heads side by side and the input of the same tokens."""
        out = self.norm(out)
        if getattr(self, "gate", None) is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def _place(self, given: Any) -> Place:
        """Where the tokens stand.

        Raises:
            InputError: A mask was given, or nothing, and the mixer needs a grid.
        """
        if given is None and self.mixer.needs_grid:
            raise InputError(
                f"the block of layer {self.mixer.host.layer} has the mixer {self.mixer.name!r} and needs the state "
                f"beside its input: call it as block(x, state) with model.begin(image), or call the whole model"
            )
        if given is None:
            return Place(None)
        if not isinstance(given, Place):
            raise InputError(f"attention with the mixer {self.mixer.name!r} takes no mask")
        return given

    def matrix(self, x: torch.Tensor, rope: torch.Tensor | None, place: Place) -> torch.Tensor:
        """The weights (B, heads, N, N) of the mixer for the module's input (B, N, C): see `Mixer.matrix`."""
        return self.mixer.matrix(*self._for_mixer(x, rope, self._place(place)))

    def _mixed(self, x: torch.Tensor, rope: torch.Tensor | None, place: Place) -> torch.Tensor:
        out = self.mixer(*self._for_mixer(x, rope, place)).transpose(1, 2).flatten(2)
        return self._finished(out, x)

    def _for_mixer(
        self, x: torch.Tensor, rope: torch.Tensor | None, place: Place
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Place]:
        query, raw_key, value = self.projected(x)
        place = place._replace(
            x=x,
            raw_key=raw_key,
            keyed=lambda key, positions: self.turned(key, self.k_norm, rope, positions),
            projected=self._raw_keys_and_values,
        )
        return *self._turned_pair(query, raw_key, rope), self._spread(value), place


class HostedAttention(_Hosted, Attention):
    """timm's attention, with a place for a mixer."""


class HostedEvaAttention(_Hosted, EvaAttention):
    """timm's attention of EVA-02, with rotary positions and a place for a mixer."""


class HostedAttentionRope(_Hosted, AttentionRope):
    """timm's attention with rotary positions, and a place for a mixer."""


class _HostedBlock(nn.Module):
    def forward(self, x: torch.Tensor, state: Any = None, **kwargs: Any) -> torch.Tensor:
        """Tokens (B, T, C) to the tokens that the reducer leaves.

        Args:
            state: A `_tokens.State`, whose reducer runs the block; None for timm's unchanged block.
            **kwargs: Arguments of timm's block, without a state only.
        """
        if state is None:
            return super().forward(x, **kwargs)
        x = state.reducer(self, x, state)
        state.depth += 1
        return x

    def placed(self, x: torch.Tensor, place: Place, rope: torch.Tensor | None = None) -> torch.Tensor:
        """timm's block on tokens (B, T, C) that stand at `place`."""
        more = {} if rope is None else {"rope": rope}
        return super().forward(x, attn_mask=place, **more)


class HostedBlock(_HostedBlock, Block):
    """timm's block, which a reducer can run."""

    def attended(self, x: torch.Tensor, attend: Attend) -> torch.Tensor:
        """The residual of the block's attention, with its inner part replaced."""
        return self.drop_path1(self.ls1(self.attn(self.norm1(x), attend=attend)))

    def widened(self, x: torch.Tensor) -> torch.Tensor:
        """The rest of the block, after attention."""
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class HostedEvaBlock(_HostedBlock, EvaBlock):
    """timm's block of EVA-02, which a reducer can run."""

    def attended(self, x: torch.Tensor, attend: Attend) -> torch.Tensor:
        """The residual of the block's attention, with its inner part replaced."""
        return self.drop_path1(self._scaled(self.gamma_1, self.attn(self.norm1(x), attend=attend)))

    def widened(self, x: torch.Tensor) -> torch.Tensor:
        """The rest of the block, after attention."""
        return x + self.drop_path2(self._scaled(self.gamma_2, self.mlp(self.norm2(x))))

    @staticmethod
    def _scaled(gamma: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
        return x if gamma is None else gamma * x


_BLOCKS = {Block: HostedBlock, EvaBlock: HostedEvaBlock}
_ATTENTION = {Attention: HostedAttention, EvaAttention: HostedEvaAttention, AttentionRope: HostedAttentionRope}


def _known(classes: dict[type, type], module: nn.Module | None) -> type | None:
    return next((kind for kind, made in classes.items() if type(module) in (kind, made)), None)


def is_plain(block: nn.Module) -> bool:
    """Whether a block is timm's plain block (of a ViT or of EVA) with plain attention, which can become a host."""
    attn = getattr(block, "attn", None)
    return _known(_BLOCKS, block) is not None and _known(_ATTENTION, attn) is not None


def hosted(block: nn.Module) -> nn.Module:
    """Change the classes of a plain block and of its attention in place, and return the block. Nothing else changes."""
    block.__class__ = _BLOCKS[_known(_BLOCKS, block)]
    block.attn.__class__ = _ATTENTION[_known(_ATTENTION, block.attn)]
    if not hasattr(block.attn, "mixer"):
        block.attn.register_module("mixer", None)
    return block


def plain(block: nn.Module) -> nn.Module:
    """Undo `hosted`: give a block and its attention timm's classes again, and remove the mixer."""
    block.__class__ = _known(_BLOCKS, block)
    block.attn.__class__ = _known(_ATTENTION, block.attn)
    block.attn._modules.pop("mixer", None)
    return block
