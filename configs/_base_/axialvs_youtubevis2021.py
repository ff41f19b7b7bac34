"""Axial-VS within clips on mmdet's Mask2Former for YouTube-VIS 2021: clips of 5 frames, the authors' recipe."""

_base_ = ["mmdet::mask2former_vis/mask2former_r50_8xb2-8e_youtubevis2021.py"]
model = dict(
    track_head=dict(
        type="ClipTrackHead",
        num_frames=5,
        pixel_decoder=dict(type="AxialTrajectoryPixelDecoder", num_frames=5, attn_drop=0.1),
    )
)
sampled = dict(type="UniformRefFrameSample", num_ref_imgs=4, frame_range=4, filter_key_img=True)
train_pipeline = [
    sampled,
    dict(
        type="TransformBroadcaster",
        share_random_params=True,
        transforms=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadTrackAnnotations", with_mask=True),
            dict(type="RandomChoiceResize", scales=[(100000, side) for side in range(288, 513, 32)], keep_ratio=True),
            dict(type="RandomFlip", prob=0.5),
        ],
    ),
    dict(type="PackTrackInputs"),
]
train_dataloader = dict(batch_size=1, dataset=dict(pipeline=train_pipeline))
whole = dict(lr_mult=1.0, decay_mult=1.0)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(level_3d_encodeing=whole, temporal_layer=whole)))
param_scheduler = [
    dict(_scope_="mmengine", type="LinearLR", start_factor=0.001, end=500, by_epoch=False),
    dict(_scope_="mmengine", type="MultiStepLR", milestones=[5000, 10000], end=15000, gamma=0.1, by_epoch=False),
]
train_cfg = dict(max_iters=15000, val_interval=15000)
default_hooks = dict(checkpoint=dict(interval=5000))
