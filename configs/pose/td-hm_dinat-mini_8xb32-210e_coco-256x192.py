"""Top-down heatmaps on DiNAT-Mini, COCO keypoints, 256x192, 210 epochs: mmpose's recipe for Swin."""

_base_ = "mmpose::body_2d_keypoint/topdown_heatmap/coco/td-hm_swin-t-p4-w7_8xb32-210e_coco-256x192.py"
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(
    backbone=dict(
        _delete_=True,
        type="TerrazzoBackbone",
        pretrained=True,
        name="dinat_mini",
        drop_path_rate=0.2,
        out_indices=(3,),
    ),
    head=dict(in_channels=512),
)
