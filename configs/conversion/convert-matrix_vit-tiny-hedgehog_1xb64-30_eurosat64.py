"""ViT-tiny on EuroSAT to Hedgehog, first stage: matrices like softmax attention's, 30 iterations of 64 images.

The teacher is what `teacher_vit-tiny_1xb64-10e_eurosat64` trained: set `model.teacher.checkpoint` to its file.
The first two stages read no labels, nor does the third with `model.stage.task_weight=0`.
"""

_base_ = ["../_base_/classification_runtime.py", "../_base_/eurosat64.py"]
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    type="AttentionConversion",
    teacher=dict(
        name="vit_tiny_patch16_224",
        img_size=64,
        patch_size=8,
        num_classes=10,
        checkpoint="work_dirs/teacher_vit-tiny_1xb64-10e_eurosat64/epoch_10.pth",
    ),
    convert=dict(mixer="hedgehog", layers="all"),
    stage=dict(type="matrix"),
)
train_dataloader = dict(sampler=dict(type="InfiniteSampler"))
val_evaluator = [dict(type="Fidelity"), dict(type="ClassificationAccuracy")]
test_evaluator = val_evaluator
optim_wrapper = dict(
    type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.0), clip_grad=dict(max_norm=5.0)
)
param_scheduler = dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=False, begin=0, end=30)
train_cfg = dict(type="IterBasedTrainLoop", max_iters=30, val_interval=30)
val_cfg, test_cfg = dict(type="ValLoop"), dict(type="TestLoop")
log_processor = dict(by_epoch=False)
default_hooks = dict(
    logger=dict(interval=10, log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=30, save_best="teacher/agreement", rule="greater"),
)
