"""Inspecting files where they lie, on their hosts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.help.building import Folder, model
from tests.help.network import TOKEN, Net, bulky, dirty, hosts, saved
from tests.help.servers import (
    COMMIT,
    File,
    Server,
    certificate,
    civitai,
    hugging_face,
    redirects,
    tls_server_context,
)
from tests.net.test_client import Proxy


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Net]:
    with hosts(tmp_path) as running:
        yield running


def test_a_table_of_contents_is_all_that_travels(net: Net) -> None:
    net.storage.routes["/b.safetensors"] = File(bulky())
    url = net.storage.url("/b.safetensors")
    said = net.folder("inspect", url, "--json")
    report = json.loads(said.out)["files"][0]
    (net.folder / "b.safetensors").write_bytes(bulky())
    local = json.loads(net.folder("inspect", "b.safetensors", "--json", "--no-metric").out)["files"][0]
    assert said.code == 0 and report["path"] == url
    assert {k: v for k, v in report.items() if k not in {"path", "name", "seconds"}} == {
        k: v for k, v in local.items() if k not in {"path", "name", "seconds"}
    }
    assert net.storage.sent < (300 << 10) < len(bulky())
    assert not net.folder.store.exists(), "nothing is kept"


def test_a_gated_repository(net: Net) -> None:
    data = saved(model("SD-tiny"))
    hugging_face(net.hub, net.storage, "org/model", "m.safetensors", data, token=TOKEN)
    said = net.folder("inspect", "hf://org/model/m.safetensors")
    assert said.code == 5 and not said.out
    assert "`hf://org/model/m.safetensors` cannot be read" in said.err
    assert "401, login needed: “Access to model org/model is restricted.”" in said.err
    assert "accept the model's terms on its page, then set `HF_TOKEN`" in said.err
    granted = net.machine("second", HF_TOKEN=TOKEN)
    for address in ("hf://org/model/m.safetensors", f"hf://org/model@{COMMIT}/m.safetensors"):
        said = granted("inspect", address)
        assert said.code == 0 and "SD-tiny" in said.out
        assert TOKEN not in said.out + said.err and "signature" not in said.out + said.err
    other = net.machine("third", HF_TOKEN="hf_wrong")
    said = other("inspect", "hf://org/model/m.safetensors")
    assert said.code == 5 and "the token in `HF_TOKEN` does not open it" in said.err


def test_civitai(net: Net) -> None:
    civitai(net.civitai, net.storage, 42, 99, saved(model("SD-tiny")), token=TOKEN)
    said = net.machine("second", CIVITAI_TOKEN=TOKEN)("inspect", "air:sd1:checkpoint:civitai:7@42")
    assert said.code == 0 and "SD-tiny" in said.out
    said = net.folder("inspect", "civitai:42")
    assert said.code == 5 and "set `CIVITAI_TOKEN`" in said.err and "logged in" in said.err


def test_what_cannot_be_read_where_it_lies(net: Net) -> None:
    net.storage.routes |= {
        "/dirty.ckpt": File(dirty()),
        "/whole.safetensors": File(bulky(), ranges=False),
        "/good.safetensors": File(saved(model("SD-tiny"))),
    }

    def inspect(*paths: str) -> tuple[int, str]:
        said = net.folder("inspect", *(net.storage.url(p) for p in paths))
        return said.code, said.err

    code, err = inspect("/gone.safetensors")
    assert code == 5 and "answers 404, not there" in err
    code, err = inspect("/dirty.ckpt")
    assert code == 6 and "only safetensors files can be read on their hosts" in err and "download it" in err
    code, err = inspect("/whole.safetensors")
    assert code == 5 and "does not serve parts" in err
    assert net.storage.sent < len(bulky()), "what is not wanted is not waited for"
    said = net.folder("inspect", net.storage.url("/gone.safetensors"), net.storage.url("/good.safetensors"))
    assert said.code == 5 and "SD-tiny" in said.out, "the others are said all the same"
    said = net.folder("inspect", net.storage.url("/good.safetensors"), "--hashes")
    assert said.code == 2 and "take the whole file" in said.err


def test_hosts_of_the_own_network_are_asked_on_purpose_only(net: Net, tmp_path: Path) -> None:
    net.storage.routes["/m.safetensors"] = File(saved(model("SD-tiny")))
    careful = net.machine("second", CKPT_ALLOW_PRIVATE="")
    said = careful("inspect", net.storage.url("/m.safetensors"))
    assert said.code == 5 and "without encryption" in said.err
    pem = certificate(tmp_path)
    with Server(tls=tls_server_context(tmp_path)) as secure:
        careful = net.machine("third", CKPT_ALLOW_PRIVATE="", SSL_CERT_FILE=str(pem))
        said = careful("inspect", secure.url("/m.safetensors", host="localhost"))
        assert said.code == 5 and "a loopback address" in said.err and "`CKPT_ALLOW_PRIVATE=1`" in said.err
        assert not secure.seen
    assert not net.storage.seen


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("https://127.0.0.1:9/m.safetensors", "`127.0.0.1` is a loopback address"),
        ("https://169.254.169.254/latest/meta-data", "`169.254.169.254` is a link-local address"),
        ("https://[::1]:9/m", "`::1` is a loopback address"),
        ("http://models.example/m", "without encryption"),
    ],
)
def test_a_public_host_that_redirects_to_a_private_one(
    net: Net, tmp_path: Path, target: str, words: str
) -> None:
    """The public host is one that a proxy leads to."""
    pem = certificate(tmp_path, "DNS:models.example")
    with Server(tls=tls_server_context(tmp_path)) as secure, Proxy(to=secure.port) as proxy:
        secure.routes["/m.safetensors"] = redirects(target)
        careful = _through(net, proxy.url, pem)
        said = careful("inspect", "https://models.example/m.safetensors")
        assert said.code == 5 and words in said.err, said.err
        assert len(secure.seen) == 1


def _through(net: Net, proxy: str, pem: Path) -> Folder:
    return net.machine("second", CKPT_ALLOW_PRIVATE="", HTTPS_PROXY=proxy, SSL_CERT_FILE=str(pem))
