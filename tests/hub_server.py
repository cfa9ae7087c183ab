"""A Hub on localhost: what huggingface_hub's client asks of the real one to push and to load a model, over HTTP.

Repositories live in memory, commits are whole or not at all, large files go the LFS way. Requests can be made to fail.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


TOKEN = "hf_test"
LARGE = (".safetensors", ".bin")


@dataclass
class Repository:
    """`commits`: oid -> files (path -> (content, whether it is large)), in order; the last is `main`. `asked`: what it
    was made with. `proposed`: the files of each pull request."""

    asked: dict = field(default_factory=dict)
    commits: dict[str, dict[str, tuple[bytes, bool]]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    proposed: list[dict[str, tuple[bytes, bool]]] = field(default_factory=list)

    @property
    def head(self):
        return list(self.commits)[-1]

    @property
    def files(self):
        return self.commits[self.head]

    def commit(self, files, message):
        oid = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[oid] = files
        self.messages.append(message)
        return oid


@dataclass
class Failure:
    """The next `times` requests of this kind fail: with a status, or the connection is closed, before (`"close"`) or
    in the middle of (`"half"`) the body."""

    method: str
    path: str
    how: int | str
    times: int = 1


class HubServer:
    """Runs in a thread between `with` and the end of its block.

    Attributes:
        repositories (`dict[str, Repository]`): By name.
        objects (`dict[str, bytes]`): Large files by their sha256, committed or not.
        received (`list[str]`): The same as they arrived, those that came twice twice.
        log, unknown (`list[str]`): Method and path of every request, and of those that this server does not know.
    """

    def __init__(self):
        self.repositories, self.objects, self.log, self.failures = {}, {}, [], []
        self.unknown, self.received = [], []
        self.lock = threading.RLock()

        class Handler(_Handler):
            hub = self

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._server.server_close()

    def count(self, pattern):
        return sum(bool(re.search(pattern, entry)) for entry in self.log)


class Refused(Exception):
    """A request, with a status and what the client reads of it."""

    def __init__(self, status, code=None, message="", headers=None, **body):
        self.status, self.body = status, {"error": message, **body}
        self.headers = headers or {}
        self.headers |= ({"X-Error-Code": code} if code else {}) | ({"X-Error-Message": message} if message else {})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *args):
        pass

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    # ---- One request ----

    def _answer(self):
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.log.append(f"{self.command} {path}")
            failure = next(
                (
                    failure
                    for failure in self.hub.failures
                    if failure.times and failure.method == self.command and re.search(failure.path, path)
                ),
                None,
            )
            if failure is not None:
                failure.times -= 1
        if failure is not None and failure.how in ("close", "half"):
            if failure.how == "half":
                self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            self.close_connection = True
            self.connection.close()
            return
        body = self._body()
        try:
            if failure is not None:
                raise Refused(failure.how, message="Internal Error - We're working hard to fix this")
            with self.hub.lock:
                for method, pattern, handler in ROUTES:
                    match = re.fullmatch(pattern, path)
                    if match and self.command in method:
                        if self.command in ("POST", "PUT") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                            if not path.startswith("/lfs/"):  # there the address is the permission
                                raise Refused(401, message="Invalid username or password.")
                        return self._send(200, *handler(self, body, **match.groupdict()))
                self.hub.unknown.append(f"{self.command} {path}")
            raise Refused(404, message="Not Found")
        except Refused as refused:
            self._send(refused.status, refused.body, refused.headers)

    def _body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status, content, headers=None):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers = {"Content-Type": "application/json", **(headers or {})}
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # ---- What is asked ----

    def _repository(self, name):
        if name not in self.hub.repositories:
            raise Refused(404, "RepoNotFound", "Repository not found")
        return self.hub.repositories[name]

    def _commit_of(self, name, revision):
        repository = self._repository(name)
        oid = repository.head if revision == "main" else revision
        if oid not in repository.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid, repository.commits[oid]

    def whoami(self, body):
        return ({"name": "user", "type": "user", "orgs": [], "auth": {"type": "access_token"}},)

    def create_repository(self, body):
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'user'}/{asked['name']}"
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repositories:
            raise Refused(409, message="You already created this model repo", url=url)
        self.hub.repositories[name] = Repository(asked)
        self.hub.repositories[name].commit(
            {".gitattributes": (b"*.safetensors filter=lfs\n", False)}, "initial commit"
        )
        return ({"url": url, "name": name},)

    def validate_yaml(self, body):
        content = json.loads(body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        errors = []
        try:
            values = yaml.safe_load(match.group(1)) if match else {}
        except yaml.YAMLError as error:
            errors.append({"message": str(error)})
        else:
            for result in [entry for model in values.get("model-index", []) for entry in model["results"]]:
                if not {"task", "dataset", "metrics"} <= result.keys():
                    errors.append({"message": '"model-index[0].results[0]" is incomplete'})
        if errors:
            raise Refused(400, errors=errors)
        return ({"errors": [], "warnings": []},)

    def repository_info(self, body, name, revision="main"):
        oid, files = self._commit_of(name, revision)
        return ({"id": name, "sha": oid, "private": False, "siblings": [{"rfilename": path} for path in files]},)

    def tree(self, body, name, revision, folder=None):
        folder = folder or ""
        _, files = self._commit_of(name, revision)
        inside = {path: entry for path, entry in files.items() if path.startswith(folder)}
        if folder and not inside:
            raise Refused(404, "EntryNotFound", "Entry not found")
        return (
            [
                {"type": "file", "path": path, "size": len(content), "oid": blob_oid(content)}
                for path, (content, _) in inside.items()
            ],
        )

    def preupload(self, body, name, revision):
        _, files = self._commit_of(name, revision)
        answer = []
        for file in json.loads(body)["files"]:
            content, large = files.get(file["path"], (None, False))
            oid = None if content is None else hashlib.sha256(content).hexdigest() if large else blob_oid(content)
            mode = "lfs" if file["path"].endswith(LARGE) else "regular"
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return ({"files": answer},)

    def lfs_batch(self, body, name):
        self._repository(name)
        objects = []
        for entry in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}
            verify = {"verify": {"href": f"{self.hub.url}/lfs/{entry['oid']}/verify"}}
            there = entry["oid"] in self.hub.objects
            objects.append({**entry, **({} if there else {"actions": {**upload, **verify}})})
        return ({"transfer": "basic", "objects": objects},)

    def lfs_upload(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, message="The content does not have this sha256")
        self.hub.objects[oid] = body
        self.hub.received.append(oid)
        return (b"",)

    def lfs_verify(self, body, oid):
        if len(self.hub.objects.get(oid, b"")) != json.loads(body)["size"]:
            raise Refused(404, message="Not uploaded")
        return ({},)

    def commit(self, body, name, revision):
        repository = self._repository(name)
        _, files = self._commit_of(name, revision)
        files, message = dict(files), ""
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"]), False
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refused(400, message=f"LFS pointer pointed to a file that does not exist: {value['path']}")
                files[value["path"]] = self.hub.objects[value["oid"]], True
            else:
                raise Refused(400, message=f"This server knows no {entry['key']}")
        url, pull = f"{self.hub.url}/{name}", {}
        if "create_pr" in parse_qs(urlsplit(self.path).query):
            oid = repository.head
            repository.proposed.append(files)
            pull = {"pullRequestUrl": f"{url}/discussions/{len(repository.proposed)}"}
        else:
            oid = repository.commit(files, message)
        return ({"success": True, "commitOid": oid, "commitUrl": f"{url}/commit/{oid}", "hookOutput": "", **pull},)

    def resolve(self, body, name, revision, path):
        oid, files = self._commit_of(name, revision)
        headers = {"X-Repo-Commit": oid}
        if path not in files:
            raise Refused(404, "EntryNotFound", "Entry not found", headers=headers)
        content, large = files[path]
        etag = hashlib.sha256(content).hexdigest() if large else blob_oid(content)
        headers |= {"ETag": f'"{etag}"', "Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        if large:
            headers |= {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        return content, headers


def blob_oid(content):
    """As git names it."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


NAME = r"(?P<name>[^/]+/[^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create_repository),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("GET", rf"/api/models/{NAME}", _Handler.repository_info),
    ("GET", rf"/api/models/{NAME}/revision/(?P<revision>[^/]+)", _Handler.repository_info),
    ("GET", rf"/api/models/{NAME}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", _Handler.tree),
    ("POST", rf"/api/models/{NAME}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]+)", _Handler.lfs_upload),
    ("POST", "/lfs/(?P<oid>[0-9a-f]+)/verify", _Handler.lfs_verify),
    ("POST", rf"/api/models/{NAME}/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("GET HEAD", rf"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
