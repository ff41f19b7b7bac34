"""ImageNet-1k from DeiT's weights, as MCTF's authors fine-tune: 1024 images per step, token-reduction consistency.

8 processes of batch 128, AdamW at 3e-5, cosine to 1e-6 in 30 epochs and 10 more at that rate, no warm-up, no mixup, no
moving mean. Another schedule of merging: `--cfg-options model.backbone.name=mctf_deit_small_fast
model.recipe.r_max=0.15`. Deviation: an epoch shows each image once, while the authors' epoch shows a third of the
images three times (repeated augmentation). On fewer GPUs set `optim_wrapper.accumulative_counts`, or
`auto_scale_lr.enable=True`. In mixed precision, as the authors train: `--amp fp16`.
"""

_base_ = ["classification_runtime.py", "imagenet.py"]
model = dict(
    type="Classifier",
    backbone=dict(num_classes=1000, pretrained=True, drop_path_rate=0.1),
    loss=dict(type="LabelSmoothingCrossEntropy", smoothing=0.1),
    recipe=dict(type="TokenConsistency", r_max=8, weight=3.0, confidence=0.4),
)
train_dataloader = dict(dataset=dict(transform=dict(interpolation="bicubic")))
_free_ = dict(decay_mult=0.0)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=3e-5, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(flat_decay_mult=0.0, custom_keys=dict(cls_token=_free_, pos_embed=_free_)),
)
param_scheduler = dict(
    type="CosineAnnealingLR", eta_min=1e-6, by_epoch=True, begin=0, end=30, convert_to_iter_based=True
)
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=40, val_interval=1)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
auto_scale_lr = dict(enable=False, base_batch_size=1024)
