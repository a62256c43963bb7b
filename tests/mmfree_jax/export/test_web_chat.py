"""The web page of an export, in a real headless Chromium, against onnxruntime in Python."""

import itertools
import json
import re
import shutil
from pathlib import Path

import page_audit
import pytest
from onnx_folders import manifest_of
from page_tokenizers import HARD, make_tokenizers

from mmfree_jax.cli.main import main
from mmfree_jax.experiments.bench import browser as browser_lib
from mmfree_jax.experiments.bench.browser import (
    answer,
    configure,
    show,
    text_of,
    type_prompt,
    wait,
)
from mmfree_jax.export import onnx_session, web_tokenizer

pytestmark = pytest.mark.timeout(180)

PROMPT, SECOND = "My fellow citizens, café 日本", " so is our union"


def send(browser, text: str) -> list[int]:
    """Types a prompt; returns the tokens of the answer."""
    type_prompt(browser, text)
    return answer(browser)


@pytest.mark.parametrize("query", ["", "?threads=1"])
def test_the_page_streams_what_python_generates(site, browser, query):
    tokenizer = make_tokenizers()["sentencepiece"]
    model = onnx_session.load(site.folder)
    first = [tokenizer.bos_id, *tokenizer.encode(PROMPT)]
    expected = list(itertools.islice(onnx_session.greedy(model, first), 40))
    both = [*first, *expected, *tokenizer.encode(SECOND)]
    expected_second = list(itertools.islice(onnx_session.greedy(model, both), 30))

    browser.get_log("browser")
    assert show(browser, site, query) == "ready", text_of(browser, "error")
    if query:
        assert text_of(browser, "threads") == "1"
    else:
        cores = browser.execute_script("return navigator.hardwareConcurrency")
        assert browser.execute_script("return crossOriginIsolated")
        assert text_of(browser, "threads") == str(min(4, cores))
    configure(browser, temperature=0, max_tokens=40)
    assert send(browser, PROMPT) == expected
    text = tokenizer.decode(first + expected).removeprefix(tokenizer.decode(first))
    shown = browser.execute_script("return document.querySelector('.answer').textContent")
    assert shown.replace("\ufffd", "") == text.replace("\ufffd", "")
    assert re.fullmatch(r"[\d.]+ tokens/s", text_of(browser, "speed"))
    assert text_of(browser, "read") == str(len(first) + 40)
    assert text_of(browser, "state").startswith("1 kB")

    # The state carries over, and nothing of it is left behind Reset.
    configure(browser, max_tokens=30)
    assert send(browser, SECOND) == expected_second
    browser.find_element("id", "reset").click()
    assert text_of(browser, "log") == ""
    assert send(browser, PROMPT) == expected[:30]
    assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []


def test_stop_ends_an_answer_and_the_next_prompt_goes_on(site, browser, monkeypatch):
    # Without an end token, so that nothing but Stop ends the answer.
    endless = {"export.json": manifest_of(site.folder, eos_token_id=None, end_ids=[])}
    monkeypatch.setattr(site, "instead", endless)
    assert show(browser, site) == "ready", text_of(browser, "error")
    configure(browser, temperature=0, max_tokens=100000)
    type_prompt(browser, PROMPT)
    # Text is there while the answer goes on.
    script = """
        const [done] = arguments;
        (function look() {
          if (document.querySelector(".answer")?.textContent) done(document.body.dataset.state);
          else setTimeout(look, 5);
        })();
    """
    assert browser.execute_async_script(script) == "busy"
    browser.find_element("id", "stop").click()
    assert wait(browser, "ready", "failed") == "ready"
    assert "[stopped]" in text_of(browser, "log")
    tokens = browser.find_element("class name", "answer").get_attribute("data-tokens")

    tokenizer, model = make_tokenizers()["sentencepiece"], onnx_session.load(site.folder)
    generated = [int(i) for i in tokens.split(",") if i]
    so_far = [tokenizer.bos_id, *tokenizer.encode(PROMPT), *generated]
    configure(browser, max_tokens=5)
    expected = onnx_session.greedy(model, [*so_far, *tokenizer.encode(SECOND)])
    assert send(browser, SECOND) == list(itertools.islice(expected, 5))


def test_sampling_follows_its_seed_and_top_k(site, browser):
    assert show(browser, site) == "ready", text_of(browser, "error")
    answers = []
    for seed, top_k in ((1, 0), (1, 0), (2, 0), (1, 1)):
        configure(browser, temperature=1, max_tokens=20, seed=seed, top_k=top_k)
        answers.append(send(browser, PROMPT))
        browser.find_element("id", "reset").click()
    configure(browser, temperature=0)
    assert answers[0] == answers[1] != answers[2]
    assert answers[3] == send(browser, PROMPT)


def test_tokenizers_give_pythons_ids_and_bytes_in_the_browser(site, browser):
    show(browser, site)
    script = """
        const [spec, texts, done] = arguments;
        Promise.all([import("./tokenizer.js"), import("./vendor/tokenizers.min.mjs")])
          .then(([page, library]) => {
            const tokenizer = page.makeTokenizer(spec, library);
            done(texts.map((text) => {
              const ids = tokenizer.encode(text);
              const stream = new page.TextStream(tokenizer, tokenizer.stripSpace);
              return [ids, ids.map((id) => stream.push(id)).join("") + stream.flush()];
            }));
          })
          .catch((error) => done(String(error)));
    """
    for name, tokenizer in make_tokenizers().items():
        spec = web_tokenizer.browser_tokenizer(tokenizer)
        found = browser.execute_async_script(script, spec, HARD)
        expected = [[ids, tokenizer.decode(ids)] for ids in map(tokenizer.encode, HARD)]
        assert found == expected, name


def test_a_page_opened_as_a_file_says_that_it_needs_a_server(site, browser):
    browser.get((site.folder / "web" / "index.html").as_uri())
    assert "python -m http.server" in text_of(browser, "error")


def _reload(browser) -> str:
    browser.refresh()
    return wait(browser, "ready", "failed")


def _focused(browser) -> str:
    return browser.execute_script("return document.activeElement.id")


def _value(browser, name: str) -> str:
    return browser.find_element("id", name).get_property("value")


def test_a_reload_keeps_the_conversation_and_the_model_goes_on(site, browser, monkeypatch):
    tokenizer, model = make_tokenizers()["sentencepiece"], onnx_session.load(site.folder)
    first = [tokenizer.bos_id, *tokenizer.encode(PROMPT)]
    expected = list(itertools.islice(onnx_session.greedy(model, first), 30))
    both = [*first, *expected, *tokenizer.encode(SECOND)]
    expected_second = list(itertools.islice(onnx_session.greedy(model, both), 20))
    assert show(browser, site) == "ready", text_of(browser, "error")
    configure(browser, temperature=0, max_tokens=30)
    assert send(browser, PROMPT) == expected
    shown, read = text_of(browser, "log"), text_of(browser, "read")
    browser.find_element("id", "prompt").send_keys(SECOND)
    for _ in range(2):
        assert _reload(browser) == "ready"
        assert (text_of(browser, "log"), text_of(browser, "read")) == (shown, read)
        assert (_value(browser, "prompt"), _value(browser, "max-tokens")) == (SECOND, "30")
    configure(browser, max_tokens=20)
    browser.find_element("id", "send").click()
    assert answer(browser) == expected_second

    # Of another model the conversation is not: its state would be meaningless.
    browser.find_element("id", "prompt").send_keys("kept")
    files = json.loads((site.folder / "export.json").read_text())["files"]
    other = manifest_of(site.folder, files=files | {"more": {"bytes": 1, "sha256": "0"}})
    monkeypatch.setattr(site, "instead", {"export.json": other})
    assert _reload(browser) == "ready"
    assert (text_of(browser, "log"), _value(browser, "prompt")) == ("", "kept")
    monkeypatch.setattr(site, "instead", {})
    # Reset forgets it, also for the next reload.
    configure(browser, max_tokens=2)
    send(browser, PROMPT)
    browser.find_element("id", "reset").click()
    assert _reload(browser) == "ready"
    assert text_of(browser, "log") == ""
    configure(browser, temperature=0, max_tokens=30)
    browser.find_element("id", "prompt").clear()
    assert send(browser, PROMPT) == expected


def test_what_was_asked_is_there_again_when_a_reload_cuts_the_answer(site, browser, monkeypatch):
    endless = {"export.json": manifest_of(site.folder, eos_token_id=None, end_ids=[])}
    monkeypatch.setattr(site, "instead", endless)
    assert show(browser, site) == "ready", text_of(browser, "error")
    configure(browser, temperature=0, max_tokens=100000)
    type_prompt(browser, PROMPT)
    assert wait(browser, "busy") == "busy"
    browser.find_element("id", "prompt").send_keys("more")
    assert _reload(browser) == "ready"
    assert text_of(browser, "log") == ""
    assert _value(browser, "prompt") == f"{PROMPT}\nmore"
    # A stopped answer is kept as it is; with what follows, it goes on from where it stopped.
    browser.find_element("id", "send").click()
    assert wait(browser, "busy") == "busy"
    browser.find_element("id", "stop").click()
    assert wait(browser, "ready", "failed") == "ready"
    configure(browser, max_tokens=5)
    before, kept = text_of(browser, "log"), browser.execute_script("return {...sessionStorage}")
    following = send(browser, "")
    browser.execute_script("Object.assign(sessionStorage, arguments[0])", kept)
    assert _reload(browser) == "ready"
    assert text_of(browser, "log") == before
    assert before.endswith("[stopped]")
    configure(browser, max_tokens=5)
    assert send(browser, "") == following


def test_the_page_works_where_the_browser_keeps_nothing(site, browser, monkeypatch):
    no_storage = b"""
        Object.defineProperty(window, "sessionStorage", {get() { throw new Error("blocked"); }});
    """
    monkeypatch.setattr(site, "instead", {"web/from-file.js": no_storage})
    assert show(browser, site) == "ready", text_of(browser, "error")
    configure(browser, max_tokens=3)
    assert send(browser, PROMPT)
    assert "until a reload only" in browser.execute_script(
        "return document.getElementById('status').textContent"
    )
    browser.get("about:blank")  # a page of the site would not let the next test clear its storage


def test_a_wrong_setting_is_said_shown_and_given_the_focus(site, browser):
    assert show(browser, site) == "ready", text_of(browser, "error")
    faults = {
        ("temperature", "9"): "Temperature is 9: set a number from 0 to 5",
        ("temperature", ""): "Temperature is no number: set a number from 0 to 5",
        ("max-tokens", "0"): "Most tokens is 0: set a whole number from 1 to 100000",
        ("top-k", "1.5"): "Top-k is 1.5: set a whole number, 0 or more",
        ("seed", "4294967296"): "Seed is 4294967296: set a whole number from 0 to 4294967295",
    }
    good = {"temperature": "0.83", "max-tokens": "2", "top-k": "1", "seed": "1"}
    configure(browser, **{name.replace("-", "_"): value for name, value in good.items()})
    browser.find_element("id", "prompt").send_keys(PROMPT)
    for (name, value), message in faults.items():
        browser.execute_script("document.getElementById('settings').open = false")
        configure(browser, **{name: value})
        browser.find_element("id", "send").click()
        field = browser.find_element("id", name)
        assert field.is_displayed()
        assert _focused(browser) == name
        assert text_of(browser, f"{name}-fault") == message
        assert field.get_attribute("aria-invalid") == "true"
        assert (text_of(browser, "log"), _value(browser, "prompt")) == ("", PROMPT)
        # It goes as soon as the number is right.
        field.clear()
        field.send_keys(good[name])
        assert text_of(browser, f"{name}-fault") == ""
        assert field.get_attribute("aria-invalid") is None
    browser.find_element("id", "send").click()
    assert len(answer(browser)) == 2


def test_the_page_is_worked_by_keyboard_and_has_names_for_screen_readers(
    site, browser, monkeypatch
):
    # Without an end token, so that nothing but Escape ends the answer.
    endless = {"export.json": manifest_of(site.folder, eos_token_id=None, end_ids=[])}
    monkeypatch.setattr(site, "instead", endless)
    assert show(browser, site) == "ready", text_of(browser, "error")
    assert _focused(browser) == "prompt"
    summary = browser.find_element("tag name", "summary")
    summary.send_keys("\ue007")  # Enter
    controls = browser.find_elements("css selector", "textarea, input, button, summary, [role=log]")
    names = [control.accessible_name for control in controls]
    assert names == [
        "Conversation", "Text to continue", "Send", "Stop", "Reset", "Settings",
        "Most tokens", "Temperature 0: greedy", "Top-k 0: all", "Seed",
    ]  # fmt: skip
    configure(browser, temperature=0, max_tokens=100000)
    prompt = browser.find_element("id", "prompt")
    prompt.send_keys("one", "\ue008\ue007\ue008", "two")  # Shift+Enter
    assert _value(browser, "prompt") == "one\ntwo"
    # From the field the next stop is Send, which then is off: the place in the page is not lost.
    prompt.send_keys("\ue004")  # Tab
    assert _focused(browser) == "send"
    browser.switch_to.active_element.send_keys("\ue007")
    assert wait(browser, "busy") == "busy"
    assert _focused(browser) == "prompt"
    prompt.send_keys("\ue00c")  # Escape
    assert wait(browser, "ready") == "ready"
    assert text_of(browser, "log").endswith("[stopped]")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrasts_and_sizes_as_the_browser_computes_them(site, browser, monkeypatch, scheme):
    page_audit.use_scheme(browser, scheme)
    try:
        assert show(browser, site) == "ready", text_of(browser, "error")
        configure(browser, max_tokens=3, temperature=9)
        type_prompt(browser, PROMPT)
        configure(browser, temperature=0)
        for wrong in (None, 9):  # with an answer and a note, then with a fault too
            if wrong is None:
                browser.find_element("id", "send").click()
                answer(browser)
                browser.execute_script("""
                    const note = document.createElement("span");
                    note.className = "note";
                    note.textContent = "[stopped]";
                    document.querySelector(".turn").append(note);
                """)
            else:
                configure(browser, temperature=wrong)
                type_prompt(browser, "x")
            texts, borders = page_audit.contrasts(browser)
            expected = {"SPAN typed", "SPAN note", "TEXTAREA prompt", "INPUT seed", "P keeping"}
            assert expected <= set(texts)
            assert ("P fault" in {t.replace("temperature-", "") for t in texts}) == (wrong == 9)
            assert {name: ratio for name, ratio in texts.items() if ratio < 4.5} == {}
            assert {"TEXTAREA prompt", "INPUT seed", "BUTTON reset", "DIV log"} <= set(borders)
            assert {name: ratio for name, ratio in borders.items() if ratio < 3} == {}
        for width in (320, 390, 1024):
            page_audit.use_window(browser, width, 640)
            sizes = page_audit.targets(browser)
            assert len(sizes) == 9
            assert {name: size for name, size in sizes.items() if min(size) < 44} == {}
            assert page_audit.overflow(browser) == 0
        # What is wrong with the files, and the progress of loading.
        monkeypatch.setattr(site, "instead", {"export.json": None})
        assert show(browser, site) == "failed"
        browser.execute_script("document.getElementById('loading').hidden = false")
        texts, _ = page_audit.contrasts(browser)
        assert {"P error", "LABEL progress-text"} <= set(texts)
        assert {name: ratio for name, ratio in texts.items() if ratio < 4.5} == {}
    finally:
        page_audit.use_scheme(browser, "light")
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_bench_browser_compares_the_page_with_python(site, browser, monkeypatch, capsys):
    built = site.folder / "web" / "vendor"

    def build(web: Path) -> None:
        shutil.copytree(built, web / "vendor")

    monkeypatch.setattr(browser_lib, "build_page", build)
    assert main(["bench", "browser", "--export", str(site.folder), "--tokens", "8"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"Chromium: ready after [\d.]+ s, [\d.]+ tokens/s, peak of the", printed)
    assert "all 8 tokens are the same" in printed
    assert main(["bench", "browser", "--export", str(site.folder), "--tokens", "1"]) == 2
    assert "--tokens is 1: set 2 or more" in capsys.readouterr().err
