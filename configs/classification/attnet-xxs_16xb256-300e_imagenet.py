"""AttNet-XXS on ImageNet-1k, 224x224: 16 processes of batch 256, 300 epochs, the authors' recipe."""

_base_ = "../_base_/attnet_imagenet_300e.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(backbone=dict(name="attnet_xxs", drop_path_rate=0.0), mixup=dict(mixup_alpha=0.05))
train_dataloader = dict(batch_size=256, dataset=dict(transform=dict(auto_augment=None, color_jitter=0.0, re_prob=0.0)))
optim_wrapper = dict(optimizer=dict(weight_decay=0.015))
