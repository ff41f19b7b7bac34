"""Axial-VS across clips on top of weights for single clips: 3 clips of 5 frames, the authors' recipe."""

_base_ = ["axialvs_youtubevis2021.py"]
model = dict(
    type="CrossClipVideo", init_cfg=None, track_head=dict(type="CrossClipTrackHead", num_frames=15, num_clips=3)
)
train_pipeline = _base_.train_pipeline
train_pipeline[0].update(num_ref_imgs=14, frame_range=14)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
param_scheduler = [
    dict(_scope_="mmengine", type="LinearLR", start_factor=0.001, end=500, by_epoch=False),
    dict(_scope_="mmengine", type="MultiStepLR", milestones=[2500, 7500], end=10000, gamma=0.1, by_epoch=False),
]
train_cfg = dict(max_iters=10000, val_interval=10000)
default_hooks = dict(checkpoint=dict(interval=2500))
