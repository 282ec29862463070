"""A stand-in for the Hugging Face Hub: keeps in memory what is pushed and serves it again, over HTTP."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub's protocol that pushing and loading a small model needs."""

    files: dict[str, dict[str, bytes]]
    """Repository -> path -> content; set by `serve`."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Create a repository, say how files are to be sent, take a commit."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            name = json.loads(body)["name"]
            self.files.setdefault(f"someone/{name}", {})
            return self._send_json({"url": f"{self._address}/someone/{name}", "id": f"someone/{name}"})
        if self.path == "/api/validate-yaml":
            return self._send_json({"errors": [], "warnings": []})
        repository, action = self._match(r"/api/models/(.+?)/(preupload|commit)/main")
        if action == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            plain = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            return self._send_json({"files": plain})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                assert line["value"]["encoding"] == "base64"
                self.files[repository][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        url = f"{self._address}/{repository}/commit/{COMMIT}"
        return self._send_json({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})

    def do_GET(self, is_body_wanted: bool = True) -> None:
        """Serve a file or describe a repository."""
        if self.path == "/api/whoami-v2":
            return self._send_json({"type": "user", "name": "someone", "orgs": []})
        if "/tree/" in self.path:  # folders, of which there are none
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        if self.path.startswith("/api/models/"):
            (repository,) = self._match(r"/api/models/([^/?]+/[^/?]+)")
            if repository not in self.files:
                return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
            names = [{"rfilename": path} for path in self.files[repository]]
            return self._send_json({"id": repository, "sha": COMMIT, "siblings": names, "tags": []})
        if self.path == "/api/agent-harnesses":  # the client library asks for a list of programs that may call it
            return self._send_json({})
        repository, path = self._match(r"/([^/]+/[^/]+)/resolve/[^/]+/([^?]+)")
        if path not in self.files.get(repository, {}):
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        content = self.files[repository][path]
        etag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        return self._send(200, content, etag, is_body_wanted)

    def do_HEAD(self) -> None:
        """Describe a file without its content."""
        self.do_GET(is_body_wanted=False)

    def log_message(self, format: str, *_: object) -> None:
        """Keep quiet."""

    @property
    def _address(self) -> str:
        return f"http://{self.headers['Host']}"

    def _match(self, pattern: str) -> tuple[str, ...]:
        found = re.match(pattern, self.path)
        assert found, f"the stand-in does not know {self.command} {self.path}"
        return found.groups()

    def _send_json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str], is_body_wanted: bool = True) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if is_body_wanted:
            self.wfile.write(content)


def serve() -> ThreadingHTTPServer:
    """Return a server on a free port of this machine; its caller runs and closes it."""
    handler = type("EmptyHub", (Hub,), {"files": {}})
    return ThreadingHTTPServer(("127.0.0.1", 0), handler)
