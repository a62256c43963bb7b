"""The page at `/` in a real headless Chromium, against the server that it comes from."""

import shutil

import page_audit
import pytest
from served import NAME, served

from mmfree_jax.data.tokenizer import ByteTokenizer
from mmfree_jax.experiments.bench.browser import chromium
from mmfree_jax.serve.service import ServiceLimits

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(
        shutil.which("chromium") is None or shutil.which("chromedriver") is None,
        reason="Chromium or its driver is not installed",
    ),
]
ATTACK = "<img src=x onerror=document.title='hurt'>&amp;<b>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def _find(browser, name):
    return browser.find_element("css selector", name)


def _wait(browser, state):
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 60).until(
        lambda b: _find(b, "body").get_attribute("data-state") == state
    )


def test_a_conversation_by_keyboard_is_escaped_kept_and_measured(browser, engine):
    from selenium.webdriver.common.keys import Keys

    with served(engine, lent=True, keys=("a-key",)) as server:
        browser.get(server.url)
        _wait(browser, "failed")
        assert "API key" in _find(browser, "#error").text
        browser.switch_to.active_element.send_keys("a-key", Keys.ENTER)  # the field of the key
        _wait(browser, "ready")
        assert _find(browser, "#model").text.startswith(f"{NAME}, on this server")
        field = browser.switch_to.active_element
        if field.get_attribute("id") != "prompt":
            field = _find(browser, "#prompt")
        browser.execute_script("document.getElementById('settings').open = true")
        _find(browser, "#max-tokens").clear()
        _find(browser, "#max-tokens").send_keys("6")
        field.send_keys(ATTACK, Keys.ENTER)
        _wait(browser, "ready")
        typed, answer = (_find(browser, f"#log .{name}") for name in ("typed", "answer"))
        assert typed.get_attribute("textContent") == ATTACK
        assert answer.get_attribute("textContent")
        assert browser.title == "MatMul-free chat"
        assert browser.find_elements("css selector", "#log img, #log b") == []
        asked = 1 + len(ByteTokenizer().encode(ATTACK))
        assert _find(browser, "#usage").text == f"{asked} tokens, 0 of them known"

        texts, borders = page_audit.contrasts(browser)
        assert min(texts.values()) >= 4.5, texts
        assert min(borders.values()) >= 3, borders

        before = _find(browser, "#log").text
        browser.refresh()
        _wait(browser, "ready")
        assert _find(browser, "#log").text == before
        _find(browser, "#reset").click()
        assert _find(browser, "#log").text == ""
        severe = [e for e in browser.get_log("browser") if "401" not in e["message"]]
        assert severe == []


def test_escape_stops_an_answer_and_frees_its_slot(browser, engine):
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    # Without end tokens, and long: an answer that ends by itself cannot be stopped.
    limits = ServiceLimits(max_tokens=100_000)
    with served(engine, limits, lent=True, end_ids=()) as server:
        browser.get(server.url)
        _wait(browser, "ready")
        browser.execute_script("document.getElementById('settings').open = true")
        field = _find(browser, "#max-tokens")
        field.clear()
        field.send_keys("100000")
        ended = engine.statistics().ended.get("cancelled", 0)
        _find(browser, "#prompt").send_keys("x", Keys.ENTER)
        _wait(browser, "busy")
        WebDriverWait(browser, 60).until(lambda b: _find(b, "#log .answer").text)
        _find(browser, "body").send_keys(Keys.ESCAPE)
        _wait(browser, "ready")
        assert "[stopped]" in _find(browser, "#log").text
        WebDriverWait(browser, 60).until(
            lambda _: engine.statistics().ended.get("cancelled", 0) == ended + 1
        )


def test_the_page_may_load_nothing_from_elsewhere(small):
    status, page, headers = small.ask("GET", "/")
    assert status == 200
    assert b"http" not in page.replace(b"http-equiv", b"")
    policy = headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    for name in ("page.js", "own.css", "style.css", "settings.js", "kept.js"):
        status, text, headers = small.ask("GET", f"/page/{name}")
        assert status == 200
        assert b"innerHTML" not in text
        assert headers["x-content-type-options"] == "nosniff"
