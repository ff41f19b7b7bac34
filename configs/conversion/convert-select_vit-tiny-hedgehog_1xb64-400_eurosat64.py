"""ViT-tiny on EuroSAT: which 6 of 12 layers can do with Hedgehog, learned in at most 400 iterations of 64 images.

Set `load_from` to the file of convert-hidden_vit-tiny-hedgehog_1xb64-90_eurosat64. All schedules take the first half;
the training ends when each layer has decided. For the last stage, set `load_from` and `model.convert` of
convert-distil_vit-tiny-hedgehog_1xb64-60_eurosat64 to the `student.pth` that it leaves.
"""

_base_ = "convert-matrix_vit-tiny-hedgehog_1xb64-30_eurosat64.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(stage=dict(type="select", target=6))
# The numbers that decide learn 30 times faster than the mixers: from 3e-2 to 3e-3.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(softmax_share=dict(lr_mult=30.0, decay_mult=0.0))))
param_scheduler = dict(eta_min=None, eta_min_ratio=0.1, end=200)
train_cfg = dict(max_iters=400, val_interval=100)
default_hooks = dict(checkpoint=dict(interval=100, save_best=None))
custom_hooks = [dict(type="StudentHook")]
