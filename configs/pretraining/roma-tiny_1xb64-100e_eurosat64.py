"""RoMA-tiny by autoregression on EuroSAT's training images, without labels: one process, batch 64, 100 epochs.

Images of 64x64 in patches of 8: 8x8 tokens, clusters of 2x2, the coarser scale in blocks of 4x4; windows of 32, 24 and
16 pixels are rotated. So a cluster is a quarter of a side and a block half a side; in the paper they are a third and
half of 192 pixels.
"""

_base_ = "../_base_/roma_pretraining_400e.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
data_root = "data/eurosat64"
train_dataloader = dict(
    batch_size=64,
    num_workers=2,
    dataset=dict(
        data_root=data_root,
        split="train",
        transform=dict(input_size=64, scale=(0.5, 1.0), vflip=0.5),
        rotation=dict(patch_size=8, windows=(32, 24, 16)),
    ),
)
model = dict(backbone=dict(name="roma_tiny", img_size=64, patch_size=8), cluster=2, block=4, decoder_dim=256)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, begin=0, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=0.0, by_epoch=True, begin=5, end=100, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=100)
