"""Downloads from loopback: a large file against curl, and one component out of a remote checkpoint."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from builder.formats.write_safetensors import plan_layout
from builder.sources.net.client import Session
from builder.sources.net.remote import fetch_component, open_remote
from builder.tensors.lazy import DType

GIB = 1 << 30


class _Storage(BaseHTTPRequestHandler):
    """Serves the files of the working folder in ranges, by sendfile; `/sent` tells the bytes of bodies."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    sent = 0

    def do_GET(self) -> None:
        if self.path == "/sent":
            body = str(_Storage.sent).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        with Path(self.path.lstrip("/")).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            start = int(asked[1]) if asked else 0
            end = min(int(asked[2]) + 1, size) if asked and asked[2] else size
            self.send_response(206 if asked else 200)
            self.send_header("ETag", f'"{size}"')
            self.send_header("Content-Length", str(end - start))
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
            self.end_headers()
            while start < end:
                count = os.sendfile(self.connection.fileno(), file.fileno(), start, end - start)
                start += count
                _Storage.sent += count

    def log_message(self, *_: object) -> None:
        pass


def _serve(folder: str) -> None:
    os.chdir(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Storage)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    server.serve_forever()


_CLIENT = """
import json, resource, sys, time
from pathlib import Path
from builder.sources.net.acquire import fetch
from builder.sources.net.client import Session
from builder.store import Store

started = time.perf_counter()
with Session({"CKPT_ALLOW_PRIVATE": "1", "HOME": sys.argv[2]}) as session:
    fetched = fetch([sys.argv[1]], store=Store(Path(sys.argv[2])), session=session, sha256=sys.argv[3])
seconds = time.perf_counter() - started
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "memory": memory}))
"""


def _whole_file(port: int, folder: Path, size: int, repeats: int) -> dict[str, object]:
    source = folder / "large.bin"
    block, digest = os.urandom(1 << 20), hashlib.sha256()
    with source.open("wb") as file:
        for _ in range(size >> 20):
            file.write(block)
            digest.update(block)
    sha256 = digest.hexdigest()
    url = f"http://127.0.0.1:{port}/large.bin"
    curl, ours = [], []
    for _ in range(repeats):
        started = time.perf_counter()
        subprocess.run(["curl", "-s", "-o", str(folder / "by-curl"), url], check=True)
        curl.append(time.perf_counter() - started)
        (folder / "by-curl").unlink()
        store = folder / "store"
        done = subprocess.run(
            [sys.executable, "-c", _CLIENT, url, str(store), sha256],
            check=True,
            capture_output=True,
            text=True,
        )
        ours.append(json.loads(done.stdout))
        shutil.rmtree(store)
    source.unlink()
    best = min(o["seconds"] for o in ours)
    return {
        "bytes": size,
        "curl_seconds": round(min(curl), 3),
        "seconds": round(best, 3),
        "gb_per_second": round(size / best / 1e9, 3),
        "of_curl": round(min(curl) / best, 3),
        "memory_mb": round(max(o["memory"] for o in ours) / 1e6, 1),
    }


def _sent(port: int) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/sent") as response:
        return int(response.read())


def _component(port: int, folder: Path) -> dict[str, object]:
    """One of 335 MB, in 248 tensors as a VAE has them, out of 7 GB of which the rest is a hole."""
    specs = {f"first_stage_model.{n:03}": (DType.F32, (337_500,)) for n in range(248)}
    specs |= {f"model.diffusion_model.{n:03}": (DType.F32, (2_500_000,)) for n in range(668)}
    layout = plan_layout(specs)
    with (folder / "large.safetensors").open("wb") as file:
        file.write(layout.head)
        file.truncate(layout.size)
    names = {n.partition(".")[2]: n for n in specs if n.startswith("first_stage_model.")}
    before, started = _sent(port), time.perf_counter()
    with Session({"CKPT_ALLOW_PRIVATE": "1", "HOME": str(folder)}) as session:
        remote = open_remote(f"http://127.0.0.1:{port}/large.safetensors", session=session)
        table = time.perf_counter() - started
        local = fetch_component(remote, names, folder / "component", task="component")
        wanted = sum(t.nbytes for t in local.values())
        local.close()
    return {
        "bytes": wanted,
        "of_file": layout.size,
        "moved": _sent(port) - before,
        "of_component": round((_sent(port) - before) / wanted, 5),
        "table_of_contents_seconds": round(table, 3),
        "seconds": round(time.perf_counter() - started, 3),
    }


def main(arguments: list[str] | None = None) -> dict[str, object]:
    """Run both measurements, print them as one JSON object and return it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=2 * GIB, help="bytes of the large file")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the files go; a temporary folder by default")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        server = subprocess.Popen(
            [sys.executable, __file__, "--serve", name], stdout=subprocess.PIPE, text=True
        )
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            result: dict[str, object] = {
                "whole_file": _whole_file(port, folder, options.size, options.repeats),
                "component": _component(port, folder),
            }
        finally:
            server.terminate()
            server.wait()
    print(json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        _serve(sys.argv[2])
    else:
        main()
