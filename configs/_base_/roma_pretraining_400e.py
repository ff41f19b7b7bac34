"""RoMA's pretraining: AdamW at 1.5e-4 for 256 images a step, 40 epochs of warm-up, cosine to 400.

Images may be anywhere under `data/unlabelled`; labels are not read, and nothing is validated. Tensors of one dimension
and the decays A_log have no weight decay.
"""

_base_ = "classification_runtime.py"
data_root = "data/unlabelled"
train_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type="RotatedImages",
        data_root=data_root,
        split="",
        transform=dict(
            input_size=192, is_training=True, interpolation="bicubic", scale=(0.2, 1.0), hflip=0.5, color_jitter=None
        ),
        rotation=dict(patch_size=16, windows=(96, 64, 32), degrees=45.0),
    ),
)
model = dict(type="RoMAPretraining", cluster=4, block=6, block_weight=0.1, decoder_dim=512)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=6e-4, betas=(0.9, 0.95), weight_decay=0.05),
    paramwise_cfg=dict(flat_decay_mult=0.0, custom_keys=dict(A_log=dict(decay_mult=0.0))),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, begin=0, end=40, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=0.0, by_epoch=True, begin=40, end=400, convert_to_iter_based=True),
]
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=400)
default_hooks = dict(checkpoint=dict(interval=10, save_best=None))
auto_scale_lr = dict(enable=False, base_batch_size=1024)
