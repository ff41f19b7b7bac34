"""DINOv2 ViT-S/14: which 6 of 12 layers can do with MATE, learned in at most 2000 iterations.

Set `load_from` to the file of the stage convert-hidden with MATE. Then as with Hedgehog.
"""

_base_ = "convert-matrix_vit-small-dinov2-mate_1xb16-2k_unlabelled-224x224.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(stage=dict(type="select", target=6))
# The numbers that decide learn 30 times faster than the mixers: from 3e-2 to 3e-3.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(softmax_share=dict(lr_mult=30.0, decay_mult=0.0))))
param_scheduler = [dict(type="CosineAnnealingLR", eta_min_ratio=0.1, by_epoch=False, begin=0, end=1000)]
default_hooks = dict(checkpoint=dict(save_best=None))
custom_hooks = [dict(type="StudentHook")]
