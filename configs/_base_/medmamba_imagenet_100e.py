"""ImageNet-1k as MedMamba's authors train on their data: Adam at 1e-4, 100 epochs, batch 32, only crops and flips.

Pixels are scaled to -1 to 1; in a test, images are resized to 224 x 224, whatever their proportions. (The authors
publish no ImageNet results.) Other folders of classes: `data_root`, `model.backbone.num_classes`.
"""

_base_ = ["classification_runtime.py", "imagenet.py"]
_half_ = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
model = dict(
    type="Classifier", backbone=dict(num_classes=1000), loss=dict(type="LabelSmoothingCrossEntropy", smoothing=0.0)
)
train_dataloader = dict(
    batch_size=32,
    dataset=dict(
        transform=dict(
            _delete_=True, input_size=224, is_training=True, interpolation="bilinear", color_jitter=None, **_half_
        )
    ),
)
val_dataloader = dict(
    dataset=dict(transform=dict(crop_pct=1.0, crop_mode="squash", interpolation="bilinear", **_half_)),
)
test_dataloader = val_dataloader
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="Adam", lr=1e-4))
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=100, val_interval=1)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
