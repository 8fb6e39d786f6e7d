"""A model that is not here: its header fetched by HTTP range requests into a sparse file of the full length.

A GGUF header is complete up to the weights, so everything that reads headers, llama.cpp's own load without allocation included,
takes such a file for the model. Only some megabytes are fetched, however large the model is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import quote, unquote, urlsplit

from spac.errors import ModelFileError
from spac.gguf.check import SPLIT_NAME, ModelFacts, check_model
from spac.gguf.reader import parse_gguf
from spac.host.memory import MIB

if TYPE_CHECKING:
    from http.client import HTTPResponse

HUB: Final = "https://huggingface.co"
HUB_VARIABLE: Final = "HF_ENDPOINT"  # as huggingface_hub has it: another address of the hub
TIMEOUT_S: Final = 30
FIRST_BYTES: Final = 1 * MIB  # of the first request; each further one doubles what is there
MAX_HEADER_BYTES: Final = 256 * MIB  # the largest vocabularies take about 20 MiB

_HUB_NAME: Final = re.compile(r"hf:(?P<repo>[^/\s]+/[^/\s@]+)(@(?P<revision>[^/\s]+))?/(?P<file>\S+\.gguf)")
_CONTENT_RANGE: Final = re.compile(r"bytes (?P<first>\d+)-(?P<last>\d+)/(?P<total>\d+)")


def is_remote(model: str) -> bool:
    """Whether a model's name means a file that must be fetched."""
    return model.lower().startswith(("http://", "https://", "hf:"))


def resolve(model: str) -> str:
    """The URL of a remote model: as it is, or of "hf:OWNER/REPO[@REVISION]/FILE.gguf" at the hub, or what $HF_ENDPOINT names.

    Raises:
        ModelFileError: neither of the two.
    """
    if not model.lower().startswith("hf:"):
        if not urlsplit(model).netloc:
            raise ModelFileError(f"{model}: names no host; write https://HOST/PATH/FILE.gguf")
        return model
    match = _HUB_NAME.fullmatch(model)
    if match is None:
        raise ModelFileError(f"{model}: is not a model of the hub; write hf:OWNER/REPO/FILE.gguf")
    hub = (os.environ.get(HUB_VARIABLE) or HUB).rstrip("/")
    if not hub.lower().startswith(("http://", "https://")):
        raise ModelFileError(f"{model}: {HUB_VARIABLE} is {hub!r}, expected an address such as {HUB}")
    return f"{hub}/{match['repo']}/resolve/{quote(match['revision'] or 'main', safe='')}/{quote(match['file'])}"


@contextlib.contextmanager
def headers_of(model: str) -> Iterator[tuple[tuple[str, ...], ModelFacts]]:
    """Local files with a model's headers, and its facts: the files themselves, or sparse copies of remote ones that go at the end.

    The facts name the URLs; the paths of copies must not be shown.

    Raises:
        ModelFileError: it cannot be found or fetched, or is no model that spac knows.
    """
    if not is_remote(model):
        facts = check_model(model)
        yield facts.parts, facts
        return
    url = resolve(model)
    with tempfile.TemporaryDirectory(prefix="spac-header-") as folder:
        urls = {str(_fetch(url, Path(folder))): url}
        first = next(iter(urls))
        for other in _other_parts(first, url):
            urls[str(_fetch(other, Path(folder)))] = other
        try:
            facts = check_model(first)
        except ModelFileError as e:
            raise ModelFileError(_with_urls(str(e), urls)) from None
        yield facts.parts, dataclasses.replace(facts, path=url, parts=tuple(urls[part] for part in facts.parts))


def _with_urls(text: str, urls: dict[str, str]) -> str:
    """A message about copies, as one about what they are copies of."""
    for path, url in urls.items():
        text = text.replace(path, url)
    return text.replace(str(Path(next(iter(urls))).parent) + os.sep, "")


def _other_parts(first: str, url: str) -> list[str]:
    """URLs of a split model's other parts."""
    parts = urlsplit(url)
    folder, _, name = parts.path.rpartition("/")
    match = SPLIT_NAME.match(unquote(name))
    if match is None or int(match["number"]) != 1:
        return []
    stem, count = match["stem"], int(match["count"])
    names = (f"{stem}-{number:05d}-of-{count:05d}.gguf" for number in range(2, min(count, 999) + 1))
    return [parts._replace(path=f"{folder}/{quote(other)}").geturl() for other in names]


def _fetch(url: str, folder: Path) -> Path:
    """Fetch one file's header into a sparse file of the same name."""
    name = Path(unquote(urlsplit(url).path)).name or "model.gguf"
    remote = _RemoteFile(url)
    path = folder / name
    try:
        with path.open("wb") as file:
            header = parse_gguf(url, remote.size, remote.read)
            remote.fetch(header.header_bytes)
            file.write(remote.data)
            file.truncate(remote.size)
    except OSError as e:
        raise ModelFileError(
            f"{url}: its header cannot be kept in {folder.parent}: {e.strerror or e}; set TMPDIR to a folder that takes large sparse files"
        ) from None
    return path


class _RemoteFile:
    """The beginning of a file on a server, fetched as far as it is asked for."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.data = bytearray()
        self.size = -1  # not known before the first answer
        self.fetch(FIRST_BYTES)

    def read(self, n: int, offset: int) -> bytes:
        """As os.pread; at least one byte if there is one."""
        self.fetch(min(offset + n, self.size))
        return bytes(self.data[offset : offset + n])

    def fetch(self, end: int) -> None:
        """Have all bytes up to `end`, and some more, so that requests are few."""
        if end <= len(self.data) or len(self.data) == self.size:
            return
        if end > MAX_HEADER_BYTES:
            raise ModelFileError(f"{self.url}: its header has more than {MAX_HEADER_BYTES >> 20} MiB; this is no sound model file")
        end = max(end, 2 * len(self.data))
        while len(self.data) < (end if self.size < 0 else min(end, self.size)):
            self._request(len(self.data), end)

    def _request(self, begin: int, end: int) -> None:
        """One range request: adds what it brings."""
        import http.client
        import urllib.error
        import urllib.request

        try:
            request = urllib.request.Request(self.url, headers={"Range": f"bytes={begin}-{end - 1}", "User-Agent": "spac"})
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                self._take(response, begin, end)
        except ModelFileError:
            raise
        except urllib.error.HTTPError as e:
            raise ModelFileError(f"{self.url}: {_STATUS.get(e.code, f'the server answered {e.code} {e.reason}')}") from None
        except urllib.error.URLError as e:
            reason = e.reason.strerror if isinstance(e.reason, OSError) and e.reason.strerror else e.reason
            raise ModelFileError(f"{self.url}: the server cannot be reached: {reason}; check the address and the network") from None
        except (OSError, http.client.HTTPException, ValueError) as e:
            raise ModelFileError(f"{self.url}: fetching the header failed: {str(e) or type(e).__name__}; try again") from None

    def _take(self, response: HTTPResponse, begin: int, end: int) -> None:
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if response.status != 206 or match is None or int(match["first"]) != begin:
            raise ModelFileError(
                f"{self.url}: the server does not answer range requests (it said {response.status});"
                " download the file and give its path, or another address"
            )
        if self.size not in (-1, int(match["total"])):
            raise ModelFileError(f"{self.url}: the file changed while its header was fetched; try again")
        self.size = int(match["total"])
        data = response.read(end - begin)
        if not data:
            raise ModelFileError(f"{self.url}: the server sent nothing; try again")
        self.data += data


_STATUS: Final = {
    401: "is private or gated (401): download it with an account, and give its path",
    403: "is private or gated (403): download it with an account, and give its path",
    404: "does not exist (404): check the name",
    416: "is empty (416)",
}
