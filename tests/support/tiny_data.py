"""Tiny data sets in the layouts of real data sets: a few small pictures of noise with random labels."""

import json

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask

SPLITS = ("train", "val", "test")


def picture(random, size):
    return Image.fromarray(random.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def label_map(random, classes, size):
    return random.integers(0, classes, (size[1] // 8, size[0] // 8), dtype=np.uint8).repeat(8, 0).repeat(8, 1)


def objects():
    """The boxes of the three objects in every picture: x, y, width, height."""
    return [(8 + 20 * number, 10, 16, 20) for number in range(3)]


def write_segmentation(root, suffix, classes, size):
    """Write CamVid's and the floors' layout: images/SPLIT/NAME, labels/SPLIT/NAME.png."""
    random = np.random.default_rng(0)
    for split in SPLITS:
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for index in range(2):
            labels = label_map(random, classes, size)
            labels[:4] = 255
            picture(random, size).save(root / "images" / split / f"{index}{suffix}")
            Image.fromarray(labels).save(root / "labels" / split / f"{index}.png")


def segmentation_batch(classes, channels, size):
    """Two noise pictures of size (height, width) with classes and edges of all pixels, as from mmseg's pipelines."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    generator = torch.Generator().manual_seed(0)
    samples = [SegDataSample(metainfo=dict.fromkeys(("img_shape", "ori_shape", "pad_shape"), size)) for _ in range(2)]
    for sample in samples:
        sample.gt_sem_seg = PixelData(data=torch.randint(classes, (1, *size), generator=generator))
        sample.gt_edge_map = PixelData(data=torch.randint(2, (1, *size), generator=generator))
    images = [torch.randint(256, (channels, *size), generator=generator, dtype=torch.uint8) for _ in samples]
    return {"inputs": images, "data_samples": samples}


def write_instances(file, images, categories, size, masks=True):
    """Write COCO's json: three objects in each of `images`; they take the categories (number to name) in turn."""
    numbers, annotations = list(categories), []
    for index in range(len(images)):
        for x, y, w, h in objects():
            mask = np.zeros((size[1], size[0]), np.uint8, order="F")
            mask[y : y + h, x : x + w] = 1
            run_lengths = coco_mask.encode(mask)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": numbers[len(annotations) * 7 % len(numbers)],
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": {"size": run_lengths["size"], "counts": run_lengths["counts"].decode()}
                    if masks
                    else [],
                }
            )
    content = {
        "images": [
            {"id": index, "file_name": name, "width": size[0], "height": size[1]} for index, name in enumerate(images)
        ],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in categories.items()],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def write_detection(root, names, size, masks):
    """Write BCCD's and the nuclei's layout: images/SPLIT/NAME.jpg, annotations/instances_SPLIT.json."""
    random = np.random.default_rng(0)
    for split in SPLITS:
        (root / "images" / split).mkdir(parents=True)
        images = [f"{index}.jpg" for index in range(2)]
        for image in images:
            picture(random, size).save(root / "images" / split / image)
        categories = dict(enumerate(names, 1))
        write_instances(root / "annotations" / f"instances_{split}.json", images, categories, size, masks)


def write_folders(root, names, size, suffix=".jpg", splits=SPLITS, count=1):
    """Write a folder per class: SPLIT/CLASS/NAME."""
    random = np.random.default_rng(0)
    for split in splits:
        for name in names:
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                picture(random, size).save(root / split / name / f"{name}_{index}{suffix}", format="jpeg")


def write_imagenet(root):
    """Write ImageNet-1k's unpacked layout, with ten of its thousand folders."""
    names = [f"n0144{index:04d}" for index in range(10)]
    write_folders(root, names, (80, 64), ".JPEG", splits=("train", "val"), count=2)


def write_coco(root):
    """Write COCO 2017: pictures, instances, panoptic segmentations; category numbers have gaps, as in COCO."""
    from mmdet.datasets import CocoDataset, CocoPanopticDataset

    random, size = np.random.default_rng(0), (96, 64)
    things = CocoDataset.METAINFO["classes"]
    numbers = {name: 1 + index + index // 8 for index, name in enumerate(CocoPanopticDataset.METAINFO["classes"])}
    assert CocoPanopticDataset.METAINFO["thing_classes"] == things
    for split in ("train2017", "val2017"):
        annotations, panoptic = root / "annotations", root / "annotations" / f"panoptic_{split}"
        (root / split).mkdir(parents=True)
        panoptic.mkdir(parents=True)
        images = [f"{index:012d}.jpg" for index in range(2)]
        instances = {numbers[name]: name for name in things}
        write_instances(annotations / f"instances_{split}.json", images, instances, size)
        write_person_keypoints(root, split, images)
        content = json.loads((annotations / f"instances_{split}.json").read_text())
        segmentations = []
        for index, image in enumerate(images):
            picture(random, size).save(root / split / image)
            # Segment 1 is stuff, the background; the objects follow. A pixel's number is R + 256 G + 65536 B.
            segments = [{"id": 1, "category_id": numbers["grass-merged"], "bbox": [0, 0, *size], "area": 5184}]
            pixels = np.zeros((size[1], size[0], 3), np.uint8)
            pixels[..., 0] = 1
            for annotation in (item for item in content["annotations"] if item["image_id"] == index):
                x, y, w, h = annotation["bbox"]
                segments.append({key: annotation[key] for key in ("category_id", "bbox", "area")})
                segments[-1]["id"] = len(segments) + 256
                pixels[y : y + h, x : x + w] = (len(segments), 1, 0)
            Image.fromarray(pixels).save(panoptic / image.replace(".jpg", ".png"))
            segmentations.append(
                {
                    "image_id": index,
                    "file_name": image.replace(".jpg", ".png"),
                    "segments_info": [{"iscrowd": 0, **segment} for segment in segments],
                }
            )
        content["annotations"] = segmentations
        content["categories"] = [
            {"id": number, "name": name, "isthing": int(name in things)} for name, number in numbers.items()
        ]
        (annotations / f"panoptic_{split}.json").write_text(json.dumps(content))


def write_ade20k(root):
    """Write ADE20K of the 2016 challenge: labels 1 to 150, and 0 for unlabelled pixels."""
    random, size = np.random.default_rng(0), (96, 64)
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for index in range(1, 3):
            name = f"ADE_{split[:-3]}_{index:08d}"
            picture(random, size).save(root / "images" / split / f"{name}.jpg")
            Image.fromarray(label_map(random, 151, size)).save(root / "annotations" / split / f"{name}.png")


def write_loveda(root):
    """Write LoveDA as mmseg converts it: labels 1 to 7, and 0 for unlabelled pixels."""
    random, size = np.random.default_rng(0), (96, 64)
    for split in ("train", "val"):
        for kind in ("img_dir", "ann_dir"):
            (root / kind / split).mkdir(parents=True)
        for index in range(2):
            picture(random, size).save(root / "img_dir" / split / f"{index}.png")
            Image.fromarray(label_map(random, 8, size)).save(root / "ann_dir" / split / f"{index}.png")


def write_cityscapes(root):
    """Write Cityscapes: a folder per city, maps of 19 training classes and 255, and mmdet's form of instances."""
    from mmdet.datasets import CityscapesDataset

    random, size = np.random.default_rng(0), (128, 64)
    for split, city in (("train", "aachen"), ("val", "frankfurt")):
        images, labels = root / "leftImg8bit" / split / city, root / "gtFine" / split / city
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        names = [f"{city}_000000_{index:06d}" for index in range(2)]
        for name in names:
            picture(random, size).save(images / f"{name}_leftImg8bit.png")
            values = label_map(random, 19, size)
            values[:4] = 255
            Image.fromarray(values).save(labels / f"{name}_gtFine_labelTrainIds.png")
        write_instances(
            root / "annotations" / f"instancesonly_filtered_gtFine_{split}.json",
            [f"{city}/{name}_leftImg8bit.png" for name in names],
            dict(enumerate(CityscapesDataset.METAINFO["classes"], 24)),
            size,
        )


def write_dota(root):
    """Write DOTA in patches: a text file of rotated boxes for each picture, with corners, class and difficulty."""
    random, size = np.random.default_rng(0), (96, 96)
    for kind in ("images", "annfiles"):
        (root / "trainval" / kind).mkdir(parents=True)
    for index in range(2):
        picture(random, size).save(root / "trainval" / "images" / f"P{index:04d}.png")
        boxes = [(20, 12, 50, 22, 44, 40, 14, 30, "plane"), (60, 50, 84, 50, 84, 66, 60, 66, "ship")]
        lines = [" ".join(map(str, box)) + " 0\n" for box in boxes]
        (root / "trainval" / "annfiles" / f"P{index:04d}.txt").write_text("".join(lines))


def write_person_keypoints(root, split, images):
    """Write COCO's keypoints of two people in each picture, and the boxes that a detector found."""
    annotations, detections = [], []
    for index in range(len(images)):
        for x, y, w, h in objects()[:2]:
            points = [(x + w * (number % 4) / 4, y + h * number / 17, 2) for number in range(17)]
            annotation = {"id": len(annotations) + 1, "image_id": index, "category_id": 1, "bbox": [x, y, w, h]}
            detections.append({"image_id": index, "category_id": 1, "bbox": [x, y, w, h], "score": 0.9})
            annotation |= {"area": w * h, "iscrowd": 0, "segmentation": [], "num_keypoints": 17}
            annotations.append({**annotation, "keypoints": [value for point in points for value in point]})
    pictures = [{"id": i, "file_name": name, "width": 96, "height": 64} for i, name in enumerate(images)]
    content = {"images": pictures, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}
    (root / "annotations" / f"person_keypoints_{split}.json").write_text(json.dumps(content))
    folder = root / "person_detection_results"
    folder.mkdir(exist_ok=True)
    (folder / f"COCO_{split}_detections_AP_H_56_person.json").write_text(json.dumps(detections))


def write_youtube_vis(root):
    """Write YouTube-VIS 2021 as mmdet converts it: two videos of 4 and 7 frames; two objects move, one comes late."""
    from mmdet.datasets import YouTubeVISDataset

    YouTubeVISDataset.set_dataset_classes("2021")
    names = YouTubeVISDataset.METAINFO["classes"]
    random, size = np.random.default_rng(0), (96, 64)
    for split in ("train", "valid"):
        videos, images, annotations = [], [], []
        for video, frames in enumerate((4, 7), 1):
            shape = {"width": size[0], "height": size[1]}
            videos.append({"id": video, "name": f"clip{video}", **shape})
            (root / split / "JPEGImages" / f"clip{video}").mkdir(parents=True)
            for frame in range(frames):
                name, number = f"clip{video}/{frame:05d}.jpg", len(images) + 1
                picture(random, size).save(root / split / "JPEGImages" / name)
                images.append({"id": number, "video_id": video, "frame_id": frame, "file_name": name, **shape})
                for instance in range(1 + (frame > 1)):
                    x, y, w, h = 6 + 5 * frame + 20 * instance, 10 + 16 * instance, 24, 20
                    corners = [x, y, x + w, y, x + w, y + h, x, y + h]
                    annotation = {"id": len(annotations) + 1, "image_id": number, "video_id": video}
                    annotation |= {"category_id": 3 + instance, "instance_id": 2 * video + instance, "iscrowd": 0}
                    annotations.append({**annotation, "bbox": [x, y, w, h], "area": w * h, "segmentation": [corners]})
        categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
        content = {"videos": videos, "images": images, "annotations": annotations, "categories": categories}
        file = root / "annotations" / f"youtube_vis_2021_{split}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content))


FULL_SIZE = {
    "imagenet": write_imagenet,
    "coco": write_coco,
    "ADEChallengeData2016": write_ade20k,
    "loveDA": write_loveda,
    "cityscapes": write_cityscapes,
    "split_ss_dota": write_dota,
    "youtube_vis_2021": write_youtube_vis,
}
"""The functions that write tiny versions of full-size data sets, by the names of the folders."""
