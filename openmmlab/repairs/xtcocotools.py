"""Keypoint scores as mmpose asks xtcocotools for them, by pycocotools: its wheels do not work with NumPy 2.

What xtcocotools adds to pycocotools: other keypoints than COCO's 17, the parts of whole bodies, objects without a known
area, and CrowdPose's scores by how crowded a picture is (Li et al., "CrowdPose", arXiv 1812.00324).
"""

import contextlib
import io
from collections import defaultdict

import numpy as np
import pycocotools.coco
import pycocotools.cocoeval

BODY = ("keypoints", "foot_kpts", "face_kpts", "lefthand_kpts", "righthand_kpts")
PARTS = {
    "keypoints": BODY[:1],
    "keypoints_crowd": BODY[:1],
    "keypoints_body": BODY[:1],
    **{f"keypoints_{key.removesuffix('_kpts')}": (key,) for key in BODY[1:]},
    "keypoints_wholebody": BODY,
}
"""The keys of the keypoints that each kind of evaluation compares."""

FILLED = 0.53
"""The share of its box that an object without a known area is taken to fill."""

EASY, MEDIUM = 0.2, 0.8
"""The crowd index below which a picture of CrowdPose is easy, and medium."""


class COCO(pycocotools.coco.COCO):
    """Annotations in COCO's format; an annotation without `iscrowd` is no crowd."""

    def createIndex(self) -> None:
        """Completes the annotations and indexes them."""
        for annotation in self.dataset.get("annotations", ()):
            annotation.setdefault("iscrowd", 0)
        super().createIndex()

    def loadRes(self, resFile):
        """Results as annotations; there may be none."""
        import json

        results = resFile
        if isinstance(resFile, str):
            with open(resFile, encoding="utf-8") as file:
                results = json.load(file)
        if len(results):
            return super().loadRes(results)
        empty = type(self)()
        empty.dataset = {**self.dataset, "annotations": []}
        empty.createIndex()
        return empty


class COCOeval(pycocotools.cocoeval.COCOeval):
    """Average precision and recall of keypoints, by object keypoint similarity.

    Args:
        cocoGt: the true annotations.
        cocoDt: the results.
        iouType: one of `PARTS`.
        sigmas: how exactly people mark each keypoint; None for COCO's 17.
        use_area: whether annotations know the area of their object.
    """

    def __init__(self, cocoGt=None, cocoDt=None, iouType="keypoints", sigmas=None, use_area=True):
        super().__init__(cocoGt, cocoDt, "keypoints" if iouType in PARTS else iouType)
        self.kind, self.use_area = iouType, use_area
        if sigmas is not None:
            self.params.kpt_oks_sigmas = np.asarray(sigmas)

    def _prepare(self) -> None:
        """Copies annotations and results in the form that pycocotools scores: one list of keypoints and an area."""
        if self.kind not in PARTS:
            super()._prepare()
            return
        self._gts, self._dts = defaultdict(list), defaultdict(list)
        self.evalImgs, self.eval = defaultdict(list), {}
        for number, annotation in enumerate(self._chosen(self.cocoGt), 1):
            points = self._points(annotation)
            # CrowdPose counts only keypoints that are not hidden.
            seen = annotation["num_keypoints"] if self.kind == "keypoints_crowd" else np.count_nonzero(points[2::3] > 0)
            truth = {**annotation, "id": number, "keypoints": points}  # pycocotools takes 0 for "no match"
            truth["ignore"] = seen == 0 or bool(annotation.get("iscrowd"))
            if not self.use_area or "area" not in annotation:
                truth["area"] = annotation["bbox"][2] * annotation["bbox"][3] * FILLED
            self._gts[annotation["image_id"], annotation["category_id"]].append(truth)
        body = PARTS[self.kind] == BODY[:1]
        score = "score" if body else f"{self.kind.removeprefix('keypoints_')}_score"  # of a part, where results have it
        for result in self._chosen(self.cocoDt):
            points = self._points(result)
            if np.any(points[2::3] > 0):
                found = {**result, "keypoints": points, "score": result.get(score, result["score"])}
                self._dts[result["image_id"], result["category_id"]].append(found)

    def summarize(self) -> None:
        """Computes and prints the scores; CrowdPose's are AP, AR and the AP of easy, medium and hard pictures."""
        super().summarize()
        if self.kind == "keypoints_crowd":
            self.stats = np.concatenate([self.stats[[0, 1, 2, 5, 6, 7]], self._by_crowding()])
            for level, precision in zip(("easy", "medium", "hard"), self.stats[6:]):
                print(f" Average Precision  (AP) @[ type={level:>6s} ] = {precision:0.3f}")

    def _by_crowding(self) -> list[float]:
        """The average precision of easy, medium and hard pictures."""
        levels = ([], [], [])
        for image in self.cocoGt.dataset["images"]:
            levels[int(np.digitize(image["crowdIndex"], (EASY, MEDIUM)))].append(image["id"])
        pictures, precisions = self.params.imgIds, []
        for level in levels:
            self.params.imgIds = level
            with contextlib.redirect_stdout(io.StringIO()):
                self.evaluate()
                self.accumulate()
            precisions.append(round(float(np.mean(self.eval["precision"][:, :, :, 0, :])), 4))
        self.params.imgIds = pictures
        return precisions

    def _chosen(self, annotations: pycocotools.coco.COCO) -> list[dict]:
        categories = self.params.catIds if self.params.useCats else []
        return annotations.loadAnns(annotations.getAnnIds(imgIds=self.params.imgIds, catIds=categories))

    def _points(self, annotation: dict) -> np.ndarray:
        return np.concatenate([np.asarray(annotation[key], float) for key in PARTS[self.kind]])
