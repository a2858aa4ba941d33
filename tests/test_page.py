"""The page in a real browser, where Chromium and its driver are installed."""

import shutil
import time

import pytest
from test_server import chat_model, served  # noqa: F401

import standalone_transformer_lm as lm

webdriver = pytest.importorskip("selenium.webdriver")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not DRIVER, reason="Chromium's driver is not installed")

ENTER, ESCAPE = "\ue007", "\ue00c"


@pytest.fixture(scope="module")
def site(chat_model):  # noqa: F811
    with served(chat_model, batch_size=4) as found:
        yield found


@pytest.fixture
def page(site):
    """A browser that shows the page, with nothing kept in it."""
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1100,700"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    browser.get(site[0])
    yield browser
    faults = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    browser.quit()
    assert not faults


def until(page, script, seconds=20):
    """Wait until a script returns true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if page.execute_script(f"return {script}"):
            return
        time.sleep(0.05)
    raise AssertionError(f"never: {script}")


def ask(page, text):
    page.find_element("id", "ask").send_keys(text + ENTER)


def turns(page):
    return page.execute_script("return talk().turns.map((turn) => [turn.role, turn.content])")


def press(page, text):
    script = """
        const found = [...document.querySelectorAll("button")].filter(
            (one) => one.textContent === arguments[0]);
        found.at(-1).click();"""
    page.execute_script(script, text)


def test_a_question_is_answered_and_kept(page, site):
    page.execute_script("options.temperature = 0")
    ask(page, "Where is the harbour?")
    until(page, "running === null && talk().turns.length === 2")
    (_, asked), (_, answer) = turns(page)
    tokenizer, model = site[1].tokenizer, site[1].engine.batch.model
    ids = lm.encode_chat(tokenizer, [("user", asked)], reply=True)[0]
    greedy = lm.SamplingSettings(512, temperature=0.0)
    (new,) = lm.complete(model, [ids], greedy, 0, frozenset({tokenizer.eos}))
    assert answer == tokenizer.decode(new)
    shown = page.find_element("css selector", ".assistant .text").get_attribute("textContent")
    assert shown == answer
    page.refresh()
    until(page, "talk().turns.length === 2")
    assert turns(page)[1][1] == answer


def test_an_answer_is_stopped_regenerated_and_its_question_edited(page, site, monkeypatch):
    eos, original = site[1].tokenizer.eos, lm.draw

    def endless(logits, *args):
        logits[:, eos] = -1e9
        return original(logits, *args)

    monkeypatch.setattr(lm, "draw", endless)
    ask(page, "First?")
    until(page, "running !== null && talk().turns.at(-1).content.length > 3")
    page.find_element("id", "ask").send_keys(ESCAPE)
    until(page, "running === null")
    stopped = turns(page)[1][1]
    assert stopped
    monkeypatch.setattr(lm, "draw", original)
    press(page, "Regenerate")
    until(page, "running === null")
    assert len(turns(page)) == 2 and turns(page)[1][1] != stopped
    press(page, "Edit")
    assert page.find_element("id", "ask").get_attribute("value") == "First?" and not turns(page)
    ask(page, " And second?")
    until(page, "running === null && talk().turns.length === 2")
    assert turns(page)[0] == ["user", "First? And second?"]


def test_several_conversations_and_what_markup_does_not_do(page):
    ask(page, "<img src=x onerror='document.title=1'> & <b>bold</b>")
    until(page, "running === null && talk().turns.length === 2")
    assert page.execute_script("return document.querySelectorAll('#log img, #log b').length") == 0
    press(page, "New conversation")
    assert not turns(page)
    ask(page, "Another")
    until(page, "running === null && talk().turns.length === 2")
    names = [one.text for one in page.find_elements("css selector", ".talk button:first-child")]
    assert names[0] == "Another" and names[1].startswith("<img")
    page.find_elements("css selector", ".talk button:first-child")[1].click()
    assert turns(page)[0][1].startswith("<img")
    page.find_elements("css selector", ".talk button:last-child")[0].click()
    assert page.execute_script("return talks.length") == 1


def test_a_fault_of_the_server_is_shown(page):
    page.execute_script("options.temperature = 9")
    ask(page, "Hot?")
    until(page, "running === null && talk().turns.length === 2")
    fault = page.find_element("css selector", ".fault").text
    assert fault == "temperature must be a number from 0 to 2"
    assert page.get_log("browser")  # the browser tells the 400, too


def test_a_narrow_page_has_a_menu(page):
    size = {"width": 390, "height": 700, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    side = page.find_element("tag name", "aside")
    assert not side.is_displayed()
    page.find_element("id", "menu").click()
    assert side.is_displayed()
    wide = page.execute_script("return document.documentElement.scrollWidth")
    assert wide <= 390
