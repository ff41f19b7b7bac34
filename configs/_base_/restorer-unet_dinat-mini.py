"""A U-shaped restorer on DiNAT-Mini, for pictures of any folder."""

_base_ = ["./pictures.py", "./restoration_10k.py"]
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    type="Restorer",
    backbone=dict(name="dinat_mini", drop_path_rate=0.0),
    neck=dict(type="RestorerUNet", channels=32, depth=1, upscale=1),
    loss=dict(type="CharbonnierLoss"),
)
