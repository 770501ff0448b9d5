"""A small Hugging Face hub on the loopback address, for the real client `huggingface_hub`.

It answers what the client asks for a download: the commit of a revision, the list of files, and
the files themselves, whole or by byte ranges. As on the hub, a large file is a redirect to another
host, which gets no token. It lists the names of its models and data sets. It also takes uploads:
the list of files, large files at an address of their own, and a commit with the rest.
"""

import base64
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote

import programs
import yaml

LARGE = 100_000  # bytes from which a file is a redirect


class Refusal(NamedTuple):
    """What the next request that contains `text` gets; without a status, half of the file."""

    text: str
    status: int | None
    headers: dict[str, str]


class SmallHub:
    """The hub and what it was asked for.

    Attributes:
      url: Value for HF_ENDPOINT.
      repositories: The files by repository and revision: {"owner/name": {"main": {file: bytes}}}.
      asked: The requests, such as "GET /owner/name/resolve/COMMIT/config.json".
      refusals: What the next requests get instead of an answer.
      token: The token that every request needs; None: none.
      owner: Owner of the token, who may upload.
      private: The models that were created as private ones.
    """

    def __init__(self, url):
        self.url = url
        self.repositories = {}
        self.asked = []
        self.refusals = []
        self.token = None
        self.owner = "some-owner"
        self.private = set()
        self.large = {}  # contents of uploaded large files by SHA-256
        self._lock = threading.Lock()  # the client asks for several files at once

    def refuse(self, text, status, **headers):
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.refusals.append(Refusal(text, status, named))

    def break_connection(self, text, times=1):
        self.refusals += [Refusal(text, None, {})] * times

    def take_refusal(self, request):
        with self._lock:
            for refusal in self.refusals:
                if refusal.text in request:
                    self.refusals.remove(refusal)
                    return refusal
        return None

    def downloads(self):
        """The names of the files whose contents were asked for."""
        files = ("/resolve/", "/large/")
        gets = [x for x in self.asked if x.startswith("GET") and any(part in x for part in files)]
        return [line.rpartition("/")[2] for line in gets]


def commit_of(files):
    """The commit of a revision depends on its files."""
    digest = hashlib.sha1()
    for name, contents in sorted(files.items()):
        digest.update(name.encode() + contents)
    return digest.hexdigest()


@contextlib.contextmanager
def running_hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.hub = SmallHub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def hub_in_use(tmp_path, monkeypatch):
    """An empty hub that the client in this process uses, in an empty working directory."""
    import huggingface_hub
    from huggingface_hub import constants

    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(programs, "DIRECTORY", tmp_path / "work")
    with running_hub() as hub:
        # What HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE set when the client is imported.
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # Large files are uploaded by the older protocol, which this hub has.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub
        huggingface_hub.close_session()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub = self.server.hub
        quoted = self.path.partition("?")[0]
        path = unquote(quoted)
        request = f"{self.command} {path}"
        hub.asked.append(request)
        refusal = hub.take_refusal(request)
        if refusal is not None and refusal.status is not None:
            return self._answer(refusal.status, b"{}", **refusal.headers)
        breaks = refusal is not None
        authorization = self.headers.get("Authorization")
        if path.startswith("/large/"):
            if authorization:  # the token is only for the hub
                return self._answer(400, b"{}")
            within = path.removeprefix("/large/")
            kind = "datasets/" if within.startswith("datasets/") else ""
            owner, name, commit, file = within.removeprefix(kind).split("/", 3)
            owner = kind + owner
            return self._send(self._files(f"{owner}/{name}", commit)[file], breaks)
        if hub.token and authorization != f"Bearer {hub.token}":
            return self._answer(401, b"{}", **{"X-Error-Code": "GatedRepo"})
        if path == "/api/whoami-v2":
            return self._answer_json({"name": hub.owner})
        if path in ("/api/models", "/api/datasets"):
            return self._list(path == "/api/datasets")
        if path.startswith("/api/datasets/"):
            owner, name, *rest = path.removeprefix("/api/datasets/").split("/")
            return self._describe(f"datasets/{owner}/{name}", rest)
        if path.startswith("/datasets/"):
            _, owner, name, _, revision, file = path.removeprefix("/").split("/", 5)
            return self._resolve(f"datasets/{owner}/{name}", revision, file, breaks)
        if path.startswith("/api/models/"):
            # A revision such as refs/pr/1 is quoted, so that it is one part of the path.
            owner, name, *rest = map(unquote, quoted.removeprefix("/api/models/").split("/"))
            return self._describe(f"{owner}/{name}", rest)
        if path.count("/") < 5:
            return self._answer(404, b"{}")
        owner, name, _, revision, file = path.removeprefix("/").split("/", 4)
        return self._resolve(f"{owner}/{name}", revision, file, breaks)

    def do_HEAD(self):
        self.do_GET()

    def do_PUT(self):
        contents = self._body()
        self.server.hub.asked.append(f"PUT {self.path}")
        self.server.hub.large[hashlib.sha256(contents).hexdigest()] = contents
        self._answer(200, b"")

    def do_POST(self):
        hub, body = self.server.hub, self._body()
        path = unquote(self.path.partition("?")[0])
        hub.asked.append(f"POST {path}")
        refusal = hub.take_refusal(f"POST {path}")
        if refusal is not None:
            return self._answer(refusal.status, b"{}", **refusal.headers)
        if "/paths-info/" in path:
            owner, name, _, revision = path.removeprefix("/api/datasets/").split("/")
            files = self._files(f"datasets/{owner}/{name}", revision)
            asked = parse_qs(body.decode())["paths"] if b"=" in body else json.loads(body)["paths"]
            entries = [self._entry(files, name) for name in asked]
            return self._answer_json([entry for entry in entries if entry])
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._answer(401, b"{}")
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            header = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
            return self._answer_json({"errors": [] if isinstance(header, dict) else [{}]})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {"oid": x["oid"], "size": x["size"]}
                | {"actions": {"upload": {"href": f"{hub.url}/uploads/{x['oid']}"}}}
                for x in json.loads(body)["objects"]
            ]
            return self._answer_json({"transfer": "basic", "objects": objects})
        owner, name, action, revision = path.removeprefix("/api/models/").split("/")
        files = hub.repositories[f"{owner}/{name}"][revision]
        if action == "preupload":
            modes = [
                {"path": x["path"], "shouldIgnore": False}
                | {"uploadMode": "lfs" if x["size"] >= LARGE else "regular"}
                for x in json.loads(body)["files"]
            ]
            return self._answer_json({"files": modes})
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = commit_of(files)
        url = f"{hub.url}/{owner}/{name}/commit/{oid}"
        return self._answer_json({"success": True, "commitOid": oid, "commitUrl": url})

    def _create(self, asked):
        hub, name = self.server.hub, f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != hub.owner:
            return self._answer(403, b"{}")
        exists = name in hub.repositories
        hub.repositories.setdefault(name, {"main": {}})
        private = (
            asked.get("private") or asked.get("visibility") == "private"
        )  # older clients, newer
        if private and not exists:
            hub.private.add(name)
        return self._answer_json({"url": f"{hub.url}/{name}"}, 409 if exists else 200)

    def _body(self):
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        contents = b""
        while size := int(self.rfile.readline(), 16):  # in chunks
            contents += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return contents

    def _knows(self, repository):
        return repository in self.server.hub.repositories

    def _files(self, repository, revision):
        """The files of a revision, named by a branch or a commit; None if there is none."""
        revisions = self.server.hub.repositories[repository]
        commits = {commit_of(files): files for files in revisions.values()}
        return revisions.get(revision, commits.get(revision))

    def _list(self, datasets):
        """The names of the models or data sets of an author, or with a text in them."""
        asked = parse_qs(self.path.partition("?")[2])
        author, search = (asked.get(name, [""])[0] for name in ("author", "search"))
        found = [
            name.removeprefix("datasets/")
            for name in self.server.hub.repositories
            if name.startswith("datasets/") == datasets
        ]
        found = [x for x in found if x.split("/")[0] == author or not author]
        return self._answer_json([{"id": x} for x in found if search.lower() in x.lower()])

    def _describe(self, repository, rest):
        """The commit of a revision, or its list of files."""
        if repository not in self.server.hub.repositories:
            return self._answer(401, b"{}", **{"X-Error-Code": "RepoNotFound"})
        files = self._files(repository, rest[1] if rest else "main")
        if files is None:
            return self._answer(404, b"{}", **{"X-Error-Code": "RevisionNotFound"})
        if rest and rest[0] == "tree":
            below = "/".join([*rest[2:], ""])
            found = [name for name in files if name.startswith(below)]
            if "recursive=true" not in self.path.lower():
                cut = (name.removeprefix(below).partition("/") for name in found)
                found = list(dict.fromkeys(below + first for first, _, _ in cut))
            if below and not found:
                return self._answer(404, b"{}", **{"X-Error-Code": "EntryNotFound"})
            return self._answer_json([self._entry(files, name) for name in found])
        siblings = [{"rfilename": name} for name in files]
        about = {"id": repository, "sha": commit_of(files), "siblings": siblings}
        about["private"] = repository in self.server.hub.private
        return self._answer(200, json.dumps(about).encode())

    @staticmethod
    def _entry(files, name):
        """A file or a directory as the list of files has it; None if it does not exist."""
        if name in files:
            contents = files[name]
            oid = hashlib.sha1(contents).hexdigest()
            return {"type": "file", "path": name, "size": len(contents), "oid": oid}
        is_directory = any(path.startswith(f"{name}/") for path in files)
        return {"type": "directory", "path": name, "oid": "0"} if is_directory else None

    def _resolve(self, repository, revision, file, breaks):
        files = self._files(repository, revision) if self._knows(repository) else None
        if files is None or file not in files:
            kind = "EntryNotFound" if files else "RepoNotFound"
            return self._answer(404, b"{}", **{"X-Error-Code": kind})
        contents, commit = files[file], commit_of(files)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(contents).hexdigest()}"'}
        if len(contents) < LARGE:
            return self._send(contents, breaks, **headers)
        headers |= {"X-Linked-Size": str(len(contents)), "X-Linked-Etag": headers["ETag"]}
        port = self.server.server_port
        location = f"http://localhost:{port}/large/{repository}/{commit}/{file}"
        return self._answer(302, b"", Location=location, **headers)

    def _send(self, contents, breaks, **headers):
        """A file, or the range that is asked for; if it breaks, the first half of it."""
        status, asked = 200, self.headers.get("Range")
        if asked:
            begin, _, last = asked.removeprefix("bytes=").partition("-")
            begin, end = int(begin), min(int(last or len(contents)) + 1, len(contents))
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(contents)}"
            status, contents = 206, contents[begin:end]
            self.server.hub.asked.append(f"RANGE {begin} {self.path}")
        self._answer(status, contents, len(contents) // 2 if breaks else None, **headers)

    def _answer_json(self, values, status=200):
        self._answer(status, json.dumps(values).encode())

    def _answer(self, status, contents, most=None, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(contents)))
        self.send_header("Content-Type", "application/json")
        if most is not None:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(contents[:most])

    def log_message(self, *_):
        """Nothing is logged."""
