"""Fetching files from a server that is slow, cut off, corrupt, or sends elsewhere."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import sleep

import pytest
import torch

from hrnet import HRNet, HRNetConfig, download
from hrnet.checkpoints import WeightsError, read
from hrnet.download import DownloadError, fetched

CONTENT = bytes(range(256)) * 2000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    asked = 0

    def do_GET(self):
        Handler.asked += 1
        path = self.path.split("?")[0]
        if path == "/elsewhere":
            self.send_response(302)
            self.send_header("Location", "/good.bin")
            self.end_headers()
            return
        if path == "/to_a_file":
            self.send_response(302)
            self.send_header("Location", "file:///etc/hostname")
            self.end_headers()
            return
        if path == "/gone.bin" or (path == "/busy.bin" and Handler.asked < 3):
            self.send_error(404 if path == "/gone.bin" else 503)
            return
        content = getattr(self.server, "content", CONTENT)
        self.send_response(200)
        if path != "/unsized.bin":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if path == "/stalls.bin":
            self.wfile.write(content[:1000])
            self.wfile.flush()
            sleep(3)
            return
        if path == "/slow.bin":
            for start in range(0, len(content), 100_000):
                self.wfile.write(content[start : start + 100_000])
                sleep(0.05)
            return
        if path == "/cut.bin" or (path == "/once_cut.bin" and Handler.asked < 2):
            self.wfile.write(content[:100_000])
            return
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(download, "TIMEOUT", 1.0)
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    Handler.asked = 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()


def left(folder):
    return [p.name for p in (folder / "checkpoints").iterdir()]


@pytest.mark.parametrize("name", ["good.bin", "unsized.bin", "slow.bin", "elsewhere", "once_cut.bin", "busy.bin?a=b"])
def test_comes_whole(name, server, tmp_path):
    path = fetched(f"{server.url}/{name}")
    assert path.read_bytes() == CONTENT
    asked = Handler.asked
    assert fetched(f"{server.url}/{name}") == path
    assert Handler.asked == asked  # once
    assert left(tmp_path) == [path.name]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cut.bin", "ended after 100000 of 512000 bytes"),
        ("stalls.bin", "timed out"),
        ("gone.bin", "404"),
        ("to_a_file", "file://"),
    ],
)
def test_nothing_is_kept_of_a_failure(name, said, server, tmp_path):
    with pytest.raises(DownloadError, match=f"cannot be fetched .*{said}.*by other means to"):
        fetched(f"{server.url}/{name}")
    assert left(tmp_path) == []


def test_no_server():
    with pytest.raises(DownloadError, match="cannot be fetched"):
        fetched("http://127.0.0.1:9/a.bin")


def test_checksums(server, tmp_path):
    assert fetched(f"{server.url}/a-{DIGEST[:8]}.bin").read_bytes() == CONTENT
    assert fetched(f"{server.url}/b-{DIGEST[:8]}_20200708.bin").read_bytes() == CONTENT
    path = fetched(f"{server.url}/c.bin#sha256={DIGEST}")
    for name in ("d-00000000.bin", f"e.bin#sha256={DIGEST[:-1]}{'0' if DIGEST[-1] != '0' else '1'}"):
        with pytest.raises(DownloadError, match="damaged on the way"):
            fetched(f"{server.url}/{name}")
    assert len(left(tmp_path)) == 3
    path.write_bytes(b"another's")
    with pytest.raises(DownloadError, match="damaged"):
        fetched(f"{server.url}/c.bin#sha256={DIGEST}")
    with pytest.raises(DownloadError, match="8 to 64 digits"):
        fetched(f"{server.url}/c.bin#md5=12")


@pytest.mark.parametrize("secret", ["bob:HUNTER2@{}", "{}?X-Amz-Signature=HUNTER2", "{}?a=b&sig=HUNTER2&download=1"])
def test_secrets_are_not_kept(secret):
    """In configurations, checkpoints and messages."""
    url = "http://" + (secret.format("nowhere.invalid/a.pth"))
    with pytest.raises(DownloadError, match=r"http://nowhere\.invalid/a\.pth: the URL holds a password") as error:
        fetched(url)
    assert "HUNTER2" not in str(error.value)


def test_weights_by_url(server, tmp_path):
    net = HRNet(HRNetConfig(4, modules=(1, 1, 1), blocks=1, stem=(1, 4)))
    torch.save(net.state_dict(), tmp_path / "a.pth")
    server.content = (tmp_path / "a.pth").read_bytes()
    assert read(f"{server.url}/a.pth").config.width == 4
    with pytest.raises(WeightsError, match="404"):
        read(f"{server.url}/gone.bin")
    with pytest.raises(WeightsError, match="only http and https"):
        read("file:///a.pth")
