"""Remote checkpoints: a table of contents without the file, and a component without the rest."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.base.addresses import parse_address
from builder.base.errors import CkptError, FetchError, SourceError, UsageError, render
from builder.formats import open_checkpoint
from builder.formats.write_safetensors import write
from builder.sources.net.client import Session
from builder.sources.net.remote import HEAD, RemoteBlob, _Move, coalesce, fetch_component, open_remote
from builder.sources.net.wire import Limits
from builder.tensors.digests import Row, component_digest, tensor_digest
from builder.tensors.lazy import DType, MemoryTensor
from tests.help.network import sha256
from tests.help.servers import File, Handler, Route, Server, hugging_face, in_turn, redirects, says
from tests.net.test_download import Heard

QUICK = Limits(connect=5, read=5, attempts=3, backoff=0.01)
RANDOM = random.Random(3)


def tensor(*shape: int, dtype: DType = DType.F16) -> MemoryTensor:
    size = dtype.itemsize
    for extent in shape:
        size *= extent
    return MemoryTensor(dtype, shape, RANDOM.randbytes(size))


TENSORS = {
    "unet.a": tensor(300, 1000),
    "unet.b": tensor(7, dtype=DType.F32),
    "unet.c": tensor(300, 1000),
    "vae.a": tensor(100, 1000),
    "vae.b": tensor(0, 3),
    "vae.c": tensor(90, 1000),
    "vae.d": tensor(),
    "z": tensor(500, 1000),
}
VAE = {name.removeprefix("vae."): name for name in TENSORS if name.startswith("vae.")}


def digest_of(names: dict[str, str]) -> str:
    rows = {
        new: Row(TENSORS[old].dtype, TENSORS[old].shape, tensor_digest(TENSORS[old]))
        for new, old in names.items()
    }
    return component_digest(rows)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("remote") / "m.safetensors"
    write(path, TENSORS, {"author": "me"}, durable=False)
    return path.read_bytes()


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


@pytest.fixture
def session(server: Server, tmp_path: Path) -> Iterator[Session]:
    environ = {
        "CKPT_ALLOW_PRIVATE": "1",
        "HF_ENDPOINT": server.url(),
        "HF_TOKEN": "hf_secret",
        "HOME": str(tmp_path),
    }
    with Session(environ, limits=QUICK) as open_session:
        yield open_session


def said(error: CkptError) -> str:
    return "\n".join(render(p) for p in error.problems)


def test_a_table_of_contents_comes_without_the_file(server: Server, session: Session, data: bytes) -> None:
    server.routes["/m"] = File(data)
    with open_remote(server.url("/m"), session=session) as remote:
        assert {n: (t.dtype, t.shape) for n, t in remote.items()} == {
            n: (t.dtype, t.shape) for n, t in TENSORS.items()
        }
        assert (remote.metadata, remote.size) == ({"author": "me"}, len(data))
        assert len(server.seen) == 1 and server.sent <= HEAD
        for name, expected in TENSORS.items():
            assert remote[name].tobytes() == expected.tobytes()


def test_a_table_of_contents_that_is_long(server: Server, session: Session, tmp_path: Path) -> None:
    many = {f"{'x' * 200}.{n}": tensor(4) for n in range(2000)}
    write(tmp_path / "m", many, durable=False)
    server.routes["/m"] = File((tmp_path / "m").read_bytes())
    with open_remote(server.url("/m"), session=session) as remote:
        assert len(remote) == 2000 and remote.size > 2 * HEAD
        assert len(server.seen) == 2
        first = next(iter(remote))
        assert remote[first].tobytes() == many[first].tobytes()


def test_a_file_of_the_hub_is_read_in_its_storage(server: Server, session: Session, data: bytes) -> None:
    with Server() as storage:
        hugging_face(server, storage, "org/name", "m.safetensors", data, token="hf_secret")
        with open_remote("hf://org/name/m.safetensors", session=session) as remote:
            assert remote.name == "hf://org/name/m.safetensors"
            assert remote["z"].tobytes() == TENSORS["z"].tobytes()
        assert len(server.seen) == 1 and len(storage.seen) == 2
        assert not any("Authorization" in s.headers for s in storage.seen)


SHORT = b"\x02\x00\x00\x00\x00\x00\x00\x00{}"


@pytest.mark.parametrize("file", [File(SHORT), File(SHORT, ranges=False)])
def test_a_file_shorter_than_its_beginning(server: Server, session: Session, file: File) -> None:
    server.routes["/m"] = file
    with open_remote(server.url("/m"), session=session) as remote:
        assert len(remote) == 0


def test_one_component_comes_without_the_rest(
    server: Server, session: Session, data: bytes, tmp_path: Path
) -> None:
    server.routes["/m"] = File(data)
    heard = Heard()
    with open_remote(server.url("/m"), session=session) as remote:
        before = server.sent
        local = fetch_component(
            remote, VAE, tmp_path / "vae", digest=digest_of(VAE), reporter=heard, task="vae"
        )
    wanted = sum(TENSORS[old].nbytes for old in VAE.values())
    assert server.sent - before <= wanted
    assert heard.advanced == wanted == heard.events[0][1]
    with local, open_checkpoint(tmp_path / "vae") as reopened:
        for names in (local, reopened):
            assert {n: names[n].tobytes() for n in names} == {
                new: TENSORS[old].tobytes() for new, old in VAE.items()
            }


def test_a_component_that_is_another_one(
    server: Server, session: Session, data: bytes, tmp_path: Path
) -> None:
    server.routes["/m"] = File(data[:-3_000] + bytes(3_000))
    with open_remote(server.url("/m"), session=session) as remote, pytest.raises(SourceError) as raised:
        fetch_component(remote, {"z": "z"}, tmp_path / "z", digest=digest_of({"z": "z"}))
    assert digest_of({"z": "z"}) in said(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_component_that_does_not_come(
    server: Server, session: Session, data: bytes, tmp_path: Path
) -> None:
    server.routes["/m"] = in_turn(File(data), says(403, "no more"))
    with open_remote(server.url("/m"), session=session) as remote, pytest.raises(FetchError, match="no more"):
        fetch_component(remote, VAE, tmp_path / "vae")
    assert list(tmp_path.iterdir()) == []


def test_drops_are_made_good(server: Server, session: Session, data: bytes, tmp_path: Path) -> None:
    server.routes["/m"] = File(data, drops=[10, 20, HEAD, 5_000, 0, 9_000])
    with open_remote(server.url("/m"), session=session) as remote:
        fetch_component(remote, VAE, tmp_path / "vae", digest=digest_of(VAE)).close()


def later(first: Route, then: Route) -> Route:
    """One route for the beginning of the file, another one for what follows."""

    def route(handler: Handler) -> None:
        (first if (handler.headers.get("Range") or "").startswith("bytes=0-") else then)(handler)

    return route


def test_parts_of_different_versions_are_not_mixed(server: Server, session: Session, data: bytes) -> None:
    other = data[:-1] + b"!"
    dated = {"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}
    undated = {"Last-Modified": "Tue, 02 Jan 2024 00:00:00 GMT"}
    for first, then in [
        (File(data), File(other)),
        (File(data), File(data, shift=1)),
        (File(data), File(data, ranges=False)),
        (File(data, etag="", headers=dated), File(other, etag="", headers=undated)),
        (File(data, etag='W/"a"'), File(data + b"x", etag='W/"a"')),
    ]:
        server.routes["/m"] = later(first, then)
        with open_remote(server.url("/m"), session=session) as remote, pytest.raises(FetchError) as raised:
            remote["z"].tobytes()
        assert "the file changed while it was read" in said(raised.value)


@pytest.mark.parametrize(
    ("route", "fact"),
    [
        (File(b"PK\x03\x04" + bytes(100)), "only safetensors files can be read on their hosts"),
        (File(b""), "the file is empty"),
        (File(b"\x09\x00\x00\x00\x00\x00\x00\x00{"), "reaches past the end"),
        (File(bytes(HEAD + 1), ranges=False), "does not serve parts"),
        (says(206, SHORT, Content_Range="bytes 5-14/20"), "does not serve parts"),
        (says(200, "<html><title>Sign in</title>"), "sends an HTML page instead of the file: “Sign in”"),
        (says(404, "no such model"), "answers 404, not there: “no such model”"),
        (File(SHORT, encoding="gzip"), "sends the file packed"),
        (redirects("http://1.1.1.1/x"), "without encryption"),
    ],
)
def test_what_cannot_be_read_is_named(server: Server, session: Session, route: Route, fact: str) -> None:
    server.routes["/m"] = route
    with pytest.raises(CkptError) as raised:
        open_remote(server.url("/m"), session=session)
    assert fact in said(raised.value) and server.url("/m") in said(raised.value)


def test_what_is_not_on_a_host_is_not_read_there(session: Session) -> None:
    with pytest.raises(SourceError, match="is on this machine"):
        open_remote("file:m.safetensors", session=session)
    with pytest.raises(UsageError):
        open_remote("m.safetensors", session=session)
    with Session({}, offline=True) as off, pytest.raises(FetchError, match="the network is off"):
        open_remote("hf://org/name/m.safetensors", session=off)


def test_bytes_past_the_end_are_not_asked_for(server: Server, session: Session, data: bytes) -> None:
    server.routes["/m"] = File(data)
    blob = RemoteBlob(session, [parse_address(server.url("/m"))])
    with pytest.raises(FetchError, match="are not there"):
        blob.read_into(blob.size - 1, memoryview(bytearray(2)))
    blob.close()
    assert len(server.seen) == 1


@given(
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 90)), max_size=20),
    st.integers(0, 20),
    st.integers(1, 100),
)
def test_coalesced_requests_cover_every_byte(spans: list[tuple[int, int]], gap: int, most: int) -> None:
    moves, at = [], 0
    for skip, length in spans:
        moves.append(_Move(at + skip, length, at))
        at += skip + length
    requests = coalesce(moves, gap, most)
    covered = [byte for request in requests for m in request for byte in range(m.start, m.start + m.length)]
    assert covered == [byte for m in moves for byte in range(m.start, m.start + m.length)]
    for request in requests:
        assert request[-1].start + request[-1].length - request[0].start <= most
        for one, two in pairwise(request):
            assert 0 <= two.start - (one.start + one.length) <= gap
    for move in moves:
        parts = [
            m for request in requests for m in request if move.start <= m.start < move.start + move.length
        ]
        assert all(m.to - m.start == move.to - move.start for m in parts)


# Several addresses of one file.


def ends(data: bytes) -> Route:
    """A host that shows the beginning of a file, and then has it no more."""
    return later(File(data), says(410, "taken down"))


def test_a_component_is_read_on_from_the_next_address(
    server: Server, session: Session, data: bytes, tmp_path: Path
) -> None:
    notes: list[str] = []

    class Told(Heard):
        def note(self, message: str) -> None:
            notes.append(message)

    session.reporter = Told()
    server.routes["/gone"] = says(404)
    server.routes["/first"] = ends(data)
    server.routes["/second"] = File(data, etag='"another"', drops=[HEAD, 5_000, 0, 0, 0])
    server.routes["/third"] = File(data, etag="")
    addresses = [server.url(p) for p in ("/gone", "/first", "/second", "/third")]
    with open_remote(addresses, session=session, size=len(data)) as remote:
        fetch_component(remote, VAE, tmp_path / "vae", digest=digest_of(VAE)).close()
        assert remote["z"].tobytes() == TENSORS["z"].tobytes()
    assert [len(server.asked(p)) > 0 for p in ("/gone", "/first", "/second", "/third")] == [True] * 4
    assert [n.split("`")[3] for n in notes] == [server.url("/second"), server.url("/third")]
    assert all(n.startswith(f"`{server.url('/first')}` is read on from") for n in notes)


def test_a_changed_file_is_read_on_elsewhere(server: Server, session: Session, data: bytes) -> None:
    server.routes["/first"] = later(File(data), File(data, ranges=False))
    server.routes["/second"] = File(data)
    addresses = [server.url("/first"), server.url("/second")]
    with open_remote(addresses, session=session) as remote:
        assert remote["z"].tobytes() == TENSORS["z"].tobytes()


def test_another_file_is_not_read_on_from(server: Server, session: Session, data: bytes) -> None:
    server.routes["/first"] = ends(data)
    server.routes["/longer"] = File(data + b"x")
    server.routes["/other"] = File(data[:500] + b"x" + data[501:])
    server.routes["/page"] = says(200, "<html><title>Sign in</title>")
    addresses: list[str] = [server.url(p) for p in ("/first", "/longer", "/other", "/page")]
    with Server() as storage:
        other = data[:-1] + b"x"
        hugging_face(server, storage, "org/name", "m.safetensors", other)
        addresses.insert(1, "hf://org/name/m.safetensors")
        pinned = sha256(data)
        with open_remote(addresses, session=session, sha256=pinned) as remote:
            for _ in range(2):
                with pytest.raises(FetchError) as raised:
                    remote["z"].tobytes()
    told = said(raised.value)
    for fact in (
        f"`{server.url('/first')}` cannot be read: `127.0.0.1` answers 410",
        f"hf://org/name/m.safetensors: its host states the SHA-256 {sha256(other)}",
        f"/longer: the file has {len(data) + 1:,} bytes instead of {len(data):,}",
        "/other: the file begins otherwise",
        "/page: `127.0.0.1` sends an HTML page",
    ):
        assert fact in told


def test_every_address_and_why_it_cannot_be_read(server: Server, session: Session, data: bytes) -> None:
    server.routes["/pickle"] = File(b"PK\x03\x04" + bytes(100))
    server.routes["/longer"] = File(data + b"x")
    addresses = ["file:m.safetensors", *(server.url(p) for p in ("/404", "/pickle", "/longer"))]
    with pytest.raises(SourceError) as raised:
        open_remote(addresses, session=session, size=len(data))
    facts = [p.fact for p in raised.value.problems]
    assert len(facts) == 4 and "is on this machine" in facts[0] and "answers 404" in facts[1]
    with pytest.raises(FetchError):
        open_remote([server.url("/404"), server.url("/405")], session=session)


def test_what_trickles_in_is_no_progress(server: Server, session: Session, data: bytes) -> None:
    """A byte a connection would go on for as long as there are bytes."""
    server.routes["/m"] = later(File(data), File(data, drops=[1] * 1000))
    with open_remote(server.url("/m"), session=session) as remote, pytest.raises(FetchError) as raised:
        remote["z"].tobytes()
    assert "short of its" in said(raised.value)
    assert len(server.seen) == 1 + QUICK.attempts


def test_a_stop_is_no_reason_to_ask_elsewhere(server: Server, session: Session, data: bytes) -> None:
    def stopped(handler: Handler) -> None:
        session.stop()
        says(404)(handler)

    server.routes["/first"] = later(File(data), stopped)
    server.routes["/second"] = File(data)
    addresses = [server.url("/first"), server.url("/second")]
    with open_remote(addresses, session=session) as remote, pytest.raises(FetchError):
        remote["z"].tobytes()
    assert server.asked("/second") == []
