"""`terrazzo infer` on videos, folders with subfolders, addresses and cameras."""

import functools
import http.server
import json
import shutil
import threading

import numpy as np
import pytest
from PIL import Image

from terrazzo.tools.data import clips
from terrazzo.tools.data.clips import ClipWriter, open_clip
from terrazzo.tools.data.floors import FloorMaker

cv2 = pytest.importorskip("cv2", reason="needs the extra 'video'")
MODEL = ("resnet10t", "--device", "cpu")


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """A video of six floors, 10 frames per second."""
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    writer, maker = ClipWriter(path, 10, (0, 0, 0)), FloorMaker(seed=2, size=64)
    for _ in range(6):
        writer.add(Image.fromarray(maker.make().image))
    writer.close()
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory, video):
    """A local server's address; it has a picture, a video, a page, and an endless stream of pictures."""
    folder = tmp_path_factory.mktemp("served")
    shutil.copy(video, folder / "clip.mp4")
    Image.fromarray(FloorMaker(seed=1, size=64).make().image).save(folder / "floor one.jpg")
    (folder / "page.html").write_text("<p>no picture</p>")
    (folder / "broken.png").write_bytes(b"nothing")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *words):
            pass

        def do_GET(self):
            if self.path == "/half.png":
                self.send_response(200)
                self.send_header("Content-Type", "image/png")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.wfile.write(b"ff\r\nhalf")
                self.close_connection = True
                return None
            if self.path != "/stream":
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
            self.end_headers()
            data = (folder / "floor one.jpg").read_bytes()
            try:
                while True:
                    self.wfile.write(b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(data))
                    self.wfile.write(data + b"\r\n")
            except OSError:  # the reader has enough
                return None

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        serving.daemon_threads = True
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_address[1]}"
        serving.shutdown()


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_video(run, video, tmp_path):
    result = run("infer", *MODEL, video, "--out", tmp_path, "--batch", 4)
    assert result.exit_code == 0, result.output
    assert "6 frames" in result.stdout
    assert names(tmp_path) == ["clip.jsonl", "clip.overlay.mp4"]
    records = lines(tmp_path / "clip.jsonl")
    assert [(record["frame"], record["seconds"]) for record in records] == [(n, n / 10) for n in range(6)]
    assert all(record["picture"] == str(video) and len(record["top"]) == 5 for record in records)
    drawn = open_clip(str(tmp_path / "clip.overlay.mp4"), "drawn", live=False)
    frames = list(drawn.frames())
    assert (len(frames), drawn.rate) == (6, 10)
    assert frames[0].image.height > 64
    first = next(open_clip(str(video), "clip", live=False).frames())
    assert np.abs(np.asarray(frames[0].image, int)[:64, :64] - np.asarray(first.image, int)).mean() < 10


def test_some_frames_of_a_segmented_video(run, trained, video, tmp_path):
    config, checkpoint = trained
    result = run(
        *("infer", config, video, "--checkpoint", checkpoint, "--device", "cpu", "--out", tmp_path),
        *("--every", 2, "--max-frames", 2),
    )
    assert result.exit_code == 0, result.output
    records = lines(tmp_path / "clip.jsonl")
    assert [record["frame"] for record in records] == [0, 2]
    assert records[0]["task"] == "segmentation"
    drawn = open_clip(str(tmp_path / "clip.overlay.mp4"), "drawn", live=False)
    assert (drawn.count, drawn.rate) == (2, 5)


def test_folders_within_folders(run, video, tmp_path):
    folder = tmp_path / "in"
    for name in ("floor.png", "deep/floor.png", "deep/er/floor.png", "deep/er/floor.webp", ".hidden/floor.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40)).save(folder / name)
    shutil.copy(video, folder / "deep" / "clip.mp4")
    (folder / "notes.txt").write_text("no picture")
    for _ in range(2):  # the results of the first run are no pictures for the second
        result = run("infer", *MODEL, folder, "--out", folder / "out", "--max-frames", 1)
        assert result.exit_code == 0, result.output
        found = [name for name in names(folder / "out") if name.endswith((".json", ".jsonl"))]
        assert found == [
            *("deep/clip.jsonl", "deep/er/floor_png.json", "deep/er/floor_webp.json"),
            *("deep/floor.json", "floor.json"),
        ]


def test_addresses(run, refused, server, tmp_path):
    picture, clip = f"{server}/floor%20one.jpg", f"{server}/clip.mp4"
    result = run("infer", *MODEL, picture, clip, f"{server}/stream", "--out", tmp_path, "--max-frames", 3)
    assert result.exit_code == 0, result.output
    written = ["clip.jsonl", "clip.overlay.mp4", "floor_one.json", "floor_one.overlay.jpg"]
    assert names(tmp_path) == [*written, "stream.jsonl", "stream.overlay.mp4"]
    assert json.loads((tmp_path / "floor_one.json").read_text())["picture"] == picture
    assert len(lines(tmp_path / "clip.jsonl")) == len(lines(tmp_path / "stream.jsonl")) == 3
    out = ("--out", tmp_path / "none")
    assert "answers 404" in refused("infer", *MODEL, f"{server}/nothing.png", *out)
    assert "is text/html" in refused("infer", *MODEL, f"{server}/page.html", *out)
    assert "broken.png" in refused("infer", *MODEL, f"{server}/broken.png", *out)
    for address in ("http://127.0.0.1:9/a.png", "http://127.0.0.1:9/my picture.png", f"{server}/half.png"):
        assert "cannot be reached" in refused("infer", *MODEL, address, *out)
    assert "use one of http" in refused("infer", *MODEL, "file:///etc/passwd", *out)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("content", [None, b"", b"no video" * 99, "cut"])
def test_a_bad_video_stops_everything(refused, video, tmp_path, content):
    path = tmp_path / "bad.mp4"
    if content is not None:
        path.write_bytes(video.read_bytes()[:600] if content == "cut" else content)
    words = refused("infer", *MODEL, video, path, "--out", tmp_path / "out")
    assert f"video {path}" in words
    assert not (tmp_path / "out").exists()


class Camera:
    """A camera that gives three pictures, and then Ctrl-C is pressed."""

    def __init__(self, place):
        self.left, self.open = 3, place == 0

    def isOpened(self):
        return self.open

    def read(self):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return True, np.full((48, 64, 3), 80 * self.left, np.uint8)

    def get(self, key):
        return 0.0

    def release(self):
        self.open = False


def test_camera(run, refused, monkeypatch, tmp_path):
    """Ctrl-C ends it, and the files hold what was seen."""
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    monkeypatch.setattr("terrazzo.tools.cli.end_children", lambda: None)
    result = run("infer", *MODEL, 0, "--out", tmp_path)
    assert result.exit_code == 130
    assert names(tmp_path) == ["camera_0.jsonl", "camera_0.overlay.mp4"]
    assert [record["frame"] for record in lines(tmp_path / "camera_0.jsonl")] == [0, 1, 2]
    assert "camera 5 cannot be opened" in refused("infer", *MODEL, 5, "--out", tmp_path)


def test_an_interrupted_file_leaves_nothing(run, video, monkeypatch, tmp_path):
    monkeypatch.setattr("terrazzo.tools.cli.end_children", lambda: None)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(clips.ClipWriter, "add", interrupted)
    assert run("infer", *MODEL, video, "--out", tmp_path).exit_code == 130
    assert names(tmp_path) == []


def test_refusals(refused, video, monkeypatch, tmp_path):
    out = ("--out", tmp_path / "out")
    assert "is for pictures" in refused("infer", "mctf_deit_tiny", video, "--show-tokens", *out)
    assert "leave --batch out" in refused("infer", "mctf_deit_tiny", video, "--show-tokens", "--batch", 2, *out)

    def missing():
        raise ModuleNotFoundError("No module named 'cv2'", name="cv2")

    monkeypatch.setattr(clips, "_opencv", missing)
    assert "[video]'" in refused("infer", *MODEL, video, *out)
    assert not (tmp_path / "out").exists()
