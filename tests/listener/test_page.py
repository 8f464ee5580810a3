"""The status page: who may see it, and what a real browser shows."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
import time
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from builder.cluster.status import status
from builder.listener.overview import Overview
from builder.listener.page import HEADERS, routes
from builder.models import ModelVersion
from builder.settings import ListenSettings
from scripts.launch import clean_environ, free_port
from tests.listener.browser import chromium, served
from tests.listener.site import DIGEST, Away, events, moment, pod, running
from tests.waiting import HANG, until

ROOT = Path(__file__).parents[2]
TOKEN, NEXT_TOKEN = "first-status-token-0123456789", "second-status-token-0123456789"
SCRIPT = "<img src=x onerror=\"document.title='hacked'\">"
PATHS = ("/status", "/status/page.js", "/status/page.css", "/status/changes")


def with_access(settings: ListenSettings, access: str, token: str = "", **more: object) -> ListenSettings:
    environ = {"MLFLOW_TRACKING_URI": settings.mlflow_tracking_uri, "REGISTRY_URL": "registry.example.com/models"}
    environ |= {"TARGET_TAG": settings.target_tag, "STATUS_ACCESS": access, "STATUS_TOKEN": token}
    return ListenSettings.from_environ({**environ, "OVERVIEW_INTERVAL": "1"}).model_copy(update=more)


@pytest.fixture
def idle(versions) -> Overview:
    """An overview that nobody starts."""
    return Overview(versions.settings, versions.catalog)


# ---- who may see it


def test_nothing_is_there_unless_it_is_switched_on(versions, idle):
    assert with_access(versions.settings, "off") == versions.settings
    assert routes(versions.settings, idle) == []
    with served(versions.settings, idle) as address:
        for path in PATHS:
            assert httpx2.get(address + path, timeout=HANG).status_code == 404


def test_every_answer_has_the_headers_that_keep_others_out(versions, idle):
    with served(with_access(versions.settings, "open"), idle) as address, httpx2.Client(timeout=HANG) as client:
        for path, code in [*((path, 200) for path in PATHS[:3]), ("/status/page.html", 404), ("/status/x", 404)]:
            answer = client.get(address + path)
            assert answer.status_code == code
            assert {name: answer.headers[name] for name in HEADERS} == HEADERS
        with client.stream("GET", f"{address}/status/changes") as answer:
            assert answer.headers["Content-Type"].startswith("text/event-stream")
            assert {name: answer.headers[name] for name in HEADERS} == HEADERS
        assert client.post(f"{address}/status").status_code == 405


def test_the_wheel_has_the_pages_files(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env=clean_environ())
    (wheel,) = tmp_path.iterdir()
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"builder/listener/static/{name}" for name in ("page.html", "page.css", "page.js")} <= set(names)


def test_the_page_names_no_other_place():
    from builder.listener import page

    for file in page._STATIC.iterdir():
        addresses = set(re.findall(r"https?://[^\s'\"/)]*", file.read_text()))
        assert addresses <= {"http://www.w3.org"}, file
        assert "innerHTML" not in file.read_text()


def test_a_token_lets_in_and_nothing_else_does(versions, idle, monkeypatch):
    monkeypatch.setattr("builder.listener.page._SLOW", 0.3)
    settings = with_access(versions.settings, "token", f"{TOKEN} {NEXT_TOKEN}")
    with served(settings, idle) as address, httpx2.Client(timeout=HANG) as client:
        for path in PATHS:
            answer = client.get(address + path)
            assert (answer.status_code, TOKEN in answer.text) == (401, False)
            assert answer.headers["WWW-Authenticate"].startswith("Basic ")
            assert {name: answer.headers[name] for name in HEADERS} == HEADERS
        for right in (("anybody", TOKEN), ("", NEXT_TOKEN)):
            assert client.get(f"{address}/status", auth=right).status_code == 200
        basic = base64.b64encode(f"x:{TOKEN}".encode()).decode()
        wrong = [
            "Bearer " + basic, "Basic", "Basic !", "Basic " + basic[:-4], "Basic " + base64.b64encode(TOKEN.encode()).decode(),
            "Basic " + base64.b64encode(f"x:{TOKEN} {NEXT_TOKEN}".encode()).decode(),
            "Basic " + base64.b64encode(b"x:").decode(),
        ]  # fmt: skip
        for given in wrong:
            began = time.monotonic()
            assert client.get(f"{address}/status", headers={"Authorization": given}).status_code == 401
            assert time.monotonic() - began >= 0.3


def test_many_wrong_passwords_at_once_are_refused_and_the_right_one_is_not(versions, idle, monkeypatch):
    monkeypatch.setattr("builder.listener.page._SLOW", 5.0)
    with (
        served(with_access(versions.settings, "token", TOKEN), idle) as address,
        httpx2.Client(timeout=HANG, trust_env=False) as client,
        ThreadPoolExecutor(20) as threads,
    ):
        tries = [threads.submit(client.get, f"{address}/status", auth=("x", "wrong")) for _ in range(20)]
        # While five are kept waiting, more are refused at once.
        assert any(each.result().status_code == 429 for each in as_completed(tries))
        assert client.get(f"{address}/status", auth=("x", TOKEN)).status_code == 200
        codes = Counter(each.result().status_code for each in tries)
        assert codes[401] >= 5
        assert sum(codes.values()) == codes[401] + codes[429]


# ---- the stream


def test_the_stream_goes_on_where_a_reader_was(versions, opened):
    for _ in range(3):
        versions.published("pump")
    overview = opened(Overview(versions.settings, versions.catalog))
    with served(with_access(versions.settings, "open"), overview) as address:
        (_, state), (_, sent), (_, last) = events(address)
        assert (state["target"], state["synced"]) == (versions.settings.target, True)
        assert (sent["first"], len(sent["rows"])) == (True, 3)
        _, (_, nothing), _ = events(address, last["id"])
        assert nothing == {"rows": [], "removed": [], "first": False}
        new = versions.failed("valve")
        overview.look_again(new.name, new.version)
        # A listing may have found it before its outcome was written.
        until(lambda: [row for row in overview.rows() if row.status.state == "failed"])
        _, (_, more), _ = events(address, last["id"])
        assert [(row["model"], row["state"]) for row in more["rows"]] == [(new.name, "failed")]
        assert not more["first"]
        # Of another replica, or of before a restart.
        _, (_, all_again), _ = events(address, "0123abcd.7")
        assert (all_again["first"], len(all_again["rows"])) == (True, 4)


def test_the_stream_ends_with_the_overview(versions, opened):
    overview = opened(Overview(versions.settings, versions.catalog))
    with (
        served(with_access(versions.settings, "open"), overview) as address,
        httpx2.stream("GET", f"{address}/status/changes", timeout=HANG) as answer,
    ):
        lines = answer.iter_lines()
        assert next(lines) == "event: state"
        overview.close()
        # It ends by itself, and not because the server was asked to end.
        assert len(list(lines)) < 20


def test_there_is_a_bound_to_readers(versions, opened, monkeypatch):
    monkeypatch.setattr("builder.listener.page._MOST_READERS", 1)
    overview = opened(Overview(versions.settings, versions.catalog))
    with served(with_access(versions.settings, "open"), overview) as address:
        with httpx2.stream("GET", f"{address}/status/changes", timeout=HANG) as answer:
            lines = answer.iter_lines()
            assert next(lines) == "event: state"
            assert httpx2.get(f"{address}/status/changes", timeout=HANG).status_code == 503
        until(lambda: stream_code(address) == 200)


def stream_code(address: str) -> int:
    with httpx2.stream("GET", f"{address}/status/changes", timeout=HANG) as answer:
        return answer.status_code


@pytest.mark.parametrize(
    ("uri", "ui", "link"),
    [
        ("https://mlflow.example.com/", "", "https://mlflow.example.com/#/models/a%2Fb%20%3Cc%3E/versions/3"),
        ("http://inside:5000", "https://mlflow.example.com/x", "https://mlflow.example.com/x/#/models/a%2Fb%20%3Cc%3E/versions/3"),
        ("https://user:password@mlflow.example.com", "", ""),
        ("databricks", "", ""),
    ],
)  # fmt: skip
def test_links_lead_to_mlflows_own_pages(versions, idle, uri, ui, link):
    from builder.listener.page import _Page

    page = _Page(with_access(versions.settings, "open", mlflow_tracking_uri=uri, mlflow_ui_url=ui), idle)
    assert page._link("a/b <c>", "3") == link


# ---- a real browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A browser without a screen, of 1440 by 900."""
    with chromium(tmp_path_factory.mktemp("chromium")) as found:
        size(found, 1440)
        yield found


def size(browser, width: int, height: int = 900) -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def lines(browser) -> list[list[str]]:
    """Return the texts of the rows that the browser shows, a cell each."""
    return browser.execute_script(
        "return [...document.querySelectorAll('#rows tr')].map((line) => [...line.children].map((cell) => cell.innerText))"
    )


def counts(browser) -> dict[str, int]:
    found = browser.execute_script(
        "return [...document.querySelectorAll('#states button')].map((each) => each.innerText.split(/\\s+/))"
    )
    return {name: int(number.replace(",", "")) for name, number in found}


def is_live(browser) -> bool:
    return browser.find_element(By.ID, "connection").text == "Live"


@pytest.fixture
def shown(versions, opened, browser):
    """Open the page of an overview of the versions, and wait until it shows them."""
    import contextlib

    with contextlib.ExitStack() as stack:

        def show(overview: Overview | None = None, path: str = "/status") -> Overview:
            overview = overview or opened(Overview(versions.settings, versions.catalog))
            address = stack.enter_context(served(with_access(versions.settings, "open"), overview))
            browser.get_log("browser")
            browser.get(f"{address}{path}")
            until(lambda: is_live(browser) and counts(browser)["all"] == len(overview.rows()))
            return overview

        yield show
        # Whatever its policy forbids, and every error of the script, is in this log.
        said = [each for each in browser.get_log("browser") if "ERR_" not in each["message"]]
        browser.get("about:blank")
    assert said == []


def test_the_page_shows_what_mlflow_has(versions, shown, browser):
    versions.published("pump", platforms=("linux/amd64", "linux/arm64"))
    versions.published("pump")
    # What needs somebody comes first, however long ago it was.
    why = "InvalidVersion: it has no artifacts. Log its files."
    versions.register("valve", state="failed", attempts=1, error=why, finished=moment(-3600))
    versions.register("fan")
    shown()
    found = status(versions.settings, versions.catalog, None)
    by_state = Counter(each.state for each in found)
    states = ("running", "pending", "new", "failed", "foreign", "published")
    assert counts(browser) == {"all": 4, **{state: by_state.get(state, 0) for state in states}}
    rows = lines(browser)
    assert {(row[1], row[2], row[0]) for row in rows} == {(each.model, each.version, each.state) for each in found}
    assert [row[0] for row in rows] == ["new", "failed", "published", "published"]
    assert rows[1][4] == "InvalidVersion: it has no artifacts. Log its files."
    assert "linux/amd64, linux/arm64" in rows[2][4] + rows[3][4]
    link = browser.find_element(By.CSS_SELECTOR, "#rows a").get_attribute("href")
    assert link == f"{versions.uri}/#/models/{versions.name('fan')}/versions/1"
    pages = browser.find_element(By.ID, "range").text
    assert pages == "4 versions"


def test_a_change_is_shown_without_loading_the_page_again(listener, opened, browser, shown):
    version = listener.versions.register("pump")
    listener.watch.start()
    shown(opened(listener.overview))
    browser.execute_script("window.loaded = 'once'")
    assert lines(browser)[0][0] == "new"
    name = listener.cluster.start(version, pod=pod("Running", publish=running()))
    until(lambda: lines(browser)[0][0] == "running")
    assert lines(browser)[0][5] == f"wheels\n{name}"
    image = f"registry.example.com/models/pump@{DIGEST}"
    listener.versions.record(version, state="published", image=image, finished=moment())
    listener.cluster.end(name)
    until(lambda: lines(browser)[0][0] == "published")
    listener.versions.client.delete_model_version(version.name, version.version)
    listener.overview.look_again(version.name, version.version)
    until(lambda: lines(browser) == [])
    assert browser.find_element(By.ID, "nothing").text == "No version carries the target's tag."
    assert browser.execute_script("return window.loaded") == "once"


@pytest.mark.parametrize(
    "name", [SCRIPT, "n" * 200, "\u202egnp.exe\u2066 evil", "<svg onload=document.title='hacked'>"]
)
def test_what_authors_write_is_text(versions, shown, browser, name):
    versions.failed(name, error=f"InvalidVersion: {SCRIPT} {'e' * 600}", platforms=(SCRIPT, "javascript:alert(1)"))
    for width in (1440, 380):
        size(browser, width)
        shown()
        (row,) = lines(browser)
        assert row[1] == versions.name(name).replace("\u202e", r"\u202e").replace("\u2066", r"\u2066")
        assert SCRIPT in row[4]
        assert browser.title == "Published models"
        assert browser.execute_script("return document.querySelectorAll('#rows :is(img, script, iframe)').length") == 0
        assert wide_as(browser) <= width
    size(browser, 1440)


def wide_as(browser) -> int:
    return browser.execute_script("return document.documentElement.scrollWidth")


def test_filters_by_state_and_model_and_keeps_them_in_the_address(versions, shown, browser):
    versions.published("pump")
    versions.failed("pump")
    versions.failed("valve")
    overview = shown()
    browser.find_element(By.CSS_SELECTOR, "#states [data-state=failed]").click()
    until(lambda: [row[0] for row in lines(browser)] == ["failed", "failed"])
    browser.find_element(By.ID, "model").send_keys("PUM")
    until(lambda: [row[1] for row in lines(browser)] == [versions.name("pump")])
    pressed = browser.find_elements(By.CSS_SELECTOR, "#states [aria-pressed=true]")
    assert [each.get_attribute("data-state") for each in pressed] == ["failed"]
    assert browser.current_url.endswith("#state=failed&model=PUM")
    assert counts(browser)["all"] == 3
    browser.refresh()
    until(lambda: [(row[0], row[1]) for row in lines(browser)] == [("failed", versions.name("pump"))])
    browser.find_element(By.ID, "model").send_keys("zzz")
    until(lambda: browser.find_element(By.ID, "nothing").text == "No version matches the filter.")
    assert len(overview.rows()) == 3


def test_the_digest_is_copied(versions, shown, browser):
    versions.published("pump")
    shown()
    browser.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    )
    # Shown for two seconds: it is watched for in the page.
    browser.execute_async_script(
        """const [done, button] = [arguments[0], document.querySelector(".copy")];
        const look = () => { if (document.querySelector(".copy").innerText === "Copied") done(); };
        new MutationObserver(look).observe(document.body, {childList: true, characterData: true, subtree: true});
        button.click();"""
    )
    copied = browser.execute_async_script("navigator.clipboard.readText().then(arguments[0], arguments[0])")
    assert copied == f"registry.example.com/models/model@{DIGEST}"


def test_the_keyboard_is_enough(versions, shown, browser):
    versions.published("pump")
    versions.failed("valve", error=f"InvalidVersion: {'why ' * 200}")
    shown()
    reached = []
    for _ in range(20):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        focused = browser.switch_to.active_element
        reached.append(focused.get_attribute("id") or focused.get_attribute("class") or focused.text)
        if focused.get_attribute("class") == "more":
            focused.send_keys(Keys.ENTER)
            break
    assert reached[0] == "skip"
    assert "model" in reached
    more = browser.find_element(By.CSS_SELECTOR, ".more")
    assert (more.text, more.get_attribute("aria-expanded")) == ("Less", "true")


def test_a_screen_reader_finds_a_table_and_hears_of_counts(versions, shown, browser):
    versions.published("pump")
    shown()
    for width in (1440, 380):
        size(browser, width)
        tree = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        roles = Counter(node["role"]["value"] for node in tree if not node["ignored"])
        assert roles["table"] == 1
        assert roles["row"] == 2
        assert roles["columnheader"] == 7
        assert roles["rowheader"] == 1
    size(browser, 1440)
    until(
        lambda: browser.find_element(By.ID, "counts").get_attribute("textContent").startswith("1 versions, 0 running")
    )
    assert browser.find_element(By.ID, "counts").get_attribute("aria-live") == "polite"


class Many:
    """A catalog of many versions, which a server would take minutes to make."""

    def __init__(self, version: ModelVersion, count: int) -> None:
        self.version, self.count = version, count

    def tagged(self, _tag):
        for number in range(1, self.count + 1):
            yield self.version.model_copy(update={"version": str(number), "name": f"model-{number % 37}"})


@pytest.mark.parametrize("count", [1000, 10_000])
def test_many_versions(versions, shown, browser, opened, count):
    many = Many(versions.published("many"), count)
    overview = opened(Overview(versions.settings.model_copy(update={"overview_interval": 3600}), many))
    shown(overview)
    until(lambda: len(lines(browser)) == 100)
    assert browser.find_element(By.ID, "range").text == f"1 to 100 of {count:,} versions"
    browser.find_element(By.ID, "next").click()
    until(lambda: browser.find_element(By.ID, "range").text == f"101 to 200 of {count:,} versions")
    assert counts(browser)["new"] == count
    # One row that changes leaves the others, and what has the focus, alone.
    browser.execute_script(
        "window.second = document.querySelectorAll('#rows tr')[1]; arguments[0].focus()",
        browser.find_element(By.CSS_SELECTOR, "#rows tr:nth-child(2) .copy"),
    )
    last = overview.rows()[0]
    overview._put(last.key, replace(last, status=replace(last.status, state="failed", error="since then")))
    until(lambda: counts(browser)["failed"] == 1)
    assert browser.execute_script("return window.second.isConnected")
    assert browser.switch_to.active_element.get_attribute("class") == "copy"


def test_says_what_does_not_answer_and_since_when(versions, opened, shown, browser):
    versions.published("pump")
    catalog = Away(versions.catalog)
    overview = shown(opened(Overview(versions.settings, catalog)))
    catalog.away = True
    until(lambda: browser.find_element(By.ID, "problems").text)
    heard = overview._mlflow
    with heard._lock:
        heard.source = replace(heard.source, failing_since=time.time() - 301)
    until(lambda: re.search(r"\b[0-9]+ min\. ago", browser.find_element(By.ID, "problems").text))
    problem = browser.find_element(By.ID, "problems").text
    assert problem.startswith("MLflow does not answer since ")
    assert problem.endswith("What is shown is from before.\nServiceUnavailable: MLflow is away. Try again.")
    assert browser.find_element(By.ID, "problems").get_attribute("role") == "alert"
    until(lambda: browser.find_element(By.ID, "connection").text == "Connected, but not current")
    assert lines(browser)[0][0] == "published"
    catalog.away = False
    until(lambda: browser.find_element(By.ID, "problems").text == "")


def test_says_that_the_listener_is_away_and_comes_back(versions, opened, browser):
    versions.published("pump")
    overview = opened(Overview(versions.settings, versions.catalog))
    port = free_port()
    with served(with_access(versions.settings, "open"), overview, port=port) as address:
        browser.get(f"{address}/status")
        until(lambda: is_live(browser))
    until(lambda: browser.find_element(By.ID, "connection").text == "Not connected, trying again")
    assert lines(browser)[0][0] == "published"
    again = opened(Overview(versions.settings, versions.catalog))
    with served(with_access(versions.settings, "open"), again, port=port):
        until(lambda: is_live(browser))
        browser.get("about:blank")


@pytest.mark.parametrize("width", [320, 380, 800, 1200, 1440, 1920])
def test_nothing_is_wider_than_the_window(versions, shown, browser, width):
    versions.failed("valve" * 20, error="InvalidVersion: " + "x" * 300)
    versions.published("pump", platforms=("linux/amd64", "linux/arm64", "linux/arm/v7"))
    size(browser, width)
    shown()
    assert wide_as(browser) <= width
    size(browser, 1440)


@pytest.mark.parametrize("dark", [False, True])
def test_texts_can_be_read_in_light_and_dark(versions, opened, tmp_path, dark):
    """Contrast of 4.5 to 1 (WCAG 2.1, 1.4.3) of every text that is shown."""
    versions.failed("valve", error="InvalidVersion: no.")
    versions.published("pump")
    versions.register("fan")
    overview = opened(Overview(versions.settings, versions.catalog))
    with served(with_access(versions.settings, "open"), overview) as address, chromium(tmp_path, dark=dark) as found:
        found.get(f"{address}/status")
        until(lambda: is_live(found) and lines(found))
        pairs = found.execute_script(COLOURS)
    assert len(pairs) > 20
    dull = {text: ratio for text, ink, paper in pairs if (ratio := contrast(ink, paper)) < 4.5}
    assert dull == {}
    papers = {paper for _, _, paper in pairs}
    assert all((luminance(paper) < 0.1) == dark for paper in papers)


COLOURS = """
const found = [];
for (const each of document.body.querySelectorAll('*')) {
  const text = [...each.childNodes].filter((node) => node.nodeType === 3).map((node) => node.data.trim()).join('');
  if (!text || !each.checkVisibility() || each.closest('.unseen, .skip, noscript')) continue;
  let under = each;
  while (under && getComputedStyle(under).backgroundColor === 'rgba(0, 0, 0, 0)') under = under.parentElement;
  const paper = getComputedStyle(under ?? document.documentElement).backgroundColor;
  if (!each.disabled) found.push([text, getComputedStyle(each).color, paper]);
}
return found;
"""


def luminance(colour: str) -> float:
    """Return the relative luminance of a colour, as WCAG 2.1 defines it."""
    parts = [int(part) / 255 for part in re.findall(r"[0-9]+", colour)[:3]]
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, two: str) -> float:
    light, dark = sorted((luminance(one), luminance(two)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_the_password_works_in_a_browser(versions, opened, browser):
    versions.published("pump")
    overview = opened(Overview(versions.settings, versions.catalog))
    with served(with_access(versions.settings, "token", TOKEN), overview) as address:
        browser.get(f"{address.replace('://', f'://anybody:{TOKEN}@')}/status")
        until(lambda: is_live(browser))
        assert lines(browser)[0][0] == "published"
        browser.get("about:blank")
