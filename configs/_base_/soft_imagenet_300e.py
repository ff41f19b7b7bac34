"""ImageNet-1k from scratch, as SOFT's authors train: AdamW, 10 epochs of warm-up, cosine to 5e-5, 300 epochs.

8 processes; the learning rate is 1e-3 for tiny and small (batch 128 per process), 3.5e-4 to 4e-4 for medium, 3.3e-4 for
large and 2.7e-4 for huge (batch 32 per process).

The drop path rate is 0.1, in the first three stages the rate of dropout. A moving average of the weights is validated
and saved, with the authors' decay of 0.99996; a short run should turn it off: `--cfg-options custom_hooks=[]`. In mixed
precision: `--amp bf16` or fp16. The operator itself stays in float32.
"""

_base_ = "imagenet_300e.py"
model = dict(backbone=dict(drop_path_rate=0.1))
optim_wrapper = dict(clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, begin=0, end=10, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=5e-5, by_epoch=True, begin=10, end=300, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=300)
custom_hooks = [dict(type="EMAHook", ema_type="ExponentialMovingAverage", momentum=4e-5)]
