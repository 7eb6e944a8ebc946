"""A stand-in of the Hugging Face hub on 127.0.0.1: it answers what its libraries ask to download, or fails as it is told."""

import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

STORED = (".safetensors", ".parquet")  # large files, which the hub keeps in a storage of its own


class Fault(NamedTuple):
    """What happens to requests whose method and path match: a status, `cut` (the answer ends at half of the file), `drop`
    (no answer), `slow` (it comes after some seconds), or `half` (a file that is whole, but whose content is cut)."""

    kind: str
    path: str = ""
    method: str = "GET|HEAD|POST"
    code: str = ""  # X-Error-Code, the hub's word for the reason


class Hub:
    """Repositories of one commit each: {"models/NAME" or "datasets/NAME": {path: content}}."""

    def __init__(self, repositories: dict[str, dict[str, bytes]]):
        self.repositories, self.faults, self.asked, self.xet = repositories, [], [], False
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answers", (Answers,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.storage = f"http://localhost:{self.server.server_port}/storage"  # another host: redirects are treated otherwise
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stored(self, digest: str) -> bytes:
        files = (content for files in self.repositories.values() for content in files.values())
        return next(content for content in files if digest_of(content) == digest)


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Answers(BaseHTTPRequestHandler):
    protocol_version, hub = "HTTP/1.1", None

    def log_message(self, *_) -> None:
        pass

    def send(self, status: int, content: bytes | dict | list, cut: bool = False, **headers) -> None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if status == 200 else None
        first, last = (int(found[1]), int(found[2] or len(content) - 1)) if found else (0, len(content) - 1)
        headers |= {"Content_Range": f"bytes {first}-{last}/{len(content)}"} if found else {}
        end = min(last + 1, len(content) // 2) if cut else last + 1
        self.send_response(206 if found else status)
        for name, value in ({"Content_Length": last + 1 - first} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else content[first:end])
        self.close_connection |= cut

    def fail(self, status: int, code: str = "", **headers) -> None:
        headers |= {"X_Error_Code": code, "X_Error_Message": "its owner says why"} if code else {}
        self.send(status, b"failed", **headers)

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, cut, half = self.path.split("?")[0], False, False
        self.hub.asked.append((self.command, path))
        for fault in self.hub.faults:
            if re.search(fault.path, path) and re.fullmatch(fault.method, self.command):
                if fault.kind.isdigit():
                    return self.fail(int(fault.kind), fault.code)
                if fault.kind == "drop":
                    self.close_connection = True
                    return None
                if fault.kind == "slow":
                    time.sleep(2)
                cut, half = fault.kind == "cut", fault.kind == "half"
        return self.answer(path, cut, half)

    do_HEAD = do_POST = do_GET

    def answer(self, path: str, cut: bool, half: bool) -> None:
        hub = self.hub
        if found := re.fullmatch("/storage/(.+)", path):
            content = hub.stored(found[1])
            return self.send(200, content[: len(content) // 2] if half else content, cut)
        if path == "/":
            return self.send(200, b"")
        if found := re.fullmatch("/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            name, what, rest = f"{'datasets' if found[1] else 'models'}/{found[2]}", "resolve", found[3]
        elif found := re.fullmatch("/api/((?:models|datasets)/[^/]+/[^/]+)(?:/([^/]+)(?:/[^/]+(?:/(.+))?)?)?", path):
            name, what, rest = found[1], found[2] or "revision", found[3] or ""
        else:
            return self.fail(404)
        files = hub.repositories.get(name)
        if files is None:
            return self.fail(401, "RepoNotFound")
        commit = hashlib.sha1(name.encode()).hexdigest()
        if what == "resolve":
            if rest not in files:
                return self.fail(404, "EntryNotFound", X_Repo_Commit=commit)
            content, digest = files[rest], digest_of(files[rest])
            headers = {"X_Repo_Commit": commit, "ETag": f'"{digest}"'}
            if not rest.endswith(STORED):
                return self.send(200, content[: len(content) // 2] if half else content, cut, **headers)
            headers |= {"X_Linked_Size": len(content), "X_Linked_ETag": f'"{digest}"'}
            if hub.xet:
                headers |= {"X_Xet_Hash": digest, "Link": f'<{hub.url}/api/{name}/xet-read-token/{commit}>; rel="xet-auth"'}
            return self.send(302, b"", Location=f"{hub.storage}/{digest}", **headers)
        if what == "tree":
            rows = tree(files, rest, "recursive=true" in self.path.lower())
            return self.send(200, rows) if rows else self.fail(404, "EntryNotFound", X_Repo_Commit=commit)
        if what == "xet-read-token":
            headers = {"X_Xet_Cas_Url": f"{hub.url}/cas", "X_Xet_Access_Token": "t", "X_Xet_Token_Expiration": 1 << 33}
            return self.send(200, {"casUrl": f"{hub.url}/cas", "accessToken": "t", "exp": 1 << 33}, **headers)
        if what != "revision":
            return self.fail(404)
        about = {"id": name.split("/", 1)[1], "sha": commit, "private": False, "gated": False, "tags": []}
        return self.send(200, about | {"siblings": [{"rfilename": path} for path in files]})


def tree(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict]:
    prefix, rows = f"{folder}/" if folder else "", {}
    for path, content in files.items():
        first, _, deeper = path.removeprefix(prefix).partition("/")
        if path.startswith(prefix):
            one = prefix + first
            rows[one] = {
                "type": "directory" if deeper else "file",
                "path": one,
                "oid": digest_of(one.encode())[:40],
                "size": 0,
            }
            if not deeper or recursive:
                rows[path] = {"type": "file", "path": path, "oid": digest_of(content)[:40], "size": len(content)}
                if path.endswith(STORED):
                    rows[path]["lfs"] = {"oid": digest_of(content), "size": len(content), "pointerSize": 134}
    return list(rows.values())
