"""The gate of a zoom on DiNAT-Mini, CamVid: which pictures need a fine pass; 600 iterations of 2 pictures.

The heads start from what zoom-region_fpn-dinat-mini_1xb2-600_camvid-480x360 trained. `heads.pth` has both heads.
"""

_base_ = "zoom-region_fpn-dinat-mini_1xb2-600_camvid-480x360.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(stage="gate")
load_from = "work_dirs/zoom-region_fpn-dinat-mini_1xb2-600_camvid-480x360/heads.pth"
