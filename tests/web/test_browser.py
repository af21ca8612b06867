"""The page in a real browser: every view, a whole prune and build, and a page that attacks it."""

from __future__ import annotations

import http.server
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from builder.toolkit.demo import write_sources
from tests.help.browser import browser, needs_browser
from tests.help.building import ROOT, files

if TYPE_CHECKING:
    from selenium.webdriver.chrome.webdriver import WebDriver

pytestmark = [needs_browser, pytest.mark.slow]

EVIL = "evil.example"
HOSTILE = "<img src=x onerror=window.hacked=1>.safetensors"

VIEWS = [
    "", "report?file=demo/dirty.ckpt", "prune?file=demo/dirty.ckpt", "extract?file=demo/dirty.ckpt",
    "replace",
    "replace?base=demo/dirty.ckpt&slot.VAE-mini=%7Cdemo/good.vae.safetensors", "replace?base=NEW+SD-mini",
    "merge?in.a=demo/dirty.ckpt&in.b=demo/dirty.ckpt&preview=1&p.alpha=0.5", "merge?op=linear", "diff",
    "recipe", "recipe?file=demo/demo.toml", "recipe?new=1", "inbox", "store", "jobs",
]  # fmt: skip


class Page:
    """`ckpt ui` as a process, and the browser that looks at it."""

    def __init__(self, driver: WebDriver, folder: Path, address: str) -> None:
        self.driver = driver
        self.folder = folder
        self.address = address
        self.base = address.partition("?")[0]

    def open(self, view: str = "") -> None:
        self.driver.get(self.base + view)

    def all(self, selector: str) -> list[Any]:
        return list(self.driver.find_elements("css selector", selector))

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def button(self, words: str) -> Any:
        return next(b for b in self.all("button") if b.text == words)

    def press(self, words: str) -> None:
        """Press a button as a person with a mouse does."""
        found = self.button(words)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", found)
        found.click()

    def wait(self, that: Callable[[], Any], why: str = "") -> Any:
        from selenium.common.exceptions import StaleElementReferenceException

        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                if found := that():
                    return found
            except (StaleElementReferenceException, IndexError):
                pass
            time.sleep(0.05)
        raise AssertionError(f"{why or 'nothing came'}: {self.one('body').text}")

    def state(self) -> str:
        """The state that the page of a job shows."""
        found = self.all("#state")
        return str(found[0].text) if found else ""

    def done(self) -> None:
        self.wait(lambda: self.state() == "done", "the job is not done")

    def problems(self) -> list[str]:
        """What the browser has to say of the page: errors, and what the policy has stopped."""
        return [str(e["message"]) for e in self.driver.get_log("browser")]

    def width(self, pixels: int) -> None:
        size = {"width": pixels, "height": 900, "deviceScaleFactor": 1, "mobile": pixels < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


@contextmanager
def ckpt_ui(folder: Path, *options: str) -> Iterator[str]:
    """The address of `ckpt ui`, which ends as Ctrl-C ends it."""
    store = folder.parent / "store"
    process = subprocess.Popen(
        [sys.executable, "-m", "builder", "ui", str(folder), "--no-browser", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CKPT_STORE": str(store), "CKPT_MODELS": ""},
    )
    assert process.stdout is not None and process.stderr is not None
    try:
        address = process.stdout.readline().strip()
        assert address, process.stderr.read()
        yield address
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    rule = f"host-resolver-rules=MAP {EVIL} 127.0.0.1"
    with browser(tmp_path_factory.mktemp("browser"), rule) as driver:
        yield driver


@pytest.fixture
def page(driver: WebDriver, tmp_path: Path) -> Iterator[Page]:
    folder = tmp_path / "demo"
    write_sources(folder)
    (folder / HOSTILE).write_bytes((folder / "good.vae.safetensors").read_bytes())
    with ckpt_ui(folder) as address:
        page = Page(driver, folder, address)
        driver.get(address)
        page.width(1440)
        page.problems()
        yield page
        driver.get("about:blank")


def test_the_address_opens_the_page_and_loses_its_token(page: Page) -> None:
    assert page.driver.current_url == page.base
    assert page.one("h1").text == "Library"
    assert "token" not in page.driver.execute_script("return document.cookie + location.href"), "HttpOnly"


@pytest.mark.parametrize("width", [390, 1440])
def test_every_view_is_whole_at_every_width(page: Page, width: int) -> None:
    """No script fails, the policy stops nothing, nothing is wider than the window, everything is there."""
    page.width(width)
    for view in VIEWS:
        page.open(view)
        assert page.problems() == [], view
        assert page.one("h1").text and page.one("nav").is_displayed(), view
        wide = page.driver.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width, view
        assert page.driver.execute_script("return window.hacked") is None, "names of files are text"
        small = page.driver.execute_script(
            "return [...document.querySelectorAll('button, select, input:not([type=hidden])')]"
            ".filter(e => e.offsetParent && e.getBoundingClientRect().right > innerWidth + 1)"
            ".map(e => e.outerHTML)"
        )
        assert small == [], view


def test_light_and_dark(page: Page) -> None:
    seen = set()
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        page.open()
        paper = "return getComputedStyle(document.documentElement).backgroundColor"
        seen.add(page.driver.execute_script(paper))
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert seen == {"rgb(255, 255, 255)", "rgb(21, 24, 28)"}


def test_a_whole_prune_with_the_keyboard_alone(page: Page) -> None:
    from selenium.webdriver import ActionChains, Keys

    def focused() -> Any:
        return page.driver.switch_to.active_element

    def tab_to(words: str) -> None:
        for _ in range(200):
            ActionChains(page.driver).send_keys(Keys.TAB).perform()
            found = focused()
            if words in (found.text, found.get_attribute("name"), found.get_attribute("href")):
                outline = page.driver.execute_script(
                    "return getComputedStyle(arguments[0]).outlineStyle", found
                )
                assert outline == "solid", "one sees where one is"
                return
        raise AssertionError(f"no way to {words}")

    def enter() -> None:
        ActionChains(page.driver).send_keys(Keys.ENTER).perform()

    page.open()
    ActionChains(page.driver).send_keys(Keys.TAB).perform()
    assert focused().text == "Skip to the content", "the first way is past the navigation"
    tab_to("demo/dirty.ckpt")
    enter()
    page.wait(lambda: page.one("h1").text == "dirty.ckpt")
    tab_to("Prune it")
    enter()
    page.wait(lambda: page.one("h1").text == "Prune dirty.ckpt")
    assert "What goes" in page.one("main").text and "UNET-mini-SD" in page.one("main").text
    tab_to("name")
    assert focused().get_attribute("value") == "dirty-pruned.safetensors"
    tab_to("save")
    ActionChains(page.driver).send_keys("pruned.toml").perform()
    tab_to("Prune it")
    enter()
    page.done()
    assert "written" in page.one("main").text
    assert (page.folder / "dirty-pruned.safetensors").exists() and (page.folder / "pruned.toml").exists()
    assert page.problems() == []
    page.open()
    assert "dirty-pruned.safetensors" in page.one("main").text


def test_a_recipe_with_its_errors_as_one_types_and_a_whole_build(page: Page) -> None:
    from selenium.webdriver import Keys

    page.open("recipe?file=demo/demo.toml")
    assert "Nothing is wrong with it." in page.one("#problems").text
    assert page.one("#problems").get_attribute("aria-live") == "polite"
    area = page.one("textarea")
    area.send_keys(Keys.CONTROL + Keys.END + Keys.NULL, "\nfixs = [")
    page.wait(lambda: "What is wrong" in page.one("#problems").text)
    assert area.get_attribute("aria-invalid") == "true"
    area.send_keys("]")
    page.wait(lambda: "unknown class fixs" in page.one("#problems").text)
    page.press(next(b.text for b in page.all("#problems button")))
    line = page.driver.execute_script(
        "const t = arguments[0]; return t.value.slice(0, t.selectionStart).split('\\n').length", area
    )
    assert f"Go to line {line}" == page.one("#problems button").text and line > 15
    assert page.driver.switch_to.active_element == area
    area.send_keys(Keys.SHIFT + Keys.END + Keys.NULL, Keys.DELETE, "# no fixes")
    page.wait(lambda: "Nothing is wrong with it." in page.one("#problems").text)
    assert page.all("#problems svg"), "the plan is drawn anew"
    page.press("Save")
    page.wait(lambda: "saved=1" in page.driver.current_url)
    assert "# no fixes" in (page.folder / "demo.toml").read_text()
    page.press("Build it")
    page.done()
    assert "written" in page.one("main").text and "sha256" in page.one("main").text
    assert (page.folder / "demo.safetensors").exists() and (page.folder / "demo.lock.toml").exists()
    assert page.problems() == []


def test_sliders_say_their_values(page: Page) -> None:
    from selenium.webdriver import Keys

    page.open("merge?in.a=demo/dirty.ckpt&in.b=demo/dirty.ckpt&p.alpha=0.5")
    sliders = page.all("input[type=range]")
    assert len(sliders) == 25
    sliders[0].send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    outputs = page.all(".slider output")
    assert [o.text for o in outputs[:2]] == ["0.52", "0.5"]
    base = page.one("input[name='p.alpha']")
    base.clear()
    base.send_keys("0.25")
    assert [o.text for o in page.all(".slider output")[:2]] == ["0.52", "0.25"], (
        "those that nobody moved follow"
    )


def test_without_script_everything_works(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    write_sources(folder)
    with (
        ckpt_ui(folder) as address,
        browser(tmp_path / "profile", "blink-settings=scriptEnabled=false") as driver,
    ):
        page = Page(driver, folder, address)
        driver.get(address)
        page.open("prune?file=demo/dirty.ckpt")
        page.press("Prune it")
        page.done()
        assert (folder / "dirty-pruned.safetensors").exists()
        page.open("recipe?file=demo/demo.toml")
        page.one("textarea").send_keys("x")
        page.press("Check")
        page.wait(lambda: "wrong" in page.one("#problems").text)
        page.open("diff?a=demo/dirty.ckpt&b=demo/dirty-pruned.safetensors")
        page.press("Compare them")
        page.done()
        assert "They differ." in page.one("main").text


ATTACK = """<!doctype html><title>attack</title><body>
<form id="form" method="post" action="{base}prune" target="frame">
<input name="file" value="demo/dirty.ckpt"><input name="folder" value="demo">
<input name="name" value="attacked.safetensors"></form>
<iframe name="frame" id="frame"></iframe><iframe id="page" src="{base}"></iframe>
<img id="image" src="{base}static/icon.svg"><script src="{base}static/page.js"></script>
<script>
window.found = [];
const body = new URLSearchParams({{file: "demo/dirty.ckpt", folder: "demo", name: "attacked.safetensors"}});
const posts = ["prune", "read", "gc", "cancel", "save", "build", "inbox"];
const tries = posts.flatMap((view) => [
  fetch("{base}" + view, {{method: "POST", body, mode: "no-cors", credentials: "include"}}),
  fetch("{base}" + view, {{method: "POST", body, credentials: "include"}}),
]).concat(["", "api/library", "api/inspect?file=demo/dirty.ckpt"].map((view) =>
  fetch("{base}" + view, {{credentials: "include"}}).then((a) => a.text()).then((t) => found.push(t))));
navigator.sendBeacon("{base}prune", body);
document.getElementById("form").submit();
const events = new EventSource("{base}events?job=1", {{withCredentials: true}});
events.addEventListener("progress", (e) => found.push(e.data));
Promise.allSettled(tries).then(() => setTimeout(() => {{ window.over = true; }}, 500));
</script>"""


class _Attacker(http.server.BaseHTTPRequestHandler):
    """Serves the attack, with all that an attacker could know but the cookie: even the path of this run."""

    base = ""

    def do_GET(self) -> None:
        body = ATTACK.format(base=self.base).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@contextmanager
def attacker(base: str) -> Iterator[int]:
    handler = type("Handler", (_Attacker,), {"base": base})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield int(server.server_address[1])
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("host", ["127.0.0.1", EVIL])
def test_a_page_of_another_origin_does_and_learns_nothing(page: Page, host: str) -> None:
    """Of another site, and of the very same one at another port, where the browser sends our cookie along."""
    before = files(page.folder)
    with attacker(page.base) as port:
        page.driver.get(f"http://{host}:{port}/")
        page.wait(lambda: page.driver.execute_script("return window.over"), "the attack does not end")
        assert page.driver.execute_script("return window.found") == []
        assert page.driver.execute_script("return document.getElementById('image').naturalWidth") == 0
        for frame in ("frame", "page"):
            page.driver.switch_to.frame(frame)
            assert "Library" not in page.one("body").text and not page.all("nav")
            page.driver.switch_to.default_content()
    assert files(page.folder) == before
    page.open("jobs")
    assert "Nothing was asked for yet." in page.one("main").text


def test_a_name_that_is_resolved_to_this_machine_is_not_answered(page: Page) -> None:
    """DNS rebinding: to the browser the page is of the attacker's own origin."""
    page.driver.get(page.base.replace("127.0.0.1", EVIL))
    assert "the host is not this server's" in page.one("body").text
    page.driver.get(page.address.replace("127.0.0.1", EVIL))
    assert "the host is not this server's" in page.one("body").text, "not even with the token"
    assert page.driver.get_cookies() == []


def test_the_cookie_goes_to_no_other_server_of_this_machine(page: Page) -> None:
    """Browsers do not tell ports apart in cookies; the path of the run does."""
    heard: list[str | None] = []

    class Listener(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append(self.headers.get("Cookie"))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listener) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        page.driver.get(f"http://127.0.0.1:{server.server_address[1]}/")
        server.shutdown()
        thread.join()
    assert heard and not any(heard)


def test_work_is_watched_and_stopped(page: Page, tmp_path: Path) -> None:
    """A file of some size: its progress moves, and Cancel leaves nothing of what was begun."""
    import numpy as np

    from builder.formats.write_safetensors import write
    from builder.tensors.lazy import DType, MemoryTensor

    data = np.zeros(1 << 26, "<f4").tobytes()
    big = {f"t{n}": MemoryTensor(DType.F32, (1 << 26,), data) for n in range(3)}
    write(page.folder / "big.safetensors", big, durable=False)
    before = files(page.folder)
    page.open("report?file=demo/big.safetensors")
    page.one("input[name=full]").click()
    page.one("input[name=hashes]").click()
    page.press("Read the weights")
    page.wait(lambda: page.all("progress"), "no progress is shown")
    assert page.wait(lambda: re.search(r"percent", page.one("#progress").get_attribute("textContent")))
    page.press("Cancel")
    page.wait(lambda: page.state().startswith("cancelled"))
    assert files(page.folder) == before
