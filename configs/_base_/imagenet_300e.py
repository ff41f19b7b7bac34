"""ImageNet-1k from scratch, as the authors train every variant (their classification/configs and train.py).

8 processes of batch 128, AdamW, 20 epochs of warm-up, cosine to 300, 10 more at the lowest rate, mixup and CutMix, in
mixed precision (`--amp fp16`). Deviations: the biases rpb have no weight decay, which the authors intended but did not
achieve; a moving average of the weights is validated and saved, which they do only for isotropic base models. It moves
by 2e-4 per iteration, so a short run should turn it off: `--cfg-options custom_hooks=[]`. On fewer GPUs, set
`optim_wrapper.accumulative_counts` so that a step has 1024 images, or `auto_scale_lr.enable=True` to scale the learning
rate.
"""

_base_ = ["classification_runtime.py", "imagenet.py"]
model = dict(
    type="Classifier",
    backbone=dict(num_classes=1000),
    loss=dict(type="SoftTargetCrossEntropy"),
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1),
)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(flat_decay_mult=0.0, custom_keys=dict(rpb=dict(decay_mult=0.0))),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, begin=0, end=20, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=5e-6, by_epoch=True, begin=20, end=300, convert_to_iter_based=True),
]
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=310, val_interval=1)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
custom_hooks = [dict(type="EMAHook", ema_type="ExponentialMovingAverage", momentum=2e-4)]
auto_scale_lr = dict(enable=False, base_batch_size=1024)
