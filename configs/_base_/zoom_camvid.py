"""Heads of a zoom on CamVid: whole pictures, AdamW, 600 iterations; the last fifth of train is held out.

CamVid's val is one slow scene, so thresholds are chosen on the held-out fifth. Region head and gate learn without
annotation; `model.labels=annotation` and the refinement use the label maps.
"""

_base_ = "camvid.py"
pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="Resize", scale=(480, 360), keep_ratio=True),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(batch_size=2, dataset=dict(indices=293, pipeline=pipeline))
val_dataloader = dict(
    dataset=dict(data_prefix=dict(img_path="images/train", seg_map_path="labels/train"), indices=-74, pipeline=pipeline)
)
test_dataloader = dict(dataset=dict(pipeline=pipeline))
val_evaluator = dict(_delete_=True, type="ZoomQuality")
test_evaluator = val_evaluator
optim_wrapper = dict(
    type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.01), clip_grad=dict(max_norm=1.0)
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=20),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=False, begin=20, end=600),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=600, val_interval=300)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=20, log_metric_by_epoch=False),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=300, max_keep_ckpts=1),
    sampler_seed=dict(type="DistSamplerSeedHook"),
)
custom_hooks = [dict(type="ZoomHeadsHook")]
