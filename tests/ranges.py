"""A stand-in for a hub: serves a folder over HTTP on this machine, with range requests or without."""

from __future__ import annotations

import contextlib
import http.server
import re
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any


class Handler(http.server.SimpleHTTPRequestHandler):
    """Answers `Range: bytes=A-B`; counts what it sends in `server.sent`."""

    def do_GET(self) -> None:
        server: Any = self.server
        path = Path(self.translate_path(self.path))
        if self.path in server.statuses:
            self.send_error(server.statuses[self.path])
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not server.ranges or wanted is None or not path.is_file():
            super().do_GET()
            return
        data, (begin, end) = path.read_bytes(), map(int, wanted.groups())
        if begin >= len(data):
            self.send_error(416)
            return
        part = data[begin : end + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {begin}-{begin + len(part) - 1}/{len(data) + server.growing * len(server.sent)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)
        server.sent.append((self.path, begin, len(part)))

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serve(folder: Path, *, ranges: bool = True, growing: int = 0) -> Iterator[Any]:
    """A server on a free port: `.url` is its address, `.sent` what it sent, `.statuses` paths that it refuses.

    Args:
        growing: bytes by which the files seem to grow with each answer.
    """
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    server.ranges, server.growing, server.sent, server.statuses = ranges, growing, [], {}
    server.handle_error = lambda *_: None  # a client that does not want the rest
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
