"""An export's web page in headless Chromium: served from this machine, driven, and measured.

Needs npm, Chromium with its driver, and selenium; nothing else than this machine is reached once
npm has installed the page's two libraries.
"""

import http.server
import itertools
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmfree_jax.data.tokenizer import Tokenizer
from mmfree_jax.errors import ConfigError, MMFreeError
from mmfree_jax.export.web_page import write_page
from mmfree_jax.installed import import_optional

PROMPT = "My fellow citizens, we hold these truths"
_ARGUMENTS = (
    "headless",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "disable-dev-shm-usage",
    "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


class BrowserError(MMFreeError):
    """The page could not be built or did not do what it should; the message says why."""


def build_page(web: Path) -> None:
    """Installs the page's libraries and copies what it loads into `web`/vendor.

    Raises:
      ConfigError: npm is not installed.
      BrowserError: npm failed.
    """
    if shutil.which("npm") is None:
        raise ConfigError("npm is not installed: run apt-get install npm")
    for command in (["npm", "ci"], ["npm", "run", "build"]):
        done = subprocess.run(command, cwd=web, capture_output=True, text=True)
        if done.returncode:
            raise BrowserError(f"{' '.join(command)} failed: {done.stderr.strip()[-300:]}")
    shutil.rmtree(web / "node_modules")


class Site:
    """Serves an export on this machine while in a `with` block.

    Attributes:
      folder: of the export.
      url: of the page.
      instead: contents in the place of some files, by path; None for a file that is missing.
    """

    def __init__(self, export: Path, page: Path) -> None:
        """Serves `page`/web beside the files of `export`; both may be the same folder."""
        self.folder = export
        self.instead: dict[str, bytes | None] = {}
        site = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def translate_path(self, path: str) -> str:
                self.directory = str(page if path.startswith("/web/") else export)
                return super().translate_path(path)

            def do_GET(self) -> None:
                path = self.path.partition("?")[0].lstrip("/")
                if path not in site.instead:
                    super().do_GET()
                elif (body := site.instead[path]) is None:
                    self.send_error(404)
                else:
                    self.send_response(200)
                    self.send_header("Content-Type", self.guess_type(path))
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def end_headers(self) -> None:
                self.send_header("Cache-Control", "no-store")
                super().end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/web/"

    def __enter__(self) -> "Site":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def chromium(profile: Path, *, timeout_s: float = 60) -> Iterator[Any]:
    """Selenium's driver of a headless Chromium that reaches nothing but this machine.

    Args:
      profile: an empty folder.
      timeout_s: longest answer to one command.

    Raises:
      ConfigError: selenium, Chromium or its driver is not installed.
      BrowserError: Chromium does not start.
    """
    import_optional("selenium", "a test of the web page", "pip install selenium")
    from selenium import webdriver
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver.chrome.service import Service

    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        raise ConfigError(
            "chromium or its driver is not installed: run apt-get install chromium chromium-driver"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in (*_ARGUMENTS, f"user-data-dir={profile}"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # With both paths given, selenium looks for no driver and no browser of its own.
    try:
        browser = webdriver.Chrome(options=options, service=Service(driver))
    except WebDriverException as e:
        raise BrowserError(
            f"{binary} does not start ({' '.join(str(e.msg).split())[:300]}): look whether "
            "it runs here without a display, with memory to spare"
        ) from e
    browser.set_script_timeout(timeout_s)
    browser.command_executor.client_config.timeout = timeout_s  # type: ignore[attr-defined]
    try:
        yield browser
    finally:
        browser.quit()


def wait(browser: Any, *states: str, timeout_s: float = 60) -> str:
    """Waits for one of the page's states: "loading", "ready", "busy", "failed"."""
    from selenium.webdriver.support.ui import WebDriverWait

    def state(_: Any) -> str | None:
        # By a script: the page may load anew meanwhile.
        found = browser.execute_script("return document.body?.dataset.state")
        return found if found in states else None

    found = WebDriverWait(browser, timeout_s, 0.05).until(state)
    assert found is not None
    return found


def text_of(browser: Any, name: str) -> str:
    """The text of the element with this id."""
    return browser.find_element("id", name).text


def show(browser: Any, site: Site, query: str = "", *, timeout_s: float = 60) -> str:
    """Opens the page as a new visitor finds it; returns "ready" or "failed"."""
    if browser.current_url.startswith("http"):
        browser.execute_script("sessionStorage.clear()")
    browser.get(site.url + query)
    return wait(browser, "ready", "failed", timeout_s=timeout_s)


def configure(browser: Any, **values: float) -> None:
    """Sets fields of the page's settings: max_tokens, temperature, top_k, seed."""
    for name, value in values.items():
        browser.execute_script(
            "document.getElementById(arguments[0]).value = arguments[1]",
            name.replace("_", "-"),
            str(value),
        )


def type_prompt(browser: Any, text: str) -> None:
    """Types a prompt and sends it."""
    browser.find_element("id", "prompt").send_keys(text)
    browser.find_element("id", "send").click()


def answer(browser: Any, *, timeout_s: float = 60) -> list[int]:
    """Waits for the answer's end; its tokens.

    Raises:
      BrowserError: the page failed; its own words.
    """
    if wait(browser, "ready", "failed", timeout_s=timeout_s) == "failed":
        raise BrowserError(text_of(browser, "error"))
    tokens = browser.find_elements("class name", "answer")[-1].get_attribute("data-tokens")
    return [int(i) for i in tokens.split(",") if i]


def measure(
    export: Path, tokenizer: Tokenizer, folder: Path, *, tokens: int, threads: int
) -> list[dict[str, Any]]:
    """The same greedy continuation in the page, then in onnxruntime on this machine.

    Args:
      export: exported folder; it may lack the page.
      tokenizer: for the page.
      folder: empty; receives the page and the browser's profile.
      tokens: to generate, at least 2.
      threads: of either runtime.

    Returns:
      A row for each: runtime, load_s (from opening to ready), tokens_per_s (behind the first
      token), peak_mib (of the page's process; None for onnxruntime, which shares Python's),
      tokens (their ids).

    Raises:
      ConfigError: something that is needed is not installed.
      CheckpointError: the export is damaged.
      BrowserError: the page failed.
    """
    from mmfree_jax.infer.text import encode_prompt

    write_page(folder, tokenizer)
    build_page(folder / "web")
    with Site(export, folder) as site, chromium(folder / "profile", timeout_s=600) as browser:
        # First without a model, so that the service worker which allows threads is there.
        site.instead = {"export.json": None}
        show(browser, site)
        site.instead = {}
        start = time.perf_counter()
        state = show(browser, site, f"?threads={threads}", timeout_s=600)
        load_s = time.perf_counter() - start
        if state == "failed":
            raise BrowserError(text_of(browser, "error"))
        configure(browser, temperature=0, max_tokens=tokens)
        type_prompt(browser, PROMPT)
        found = answer(browser, timeout_s=600)
        speed = float(text_of(browser, "speed").split()[0])
        page = {
            "runtime": "onnxruntime-web in Chromium",
            "load_s": load_s,
            "tokens_per_s": speed,
            "peak_mib": _page_peak_mib(browser.service.process.pid),
            "tokens": found,
        }
    return [page, _native(export, encode_prompt(tokenizer, PROMPT), tokens, threads)]


def _native(export: Path, prompt: list[int], tokens: int, threads: int) -> dict[str, Any]:
    from mmfree_jax.export import onnx_session

    start = time.perf_counter()
    model = onnx_session.load(export, threads=threads)
    load_s = time.perf_counter() - start
    stream = onnx_session.greedy(model, prompt)
    found = [next(stream)]
    start = time.perf_counter()
    found += itertools.islice(stream, tokens - 1)
    return {
        "runtime": "onnxruntime in Python",
        "load_s": load_s,
        "tokens_per_s": (tokens - 1) / (time.perf_counter() - start),
        "peak_mib": None,
        "tokens": found,
    }


def _page_peak_mib(driver: int) -> float:
    """Largest memory that any of the browser's page processes has held, by Linux's count."""
    parents, peaks = {}, {}
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            status = (process / "status").read_text()
            arguments = (process / "cmdline").read_bytes()
        except OSError:  # it has ended meanwhile
            continue
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        parents[int(process.name)] = int(fields["PPid"])
        if b"--type=renderer" in arguments and "VmHWM" in fields:
            peaks[int(process.name)] = int(fields["VmHWM"].split()[0]) / 1024
    return max(
        (peak for process, peak in peaks.items() if driver in _ancestors(process, parents)),
        default=float("nan"),
    )


def _ancestors(process: int, parents: dict[int, int]) -> Iterator[int]:
    while process in parents:
        process = parents[process]
        yield process
