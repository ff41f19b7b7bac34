"""Configs that OpenMMLab ships and that cannot be built anywhere."""

FAULTS = {
    ("mmdet", "3.3.0"): {
        "bytetrack/bytetrack_yolox_x_8xb4-amp-80e_crowdhuman-mot17halftrain_test-mot17test.py": "its base is absent",
        "cascade_rpn/cascade-rpn_r50-caffe_fpn_1x_coco.py": "does not give its head num_classes, which the head needs",
        "sort/faster-rcnn_r50_fpn_8xb2-4e_mot17train_test-mot17train.py": "its base is named without .py",
        "sort/faster-rcnn_r50_fpn_8xb2-8e_mot20halftrain_test-mot20halfval.py": "its base is named without .py",
        "sort/faster-rcnn_r50_fpn_8xb2-8e_mot20train_test-mot20train.py": "its base is named without .py",
        "v3det/fcos_swinb_fpn_8x4_sample1e-3_mstrain_v3det_2x.py": "gives FPN the unknown force_grad_on_level",
    },
    ("mmaction", "1.2.0"): {
        **{
            f"localization/drn/drn_2xb16-4096-10e_c3d-feature_{step}.py": "its model DRN is not in the wheel"
            for step in ("first", "second", "third")
        },
        **{
            f"detection/lfb/slowonly-lfb-{kind}_kinetics400-pretrained-r50_8xb12-4x16x1-20e_ava21-rgb.py": (
                "is built from a bank of features in data/ava"
            )
            for kind in ("max", "nl")
        },
    },
    ("mmdet3d", "1.4.0"): {
        **{
            f"nuimages/{name}": "gives its detector `pretrained`, which mmdet 3 does not take"
            for name in (
                "cascade-mask-rcnn-r50-fpn_coco-20e_nuim.py",
                "cascade-mask-rcnn_r101_fpn_1x_nuim.py",
                "cascade-mask-rcnn_r50_fpn_1x_nuim.py",
                "cascade-mask-rcnn_r50_fpn_coco-20e-1x_nuim.py",
                "cascade-mask-rcnn_x101_32x4d_fpn_1x_nuim.py",
                "htc_r50_fpn_1x_nuim.py",
                "htc_r50_fpn_coco-20e-1x_nuim.py",
                "htc_r50_fpn_coco-20e_nuim.py",
                "htc_r50_fpn_head-without-semantic_1x_nuim.py",
                "htc_x101_64x4d_fpn_dconv_c3-c5_coco-20e-1xb16_nuim.py",
                "mask-rcnn_r101_fpn_1x_nuim.py",
                "mask-rcnn_r50_caffe_fpn_1x_nuim.py",
                "mask-rcnn_r50_caffe_fpn_coco-3x_1x_nuim.py",
                "mask-rcnn_r50_caffe_fpn_coco-3x_20e_nuim.py",
                "mask-rcnn_r50_fpn_1x_nuim.py",
                "mask-rcnn_r50_fpn_coco-2x_1x_nuim.py",
                "mask-rcnn_r50_fpn_coco-2x_1x_nus-2d.py",
                "mask-rcnn_x101_32x4d_fpn_1x_nuim.py",
            )
        },
        "mvfcos3d/multiview-fcos3d_r101-dcn_centerhead_16xb2_waymoD5-3d-3class.py": "its base is absent",
    },
    ("mmocr", "1.0.1"): {
        "textdet/dbnet/dbnet_resnet50-dcnv2_fpnc_100k_synthtext.py": "uses a data set that its base lacks",
    },
    ("mmpose", "1.3.2"): {
        "body_2d_keypoint/edpose/coco/edpose_res50_8xb2-50e_coco-800x1333.py": "its base is not in the wheel",
    },
    ("mmpretrain", "1.2.0"): {
        **{
            f"levit/deploy/levit-{width}_8xb256_in1k.py": "its head cannot switch to deployment"
            for width in ("128", "128s", "192", "256", "384")
        },
        **{
            f"replknet/{name}_in1k{size}.py": "mixes the two dialects of configs"
            for name in ("replknet-31B_32xb64", "deploy/replknet-31B-deploy_32xb64")
            for size in ("", "-384px")
        },
        "resnet/resnet50_8xb32-cutmix_in1k.py": "names the unknown BatchCutMix",
        "swin_transformer_v2/swinv2-base-w12_8xb128_in21k-192px.py": "uses test_pipeline, which its base lacks",
        "swin_transformer_v2/swinv2-large-w12_8xb128_in21k-192px.py": "uses test_pipeline, which its base lacks",
    },
    ("mmrotate", "1.0.0rc1"): {
        "gwd/rotated-retinanet-rbox-le135_r50_fpn_gwd_1x_dota.py": "its base is absent",
        "s2anet/s2anet-le135_r50_fpn_3x_hrsc.py": "names the unknown model S2ANet",
    },
}
"""Configs that no installation of that release can build, each with the reason; each was examined by hand."""
