"""The region head of a zoom on DiNAT-Mini, CamVid: which tiles a fine pass changes; 600 iterations of 2 pictures.

The base model is what zoom-base_fpn-dinat-mini_1xb4-10k_camvid-480x360 trained: set `model.checkpoint` to its file.
`model.labels=annotation` learns what a fine pass corrects, and needs label maps.
"""

_base_ = ["../_base_/zoom_fpn_dinat-mini.py", "mmseg::_base_/default_runtime.py", "../_base_/zoom_camvid.py"]
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    _delete_=True,
    type="ZoomHeads",
    base=_base_.model,
    checkpoint="work_dirs/zoom-base_fpn-dinat-mini_1xb4-10k_camvid-480x360/iter_10000.pth",
    stage="region",
    scale=4,
    tile=96,
    halo=16,
    stride=16,
    budget=0.25,
)
