"""ImageNet-1k from scratch, as MambaVision's authors train: 4096 images per step, LAMB at 5e-3, 20 epochs of warm-up.

Published settings of the variants: weight decay from 0.05 (T) to 0.12 (L2), drop path 0.2 (T, T2, S) and 0.3 (B, L,
L2), 35 epochs of warm-up (B). Deviations: after a quarter of the run, the authors also train towards the moving average
of the weights (MESA), which is not offered here; A_log and D have no weight decay, which they intended but did not
achieve. A short run should turn the average off: `--cfg-options custom_hooks=[]`. In mixed precision: `--amp fp16`. On
fewer GPUs set `optim_wrapper.accumulative_counts`, or `auto_scale_lr.enable=True`.
"""

_base_ = "imagenet_300e.py"
val_dataloader = dict(dataset=dict(transform=dict(crop_pct=1.0)))
test_dataloader = val_dataloader
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="Lamb", lr=5e-3, weight_decay=0.05),
    paramwise_cfg=dict(_delete_=True, flat_decay_mult=0.0, custom_keys=dict(A_log=dict(decay_mult=0.0))),
)
auto_scale_lr = dict(base_batch_size=4096)
