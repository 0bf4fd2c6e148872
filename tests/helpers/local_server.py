"""An HTTP server on 127.0.0.1 that runs in a thread until its `with` block ends."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self


class LocalServer(ThreadingHTTPServer):
    """Answers requests by a handler, each in a thread of its own, on a free port."""

    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler]):
        super().__init__(("127.0.0.1", 0), handler)
        self.is_closed = threading.Event()
        """Set when the `with` block ends, so that a handler that hangs on purpose can end."""

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object):
        self.is_closed.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """Ignore clients that have disconnected."""
