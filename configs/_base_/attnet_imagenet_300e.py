"""ImageNet-1k from scratch, as AttNet's authors train: 4096 images per step, AdamW at 4e-3, 5 warm-up epochs, cosine.

This is the recipe for T2 to T4. The authors' run files have these settings:

    variant   drop path   weight decay   mixup   RandAugment   erasing   colour jitter
    XXS       0           0.015          0.05    none          0         0
    XS        0.02        0.025          0.1     none          0         0
    S         0.05        0.025          0.3     m9            0         0.1
    T1        0.1         0.025          0.6     m9            0.15      0.2
    T2        0.2         0.05           0.8     m9            0.25      0.4
    T3, T4    0.4, 0.5    0.05           0.8     m9            0.25      0.4

(T4 at 384 x 384.) Deviation: an epoch shows each image once, while the authors' epoch shows a third of the images three
times (repeated augmentation). A moving average of the weights is validated and saved; a short run should turn it off:
`--cfg-options custom_hooks=[]`. On fewer GPUs set `optim_wrapper.accumulative_counts`, or `auto_scale_lr.enable=True`.
In mixed precision: `--amp fp16` or bf16.
"""

_base_ = "imagenet_300e.py"
train_dataloader = dict(dataset=dict(transform=dict(interpolation="bicubic", color_jitter=0.4)))
optim_wrapper = dict(
    optimizer=dict(lr=4e-3),
    paramwise_cfg=dict(_delete_=True, flat_decay_mult=0.0),
    clip_grad=None,
)
param_scheduler = [
    dict(type="LinearLR", start_factor=2.5e-4, by_epoch=True, begin=0, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-6, by_epoch=True, begin=5, end=300, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=300)
custom_hooks = [dict(type="EMAHook", ema_type="ExponentialMovingAverage", momentum=5e-5)]
auto_scale_lr = dict(base_batch_size=4096)
