"""The refinement of a zoom on AttNet-XXS, CamVid: corrects fused logits; an epoch, 147 iterations of 2 pictures.

The heads start from what zoom-gate_fpn-attnet-xxs_1xb2-600_camvid-480x360 trained. `heads.pth` has all three.
The label maps are used.
"""

_base_ = "zoom-region_fpn-attnet-xxs_1xb2-600_camvid-480x360.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(stage="refine")
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=20),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=False, begin=20, end=147),
]
train_cfg = dict(max_iters=147, val_interval=147)
default_hooks = dict(checkpoint=dict(interval=147))
load_from = "work_dirs/zoom-gate_fpn-attnet-xxs_1xb2-600_camvid-480x360/heads.pth"
