"""ImageNet-1k at 384x384, from ImageNet-22k, as the authors train (classification/configs/dinat_large_384.yml).

8 processes of batch 64, AdamW, 30 epochs with a linearly falling rate, no mixup, no mixed precision.
"""

_base_ = ["classification_runtime.py", "imagenet.py"]
model = dict(
    type="Classifier",
    backbone=dict(num_classes=1000, pretrained=True, drop_path_rate=0.35),
    loss=dict(type="LabelSmoothingCrossEntropy", smoothing=0.1),
)
train_dataloader = dict(batch_size=64, dataset=dict(transform=dict(input_size=384)))
val_dataloader = dict(batch_size=64, dataset=dict(transform=dict(input_size=384, crop_pct=1.0)))
test_dataloader = val_dataloader
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=5e-5, betas=(0.9, 0.999), weight_decay=1e-10),
    paramwise_cfg=dict(flat_decay_mult=0.0, custom_keys=dict(rpb=dict(decay_mult=0.0))),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = dict(
    type="PolyLR", power=1.0, eta_min=5e-6, by_epoch=True, begin=0, end=30, convert_to_iter_based=True
)
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=30, val_interval=1)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
auto_scale_lr = dict(enable=False, base_batch_size=512)
