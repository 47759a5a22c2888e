"""Files behind URLs: whole, checked, and fetched once."""

import hashlib
import os
import re
import time
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import parse_qsl, urldefrag, urlsplit
from urllib.request import Request, urlopen

import torch
from tqdm import tqdm

SECRET = re.compile(r"(?i)(sig|signature|token|secret|password|passwd|credential|auth|authorization|key|key[-_]?id)$")
"""Names of a URL's parameters that nobody else should read, such as X-Amz-Signature."""
TRIES = 3
TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as lost."""


class DownloadError(ValueError):
    """A file cannot be fetched, or is not what was asked for; the message says what to do."""


def fetched(url: str) -> Path:
    """The file behind a URL, from torch.hub's cache or downloaded into it.

    Its SHA-256 is checked against `#sha256=...` at the URL's end, or the beginning of it that model hubs put into names
    (`hrnet_w32-36af842e.pth`).

    Raises:
        DownloadError: if it cannot be fetched, comes cut off, or has another checksum; nothing is kept of it then.
    """
    plain, fragment = urldefrag(url)
    if not plain.startswith(("http://", "https://")):
        raise DownloadError(f"{url}: only http and https are fetched; give a file's path for others")
    split = urlsplit(plain)
    if "@" in split.netloc or any(SECRET.search(name) for name, _ in parse_qsl(split.query, keep_blank_values=True)):
        raise DownloadError(
            f"{split.scheme}://{split.netloc.rpartition('@')[2]}{split.path}: the URL holds a password or a signature, "
            f"which configurations and checkpoints would keep; download the file and give its path"
        )
    # Every model of a hub is called model.safetensors: the whole URL tells them apart.
    name = f"{hashlib.sha256(plain.encode()).hexdigest()[:8]}-{plain.split('?')[0].rsplit('/', 1)[-1]}"
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    digest = wanted(plain, fragment)
    if path.is_file():
        if fragment:  # asked for by name: a cache that others write to is checked as well
            check(path, digest, url)
        return path
    part = path.with_name(f"{name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for last in range(TRIES):
            try:
                download(plain, part)
                break
            except (OSError, HTTPException) as error:
                gone = isinstance(error, HTTPError) and error.code < 500
                if gone or last == TRIES - 1:
                    raise DownloadError(
                        f"{url}: cannot be fetched ({error}); download it by other means to {path}"
                    ) from None
                time.sleep(2**last)
        check(part, digest, url)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def wanted(url: str, fragment: str) -> str:
    """The beginning of the SHA-256 that the file should have; empty if nothing says."""
    if fragment:
        found = re.fullmatch(r"sha256=([0-9a-f]{8,64})", fragment)
        if found is None:
            raise DownloadError(f"{url}#{fragment}: a checksum is told as #sha256=, and 8 to 64 digits from 0 to f")
        return found.group(1)
    found = re.search(r"-([0-9a-f]{8})(?:_\d{8})?\.\w+$", url.split("?")[0])
    return found.group(1) if found else ""


def download(url: str, part: Path) -> None:
    with urlopen(Request(url, headers={"User-Agent": "hrnet-lightning"}), timeout=TIMEOUT) as source:
        length = source.headers.get("Content-Length")
        size = int(length) if length else None
        with part.open("wb") as file, tqdm(total=size, unit="B", unit_scale=True, desc=part.name[9:40]) as bar:
            while chunk := source.read(1 << 17):
                file.write(chunk)
                bar.update(len(chunk))
    got = part.stat().st_size
    if size is not None and got != size:
        raise OSError(f"the connection ended after {got} of {size} bytes")


def check(path: Path, digest: str, url: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(digest):
        raise DownloadError(
            f"{url}: the file's SHA-256 begins with {found[: len(digest)]} instead of {digest}: it was damaged on the "
            f"way, or is another file"
        )
