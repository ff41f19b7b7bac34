"""DINOv2 ViT-S/14 to Hedgehog, third stage with adapters: converted attention, and LoRA for everything else.

It needs the extra `conversion`. Set `load_from` to the file of convert-hidden, or `load_from` and `model.convert` to
the `student.pth` of convert-select. The student, with the adapters added to its weights, is `student.pth` again.
"""

_base_ = "convert-matrix_vit-small-dinov2-hedgehog_1xb16-2k_unlabelled-224x224.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(stage=dict(type="distil", trained="adapters", rank=16, alpha=32))
optim_wrapper = dict(optimizer=dict(lr=3e-4))
custom_hooks = [
    dict(type="EMAHook", ema_type="ExponentialMovingAverage", momentum=0.01),
    dict(type="StudentHook"),
]
