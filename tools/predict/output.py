"""Files of predictions: what `terrazzo infer` writes for a picture, and for a video."""

import contextlib
import json
from pathlib import Path
from types import TracebackType

from PIL import Image

from terrazzo._files import check_room, written_whole
from terrazzo.tools.data.clips import ClipWriter
from terrazzo.tools.predict.draw import PAPER, legend_height, shrunk
from terrazzo.tools.predict.prediction import LEGEND_ENTRIES, Prediction

_JPEG_SIDE = 65500
"""Pixels of a side, at most, that libjpeg writes."""


def write_prediction(out: Path, name: str, prediction: Prediction, tokens: Image.Image | None = None) -> None:
    """Write NAME.json, NAME.overlay.jpg and whatever else there is into a folder; each file whole or not at all."""
    if prediction.restored is not None:  # before the drawings, which may fail
        with written_whole(out / f"{name}.restored.png") as temporary:
            prediction.restored.save(temporary)
    for kind, drawing in (("overlay", prediction.drawing), ("tokens", tokens)):
        if drawing is not None:
            with written_whole(out / f"{name}.{kind}.jpg") as temporary:
                shrunk(drawing, _JPEG_SIDE).save(temporary, quality=92)
    for kind, pixels in (("labels", prediction.labels), ("segments", prediction.segments)):
        if pixels is not None:
            with written_whole(out / f"{name}.{kind}.png") as temporary:
                Image.fromarray(pixels).save(temporary)
    # The JSON comes last: if it exists, the other files exist.
    with written_whole(out / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(prediction.record, indent=2) + "\n")


class ClipOutput:
    """NAME.overlay.mp4 and NAME.jsonl, a line of JSON for each frame; all whole, or none.

    From a restorer also NAME.restored.mkv, lossless. A video has even sides: an odd side gets its last pixels twice.

    Args:
        out: the folder.
        name: what the files are called.
        rate: frames per second.
        live: whether Ctrl-C is the usual end, so that the files are kept.

    Attributes:
        count: the number of frames so far.
    """

    def __init__(self, out: Path, name: str, rate: float, live: bool):
        self.out, self.name, self.rate, self.live, self.count = out, name, rate, live, 0

    def __enter__(self) -> "ClipOutput":
        with contextlib.ExitStack() as stack:
            lines = stack.enter_context(written_whole(self.out / f"{self.name}.jsonl"))
            video = stack.enter_context(written_whole(self.out / f"{self.name}.overlay.mp4"))
            self.lines = open(lines, "w")
            self.writers = [ClipWriter(video, self.rate, PAPER)]
            self.files = stack.pop_all()
        return self

    def add(self, prediction: Prediction) -> None:
        """Append a frame."""
        record, height = prediction.record, 0
        if self.count == 0 and record.get("classes"):  # a later frame may have more classes in its legend
            size = (record["width"], record["height"])
            height = size[1] + legend_height(size, [f"{name} 100 %" for name in record["classes"][:LEGEND_ENTRIES]])
        if prediction.restored is not None:
            if len(self.writers) == 1:
                video = self.files.enter_context(written_whole(self.out / f"{self.name}.restored.mkv"))
                self.writers.append(ClipWriter(video, self.rate, None))
            self.writers[1].add(prediction.restored)
        self.writers[0].add(prediction.drawing, height)
        self.lines.write(json.dumps(record) + "\n")
        self.count += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        kept = error is None or bool(self.count and self.live and isinstance(error, KeyboardInterrupt))
        try:
            self._finish(kept)
        except BaseException as failure:
            self.files.__exit__(type(failure), failure, failure.__traceback__)
            raise
        if kept:
            self.files.close()
        else:
            self.files.__exit__(kind, error, trace)

    def _finish(self, kept: bool) -> None:
        """Close the files; if they are kept, an OSError if one of them is not whole."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.lines.close)
            for writer in self.writers:
                stack.callback(writer.close)
        if kept and self.count:
            for writer in self.writers:
                check_room(writer.path)
