"""A bucket that answers as Google Cloud Storage does, as far as jaxcl's libraries ask: a dictionary behind HTTP.

gcsfs, google-cloud-storage and TensorStore talk to it over the loopback, so the code that runs is theirs.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class Objects:
    """{name: bytes} with the generation of each, which grows with every write."""

    def __init__(self) -> None:
        self.data: dict[str, tuple[bytes, int]] = {}
        self.clock, self.lock = 0, threading.Lock()
        self.calls: list[str] = []
        self.uploads: dict[str, str] = {}  # open resumable uploads: id -> object

    def put(self, name: str, content: bytes, wanted: int | None) -> dict[str, Any] | None:
        """The new object's metadata; None where it is not of the generation that was ``wanted`` (0: absent)."""
        with self.lock:
            if wanted is not None and wanted != self.data.get(name, (b"", 0))[1]:
                return None
            self.clock += 1
            self.data[name] = (content, self.clock)
            return self.meta(name)

    def meta(self, name: str) -> dict[str, Any]:
        content, generation = self.data[name]
        md5 = base64.b64encode(hashlib.md5(content).digest()).decode()
        times = dict.fromkeys(("timeCreated", "updated"), "2026-01-01T00:00:00.000Z")
        numbers = {"generation": str(generation), "metageneration": "1", "size": str(len(content))}
        kind = {"kind": "storage#object", "bucket": "bucket", "name": name, "md5Hash": md5, "storageClass": "STANDARD"}
        return {**kind, **numbers, **times, "etag": str(generation), "contentType": "application/octet-stream"}


class Handler(BaseHTTPRequestHandler):
    """The routes of the JSON interface: bucket, list, metadata, media, upload (whole and resumable), copy, delete."""

    protocol_version = "HTTP/1.1"
    objects: Objects

    def log_message(self, *_: Any) -> None: ...

    def answer(self, status: int, body: Any = b"", **headers: str) -> None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def handle_any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        parts = urlsplit(self.path)
        query = {k: v[0] for k, v in parse_qs(parts.query, keep_blank_values=True).items()}
        self.objects.calls.append(f"{self.command} {self.path}")
        if parts.path.startswith("/upload/"):
            return self.upload(query, body)
        found = re.match(r"(?:/download)?(?:/storage/v1)?/b/[^/]+(?:/o(?:/(.*))?)?$", parts.path)
        if not found:
            return self.answer(404, {"error": {"code": 404, "message": "no such route"}})
        if found.group(1):
            return self.one(unquote(found.group(1)), query)
        return (
            self.listing(query) if parts.path.endswith("/o") else self.answer(200, {"name": "bucket", "id": "bucket"})
        )

    do_GET = do_POST = do_PUT = do_DELETE = handle_any

    def listing(self, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        start, end = query.get("startOffset", ""), query.get("endOffset")
        items, folders = [], set()
        for name in sorted(self.objects.data):
            if not name.startswith(prefix) or name < start or (end and name >= end):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append(self.objects.meta(name))
        self.answer(200, {"kind": "storage#objects", "items": items, "prefixes": sorted(folders)})

    def one(self, name: str, query: dict[str, str]) -> None:
        copy = re.match(r"(.*)/(?:rewriteTo|copyTo)/b/[^/]+/o/(.*)$", name)
        source = copy.group(1) if copy else name
        if source not in self.objects.data:
            return self.answer(404, {"error": {"code": 404, "message": f"No such object: {source}"}})
        content, generation = self.objects.data[source]
        if copy:
            made = self.objects.put(unquote(copy.group(2)), content, None)
            return self.answer(200, {"done": True, "resource": made})
        if self.command == "DELETE":
            with self.objects.lock:
                self.objects.data.pop(name, None)
            return self.answer(204)
        if query.get("alt") != "media":
            return self.answer(200, self.objects.meta(name))
        if query.get("ifGenerationNotMatch") == str(generation):
            return self.answer(304)
        headers = {"x_goog_generation": str(generation), "ETag": str(generation)}
        asked = re.match(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return self.answer(200, content, **headers)
        first = int(asked.group(1)) if asked.group(1) else len(content) - int(asked.group(2))
        last = min(int(asked.group(2)) if asked.group(2) and asked.group(1) else len(content) - 1, len(content) - 1)
        if first > last:
            return self.answer(416)
        headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
        return self.answer(206, content[first : last + 1], **headers)

    def upload(self, query: dict[str, str], body: bytes) -> None:
        kind, name = query.get("uploadType"), query.get("name", "")
        wanted = int(query["ifGenerationMatch"]) if "ifGenerationMatch" in query else None
        if kind == "resumable" and "upload_id" not in query:
            number = str(len(self.objects.uploads))
            self.objects.uploads[number] = name or json.loads(body)["name"]
            here = f"http://{self.headers['Host']}/upload/storage/v1/b/bucket/o?uploadType=resumable&upload_id={number}"
            return self.answer(200, {}, Location=here)
        if kind == "resumable":
            name = self.objects.uploads[query["upload_id"]]
        elif kind == "multipart":
            mark = re.search(r"boundary=['\"]?([^'\";]+)", self.headers["Content-Type"])
            assert mark is not None
            _, first, second, *_ = body.split(b"--" + mark.group(1).encode())
            name = json.loads(first.split(b"\n\n" if b"\r\n\r\n" not in first else b"\r\n\r\n", 1)[1])["name"]
            gap = b"\r\n\r\n" if b"\r\n\r\n" in second else b"\n\n"
            body = second.split(gap, 1)[1].removesuffix(b"\n").removesuffix(b"\r")
        made = self.objects.put(name, body, wanted)
        self.answer(*((200, made) if made else (412, {"error": {"code": 412, "message": "conditionNotMet"}})))


class Server(ThreadingHTTPServer):
    """Says nothing about clients that hang up, as killed ones do."""

    daemon_threads = True

    def handle_error(self, *_: Any) -> None: ...


@contextmanager
def bucket() -> Iterator[tuple[Objects, dict[str, str]]]:
    """(the objects, the environment under which gs://bucket leads to them)."""
    objects = Objects()
    server = Server(("127.0.0.1", 0), type("Bound", (Handler,), {"objects": objects}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield (
            objects,
            {
                "STORAGE_EMULATOR_HOST": url,  # gcsfs and google-cloud-storage
                "FSSPEC_GCS_TOKEN": "anon",
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it would ask for the kind of bucket over gRPC
                "GOOGLE_CLOUD_PROJECT": "project",
                "TENSORSTORE_GCS_HTTP_URL": url,
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            },
        )
    finally:
        server.shutdown()
        server.server_close()
