"""The status page in a real browser."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.harness import MODEL, Server, until

webdriver = pytest.importorskip("selenium.webdriver")
BROWSER, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(None in (BROWSER, DRIVER), reason="no Chromium with its driver here")
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
)
OPTIONS += "--disable-component-update --disable-sync --window-size=1100,1000"


@pytest.fixture
def page(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for option in [*OPTIONS.split(), f"--user-data-dir={tmp_path}"]:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def text(page: webdriver.Chrome, name: str) -> str:
    return page.find_element("id", name).text


def test_it_shows_a_woven_engine_at_work(page: webdriver.Chrome, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("open sesame\n")
    with Server("--weave", "on", "--api-key-file", str(keys)) as server:
        page.get(server.url)
        until(lambda: text(page, "state") == "needs an API key")
        field = page.find_element("id", "secret")
        field.send_keys("open sesame")
        field.submit()
        until(lambda: text(page, "state") == "ready")
        assert text(page, "model") == MODEL and "2 ranks" in text(page, "what")
        server.client.headers["Authorization"] = "Bearer open sesame"
        prompts = [f"{i}: def f(" for i in range(12)]

        def works() -> bool:
            server.complete(prompts, max_tokens=300, ignore_eos=True)
            return int(text(page, "rate").replace("–", "0")) > 0 and "Woven" in text(page, "reading")

        until(works)
        assert int(text(page, "woven")) > 0 and "communication under compute" in text(page, "reading")
        boxes = "document.querySelectorAll('#timeline rect.' + arguments[0])"
        for kind in ("block", "seam"):  # two halves, each with its seams below
            assert (
                len(set(page.execute_script(f"return [...{boxes}].map(box => box.getAttribute('y'))", kind)))
                == 2
            )
        until(lambda: "–" not in text(page, "latency"))
        page.save_screenshot(str(tmp_path / "page.png"))
        answer = server.client.get("/")
        assert "unsafe-inline" not in answer.headers["content-security-policy"]
        severe = [line["message"] for line in page.get_log("browser") if line["level"] == "SEVERE"]
        assert [line for line in severe if "401" not in line] == []
        os.kill(server.process.pid, signal.SIGSTOP)  # it takes connections, and never answers
        until(lambda: text(page, "state") == "does not answer")
        assert page.find_element("tag name", "main").get_attribute("class") == "stale"
        os.kill(server.process.pid, signal.SIGCONT)
        until(lambda: page.find_element("tag name", "main").get_attribute("class") == "")
        server.end(signal.SIGKILL)
        until(lambda: text(page, "state") == "unreachable")
