"""How the pipelines of mmdet and mmseg read pictures and label maps: upright, and as every other part of terrazzo does.

mmcv's own decoding differs in four ways. It refuses floats. It does not turn label maps, nor anything that is read
"unchanged" or by turbojpeg. Its handling of transparency depends on the backend. For a damaged file it does not give
the name or, with some versions of OpenCV, any error. It stays in use for whole upright 8-bit JPEG and PNG files, which
every decoder reads alike, and if a config asks for "unchanged" values, turbojpeg or tifffile.
"""

from io import BytesIO
from pathlib import Path
from typing import Any

import mmcv
import mmcv.image
import mmcv.image.io
import mmengine.fileio
import numpy as np
from mmcv.transforms import BaseTransform, LoadAnnotations, LoadImageFromFile

from terrazzo._pictures import check_claim, check_same_turn, is_plain, orientation, read_picture, turned
from terrazzo.errors import InputError, first_line

_mmcv_decode = mmcv.image.io.imfrombytes


def install() -> None:
    """Makes mmcv decode through this module, however a config names its loaders. A second call changes nothing."""
    for module in (mmcv, mmcv.image, mmcv.image.io):
        module.imfrombytes = decode
    LoadImageFromFile.transform = load_image
    LoadAnnotations.__call__ = load_annotations


def decode(
    content: bytes,
    flag: str | int = "color",
    channel_order: str = "bgr",
    backend: str | None = None,
    name: str | Path = "in memory",
) -> np.ndarray:
    """`mmcv.imfrombytes`: the picture in a file's bytes, upright unless the flag says "ignore_orientation".

    Args:
        content: the bytes.
        flag: "color", "grayscale", "unchanged", or the first two with "_ignore_orientation"; or a flag of OpenCV.
        channel_order: "bgr" or "rgb", for colours.
        backend: "cv2", "pillow", "turbojpeg" or "tifffile"; None for the choice of `mmcv.use_backend`.
        name: what messages call the picture.

    Returns:
        (H, W, 3), or (H, W) for grey; uint8 unless read "unchanged" or by tifffile.

    Raises:
        InputError: the picture is empty or damaged, or has an unknown range.
    """
    backend = backend or mmcv.image.io.imread_backend
    upright = isinstance(flag, str) and not flag.endswith("_ignore_orientation")
    if str(flag).removesuffix("_ignore_orientation") not in ("color", "grayscale") or backend not in ("cv2", "pillow"):
        return _decoded_by_mmcv(content, flag, channel_order, backend, name, upright)
    if backend == "cv2" and is_plain(BytesIO(content)):
        # A plain file is upright, even if OpenCV reads an orientation from broken EXIF data.
        pixels = _mmcv_decode(content, f"{flag.partition('_')[0]}_ignore_orientation", "bgr", backend)
        # OpenCV fills the rest of a truncated JPEG with grey, and some of its versions do not report it.
        if pixels is not None and (content[:1] != b"\xff" or content.rfind(b"\xff\xd9") > content.rfind(b"\xff\xda")):
            return pixels if channel_order == "bgr" or pixels.ndim == 2 else np.ascontiguousarray(pixels[..., ::-1])
    picture = read_picture(BytesIO(content), name, upright)
    if flag.startswith("grayscale"):
        return np.array(picture.convert("L"))
    raw = picture.tobytes("raw", channel_order.upper())
    return np.frombuffer(bytearray(raw), np.uint8).reshape(picture.height, picture.width, 3)


def _decoded_by_mmcv(
    content: bytes, flag: str | int, channel_order: str, backend: str, name: str | Path, upright: bool
) -> np.ndarray:
    check_claim(BytesIO(content), name)
    try:
        pixels, reason = _mmcv_decode(content, flag, channel_order, backend), f"by {backend}"
    except Exception as error:  # a decoder fails in every way
        pixels, reason = None, f"by {backend}: {first_line(error)}"
    if pixels is None:
        read_picture(BytesIO(content), name)  # has a better message, if Pillow cannot read it either
        raise InputError(f"picture {name} cannot be decoded {reason}")
    is_tiff = content[:2] in (b"II", b"MM")
    if not upright or (is_tiff and backend != "tifffile"):  # OpenCV and Pillow turn a TIFF in any case
        return pixels
    return turned(pixels, orientation(BytesIO(content)))


def load_image(self: LoadImageFromFile, results: dict[str, Any]) -> dict[str, Any] | None:
    """`LoadImageFromFile.transform`: the picture at `img_path`; refused if it is turned and its annotations are not.

    Raises:
        InputError: the picture cannot be read and `ignore_empty` is off, or its annotations are not turned like the
            picture.
    """
    path, labels = results["img_path"], results.get("seg_map_path")
    try:
        content = _content(self, path)
        pixels = decode(content, self.color_type, backend=self.imdecode_backend, name=path)
    except InputError:
        if self.ignore_empty:
            return None
        raise
    if labels and Path(path).is_file() and Path(labels).is_file():
        check_same_turn(path, labels)
    _check_size(path, content, pixels, results.get("width"), results.get("height"))
    results["img"] = pixels.astype(np.float32) if self.to_float32 else pixels
    results["img_shape"] = results["ori_shape"] = pixels.shape[:2]
    return results


def load_annotations(self: LoadAnnotations, results: dict[str, Any]) -> dict[str, Any]:
    """`LoadAnnotations.__call__` for mmcv, mmdet and mmseg, with errors that name the label map.

    Raises:
        InputError: the label map cannot be read.
    """
    try:
        return BaseTransform.__call__(self, results)
    except (InputError, OSError) as error:
        path, reason = results.get("seg_map_path"), getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"label map {path} cannot be read: {reason}") from error


def _check_size(path: str, content: bytes, pixels: np.ndarray, width: int | None, height: int | None) -> None:
    """InputError if a turned picture has another size than its annotations say."""
    size = (pixels.shape[1], pixels.shape[0])
    if None in (width, height) or (width, height) == size or (turn := orientation(BytesIO(content))) == 1:
        return
    raise InputError(
        f"picture {path} is {size[0]}x{size[1]} after its EXIF orientation {turn} is applied, but its "
        f"annotations are for {width}x{height}; save it upright, and annotate it upright"
    )


def _content(loader: LoadImageFromFile, path: str) -> bytes:
    try:
        if loader.file_client_args is not None:
            return mmengine.fileio.FileClient.infer_client(loader.file_client_args, path).get(path)
        return mmengine.fileio.get(path, backend_args=loader.backend_args)
    except OSError as error:
        raise InputError(f"picture {path} cannot be read: {error.strerror or error}") from error
