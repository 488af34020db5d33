"""An HTTP proxy before an object store that loses answers, resets connections inside a body, or says that it is busy."""

import http.client
import socket
import struct
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

FAULTS = ("answer lost", "body cut", "busy", "refused")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a head and a body apart would wait 40 ms for each other
    wbufsize = -1

    def log_message(self, *_):
        pass

    def _pass_on(self):
        proxy = self.server.proxy
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = proxy.next_fault(self.command, self.path)
        if fault == "refused":
            self._reset()
            return
        if fault == "busy":
            text = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
            self.send_response(503)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text if self.command != "HEAD" else b"")
            return
        there = http.client.HTTPConnection(proxy.host, proxy.port, timeout=30)
        there.request(self.command, self.path, body or None, dict(self.headers))
        answer = there.getresponse()
        data = answer.read()
        there.close()
        if fault == "answer lost":
            self._reset()
            return
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", answer.getheader("Content-Length") or str(len(data)))
        self.end_headers()
        if fault == "body cut":
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self._reset()
            return
        self.wfile.write(data)

    def _reset(self):
        """Close with RST instead of an orderly end."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.shutdown(socket.SHUT_RDWR)  # close() alone would wait for the files that read and write it


for _method in ("GET", "PUT", "POST", "HEAD", "DELETE"):
    setattr(_Handler, f"do_{_method}", _Handler._pass_on)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        """Say nothing: the client resets connections, too."""

    def shutdown_request(self, request):
        """Close quietly a connection that was reset."""
        try:
            super().shutdown_request(request)
        except OSError:
            request.close()


class LossyProxy:
    """Counts requests, and disturbs the n-th and those after it, `times` in all."""

    def __init__(self, endpoint: str) -> None:
        self.host, self.port = urlsplit(endpoint).hostname, urlsplit(endpoint).port
        self._lock = threading.Lock()
        self.disturb()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def disturb(self, fault: str | None = None, n: int = 0, times: int = 1) -> None:
        with self._lock:
            self.fault, self.n, self.times = fault, n, times
            self.requests: list[str] = []

    def next_fault(self, method: str, path: str) -> str | None:
        with self._lock:
            self.requests.append(f"{method} {path}")
            count = len(self.requests)
            return self.fault if self.fault and self.n <= count < self.n + self.times else None

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def lossy(endpoint: str):
    proxy = LossyProxy(endpoint)
    try:
        yield proxy
    finally:
        proxy.close()
