"""An HTTP proxy in front of an S3 service that misbehaves when it is told to.

It passes requests on byte for byte, so signatures (which cover the Host header) stay valid.
"""

import contextlib
import dataclasses
import http.client
import random
import socket
import threading
import time
from urllib.parse import urlsplit

BUSY = "<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
BROKEN = "<Error><Code>InternalError</Code><Message>We met an error.</Message></Error>"
EXPIRED = "<Error><Code>ExpiredToken</Code><Message>The token has expired.</Message></Error>"
DENIED = "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
ANSWERS = {"500": ("500 Internal Server Error", BROKEN), "503": ("503 Slow Down", BUSY),
           "expired": ("400 Bad Request", EXPIRED), "denied": ("403 Forbidden", DENIED)}
TRANSIENT = ("500", "503", "drop", "lost", "cut", "stall")
"""drop: no answer, not passed on. lost: passed on, no answer. cut: an answer with half its body.
stall: silence beyond the timeout."""


@dataclasses.dataclass
class Request:
    """One request as it came, and what was done to it."""

    method: str
    path: str
    fault: str | None = None


class FaultProxy:
    """`fault(request, number)` names what happens to each request; None passes it on."""

    def __init__(self, upstream: str, stall: float = 3.0) -> None:
        parts = urlsplit(upstream)
        self._upstream, self._stall = (parts.hostname, parts.port), stall
        self._lock = threading.Lock()
        self.requests: list[Request] = []
        self.fault = lambda request, number: None
        self._server = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.endpoint = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def seeded(self, seed: int, share: float = 0.25, kinds=TRANSIENT) -> None:
        """A share of all requests fails, in ways and at moments that follow from the seed."""
        draw = random.Random(seed)
        self.fault = lambda request, number: (draw.choice(kinds) if draw.random() < share else None)

    def faults(self) -> list[str]:
        """What was done so far."""
        return [request.fault for request in self.requests if request.fault]

    def close(self) -> None:
        self._server.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """Requests of one connection, until either side has enough."""
        with contextlib.suppress(OSError, http.client.HTTPException), client:
            stream = client.makefile("rb")
            while head := _read_head(stream):
                fields = _fields(head)
                if fields.get("expect", "").lower() == "100-continue":
                    client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                body = stream.read(int(fields.get("content-length", 0)))
                method, path, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
                request = Request(method, path)
                with self._lock:
                    request.fault = self.fault(request, len(self.requests))
                    self.requests.append(request)
                if not self._answer(client, request, head, body):
                    return

    def _answer(self, client: socket.socket, request: Request, head: bytes, body: bytes) -> bool:
        """Answers or not; whether the connection lives on."""
        if request.fault in ANSWERS:
            status, text = ANSWERS[request.fault]
            shown = b"" if request.method == "HEAD" else text.encode()
            client.sendall(f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: "
                           f"{len(shown)}\r\n\r\n".encode() + shown)
            return True
        if request.fault == "drop":
            return False
        if request.fault == "stall":
            time.sleep(self._stall)
            return False
        answer = self._pass_on(request, head, body)
        if request.fault == "lost":
            return False
        if request.fault == "cut":
            start = answer.index(b"\r\n\r\n") + 4
            if len(answer) > start:  # otherwise there is nothing to cut: no answer
                client.sendall(answer[:(start + len(answer)) // 2])
            return False
        client.sendall(answer)
        return True

    def _pass_on(self, request: Request, head: bytes, body: bytes) -> bytes:
        """The service's whole answer."""
        with socket.create_connection(self._upstream, timeout=120) as server:
            lines = [line for line in head.split(b"\r\n")
                     if not line.lower().startswith((b"expect:", b"connection:"))]
            server.sendall(b"\r\n".join([*lines[:-2], b"Connection: close", b"", b""]) + body)
            response = http.client.HTTPResponse(server, method=request.method)
            response.begin()
            content = response.read()
            kept = [(name, value) for name, value in response.getheaders() if name.lower() not in
                    ("transfer-encoding", "connection", "content-length")]
            length = response.getheader("content-length") if request.method == "HEAD" else None
            kept.append(("Content-Length", length or str(len(content))))
            text = "".join(f"{name}: {value}\r\n" for name, value in kept)
            start = f"HTTP/1.1 {response.status} {response.reason}\r\n{text}\r\n"
            return start.encode() + content


def _read_head(stream) -> bytes:
    lines = b""
    while line := stream.readline(65536):
        lines += line
        if line == b"\r\n":
            return lines
    return b""


def _fields(head: bytes) -> dict[str, str]:
    pairs = (line.partition(":") for line in head.decode("latin-1").split("\r\n")[1:] if line)
    return {name.strip().lower(): value.strip() for name, _, value in pairs}
