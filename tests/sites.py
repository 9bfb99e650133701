"""A server on this machine that cuts, stalls, corrupts and refuses, for the tests of downloads."""

import contextlib
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


class Handler(SimpleHTTPRequestHandler):
    """Serves files by a table; `mood(path, visit)` says what goes wrong with an answer."""

    def __init__(self, *args, site, **kwargs):
        self.site = site
        super().__init__(*args, **kwargs)

    def log_message(self, *args):
        pass

    def do_GET(self):
        path = unquote(self.path).lstrip("/")
        with self.site.lock:
            visit = self.site.visits[path] = self.site.visits.get(path, 0) + 1
        mood = self.site.mood(path, visit)
        if mood in (404, 403, 429, 503):
            return self.send_error(mood)
        body, start = self.site.read(path), 0
        if self.site.continues and (wanted := self.headers.get("Range")):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            self.site.asked.append((path, start))
            if start >= len(body):
                return self.send_error(416)
            body = body[start:]
        if mood == "corrupt":
            body = body[: len(body) // 2] + bytes([body[len(body) // 2] ^ 1]) + body[len(body) // 2 + 1 :]
        if mood == "page":
            body = b"<html>please sign in</html>"
        self.send_response(206 if start else 200)
        if mood != "unsized":
            self.send_header("Content-Length", str(len(body) * (1000 if mood == "endless" else 1)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body[: len(body) // 2] if mood in ("cut", "stall", "unsized") else body)
            if mood == "endless":
                for _ in range(999):
                    self.wfile.write(body)
            if mood == "stall":
                time.sleep(1)


class Site:
    """A running server; `read(path)` gives the content of a file."""

    def __init__(self, read, continues=False):
        self.read, self.visits, self.lock = read, {}, threading.Lock()
        self.continues, self.asked = continues, []  # whether it answers requests for a rest, and which came
        self.mood = lambda path, visit: None
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, site=self))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()  # quick to end
