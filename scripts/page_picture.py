"""Takes the pictures of the server's page in the documents: a real server, the demo bundle, Debian's Chromium.

Run after the page or the demo pair has changed, on an idle machine, whose times they show; needs chromium and chromium-driver.
Writes page.png and page_dark.png into docs/images, and prints the times.
"""

from __future__ import annotations

import base64
import io
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.support.wait import WebDriverWait

from hst_trt.builder.build import build_bundle
from hst_trt.recipe import load_recipe, load_target

ROOT = Path(__file__).resolve().parent.parent
CHROMEDRIVER = shutil.which("chromedriver")  # else selenium asks the internet for one
IMAGES = ROOT / "docs" / "images"
WIDTH = 1280
STEP = 5
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip


def main() -> None:
    bundle = build_bundle(load_recipe("demo"), load_target("cpu"), ROOT / "engines" / "demo-cpu.hstb").bundle
    command = [str(Path(sys.executable).with_name("hst-trt")), "serve", str(bundle.path), "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            ready = next(found for line in server.stderr if (found := re.search(r"ready on (\S+)", line)))
            for name, scheme in (("page.png", "light"), ("page_dark.png", "dark")):
                image, figures = take(ready.group(1), scheme)
                image.save(IMAGES / name, optimize=True)
                print(f"{IMAGES / name}: {figures}")
        finally:
            server.send_signal(signal.SIGTERM)


def take(address: str, scheme: str) -> tuple[Image.Image, str]:
    """The whole page after some drawings of the prompt it starts with, the last one shown with a mask; and its figures."""
    options = webdriver.ChromeOptions()
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        with webdriver.Chrome(options, webdriver.ChromeService(CHROMEDRIVER)) as browser:
            media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
            metrics = {"width": WIDTH, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            browser.get(address)
            draw(browser, "hybrid")  # the first of a process is slower: the memory is new
            draw(browser, "small")
            draw(browser, "ras")
            draw(browser, "hybrid")
            browser.execute_script(
                "const scrub = document.getElementById('scrub'); scrub.value = arguments[0];"
                "scrub.dispatchEvent(new Event('input')); document.getElementById('command').open = true;"
                "document.activeElement.blur()",
                STEP,
            )
            figures = " ".join(browser.find_element("id", "facts").text.split())
            taken = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "format": "png"})
    return Image.open(io.BytesIO(base64.b64decode(taken["data"]))).convert("RGB"), figures


def draw(browser: webdriver.Chrome, schedule: str) -> None:
    button = browser.find_element("id", "draw")
    WebDriverWait(browser, 60).until(lambda _: button.is_enabled())
    browser.find_element("css selector", f"#schedule option[value={schedule}]").click()
    button.click()
    WebDriverWait(browser, 60).until(lambda _: browser.find_element("id", "doing").text.startswith("Done"))


if __name__ == "__main__":
    main()
