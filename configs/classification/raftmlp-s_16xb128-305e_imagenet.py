"""RaftMLP-S on ImageNet-1k, 224x224: 16 processes of batch 128, 305 epochs, the authors' recipe.

AdamW at 2e-3, 5 epochs of warm-up, cosine, in float32. The other variants are `model.backbone.name` raftmlp_m and
raftmlp_l. On fewer GPUs set `optim_wrapper.accumulative_counts`, or `auto_scale_lr.enable=True`.
"""

_base_ = "../_base_/imagenet_300e.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(backbone=dict(name="raftmlp_s", drop_path_rate=0.1))
train_dataloader = dict(dataset=dict(transform=dict(interpolation="bicubic", auto_augment=None, color_jitter=0.4)))
optim_wrapper = dict(optimizer=dict(lr=2e-3), paramwise_cfg=dict(_delete_=True, flat_decay_mult=0.0), clip_grad=None)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, begin=0, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, begin=5, end=305, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=305)
custom_hooks = []
auto_scale_lr = dict(base_batch_size=2048)
