"""UPerNet on MambaVision, ADE20K, 160000 iterations: the authors' recipe, in mixed precision (`--amp fp16`).

Windows of 64 and 32 fit images of 1024 pixels: smaller maps are padded to the windows. The drop path is 0.2, for the
reason in mambavision_cascade-mask-rcnn_3x_coco.py.
"""

_base_ = "upernet_160k_ade20k.py"
model = dict(backbone=dict(drop_path_rate=0.2, window_size=(64, 32)))
optim_wrapper = dict(optimizer=dict(lr=5e-5))
