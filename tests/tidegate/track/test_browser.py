"""What a newcomer does in `tidegate ui`, in a real Chromium: find runs, compare two, open a report."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.common.exceptions import ElementClickInterceptedException, StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no browser: apt-get install chromium chromium-driver"),
]
WAIT_S = 60.0
COLUMNS = ["Duration", "val/loss", "val/bpb", "tokens", "moe/maxvio_mean", "moe/dead_experts_mean"]


class Reader:
    """A person at a browser."""

    def __init__(self, browser: webdriver.Chrome, screenshots: Path) -> None:
        self.browser, self._screenshots = browser, screenshots

    def sees(self, what: str) -> WebElement:
        """The first thing at this XPath, once it is shown."""

        def shown(browser: webdriver.Chrome) -> WebElement | None:
            return next((found for found in browser.find_elements(By.XPATH, what) if found.is_displayed()), None)

        return self._wait().until(shown, f"{what} at {self.browser.current_url}")

    def presses(self, what: str) -> None:
        def pressed(_: webdriver.Chrome) -> bool:
            self.sees(what).click()
            return True

        self._wait().until(pressed, what)

    def _wait(self) -> WebDriverWait[webdriver.Chrome]:
        redrawn = (StaleElementReferenceException, ElementClickInterceptedException)  # the page, between two looks
        return WebDriverWait(self.browser, WAIT_S, ignored_exceptions=redrawn)

    def columns(self) -> list[str]:
        """Of the table of runs, from left to right, after the name and the time."""
        read = "return [...document.querySelectorAll('.ag-header-viewport .ag-header-cell')].map("
        cells = self.browser.execute_script(read + "cell => [cell.getBoundingClientRect().x, cell.innerText.trim()])")
        return [name for _, name in sorted(cells)]

    def keeps(self, name: str) -> None:
        assert self.browser.save_screenshot(str(self._screenshots / f"{name}.png"))


def cell(metric: str) -> str:
    """XPath of a cell of the table of runs."""
    return f"//*[@role='gridcell' and @col-id='metrics.`{metric}`']"


@pytest.fixture
def reader(tmp_path) -> Iterator[Reader]:
    screenshots = Path(os.environ.get("TIDEGATE_SCREENSHOTS") or tmp_path / "screenshots")
    screenshots.mkdir(parents=True, exist_ok=True)
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    # As root in a container, and without asking Google's servers for anything.
    quiet = "no-first-run disable-background-networking disable-component-update disable-sync disable-quic"
    for flag in ("headless no-sandbox disable-gpu " + quiet).split():
        options.add_argument(f"--{flag}")
    options.add_argument("--window-size=2000,1100")
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield Reader(browser, screenshots)
    finally:
        browser.quit()


@pytest.fixture
def address(tiny_job, tmp_path, unused_port, wait_until, answers) -> Iterator[str]:
    """Where `tidegate ui` says that it shows two runs, one with an attention gate and one without."""
    state, tidegate = ["--state-dir", str(tmp_path / "state")], [sys.executable, "-m", "tidegate.cli"]
    train = [
        *tidegate,
        "train",
        str(tiny_job(train={"eval_every": 4}, resources={"price_per_hour": 3600.0})),
        "--local",
        "--workers",
        "1",
        *state,
    ]
    for name, gate in (("gated", "sdpa_output"), ("plain", "none")):
        changes = ["--set", f"name={name}", "--set", f"model.attention.gate={{kind: {gate}}}"]
        done = subprocess.run([*train, *changes], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    with (tmp_path / "ui.log").open("w") as log:
        command = [*tidegate, "ui", "--port", str(unused_port), *state]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert server.stdout is not None
        name, _, address = server.stdout.readline().strip().partition(": ")
        assert name == "tidegate"
        wait_until(lambda: answers(unused_port), 90, f"the UI; log: {log.name}")
        yield address
    finally:
        server.terminate()
        server.communicate(timeout=30)


def test_a_newcomer_finds_compares_and_opens_runs(address, reader, wait_until):
    reader.browser.get(address)
    reader.presses("//button[contains(@data-component-id, 'assistant') and @aria-label='Close']")  # MLflow's, at first
    reader.sees("//a[.='plain-1']")
    assert reader.sees(cell("tokens")).text == "6144"
    wait_until(lambda: reader.columns()[:6] == COLUMNS, 20, f"the columns in our order, not {reader.columns()}")
    reader.keeps("runs")
    reader.browser.set_window_size(3000, 1100)  # columns beyond the edge are not drawn
    for name in ("attention/sink_heads", "cost/gpu_hours", "cost/money"):
        for row in ("gated-1", "plain-1"):
            assert float(reader.sees(f"//*[@row-id=//*[@row-id][.//a[.='{row}']]/@row-id]{cell(name)}").text) >= 0, name
    reader.keeps("costs")
    reader.browser.set_window_size(2000, 1100)

    for name in ("gated-1", "plain-1"):
        reader.presses(f"//*[@role='row'][.//a[.='{name}']]//*[contains(@class, 'ag-checkbox-input-wrapper')]")
    reader.presses("//button[.='Compare']")
    parameters = "//*[contains(@class, 'collapse-item')][./*[contains(@class, 'collapse-header')][.='Parameters']]"
    assert reader.sees(f"{parameters}//tr[th='train.tokens']")
    reader.presses(f"{parameters}//*[@role='switch']")  # Show diff only
    gates = reader.sees(f"{parameters}//tr[th='model.attention.gate.kind']")
    assert {cell.text for cell in gates.find_elements(By.TAG_NAME, "td")} == {"sdpa_output", "none"}
    assert not reader.browser.find_elements(By.XPATH, f"{parameters}//tr[th='train.tokens']")
    reader.browser.execute_script("arguments[0].scrollIntoView()", reader.sees(parameters))
    reader.keeps("comparison")

    reader.browser.back()
    reader.presses("//a[.='gated-1']")
    reader.presses("//*[@role='tab' and .='Artifacts']")
    reader.presses("//*[text()='report.html']")
    reader.browser.switch_to.frame(reader.sees("//iframe"))
    assert reader.sees("//h1").text.startswith("gated-1")
    reader.sees("//*[name()='svg' and contains(@class, 'main-svg')]")
    reader.keeps("report")
