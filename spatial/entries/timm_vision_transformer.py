"""timm's plain ViT. Every rank has the tokens in front, and the tokens of its rows."""

import torch
from torch import nn

from terrazzo.errors import InputError
from terrazzo.spatial._entries import OWN, Entry
from terrazzo.spatial._part import Part
from terrazzo.spatial._tokens import positions


def _check(model: nn.Module) -> str | None:
    if model.attn_pool is not None or model.global_pool not in ("", "token"):
        return f"pools all tokens ('{model.global_pool}'): create it with global_pool='token', or for features"
    return None if isinstance(model.patch_drop, nn.Identity) else "drops patches"


def _positions(part: Part, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Tokens in front, own tokens, and their positions."""
    level = part.tokens
    if level is None:
        raise InputError(f"{part.at} has a stem that is not known to make tokens of a map")
    part.prefix = model.num_prefix_tokens
    x = x.flatten(1, -2)
    front = [token.expand(x.shape[0], -1, -1) for token in (model.cls_token, model.reg_token) if token is not None]
    if model.pos_embed is None:
        return torch.cat([*front, x], 1)
    before = 0 if model.no_embed_class else model.num_prefix_tokens
    learned, grid = model.pos_embed[:, before:], tuple(model.patch_embed.grid_size)
    size = (level.height, level.width)
    if grid != size and not model.dynamic_img_size:
        raise InputError(
            f"{part.at} has positions for {grid[0]}x{grid[1]} patches, and the image has {size[0]}x{size[1]}: create "
            "the model with dynamic_img_size=True"
        )
    x = x + positions(part, learned, grid)
    if not front:
        return model.pos_drop(x)
    tokens = torch.cat(front, 1)
    return model.pos_drop(torch.cat([tokens + model.pos_embed[:, :before] if before else tokens, x], 1))


ENTRIES = {
    "VisionTransformer": Entry(_positions, method="_pos_embed", check=_check),
    "Block": OWN,
}
