"""Repairs of OpenMMLab's other packages, which were released for older versions of mmdet, mmcv, Python and NumPy.

A repair acts while its package is imported, in memory: no file is changed, and a package without need of it is left
alone. `REPAIRS` lists all of them. Each raised limit is the version that terrazzo was tested with.
"""

from terrazzo.openmmlab.repairs._finder import Repair, install

_NEW_NUMPY = {
    "np.Inf": "np.inf",
    "np.NAN": "np.nan",
    "np.in1d(": "np.isin(",
    "np.int0(": "np.intp(",
    "np.trapz(": "np.trapezoid(",
    "dtype=np.float)": "dtype=float)",
}
"""Names that NumPy removed; NumPy 1 knows the old names, and the repair does not act there."""

_OLD_TRANSFORMERS = {
    "'transformers>=4.28.0'])": "'transformers>=4.28.0']) and not satisfy_requirement('transformers>=5')",
    'pip install "mmpretrain[multimodal]"': 'pip install "transformers>=4.28,<5"',
    'pip install "mmaction2[multimodal]"': 'pip install "transformers>=4.28,<5"',
}
"""Language models are written for transformers 4; each package has placeholders that ask for it. With transformers 5,
the package could not be imported at all."""

_HERE = "terrazzo.openmmlab.repairs"

REPAIRS = {
    "mmcv": Repair(edits={"mmcv.ops.pixel_group": _NEW_NUMPY}),
    "mmdet": Repair(edits={"mmdet.evaluation.functional.ytviseval": _NEW_NUMPY}),
    "mmrotate": Repair(
        edits={
            "mmrotate": {"mmdet_maximum_version = '3.1.0'": "mmdet_maximum_version = '3.3.0'"},
            "mmrotate.models.detectors.refine_single_stage": {
                "from collections import Sequence": "from collections.abc import Sequence"
            },
            # Its new processes would import mmrotate without repairs, fail, and be started again without end.
            "mmrotate.evaluation.functional.mean_ap": {
                "from multiprocessing import get_context": "from multiprocessing.pool import ThreadPool",
                "get_context('spawn').Pool(nproc)": "ThreadPool(nproc)",
            },
        },
    ),
    "mmpose": Repair(
        stand_ins={
            "xtcocotools": "",
            "xtcocotools.coco": f"{_HERE}.xtcocotools",
            "xtcocotools.cocoeval": f"{_HERE}.xtcocotools",
            "xtcocotools.mask": "pycocotools.mask",
        },
        # The wheels of xtcocotools were compiled for NumPy 1; this is the same code, compiled for the installed NumPy.
        replaced={"xtcocotools._mask": "pycocotools._mask"},
    ),
    "mmyolo": Repair(edits={"mmyolo": {"mmcv_maximum_version = '2.1.0'": "mmcv_maximum_version = '2.2.0'"}}),
    "mmpretrain": Repair(
        edits={
            "mmpretrain.evaluation.metrics.retrieval": _NEW_NUMPY,
            "mmpretrain.utils.dependency": _OLD_TRANSFORMERS,
        },
        stand_ins={
            "importlib_metadata": "importlib.metadata",
            "modelindex": "",
            "modelindex.load_model_index": f"{_HERE}.modelindex",
            "modelindex.models": "",
            "modelindex.models.Model": f"{_HERE}.modelindex",
        },
    ),
    "mmaction": Repair(
        edits={
            "mmaction.datasets.transforms.pose_transforms": _NEW_NUMPY,
            "mmaction.evaluation.functional.accuracy": _NEW_NUMPY,
            "mmaction.evaluation.functional.ava_evaluation.metrics": _NEW_NUMPY,
            "mmaction.evaluation.metrics.multimodal_metric": _NEW_NUMPY,
            "mmaction.utils.dependency": _OLD_TRANSFORMERS,
            "mmaction.utils.misc": _NEW_NUMPY,
        },
        stand_ins={
            "importlib_metadata": "importlib.metadata",
            "mmaction.models.localizers.drn": "",
            "mmaction.models.localizers.drn.drn": f"{_HERE}.drn",
        },
    ),
    "mmocr": Repair(
        edits={
            "mmocr": {"mmdet_maximum_version = '3.2.0'": "mmdet_maximum_version = '3.4.0'"},
            "mmocr.datasets.transforms.textdet_transforms": _NEW_NUMPY,
            "mmocr.models.textdet.postprocessors.fce_postprocessor": _NEW_NUMPY,
        }
    ),
    "mmdet3d": Repair(edits={"mmdet3d.evaluation.functional.scannet_utils.evaluate_semantic_instance": _NEW_NUMPY}),
}

__all__ = ["REPAIRS", "Repair", "install"]
