"""A stage of a conversion on images without labels: AdamW without weight decay, cosine, 2000 iterations.

The teacher's weights are timm's; `model.teacher.checkpoint=FILE` names other weights. All layers are converted;
`model.convert.layers=[0,1,2]` converts some. Images may be anywhere under the folders, several of them, inside or
outside of `data_root`: `train_dataloader.dataset.folders=[a,b,/data/c]`.
"""

_base_ = "classification_runtime.py"
data_root = "data/unlabelled"
train_dataloader = dict(
    batch_size=16,
    num_workers=2,
    persistent_workers=True,
    drop_last=True,
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        type="Pictures",
        data_root=data_root,
        folders="train",
        transform=dict(
            input_size=224, is_training=True, interpolation="bicubic", scale=(0.35, 1.0), hflip=0.5, color_jitter=None
        ),
    ),
)
val_dataloader = dict(
    batch_size=16,
    num_workers=2,
    persistent_workers=True,
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="Pictures",
        data_root=data_root,
        folders="val",
        transform=dict(input_size=224, crop_pct=1.0, interpolation="bicubic"),
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="Fidelity")
test_evaluator = val_evaluator
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-2, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=False, begin=50, end=2000),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=2000, val_interval=500)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
log_processor = dict(by_epoch=False)
default_hooks = dict(
    logger=dict(interval=20, log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=500, save_best="teacher/kl", rule="less"),
)
auto_scale_lr = dict(enable=False, base_batch_size=16)
