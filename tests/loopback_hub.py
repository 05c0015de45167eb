"""A stand-in for the Hugging Face Hub on 127.0.0.1: as much of its HTTP API as `HfApi` and `datasets` use to push.

Repositories live in memory. Differences from a plain file store that matter to the tests are kept: private
repositories are invisible without a token, read-only tokens and foreign organisations get 403, large files go
through LFS, a commit on a stale parent gets 412, and a card's YAML is checked. `fail` lets a test break any call.

    with LoopbackHub() as hub:
        HfApi(endpoint=hub.url, token="hf_test").create_repo("tester/x", repo_type="dataset")
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

REPO = r"(?P<repo>[^/]+/[^/]+)"


@dataclass
class Repo:
    """One repository; `refs` maps a branch or pull request to its files, `commits` lists what was pushed."""

    id: str
    kind: str
    private: bool
    gated: Any = False
    refs: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    heads: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    commits: list[dict[str, Any]] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        return self.refs["main"]


@dataclass
class Token:
    """An access token of the one user: `role` is write, read or fineGrained (then `scopes` as whoami reports them)."""

    role: str = "write"
    scopes: list[dict[str, Any]] = field(default_factory=list)


class LoopbackHub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, user: str = "tester", orgs: dict[str, str] | None = None, lfs_bytes: int = 10_000_000):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.user = user
        self.orgs = {"myorg": "write", "readers": "read"} if orgs is None else orgs
        self.tokens = {"hf_test": Token(), "hf_read": Token("read")}
        self.lfs_bytes = lfs_bytes
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.log: list[str] = []
        #: A test's saboteur: called with ("POST", "/api/…"), an HTTP status refuses the call, None lets it pass.
        self.fail: Callable[[str, str], int | None] = lambda method, path: None
        self.lock = threading.RLock()

    def dataset(self, repo_id: str) -> Repo:
        return self.repos[("dataset", repo_id)]

    def writes(self) -> list[str]:
        """The calls so far that change something on the Hub."""
        return [call for call in self.log if not call.startswith(("GET", "HEAD")) and "validate-yaml" not in call]

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()
        self.server_close()


class _HubError(Exception):
    def __init__(self, status: int, code: str, message: str = ""):
        super().__init__(message or code)
        self.status, self.code, self.message = status, code, message or code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LoopbackHub

    # -- transport

    def log_message(self, *args: object) -> None:
        pass

    def handle_any(self) -> None:
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), parse_qs(parts.query)
        body = self._body()
        hub = self.server
        with hub.lock:
            hub.log.append(f"{self.command} {path}")
        try:
            if status := hub.fail(self.command, path):
                raise _HubError(status, "Sabotaged", "the test broke this call")
            for pattern, method in _ROUTES:
                if found := re.fullmatch(pattern, path):
                    with hub.lock:
                        return self._send(*method(self, query, body, **found.groupdict()))
            raise _HubError(404, "NotFound", path)
        except _HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            self._send(error.status, {"error": error.message}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        raw = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    # -- who may do what

    def _token(self) -> Token | None:
        return self.server.tokens.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def _signed_in(self) -> Token:
        token = self._token()
        if token is None:
            raise _HubError(401, "Unauthorized", "Invalid username or password.")
        return token

    def _repo(self, kind: str, repo: str) -> Repo:
        found = self.server.repos.get((kind, repo))
        # As on the Hub, what one may not see does not exist.
        if found is None or (found.private and self._token() is None):
            raise _HubError(401 if self._token() is None else 404, "RepoNotFound", "Repository not found")
        return found

    def _may_write(self, repo: str) -> None:
        token = self._signed_in()
        owner = repo.split("/")[0]
        if token.role == "fineGrained":
            names = {s["entity"]["name"] for s in token.scopes if "repo.write" in s["permissions"]}
            allowed = owner in names or repo in names
        else:
            mine = owner == self.server.user or self.server.orgs.get(owner, "none") in ("admin", "write", "contributor")
            allowed = token.role == "write" and mine
        if not allowed:
            raise _HubError(403, "Forbidden", f"You don't have the rights to write to {repo}")

    # -- the API

    def whoami(self, query: dict, body: bytes) -> tuple:
        token = self._signed_in()
        access: dict[str, Any] = {"displayName": "test", "role": token.role}
        if token.role == "fineGrained":
            access["fineGrained"] = {"global": [], "scoped": token.scopes}
        orgs = [{"type": "org", "name": name, "roleInOrg": role} for name, role in self.server.orgs.items()]
        auth = {"type": "access_token", "accessToken": access}
        return 200, {"type": "user", "name": self.server.user, "orgs": orgs, "auth": auth}

    def validate_yaml(self, query: dict, body: bytes) -> tuple:
        content = json.loads(body)["content"]
        front = re.match(r"---\r?\n(.*?)\r?\n---", content, re.S)
        try:
            data = yaml.safe_load(front[1]) if front else {}
        except yaml.YAMLError as error:
            return 400, {"errors": [{"message": str(error)}], "warnings": []}
        names = [config["config_name"] for config in data.get("configs", [])]
        bad = [name for name in names if re.search(r'[<>:/\\|?*"]', name)]
        if bad or len(set(names)) != len(names):
            return 400, {"errors": [{"message": f"bad or repeated config names {bad or names}"}], "warnings": []}
        return 200, {"errors": [], "warnings": []}

    def create(self, query: dict, body: bytes) -> tuple:
        ask = json.loads(body)
        kind = ask.get("type") or "model"
        repo_id = f"{ask.get('organization') or self.server.user}/{ask['name']}"
        self._may_write(repo_id)
        url = self._url(kind, repo_id)
        if (kind, repo_id) in self.server.repos:
            return 409, {"error": "You already created this repo", "url": url}
        private = ask.get("visibility") == "private" or ask.get("private") is True
        self.server.repos[(kind, repo_id)] = Repo(repo_id, kind, private)
        return 200, {"url": url, "name": repo_id, "id": repo_id}

    def auth_check(self, query: dict, body: bytes, kind: str, repo: str, write: str | None) -> tuple:
        self._repo(kind, repo)
        if write:
            self._may_write(repo)
        return 200, {}

    def settings(self, query: dict, body: bytes, kind: str, repo: str) -> tuple:
        found = self._repo(kind, repo)
        self._may_write(repo)
        found.gated = json.loads(body).get("gated", found.gated)
        return 200, {}

    def info(self, query: dict, body: bytes, kind: str, repo: str, rev: str | None = None) -> tuple:
        found, ref = self._at(kind, repo, rev)
        siblings = [{"rfilename": name} for name in sorted(found.refs[ref])]
        return 200, {
            "id": repo,
            "_id": repo,
            "sha": found.heads[ref],
            "private": found.private,
            "gated": found.gated,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": siblings,
        }

    def tree(self, query: dict, body: bytes, kind: str, repo: str, rev: str, folder: str | None) -> tuple:
        found, ref = self._at(kind, repo, rev)
        inside = f"{folder}/" if folder else ""
        files = {name: blob for name, blob in found.refs[ref].items() if name.startswith(inside)}
        if folder and not files:
            raise _HubError(404, "EntryNotFound", f"{folder} does not exist")
        listing = [_entry(name, blob) for name, blob in files.items() if "/" not in name[len(inside) :]]
        folders = {inside + name[len(inside) :].split("/")[0] for name in files if "/" in name[len(inside) :]}
        if query.get("recursive", ["false"])[0].lower() in ("true", "1"):
            listing = [_entry(name, blob) for name, blob in files.items()]
            parents = {name.rsplit("/", depth)[0] for name in files for depth in range(1, name.count("/") + 1)}
            folders = {name for name in parents if name.startswith(inside)}
        listing += [{"type": "directory", "path": name, "oid": _sha1(name.encode()), "size": 0} for name in folders]
        return 200, sorted(listing, key=lambda entry: entry["path"])

    def paths_info(self, query: dict, body: bytes, kind: str, repo: str, rev: str) -> tuple:
        found, ref = self._at(kind, repo, rev)
        wanted = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
        files = found.refs[ref]
        listing = [_entry(name, files[name]) for name in wanted if name in files]
        for name in wanted:
            if any(path.startswith(name.rstrip("/") + "/") for path in files):
                listing.append({"type": "directory", "path": name, "oid": _sha1(name.encode()), "size": 0})
        return 200, listing

    def preupload(self, query: dict, body: bytes, kind: str, repo: str, rev: str) -> tuple:
        found, ref = self._at(kind, repo, rev)
        self._may_write(repo)
        answer = []
        for ask in json.loads(body)["files"]:
            blob = found.refs[ref].get(ask["path"])
            mode = "lfs" if ask["size"] >= self.server.lfs_bytes else "regular"
            oid = None if blob is None else _sha1(b"blob %d\0" % len(blob) + blob)
            answer.append({"path": ask["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": answer}

    def lfs_batch(self, query: dict, body: bytes, kind: str | None, repo: str) -> tuple:
        self._may_write(repo)
        objects = []
        for ask in json.loads(body)["objects"]:
            href = f"{self.server.url}/lfs/{ask['oid']}"
            actions = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            known = ask["oid"] in self.server.blobs
            objects.append({"oid": ask["oid"], "size": ask["size"]} | ({} if known else {"actions": actions}))
        return 200, {"transfer": "basic", "objects": objects}

    def lfs_object(self, query: dict, body: bytes, oid: str, verify: str | None) -> tuple:
        if self.command == "PUT":
            if hashlib.sha256(body).hexdigest() != oid:
                raise _HubError(400, "BadRequest", "content does not match its hash")
            self.server.blobs[oid] = body
        return 200, {}

    def commit(self, query: dict, body: bytes, kind: str, repo: str, rev: str) -> tuple:
        found, ref = self._at(kind, repo, rev)
        self._may_write(repo)
        files = dict(found.refs[ref])
        header: dict[str, Any] = {}
        for line in body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                header = value
                if value.get("parentCommit") not in (None, found.heads[ref]):
                    raise _HubError(412, "PreconditionFailed", "A commit has happened since. Please refresh and retry.")
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif key == "deletedFile":
                files.pop(value["path"], None)
        found.refs[ref] = files
        found.heads[ref] = _sha1(body + str(len(found.commits)).encode())
        found.commits.append({"oid": found.heads[ref], "ref": ref, **header})
        url = f"{self._url(kind, repo)}/commit/{found.heads[ref]}"
        return 200, {"success": True, "commitOid": found.heads[ref], "commitUrl": url}

    def resolve(self, query: dict, body: bytes, kind: str | None, repo: str, rev: str, file: str) -> tuple:
        found, ref = self._at(kind or "model", repo, rev)
        blob = found.refs[ref].get(file)
        if blob is None:
            raise _HubError(404, "EntryNotFound", "Entry not found")
        headers = {"ETag": f'"{_sha1(blob)}"', "X-Repo-Commit": found.heads[ref], "Accept-Ranges": "bytes"}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if span:
            start, end = int(span[1]), min(int(span[2] or len(blob)), len(blob) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(blob)}"
            return 206, blob[start : end + 1], headers
        return 200, blob, headers

    # -- helpers

    def _at(self, kind: str, repo: str, rev: str | None) -> tuple[Repo, str]:
        """The repository and the ref that `rev` (a ref, a commit id, or nothing) stands for."""
        found = self._repo(kind, repo)
        if rev is None or rev in found.refs:
            return found, rev or "main"
        for ref, head in found.heads.items():
            if head == rev:
                return found, ref
        raise _HubError(404, "RevisionNotFound", f"no revision {rev}")

    def _url(self, kind: str, repo: str) -> str:
        return f"{self.server.url}/{'' if kind == 'model' else kind + 's/'}{repo}"


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _entry(name: str, blob: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(blob), "oid": _sha1(blob)}


_API = rf"/api/(?P<kind>model|dataset|space)s/{REPO}"
_WEB = rf"/(?:(?P<kind>dataset|space)s/)?{REPO}"
_ROUTES = [
    (r"/api/whoami-v2", _Handler.whoami),
    (r"/api/validate-yaml", _Handler.validate_yaml),
    (r"/api/repos/create", _Handler.create),
    (r"/lfs/(?P<oid>[0-9a-f]{64})(?P<verify>/verify)?", _Handler.lfs_object),
    (rf"{_WEB}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (rf"{_API}/auth-check(?P<write>/write)?", _Handler.auth_check),
    (rf"{_API}/settings", _Handler.settings),
    (rf"{_API}/preupload/(?P<rev>[^/]+)", _Handler.preupload),
    (rf"{_API}/commit/(?P<rev>[^/]+)", _Handler.commit),
    (rf"{_API}/tree/(?P<rev>[^/]+)(?:/(?P<folder>.*))?", _Handler.tree),
    (rf"{_API}/paths-info/(?P<rev>[^/]+)", _Handler.paths_info),
    (rf"{_API}(?:/revision/(?P<rev>[^/]+))?", _Handler.info),
    (rf"{_WEB}/resolve/(?P<rev>[^/]+)/(?P<file>.+)", _Handler.resolve),
]
