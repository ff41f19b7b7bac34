"""Checkpoints by address: a file is complete or absent, each address has its file, and no network gives one line."""

import contextlib
import functools
import hashlib
import http.server
import os
import socket
import threading
import time

import pytest
import torch
from mmengine.runner import CheckpointLoader

from terrazzo.errors import InputError
from terrazzo.openmmlab import addresses


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Put PyTorch's cache into a folder of the test, and use no proxy."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_GET(self):
        if "short" in self.path:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"half")
        else:
            super().do_GET()


@pytest.fixture
def server(tmp_path):
    """The address of a server, and the folder that it serves."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", folder
        running.shutdown()


@pytest.fixture
def closed():
    """An address at which no server answers."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def save(path, value, key="a"):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {key: torch.tensor(value)}}, path)


def load(address):
    return CheckpointLoader.load_checkpoint(address)["state_dict"]["a"].item()


def refusal(address):
    with pytest.raises(InputError) as caught:
        CheckpointLoader.load_checkpoint(address)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_two_addresses_with_one_name(server, cache):
    address, folder = server
    for value in (1, 2):
        save(folder / str(value) / "x.pth", value)
    assert [load(f"{address}/{value}/x.pth") for value in (1, 2, 1)] == [1, 2, 1]
    assert len(list(cache.iterdir())) == 2
    (folder / "1" / "x.pth").unlink()
    assert load(f"{address}/1/x.pth") == 1  # fetched once


def test_half_a_file_and_none_leave_nothing(server, cache):
    address, _ = server
    assert "could not be fetched" in refusal(f"{address}/short.pth")
    assert "the server says 404" in refusal(f"{address}/missing.pth")
    assert list(cache.glob("*")) == []


def test_a_page_instead_of_a_file_is_named(server):
    address, folder = server
    (folder / "x.pth").write_text("<html>Log in</html>")
    assert "remove it to fetch it again" in refusal(f"{address}/x.pth")


def test_file_of_the_hub_is_taken_if_its_name_proves_it(cache, closed):
    save(cache / "x.pth", 3)
    digest = hashlib.sha256((cache / "x.pth").read_bytes()).hexdigest()[:8]
    (cache / "x.pth").rename(cache / f"x-{digest}.pth")
    assert load(f"{closed}/x-{digest}.pth") == 3
    save(cache / "x-00000000.pth", 4)
    assert "could not be fetched" in refusal(f"{closed}/x-00000000.pth")


@pytest.mark.parametrize(
    ("scheme", "table"),
    [
        ("torchvision", "get_torchvision_models"),
        ("modelzoo", "get_torchvision_models"),
        ("open-mmlab", "get_external_models"),
        ("openmmlab", "get_external_models"),
        ("mmcls", "get_mmcls_models"),
    ],
)
def test_without_a_network_the_file_to_get_is_named(scheme, table, closed, cache, monkeypatch):
    monkeypatch.setattr(addresses.mmengine.runner.checkpoint, table, lambda: {"resnet": f"{closed}/resnet.pth"})
    line = refusal(f"{scheme}://resnet")
    path = line.rsplit("put it at ", 1)[1]
    assert f"weights {closed}/resnet.pth could not be fetched" in line
    save(addresses.pathlib.Path(path), 5, key="backbone.a" if scheme == "mmcls" else "a")
    assert load(f"{scheme}://resnet") == 5
    assert "did you mean resnet?" in refusal(f"{scheme}://resnet5")


def test_zoos_of_mmengine_are_known():
    for scheme, name in (("torchvision", "resnet50"), ("open-mmlab", "vgg16_caffe"), ("mmcls", "resnet18")):
        assert addresses._zoos()[scheme]()[name].startswith("http")


def test_a_server_that_does_not_answer(monkeypatch):
    monkeypatch.setattr(addresses, "PATIENCE", 0.3)
    with contextlib.closing(socket.socket()) as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        begun = time.perf_counter()
        line = refusal(f"http://127.0.0.1:{silent.getsockname()[1]}/x.pth")
    assert "no answer for 0.3 seconds" in line
    assert time.perf_counter() - begun < 5


def test_unknown_server_and_store():
    assert "could not be fetched (its server is not known" in refusal("https://name.invalid/x.pth")
    assert "s3://bucket/x.pth' could not be fetched by the backend petrel" in refusal("s3://bucket/x.pth")
