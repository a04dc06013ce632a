"""A small Hugging Face Hub on loopback: what huggingface_hub's client asks of it to push and to load, and faults.

Large files go through Git LFS, as on a Hub without Xet (HF_HUB_DISABLE_XET=1).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

LARGE = 10_000  # bytes; the real Hub's limit depends on the file
USERS = {
    "hf_writer": ("ann", "write"),
    "hf_reader": ("ann", "read"),
    "hf_stranger": ("bob", "write"),
    "hf_narrow": ("ann", "fineGrained"),  # and may write nowhere
}


@dataclass
class Fault:
    """What happens to the next `times` requests of a kind instead of an answer."""

    method: str
    path: str  # a regular expression
    status: int | None  # None: the connection is cut after the first bytes of the body
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Repository:
    """Files of the last commit, by path."""

    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr((self.commits, sorted(self.files.items()))).encode()).hexdigest()


class Hub:
    """The state of the server: repositories by kind and name, large files by hash, faults to come."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.lock = threading.RLock()
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.large: dict[str, bytes] = {}
        self.verified: set[str] = set()
        self.faults: list[Fault] = []
        self.requests: list[str] = []

    def model(self, name: str) -> Repository:
        return self.repositories["models", name]

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    self.faults = [f for f in self.faults if f.times > 0]
                    return fault
        return None


@contextmanager
def hub_server() -> Iterator[Hub]:
    """The server, until the context ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    _Handler.hub = hub
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def environment(hub: Hub, home: Any, token: str | None = "hf_writer") -> dict[str, str]:
    """Variables that send a process's client to the server, with its caches and logins in a folder of its own."""
    variables = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HOME": str(home)}
    return variables | ({} if token is None else {"HF_TOKEN": token})


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        hub = self.hub
        hub.requests.append(f"{method} {path}")
        fault = hub.fault_for(method, path)
        if fault is not None and fault.status is None:
            self.rfile.read(min(1000, int(self.headers.get("Content-Length", 0))))
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        body = self._body()
        if fault is not None:
            self._send(fault.status or 0, {"error": "injected"}, headers=fault.headers)
            return
        routes: list[tuple[str, str, Any]] = [
            ("GET", r"/api/whoami-v2", self._whoami),
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/validate-yaml", self._validate),
            ("GET", r"/api/models/(?P<name>.+)/auth-check/write", self._auth_check),
            ("POST", r"/api/models/(?P<name>.+)/preupload/main", self._preupload),
            ("POST", r"/api/models/(?P<name>.+)/commit/main", self._commit),
            ("GET", r"/api/(?P<kind>models|datasets|spaces)/(?P<name>[^/]+/[^/]+)(/revision/[^/]+)?", self._info),
            ("GET", r"/api/models/(?P<name>[^/]+/[^/]+)/tree/.*", self._tree),
            ("POST", r"/(?P<name>.+)\.git/info/lfs/objects/batch", self._batch),
            ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", self._put),
            ("POST", r"/lfs/verify", self._verify),
            ("GET", r"/(?P<name>[^/]+/[^/]+)/resolve/[^/]+/(?P<file>.+)", self._resolve),
            ("HEAD", r"/(?P<name>[^/]+/[^/]+)/resolve/[^/]+/(?P<file>.+)", self._resolve),
        ]
        for verb, pattern, handle in routes:
            matched = re.fullmatch(pattern, path)
            if verb == method and matched:
                with hub.lock:
                    handle(body, **{k: v for k, v in matched.groupdict().items() if v is not None})
                return
        self._send(404, {"error": "Not Found"})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _user(self) -> tuple[str, str] | None:
        return USERS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _may_write(self, name: str) -> bool:
        user = self._user()
        if user is not None and user == (name.split("/")[0], "write"):
            return True
        if user is None:
            self._send(401, {"error": "Invalid credentials"})
        else:
            self._send(403, {"error": "You don't have the rights to write to this repository"})
        return False

    def _known(self, name: str, kind: str = "models") -> Repository | None:
        repository = self.hub.repositories.get((kind, name))
        if repository is None:
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return repository

    def _whoami(self, body: bytes) -> None:
        user = self._user()
        if user is None:
            self._send(401, {"error": "Invalid credentials in Authorization header"})
            return
        token = {"displayName": "test", "role": user[1]}
        self._send(200, {"type": "user", "name": user[0], "auth": {"type": "access_token", "accessToken": token}})

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization'] or (self._user() or ('nobody',))[0]}/{asked['name']}"
        if not self._may_write(name):
            return
        url = {"url": f"{self.hub.endpoint}/{name}"}
        if ("models", name) in self.hub.repositories:
            self._send(409, {"error": "You already created this model repo", **url})
            return
        self.hub.repositories["models", name] = Repository()
        self._send(200, url)

    def _validate(self, body: bytes) -> None:
        errors = card_errors(json.loads(body)["content"])
        self._send(400 if errors else 200, {"errors": [{"message": e} for e in errors], "warnings": []})

    def _auth_check(self, body: bytes, name: str) -> None:
        if self._known(name) and self._may_write(name):
            self._send(200, {})

    def _info(self, body: bytes, kind: str, name: str) -> None:
        repository = self._known(name, kind)
        if repository is not None:
            files = [{"rfilename": path} for path in repository.files]
            self._send(200, {"id": name, "modelId": name, "sha": repository.sha, "siblings": files, "tags": []})

    def _tree(self, body: bytes, name: str) -> None:
        repository = self._known(name)
        if repository is not None:
            files = repository.files.items()
            self._send(200, [{"type": "file", "path": p, "size": len(d), "oid": _git_hash(d)} for p, d in files])

    def _preupload(self, body: bytes, name: str) -> None:
        repository = self._known(name)
        if repository is None or not self._may_write(name):
            return
        answers = []
        for file in json.loads(body)["files"]:
            large = file["size"] > LARGE
            there = repository.files.get(file["path"])
            oid = None if there is None else hashlib.sha256(there).hexdigest() if large else _git_hash(there)
            mode = "lfs" if large else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send(200, {"files": answers})

    def _batch(self, body: bytes, name: str) -> None:
        if not self._may_write(name):
            return
        objects = []
        for asked in json.loads(body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.verified:
                upload = {"href": f"{self.hub.endpoint}/lfs/{asked['oid']}"}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.endpoint}/lfs/verify"}}
            objects.append(answer)
        self._send(200, {"transfer": "basic", "objects": objects})

    def _put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._send(400, {"error": "the content is not what was announced"})
            return
        self.hub.large[oid] = body
        self._send(200, {})

    def _verify(self, body: bytes) -> None:
        asked = json.loads(body)
        if len(self.hub.large.get(asked["oid"], b"")) != asked["size"]:
            self._send(404, {"error": "the object is not there"})
            return
        self.hub.verified.add(asked["oid"])
        self._send(200, {})

    def _commit(self, body: bytes, name: str) -> None:
        repository = self._known(name)
        if repository is None or not self._may_write(name):
            return
        header, *changes = (json.loads(line) for line in body.splitlines())
        files = dict(repository.files)
        for change in changes:
            value = change["value"]
            if change["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif change["key"] == "lfsFile" and value["oid"] in self.hub.verified:
                files[value["path"]] = self.hub.large[value["oid"]]
            else:
                self._send(400, {"error": f"cannot do {change['key']} of {value['path']}"})
                return
        repository.files = files
        repository.commits.append(header["value"]["summary"])
        url = f"{self.hub.endpoint}/{name}/commit/{repository.sha}"
        self._send(200, {"success": True, "commitOid": repository.sha, "commitUrl": url})

    def _resolve(self, body: bytes, name: str, file: str) -> None:
        repository = self._known(name)
        if repository is None:
            return
        content = repository.files.get(file)
        headers = {"X-Repo-Commit": repository.sha}
        if content is None:
            self._send(404, {"error": "Entry not found"}, {**headers, "X-Error-Code": "EntryNotFound"})
        else:
            self._send(200, content, {**headers, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'})


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def card_errors(text: str) -> list[str]:
    """What the Hub would refuse in a card's metadata (docs: hub-docs, modelcard.md), as far as ours has it."""
    matched = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    if matched is None:
        return ["there is no metadata"]
    try:
        data = yaml.safe_load(matched[1])
    except yaml.YAMLError as error:
        return [str(error)]
    texts = ("library_name", "license", "pipeline_tag")
    errors = [f'"{key}" must be a string' for key in texts if not isinstance(data.get(key, ""), str)]
    lists = ("tags", "datasets", "metrics")
    errors += [f'"{k}" must be strings' for k in lists if not all(isinstance(v, str) for v in data.get(k, []))]
    for model in data.get("model-index", []):
        if not isinstance(model.get("name"), str):
            errors.append('"model-index[0].name" is required')
        for result in model.get("results", []):
            required = [("task", "type"), ("dataset", "type"), ("dataset", "name")]
            errors += [f'"{a}.{b}" is required' for a, b in required if not isinstance(result.get(a, {}).get(b), str)]
            metrics = result.get("metrics") or [{}]
            errors += ['"metrics.type and value" are required' for m in metrics if not {"type", "value"} <= m.keys()]
    return errors
