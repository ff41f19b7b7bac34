"""RoMA-base by autoregression on images without labels, 192x192: 8 processes of batch 128, 400 epochs, as in the paper.

For RoMA-large, set `model.backbone.name=roma_large`. The paper's data are up to 4 million images from several remote
sensing sets; any folder of images works. To fine-tune, set `model.backbone.checkpoint` to the trained file.
"""

_base_ = "../_base_/roma_pretraining_400e.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(backbone=dict(name="roma_base", img_size=192))
