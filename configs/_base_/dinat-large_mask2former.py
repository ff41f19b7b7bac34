"""The common part of the authors' Mask2Former configs: DiNAT-Large, kernel 11, ImageNet-22k, interpolated biases.

From mask2former/configs of their repository: no mixed precision, a tenth of the learning rate in the backbone, no
weight decay on norms and embeddings. As in all our recipes, the biases rpb have no weight decay here either.
"""

dinat_large = dict(
    type="TerrazzoBackbone",
    name="dinat_large_384_11x11.in22k_interpolated",
    pretrained=True,
    drop_path_rate=0.3,
    dilations=[[1, 14, 1], [1, 4, 1, 7], [1, 2, 1, 3] * 4 + [1, 3], [1] * 5],
)
dinat_large_channels = [192, 384, 768, 1536]
# mmengine takes the longest key that occurs in a parameter's name: the norms' keys must be longer than "backbone".
dinat_large_norms = [
    "stem.norm",
    "downsample.norm",
    *(f"norm{i}.{kind}" for i in range(4) for kind in ("weight", "bias")),
]
dinat_large_keys = dict(
    backbone=dict(lr_mult=0.1),
    **{key: dict(lr_mult=0.1, decay_mult=0.0) for key in (*dinat_large_norms, ".attn.rpb")},
    **{key: dict(decay_mult=0.0) for key in ("query_embed", "query_feat", "level_embed")},
)
