"""A Hugging Face hub on loopback: repositories served from folders and written to, with a real network's faults."""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

# kind/owner/name: how the hub's addresses name a repository; models have no prefix outside /api.
TREE = re.compile(r"/api/(models|datasets|spaces)/([^/]+/[^/]+)/tree/([^/]+)/?(.*)")
INFO = re.compile(r"/api/(models|datasets|spaces)/([^/]+/[^/]+?)(?:/revision/([^/]+))?")
PATHS_INFO = re.compile(r"/api/(models|datasets|spaces)/([^/]+/[^/]+)/paths-info/([^/]+)")
RESOLVE = re.compile(r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
PREUPLOAD = re.compile(r"/api/(models|spaces)/([^/]+/[^/]+)/preupload/main")
COMMIT = re.compile(r"/api/(models|spaces)/([^/]+/[^/]+)/commit/main")
BATCH = re.compile(r"/(?:(spaces)/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch")
BLOB = re.compile(r"/lfs/([0-9a-f]{64})")


class Hub:
    """Repositories as (kind, "owner/name") -> (commit, folder), and what to do wrong with them."""

    def __init__(self) -> None:
        self.address = ""
        self.reset()

    def reset(self) -> None:
        """Forget all repositories, faults and requests."""
        self.repositories: dict[tuple[str, str], tuple[str, Path]] = {}
        self.gated: set[str] = set()
        self.private: set[str] = set()  # and nobody has a token for them
        self.faults: Counter[str] = Counter()  # "503", "cut" or "damaged": how often yet
        self.busy: Counter[str] = Counter()  # files whose next downloads are answered 503, by name
        self.requests: list[str] = []
        self.authorizations: set[str] = set()
        self.storage = Path()  # where repositories that clients make are kept
        self.users: dict[str, str] = {}  # token -> who it belongs to; one may write only to repositories of one's own
        self.blobs: dict[str, bytes] = {}  # LFS objects, by SHA-256
        self.room: int | None = None  # for so many of them; then every upload is cut
        self.commits = 0

    def add(self, kind: str, name: str, commit: str, folder: Path) -> None:
        self.repositories[kind, name] = (commit, folder)

    def take_fault(self, name: str) -> bool:
        """Whether this request is to go wrong in this way; uses up one."""
        if self.faults[name] > 0:
            self.faults[name] -= 1
            return True
        return False


def etag(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def git_oid(path: Path) -> str:
    """A file's id as git names it."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_lfs(name: str) -> bool:
    return name.endswith((".safetensors", ".data", ".parquet"))


class Handler(BaseHTTPRequestHandler):
    """Answers as the hub does, for a `hub` that `handler` sets."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: object) -> None:
        pass

    def reply(self, status: int, body: object = None, **headers: str) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def repository(self, kind: str, name: str, revision: str | None) -> tuple[str, Path] | None:
        """The commit and folder asked for; None, and an answer that says why not, where there is none."""
        if name in self.hub.gated:
            self.reply(401, {"error": "gated"}, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        elif name in self.hub.private:
            self.reply(401, {"error": "Invalid username or password."}, X_Error_Code="RepoNotFound")
        elif (kind, name) not in self.hub.repositories:
            self.reply(404, {"error": "not found"}, X_Error_Code="RepoNotFound")
        elif revision not in (None, "main", self.hub.repositories[kind, name][0]):
            self.reply(404, {"error": "no such revision"}, X_Error_Code="RevisionNotFound")
        else:
            return self.hub.repositories[kind, name]
        return None

    def entries(self, folder: Path, inside: str = "", recursive: bool = True) -> list[dict]:
        """The files and folders below `inside`, as the hub lists them."""
        listed = []
        for path in sorted((folder / inside).rglob("*") if recursive else (folder / inside).glob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_file():
                listed.append({"type": "file", "path": name, "size": path.stat().st_size, "oid": etag(path)[:40]})
            else:
                listed.append({"type": "directory", "path": name, "size": 0, "oid": "0" * 40})
        return listed

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        self.hub.authorizations.add(self.headers.get("Authorization") or "")
        name = path.rpartition("/")[2]
        if self.command == "GET" and "/resolve/" in path and self.hub.busy[name] > 0:
            self.hub.busy[name] -= 1
            self.reply(503, {"error": "busy"})
        elif self.hub.take_fault("503"):
            self.reply(503, {"error": "busy"})
        elif path == "/api/whoami-v2":
            user = self.user()
            self.reply(200, {"name": user, "type": "user"}) if user else self.reply(401, {"error": "no token"})
        elif match := TREE.fullmatch(path):
            if found := self.repository(match[1], match[2], match[3]):
                inside = self.entries(found[1], match[4], "recursive=true" in self.path.lower())
                there = inside or not match[4]  # also an empty repository has a root
                self.reply(200, inside) if there else self.reply(404, {}, X_Error_Code="EntryNotFound")
        elif match := PATHS_INFO.fullmatch(path):
            length = int(self.headers.get("Content-Length") or 0)
            asked = self.rfile.read(length).decode()
            if found := self.repository(match[1], match[2], match[3]):
                self.reply(200, [e for e in self.entries(found[1]) if e["path"] in unquote(asked)])
        elif match := INFO.fullmatch(path):
            if found := self.repository(match[1], match[2], match[3]):
                siblings = [{"rfilename": e["path"]} for e in self.entries(found[1]) if e["type"] == "file"]
                self.reply(200, {"id": match[2], "sha": found[0], "siblings": siblings, "private": False, "tags": []})
        elif match := RESOLVE.fullmatch(path):
            if found := self.repository(match[1] or "models", match[2], match[3]):
                self.send_file(found[0], found[1] / match[4])
        else:
            self.reply(404, {"error": path})

    do_HEAD = do_GET

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def user(self) -> str | None:
        return self.hub.users.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if PATHS_INFO.fullmatch(path):
            self.do_GET()
            return
        self.hub.requests.append(f"{self.command} {path}")
        body = self.body()
        user = self.user()
        if path == "/api/validate-yaml":
            self.reply(200, {"errors": [], "warnings": []})
        elif user is None:
            self.reply(401, {"error": "Invalid credentials"})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            self.create(user, f"{asked.get('type', 'model')}s", f"{asked['organization'] or user}/{asked['name']}")
        elif match := PREUPLOAD.fullmatch(path) or COMMIT.fullmatch(path) or BATCH.fullmatch(path):
            kind, name = match[1] or "models", match[2]
            if not name.startswith(f"{user}/"):
                self.reply(403, {"error": "no rights"})
            elif (kind, name) not in self.hub.repositories:
                self.reply(404, {}, X_Error_Code="RepoNotFound")
            elif match.re is PREUPLOAD:
                self.preupload(self.hub.repositories[kind, name][1], json.loads(body))
            elif match.re is BATCH:
                self.batch(json.loads(body))
            else:
                self.commit(kind, name, [json.loads(line) for line in body.splitlines()])
        else:
            self.reply(404, {"error": path})

    def create(self, user: str, kind: str, name: str) -> None:
        if not name.startswith(f"{user}/"):
            self.reply(403, {"error": "no rights"})
            return
        there = (kind, name) in self.hub.repositories
        if not there:
            folder = self.hub.storage / kind / name
            folder.mkdir(parents=True)
            self.hub.add(kind, name, "0" * 40, folder)
        self.reply(409 if there else 200, {"url": f"{self.hub.address}/{name}", "name": name, "id": name})

    def preupload(self, folder: Path, asked: dict) -> None:
        files = []
        for name in (file["path"] for file in asked["files"]):
            mode, path = "lfs" if is_lfs(name) else "regular", folder / name
            oid = (etag(path) if mode == "lfs" else git_oid(path)) if path.is_file() else None
            files.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.reply(200, {"files": files})

    def batch(self, asked: dict) -> None:
        objects = []
        for wanted in asked["objects"]:
            upload = {"upload": {"href": f"{self.hub.address}/lfs/{wanted['oid']}", "header": {}}}
            objects.append({**wanted, **({} if wanted["oid"] in self.hub.blobs else {"actions": upload})})
        self.reply(200, {"transfer": "basic", "objects": objects})

    def do_PUT(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        data = self.body()
        match = BLOB.fullmatch(self.path)
        if match is None or hashlib.sha256(data).hexdigest() != match[1]:
            self.reply(400, {"error": "not what it says"})
        elif self.hub.room is not None and len(self.hub.blobs) >= self.hub.room:
            self.close_connection = True
            self.connection.close()
        else:
            self.hub.blobs[match[1]] = data
            self.reply(200, {})

    def commit(self, kind: str, name: str, lines: list[dict]) -> None:
        folder = self.hub.repositories[kind, name][1]
        for line in lines[1:]:
            path = folder / line["value"]["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            match line["key"]:
                case "file":
                    path.write_bytes(base64.b64decode(line["value"]["content"]))
                case "lfsFile":
                    path.write_bytes(self.hub.blobs[line["value"]["oid"]])
                case "deletedFile":
                    path.unlink()
        self.hub.commits += 1
        sha = f"{self.hub.commits:040x}"
        self.hub.add(kind, name, sha, folder)
        self.reply(200, {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.address}/{name}/commit/{sha}"})

    def send_file(self, commit: str, path: Path) -> None:
        if not path.is_file():
            self.reply(404, {}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        data, start = path.read_bytes(), 0
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start = int(match[1])
            stop = int(match[2]) + 1 if match[2] else len(data)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
            part = data[start:stop]
        else:
            self.send_response(200)
            part = data
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{etag(path)}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if len(part) > 10_000 and self.hub.take_fault("damaged"):
            part = part[:-1] + bytes([part[-1] ^ 1])
        if len(part) > 10_000 and self.hub.take_fault("cut"):
            self.wfile.write(part[: len(part) // 2])
            self.wfile.flush()
            self.connection.close()
            self.close_connection = True
            return
        self.wfile.write(part)


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    return type("Handler", (Handler,), {"hub": hub})


@contextmanager
def running(hub: Hub):
    """Serve `hub` on a free port of loopback while the block runs; its address is hub.address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
