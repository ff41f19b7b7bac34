"""AdamW for 160000 iterations of a segmentor, 8 processes of batch 2, as NAT, DiNAT and Swin train on ADE20K."""

_base_ = ["mmseg::_base_/schedules/schedule_160k.py", "mmseg::_base_/default_runtime.py"]
optimizer = dict(_delete_=True, type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01)
optim_wrapper = dict(
    optimizer=optimizer,
    paramwise_cfg=dict(custom_keys=dict(rpb=dict(decay_mult=0.0), norm=dict(decay_mult=0.0))),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=1500, end=160000),
]
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2, save_best="mIoU"))
auto_scale_lr = dict(enable=False, base_batch_size=16)
