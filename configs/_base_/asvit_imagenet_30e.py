"""ImageNet-1k from a trained ViT, also the teacher, as AS-ViT's authors intend to fine-tune: 512 images per step.

4 processes of batch 128, AdamW at 2e-5, cosine to 2e-6 in 30 epochs, no warm-up, mixup and CutMix, no drop path (the
authors' 0.1 never reaches their model). Another budget: `--cfg-options model.recipe.budget=0.5`. A moving average of
the weights is validated and saved; a short run should turn it off: `--cfg-options custom_hooks=[]`. Deviations: the
authors' published code does not run (see `terrazzo/openmmlab/token_budget.py`); an epoch shows each image once, while
their epoch shows a third of the images three times (repeated augmentation); in their validation the batch decides the
number of tokens. On fewer GPUs set `optim_wrapper.accumulative_counts`, or `auto_scale_lr.enable=True`. In mixed
precision: `--amp fp16`.
"""

_base_ = ["classification_runtime.py", "imagenet.py"]
model = dict(
    type="Classifier",
    backbone=dict(num_classes=1000),
    loss=dict(type="SoftTargetCrossEntropy"),
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1),
    recipe=dict(type="TokenBudget", budget=0.65, weight=2.0, distillation=0.5),
)
train_dataloader = dict(dataset=dict(transform=dict(interpolation="bicubic")))
_free_ = dict(decay_mult=0.0)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=2e-5, betas=(0.9, 0.999), weight_decay=1e-6),
    paramwise_cfg=dict(flat_decay_mult=0.0, custom_keys=dict(cls_token=_free_, pos_embed=_free_, thresholds=_free_)),
)
param_scheduler = dict(
    type="CosineAnnealingLR", eta_min=2e-6, by_epoch=True, begin=0, end=30, convert_to_iter_based=True
)
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=30, val_interval=1)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
custom_hooks = [dict(type="EMAHook", ema_type="ExponentialMovingAverage", momentum=4e-5)]
auto_scale_lr = dict(enable=False, base_batch_size=512)
