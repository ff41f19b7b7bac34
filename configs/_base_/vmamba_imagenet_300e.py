"""ImageNet-1k from scratch, as the authors of VMamba and Swin train: 1024 images per step, 300 epochs.

8 processes of batch 128, AdamW at 1e-3, 20 epochs of warm-up, cosine, mixup and CutMix. The other variants are
`model.backbone.name` vmamba_tiny_s2l5, vmamba_small_s1l20 and vmamba_base_s1l20, at drop paths 0.2, 0.3 and 0.5, and
vmamba_v0_tiny, _small and _base, at 0.2, 0.3 and 0.6. A moving average of the weights is validated and saved; a short
run should turn it off: `--cfg-options custom_hooks=[]`. On fewer GPUs set `optim_wrapper.accumulative_counts`, or
`auto_scale_lr.enable=True`. Deviation: decays and steps of the scans (A_logs, Ds, dt_projs_bias) have no weight decay.
"""

_base_ = "imagenet_300e.py"
train_dataloader = dict(dataset=dict(transform=dict(interpolation="bicubic", color_jitter=0.4)))
_free_ = dict(decay_mult=0.0)
optim_wrapper = dict(
    paramwise_cfg=dict(_delete_=True, flat_decay_mult=0.0, custom_keys=dict(A_logs=_free_, dt_projs_bias=_free_))
)
train_cfg = dict(max_epochs=300)
custom_hooks = [dict(type="EMAHook", ema_type="ExponentialMovingAverage", momentum=1e-4)]
