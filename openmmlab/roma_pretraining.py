"""RoMA's autoregressive pretraining: predict the next cluster of patches from all earlier clusters."""

import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from timm.layers import Mlp, trunc_normal_
from torch import Tensor, nn

from terrazzo.backbones._layers import patch_conv, whole_patches
from terrazzo.backbones.roma import Block, RoMA, init_blocks, init_patches
from terrazzo.errors import InputError
from terrazzo.openmmlab._timm import create_model

LEVELS = 4  # maps of the encoder, one for each block of the decoder
HEAD_DIM = 64


def sines(side: int, dim: int) -> Tensor:
    """MAE's fixed embedding of the positions of a square, (1, side, side, dim): columns first, then rows."""
    rates = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side)[:, None] * rates
    along = torch.cat([angles.sin(), angles.cos()], 1).float()  # side dim/2
    rows, columns = (x.expand(side, side, -1) for x in (along[:, None], along[None]))
    return torch.cat([columns, rows], -1)[None]


def in_clusters(x: Tensor, side: int) -> Tensor:
    """(B, H, W, C) to (B, H W, C): squares of `side` x `side` tokens one after another, all by rows."""
    x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side))
    return x.transpose(2, 3).flatten(1, 4)


class PatchStem(nn.Module):
    """Patches with a fixed position embedding, which fine-tuning starts from."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, img_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = patch_conv(in_chans, dim, patch_size)
        self.register_buffer("pos_embed", sines(img_size // patch_size, dim).flatten(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, img_size, img_size) to (B, H, W, C)."""
        x = self.proj(whole_patches(x, self.patch_size)).permute(0, 2, 3, 1)
        return x + self.pos_embed.view(1, *x.shape[1:])


class Encoder(nn.Module):
    """A RoMA before fine-tuning: one direction, no class token. Parameters have the names of `RoMA`."""

    def __init__(self, model: RoMA, img_size: int):
        """Args:
        model: a RoMA of the wanted sizes; without data it may be on the meta device.
        """
        super().__init__()
        patch_size = model.stem.proj.stride[0]
        self.stem = PatchStem(model.in_chans, model.num_features, patch_size, img_size)
        self.blocks = nn.ModuleList(Block(model.num_features, 1, 0.0) for _ in model.blocks)
        init_blocks(self.blocks)
        init_patches(self.stem.proj)


class DecoderBlock(nn.Module):
    """Queries attend to the encoder's features, then an MLP follows."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm_query, self.norm_latent = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, query: Tensor, latent: Tensor, mask: Tensor) -> Tensor:
        parts = self.q(self.norm_query(query)), *self.kv(self.norm_latent(latent)).chunk(2, -1)
        q, k, v = (x.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for x in parts)  # B heads L HEAD_DIM
        out = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        query = query + self.proj(out)
        return query + self.mlp(self.norm(query))


@MODELS.register_module()
class RoMAPretraining(BaseModel):
    """Autoregressive pretraining of RoMA on images without labels.

    Tokens are read in clusters, cluster after cluster. A query for each token of cluster k + 1 attends to the encoder's
    clusters up to k, and predicts the token's pixels, normalised within their patch. The encoder's image has one
    rotated window (`RotatedImages`), and the target is the image without the rotation. A learned vector marks the
    window's tokens.

    Source: RoMA, arXiv 2503.10392, sections 3.2 and 3.3; ARM, arXiv 2406.07537. This follows the paper's intent. The
    published code differs. Its target is the rotated image. It divides the window's offset by the patch size twice, so
    the mark begins at the first token, and the mark is on a diagonal. Its coarser scale compares a prediction in one
    order with a target in another order. In the same order, the coarser scale is the same error over the tokens outside
    the first large block; this is computed here.

    `TerrazzoBackbone` and `Classifier` take a pretrained file as `checkpoint`: all four directions start from its
    single direction.

    Args:
        backbone: `name` of a RoMA, `img_size`, and other arguments of the model.
        cluster: side of a cluster, in tokens.
        block: side of a block of the coarser scale, in tokens.
        block_weight: weight of the coarser scale in the loss.
        decoder_dim: width of the decoder, a multiple of 64.
        data_preprocessor: mmengine's; by default it only moves the batch to the device.
        init_cfg: mmengine's; `load_from` names a model to continue from.

    Raises:
        InputError: The model is not a RoMA, or its images do not divide into patches, clusters and blocks.
    """

    def __init__(
        self,
        backbone: dict,
        cluster: int = 4,
        block: int = 6,
        block_weight: float = 0.1,
        decoder_dim: int = 512,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ):
        super().__init__(data_preprocessor, init_cfg)
        options = {key: value for key, value in backbone.items() if key not in ("_scope_", "name")}
        with torch.device("meta"):
            model = create_model(backbone.get("name", ""), num_classes=0, **options)
        if not isinstance(model, RoMA):
            raise InputError(
                f"RoMAPretraining.backbone is {backbone.get('name')!r}; it must be a RoMA, such as roma_base"
            )
        img_size, patch_size = options.get("img_size", 224), model.stem.proj.stride[0]
        side, depth, width = img_size // patch_size, len(model.blocks), model.num_features
        if img_size % patch_size or side % cluster or side % block or not cluster <= block < side:
            raise InputError(
                f"img_size {img_size} is {img_size / patch_size:g} patches per side; it must be a multiple of the "
                f"cluster's {cluster} and of the block's {block}, with cluster <= block < side"
            )
        if depth % 6 or decoder_dim % HEAD_DIM:
            raise InputError(
                f"depth must be a multiple of 6 and decoder_dim of {HEAD_DIM}, got {depth} and {decoder_dim}"
            )
        self.img_size, self.patch_size, self.cluster, self.block_weight = img_size, patch_size, cluster, block_weight
        self.taps = [depth // 2 + i * depth // 6 - 1 for i in range(LEVELS)]
        self.backbone = Encoder(model, img_size)
        self.angle_embed = nn.Parameter(torch.empty(width))
        self.tap_norms = nn.ModuleList(nn.LayerNorm(width) for _ in self.taps)
        self.to_decoder = nn.Linear(LEVELS * width, LEVELS * decoder_dim)
        self.query = nn.Parameter(torch.empty(decoder_dim))
        self.decoder = nn.ModuleList(DecoderBlock(decoder_dim) for _ in self.taps)
        self.norm = nn.LayerNorm(decoder_dim)
        self.predict = nn.Linear(decoder_dim, model.in_chans * patch_size**2)
        tokens = cluster**2
        segment = torch.arange(side**2 - tokens) // tokens
        grid = torch.arange(side)
        outside = (grid[:, None] >= block) | (grid >= block)
        fixed = dict(
            positions=in_clusters(sines(side, decoder_dim), cluster)[:, tokens:],
            mask=segment[:, None] >= segment,
            outside=in_clusters(outside[None, ..., None], cluster)[0, tokens:, 0],
        )
        for name, value in fixed.items():
            self.register_buffer(name, value, persistent=False)
        for parameter in (self.angle_embed, self.query):
            trunc_normal_(parameter, std=0.02)
        for part in (self.to_decoder, self.predict):
            nn.init.zeros_(part.bias)
        for layer in self.decoder.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(part.bias)

    def forward(
        self,
        inputs: Tensor,
        targets: Tensor | None = None,
        window: Tensor | None = None,
        img_path: list[str] | None = None,
        mode: str = "tensor",
    ) -> Tensor | dict[str, Tensor]:
        """Predicts patches, or compares them.

        Args:
            inputs: B 3 H W, the encoder's images.
            targets: the same images before the rotation; by default `inputs`.
            window: B x 3, top, left and side of the window, in patches; None for no window.
            img_path: the files of the images, which the data loader brings for error messages.
            mode: "tensor" gives the predicted patches of all clusters but the first, B x tokens x pixels, rows first,
                channels last, in the order of `in_clusters`; "loss" the mean squared errors.
        """
        if inputs.shape[-2:] != (self.img_size, self.img_size):
            raise InputError(f"images are {tuple(inputs.shape[-2:])}; the config's img_size is {self.img_size}")
        predicted = self._decode(self._encode(inputs, window))
        if mode != "loss":
            return predicted
        patches = self._normalised_patches(inputs if targets is None else targets)
        error = (predicted - in_clusters(patches, self.cluster)[:, self.cluster**2 :]).square()
        return {"loss_tokens": error.mean(), "loss_blocks": self.block_weight * error[:, self.outside].mean()}

    def init_weights(self) -> None:
        """Leaves the weights as they are; mmengine would initialise them again."""
        self._is_init = True

    def _encode(self, inputs: Tensor, window: Tensor | None) -> Tensor:
        """The features that each decoder block attends to, (B, tokens, decoder_dim, LEVELS)."""
        x = self.backbone.stem(inputs)
        if window is not None:
            place = torch.arange(x.shape[1], device=x.device)
            top, left, side = window.unsqueeze(-1).unbind(1)  # B 1
            rows, columns = ((place >= first) & (place < first + side) for first in (top, left))
            x = x + (rows[:, :, None] & columns[:, None]).unsqueeze(-1) * self.angle_embed
        x = in_clusters(x, self.cluster)[:, : -(self.cluster**2)]
        taps = []
        for i, block in enumerate(self.backbone.blocks):
            x = block(x)
            taps += [norm(x) for tap, norm in zip(self.taps, self.tap_norms) if tap == i]
        return self.to_decoder(torch.cat(taps, -1)).unflatten(-1, (-1, LEVELS))

    def _decode(self, latent: Tensor) -> Tensor:
        x = (self.query + self.positions).expand(len(latent), -1, -1)
        for i, block in enumerate(self.decoder):
            x = block(x, latent[..., i], self.mask)
        return self.predict(self.norm(x))

    def _normalised_patches(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, H / patch, W / patch, pixels), each with mean 0 and variance 1."""
        size = self.patch_size
        x = x.unflatten(3, (-1, size)).unflatten(2, (-1, size)).permute(0, 2, 4, 3, 5, 1).flatten(3)
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt()
