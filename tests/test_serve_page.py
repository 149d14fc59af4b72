"""The server's page in a headless Chromium, against the real server: what it draws, shows and says, and who can use it."""

from __future__ import annotations

import base64
import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hst_trt
from hst_trt import HybridStitchPipeline

pytest.importorskip("fastapi", reason='needs the server: pip install "hst_trt[serve]"')
httpx = pytest.importorskip("httpx")
webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium, which drives the browser")
CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="needs a browser: apt-get install chromium chromium-driver"
)

import uvicorn  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

from hst_trt.server.app import make_app  # noqa: E402
from hst_trt.server.service import ImageService  # noqa: E402

PAGE = Path(hst_trt.__file__).parent / "server" / "page"
KEY = "a key that nobody would guess"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--window-size=1280,900",
)  # fmt: skip


# -- a server and a browser ------------------------------------------------------------------------------------------------
@contextmanager
def serving(service: ImageService, **options: Any) -> Iterator[str]:
    """Its address, while it runs in a thread."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_app(service, **options), log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    assert service.wait_for("ready", "failed") == "ready"
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    server.should_exit = True
    thread.join()
    listening.close()


@pytest.fixture(scope="module")
def service(demo_bundle: Path) -> ImageService:
    return ImageService(demo_bundle, threads=1)


@pytest.fixture(scope="module")
def address(service: ImageService) -> Iterator[str]:
    with serving(service, local=True) as url:
        yield url


@pytest.fixture(scope="module")
def pipeline(demo_bundle: Path) -> HybridStitchPipeline:
    """What the pictures and masks are compared with."""
    return HybridStitchPipeline.from_bundle(demo_bundle, threads=1)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(CHROMEDRIVER))
    browser.set_script_timeout(30)
    yield browser
    browser.quit()


class Page:
    """The open page, and what a person would do with it."""

    def __init__(self, driver: Any, address: str) -> None:
        self.driver, self.address = driver, address
        self.requests: list[dict[str, Any]] = []

    def open(self) -> None:
        self.driver.get(self.address)
        self.wait(lambda: not self.js("return document.getElementById('draw').disabled"))
        # everything that is said, to the eye and to the ear, in the order it was said
        self.js(
            "window.said = {doing: [], announced: []};"
            "for (const id in said) new MutationObserver(() => said[id].push(document.getElementById(id).textContent))"
            ".observe(document.getElementById(id), {childList: true, characterData: true, subtree: true})"
        )

    def js(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    def js_async(self, code: str, *arguments: Any) -> Any:
        """The value of the last expression of an async function of `args`."""
        run = f"const done = arguments[arguments.length - 1]; (async (...args) => {{ {code} }})(...arguments).then(done, done)"
        return self.driver.execute_async_script(run, *arguments)

    def wait(self, true: Callable[[], Any], seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, f"waited in vain; the page says: {self.text('doing')!r}, {self.text('error')!r}"
            time.sleep(0.02)

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def text(self, id: str) -> str:
        return self.js("return document.getElementById(arguments[0]).textContent", id)

    def set(self, id: str, value: object) -> None:
        self.js(
            "const [id, value] = arguments, control = document.getElementById(id);"
            "control.value = value; control.dispatchEvent(new Event('input', {bubbles: true}))",
            id, value,
        )  # fmt: skip

    def draw(self) -> None:
        self.find("#draw").click()
        self.wait_until_drawn()

    def wait_until_drawn(self) -> None:
        self.wait(lambda: re.match("Done|Not drawn|Cancelled", self.text("doing")))

    def press(self, *keys: str) -> None:
        self.driver.switch_to.active_element.send_keys(*keys)

    def focused(self) -> str:
        return self.js("return document.activeElement.id")

    def pixels(self, selector: str) -> np.ndarray:
        """RGBA of an image or a canvas, [H, W, 4]."""
        url = self.js_async(
            "const source = document.querySelector(args[0]);"
            "if (source.decode) await source.decode();"
            "const canvas = document.createElement('canvas');"
            "[canvas.width, canvas.height] = [source.naturalWidth ?? source.width, source.naturalHeight ?? source.height];"
            "canvas.getContext('2d').drawImage(source, 0, 0);"
            "const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);"
            "let bytes = ''; for (const byte of data.data) bytes += String.fromCharCode(byte);"
            "return [canvas.height, canvas.width, btoa(bytes)]",
            selector,
        )
        height, width, content = url
        return np.frombuffer(base64.b64decode(content), np.uint8).reshape(height, width, 4)

    def sent(self) -> list[dict[str, Any]]:
        """The bodies of the requests for pictures since the page was opened."""
        self._read_network()
        return [json.loads(r["postData"]) for r in self.requests if r["method"] == "POST"]

    def _read_network(self) -> None:
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"])

    def check_nothing_went_wrong(self, *, refused: bool = False) -> None:
        """No word in the console, but of refused requests where some were, and no request to anywhere else."""
        self._read_network()
        elsewhere = [r["url"] for r in self.requests if not r["url"].startswith((self.address, "blob:", "data:"))]
        assert not elsewhere
        lines = self.driver.get_log("browser")
        assert not [line["message"] for line in lines if not (refused and line["source"] == "network")]


@pytest.fixture
def page(driver: Any, address: str) -> Iterator[Page]:
    driver.get("about:blank")
    driver.get_log("performance"), driver.get_log("browser")  # of the test before
    shown = Page(driver, address)
    shown.open()
    yield shown
    look(driver, width=1280)


def look(driver: Any, *, width: int, dark: bool = False) -> None:
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


# -- drawing ---------------------------------------------------------------------------------------------------------------
def test_a_newcomer_draws_with_three_keys_and_sees_large_only_beside_it(page: Page, pipeline: HybridStitchPipeline) -> None:
    page.press(Keys.TAB)
    assert page.focused() == "prompt"
    page.press(Keys.TAB)
    assert page.focused() == "draw"
    page.press(Keys.ENTER)
    page.wait_until_drawn()
    page.wait(lambda: page.focused() == "draw")

    said = page.js("return said")
    assert any(
        re.fullmatch(r"This picture: step \d+ of 20, hybrid stage, large model on 80 tokens", line) for line in said["doing"]
    )
    assert any(line.startswith("Large only: step 1 of 20, large") for line in said["doing"])
    stages = [line for line in said["announced"] if line.startswith("This picture: ") and " stage" in line]
    assert [line.split()[2] for line in stages] == ["large", "hybrid", "small"]  # once a stage, not once a step
    assert re.match(r"Done in .* 75 % of the large model's compute saved\.", said["announced"][-1])

    prompt = page.js("return document.getElementById('prompt').value")
    for figure, schedule in (("#main-figure", "hybrid"), ("#other-figure", "large")):
        expected = np.asarray(pipeline(prompt, seed=7, schedule=schedule).images[0])
        np.testing.assert_array_equal(page.pixels(f"{figure} img")[..., :3], expected)
    page.check_nothing_went_wrong()


def test_the_figures_are_those_of_the_answer(page: Page) -> None:
    page.draw()
    page.wait(lambda: "PSNR" in page.text("facts"))
    facts = dict(
        page.js("return [...document.querySelectorAll('#facts div')].map(d => [d.children[0].textContent, d.innerText])")
    )
    assert "75 %" in facts["Large compute saved"]
    assert "1072 of 5120 tokens" in facts["Large compute saved"]
    assert "20 steps" in facts["Large only took"]
    measured = float(re.search(r"([\d.]+)×", facts["Speed-up of the loop"]).group(1))
    loops = [re.search(r"(?:denoise|loop) ([\d.]+) (m?s)", facts[name]).groups() for name in ("Time taken", "Large only took")]
    loop, reference = (float(value) / (1000 if unit == "ms" else 1) for value, unit in loops)
    assert measured == pytest.approx(reference / loop, rel=0.03)  # as they are rounded
    one, other = (page.pixels(f"{figure} img")[..., :3].astype(float) for figure in ("#main-figure", "#other-figure"))
    psnr = 10 * np.log10(255**2 / np.mean((one - other) ** 2))
    assert f"{psnr:.1f} dB" in facts["PSNR to large only"]


def test_the_timeline_has_a_segment_a_step_as_wide_as_it_took(page: Page) -> None:
    page.draw()
    rows = page.js(
        "return [...document.querySelectorAll('.timeline')].map(row => [...row.querySelectorAll('.segment')].map(s => {"
        "const bar = s.querySelector('.bar').getBoundingClientRect(), slot = s.querySelector('.slot').getBoundingClientRect();"
        "return [s.classList[1], slot.width, bar.height / slot.height]}))"
    )
    assert [stage for stage, _, _ in rows[0]] == ["large"] * 2 + ["hybrid"] * 7 + ["small"] * 11
    assert [stage for stage, _, _ in rows[1]] == ["large"] * 20
    heights = [round(height, 2) for _, _, height in rows[0]]
    assert heights[0] == 1
    assert heights[-1] < heights[2] < 0.5
    took = page.js("return [...document.querySelectorAll('#table tbody tr')].map(row => Number(row.lastChild.textContent))")
    widths = np.array([width for _, width, _ in rows[0]])
    np.testing.assert_allclose(widths / widths.sum(), np.array(took) / sum(took), atol=2e-3)
    shown = page.js("return document.querySelector('.timeline [role=img]').getAttribute('aria-label')")
    assert "2 large steps, 7 hybrid steps, 11 small steps" in shown


def test_the_overlay_shows_the_bits_of_each_step(page: Page, pipeline: HybridStitchPipeline) -> None:
    page.draw()
    prompt = page.js("return document.getElementById('prompt').value")
    masks = pipeline(prompt, seed=7, keep_masks=True).masks
    assert sorted(masks) == list(range(2, 9))

    def veiled() -> np.ndarray:
        return page.pixels("#main-figure canvas")[8::16, 8::16, 3] > 0

    assert not veiled().any()  # the overlay is off at first
    slider = page.find("#scrub")
    slider.send_keys(Keys.HOME)
    for step in range(20):
        expected = masks[step][0] if step in masks else np.full((16, 16), step < 2)
        np.testing.assert_array_equal(veiled(), ~expected, err_msg=f"step {step}")
        assert slider.get_attribute("aria-valuetext").startswith(f"{step + 1} of 20, ")
        slider.send_keys(Keys.ARROW_RIGHT)
    page.find("#overlay").click()
    assert not veiled().any()


def test_play_goes_through_the_steps_and_a_segment_leads_to_its_own(page: Page) -> None:
    page.draw()
    page.js("document.querySelector('.timeline [data-step=\"17\"]').dispatchEvent(new MouseEvent('click', {bubbles: true}))")
    assert page.text("scrub-value").startswith("18 of 20, small stage: large model on no token")
    page.find("#play").click()
    assert page.text("play") == "Stop"
    page.wait(lambda: page.text("play") == "Play")
    assert page.text("scrub-value").startswith("20 of 20")


# -- comparing ------------------------------------------------------------------------------------------------------------
def test_schedules_share_one_large_only_picture_and_can_stand_beside_each_other(page: Page) -> None:
    page.draw()
    page.set("schedule", "ras")
    page.set("mask-ratio", 0.5)
    page.draw()
    page.find("#schedule option[value=small]").click()  # as a mouse chooses
    assert not page.find("#mask-ratio").is_enabled()
    page.find("#schedule option[value=hybrid]").click()
    for stage, steps in (("large", 4), ("hybrid", 10), ("small", 6)):
        page.set(f"stage-{stage}", steps)
    page.draw()
    sent = page.sent()
    assert [body["schedule"] for body in sent] == ["hybrid", "large", "ras", "hybrid"]
    assert sent[2]["mask_ratio"] == 0.5
    assert sent[3]["stages"] == [4, 10, 6]
    assert all(body["stream"] and body["details"] and body["seed"] == 7 for body in sent)

    last = page.pixels("#main-figure img")
    assert len(page.driver.find_elements("css selector", "#strip li")) == 3
    page.driver.find_elements("css selector", "#strip .thumbnail")[2].click()
    first = page.pixels("#main-figure img")
    assert (first != last).any()
    assert page.find("#other-figure strong").text == "Large only"
    page.driver.find_elements("css selector", "#strip [aria-pressed]")[0].click()
    np.testing.assert_array_equal(page.pixels("#other-figure img"), last)
    np.testing.assert_array_equal(page.pixels("#main-figure img"), first)
    page.wait(lambda: "PSNR to the one beside" in page.text("facts"))
    assert page.js("return document.activeElement.textContent") == "Beside"  # the strip was made anew under the focus
    page.check_nothing_went_wrong()


def test_a_speed_up_is_one_of_the_frontiers_and_chooses_everything_else(page: Page) -> None:
    page.find("#beside").click()
    slider = page.find("#speedup")
    slider.send_keys(*[Keys.ARROW_RIGHT] * 24)
    asked = float(slider.get_attribute("aria-valuetext").split()[0])
    assert not page.find("#schedule").is_enabled()
    page.draw()
    (body,) = page.sent()
    assert body["speedup"] == pytest.approx(asked, abs=0.006)
    assert not {"schedule", "num_inference_steps", "stages", "mask_ratio"} & set(body)
    chosen = page.text("speedup-hint").split(": ")[1]
    assert page.js("return document.querySelector('#command code').textContent").endswith(chosen)
    assert "not measured" in page.text("facts")
    page.find("#beside").click()  # what speed-ups are counted from
    page.draw()
    assert page.sent()[-1]["num_inference_steps"] == 28
    slider.send_keys(Keys.HOME)
    assert page.text("speedup-value") == "off"
    assert page.find("#schedule").is_enabled()


def test_an_empty_seed_is_drawn_by_the_server_and_large_only_follows_it(page: Page) -> None:
    page.set("seed", "")
    page.set("size", "192x192")
    page.set("negative-prompt", "blue")
    page.draw()
    picture, reference = page.sent()
    assert "seed" not in picture
    assert f"seed {reference['seed']}" in page.text("main-figure")
    assert reference["size"] == picture["size"] == "192x192"
    assert reference["negative_prompt"] == "blue"
    command = page.js("return document.querySelector('#command code').textContent")
    assert f"--negative-prompt 'blue' --seed {reference['seed']} --width 192 --height 192 --schedule hybrid" in command
    assert page.pixels("#main-figure canvas").shape[:2] == (192, 192)


# -- what may go wrong ----------------------------------------------------------------------------------------------------
def test_cancel_ends_the_servers_work(page: Page, service: ImageService) -> None:
    def count(name: str, **labels: str) -> float:
        return service.metrics.registry.get_sample_value(name, labels) or 0.0

    before = count("hst_trt_requests_total", outcome="cancelled")
    page.set("size", "384x384")
    page.set("schedule", "large")
    page.set("steps", 100)
    page.find("#draw").send_keys(Keys.ENTER)
    page.wait(lambda: "step 3 of 100" in page.text("doing"))
    assert page.focused() == "cancel"
    page.press(Keys.SPACE)
    page.wait(lambda: page.text("doing") == "Cancelled.")
    step = max(int(line.split()[3]) for line in page.js("return said.doing") if " step " in line)
    assert step < 50
    page.wait(lambda: count("hst_trt_requests_running") == 0, 5)
    assert count("hst_trt_requests_total", outcome="cancelled") == before + 1
    page.wait(lambda: page.focused() == "draw")
    assert page.text("error") == ""
    page.set("size", "256x256")
    page.set("schedule", "small")
    page.set("steps", 4)
    page.draw()
    assert page.text("doing").startswith("Done")
    page.check_nothing_went_wrong()


def test_a_picture_stays_when_large_only_is_cancelled(page: Page) -> None:
    page.set("schedule", "small")
    page.set("steps", 100)
    page.find("#prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    page.wait(lambda: "Large only: step 2 of 100" in page.text("doing"))
    assert page.text("other-figure").split() == ["Drawing", "…", "Large", "only"]
    page.find("#cancel").click()
    page.wait_until_drawn()
    assert page.text("other-figure").split() == ["Not", "drawn.", "Large", "only"]
    assert page.pixels("#main-figure img").shape == (256, 256, 4)
    assert "not measured" in page.text("facts")
    page.check_nothing_went_wrong()


def test_a_refusal_is_shown_in_the_servers_words_and_announced(page: Page) -> None:
    page.set("stage-large", 3)
    page.draw()
    (sent,) = page.sent()
    answer = httpx.post(f"{page.address}v1/images/generations", json=sent)
    assert answer.status_code == 400
    assert page.text("error") == answer.json()["error"]["message"]
    assert page.text("error").startswith("stages 3,0,0 do not make 20 steps")
    assert page.find("#error").get_attribute("role") == "alert"
    nodes = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    assert any(node.get("role", {}).get("value") == "alert" for node in nodes)
    assert page.text("doing") == "Not drawn."
    page.set("stage-large", "")
    page.draw()
    assert page.text("error") == ""
    page.set("steps", 200)
    page.js("document.getElementById('request').noValidate = true")
    page.draw()
    assert page.text("error").startswith("200 steps are more")
    assert page.find("#steps").get_attribute("aria-invalid") == "true"
    page.check_nothing_went_wrong(refused=True)


def test_a_server_that_is_gone_is_said(page: Page, demo_bundle: Path) -> None:
    with serving(ImageService(demo_bundle, threads=1), local=True) as url:
        other = Page(page.driver, url)
        other.open()
    other.draw()
    assert other.text("error").startswith("The server cannot be reached")


def test_a_key_is_asked_for_and_kept_in_memory_only(page: Page, demo_bundle: Path) -> None:
    with serving(ImageService(demo_bundle, threads=1), keys=[KEY]) as url:
        other = Page(page.driver, url)
        other.driver.get(url)
        for key in ("a wrong one", KEY):
            other.wait(lambda: other.js("return document.getElementById('key-dialog').open"))
            assert other.focused() == "key"
            assert other.text("key-message").startswith("a key is needed")
            assert other.find("#key").get_attribute("type") == "password"
            other.press(key, Keys.ENTER)
        other.wait(lambda: other.find("#draw").is_enabled())
        other.draw()
        assert other.text("doing").startswith("Done")
        assert other.js("return localStorage.length + sessionStorage.length + document.cookie.length") == 0
        assert KEY not in other.js("return document.documentElement.outerHTML + document.getElementById('key').value")
        assert KEY not in " ".join(r["url"] for r in other.requests)
        other.driver.refresh()
        other.wait(lambda: other.js("return document.getElementById('key-dialog').open"))
        page.driver.get("about:blank")


# -- for everyone ---------------------------------------------------------------------------------------------------------
INTERACTIVE = {
    "button", "checkbox", "textbox", "combobox", "spinbutton", "slider", "link", "progressbar", "image", "img", "region",
    "form", "listbox", "DisclosureTriangle",
}  # fmt: skip

CONTRAST = """
const parse = (text) => {
  const parts = text.match(/[\\d.]+/g).map(Number);
  return [...parts.slice(0, 3), parts[3] ?? 1];
};
const over = (top, under) => under.map((u, i) => top[i] * top[3] + u * (1 - top[3]));
const ground = (element) => {
  const layers = [];
  for (let at = element; at; at = at.parentElement) layers.push(parse(getComputedStyle(at).backgroundColor));
  return layers.reverse().reduce((under, layer) => over(layer, under), [255, 255, 255]);
};
const luminance = (rgb) => {
  const [r, g, b] = rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const contrast = (a, b) => {
  const [light, dark] = [luminance(a), luminance(b)].sort((x, y) => y - x);
  return (light + 0.05) / (dark + 0.05);
};
const found = [];
for (const element of document.querySelectorAll("body *")) {
  const style = getComputedStyle(element);
  if (!element.checkVisibility() || element.matches(":disabled, :disabled *, option")) continue;
  const under = ground(element), name = `${element.tagName} #${element.id} .${element.className.baseVal ?? element.className}`;
  const own = [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.textContent.trim());
  if (own || element.matches("input, textarea, select")) {
    const colour = parse(element instanceof SVGElement ? style.fill : style.color);
    found.push([`text of ${name}`, contrast(over(colour, under), under), 4.5]);
  }
  if (element.matches("input:not([type=range], [type=checkbox]), textarea, select, button:not(.primary)"))
    found.push([`edge of ${name}`, contrast(parse(style.borderTopColor).slice(0, 3), ground(element.parentElement)), 3]);
  if (element.matches(".bar")) found.push([`bar of ${name}`, contrast(parse(style.fill).slice(0, 3), under), 3]);
}
return found;
"""


def drawn_twice(page: Page) -> None:
    """Everything that the page can show, shown."""
    page.js("for (const details of document.querySelectorAll('details')) details.open = true")
    page.draw()
    page.set("schedule", "small")
    page.set("stage-large", "")
    page.draw()
    page.driver.find_elements("css selector", "#strip .thumbnail")[1].click()
    page.find("#play").click()
    page.js("document.getElementById('error').textContent = 'an error of the server'")


def test_everything_has_a_name_and_headings_are_in_order(page: Page) -> None:
    drawn_twice(page)
    nodes = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    seen = [(n["role"]["value"], n.get("name", {}).get("value", "").strip()) for n in nodes if not n["ignored"]]
    named = [(role, name) for role, name in seen if role in INTERACTIVE]
    assert {"button", "checkbox", "slider", "spinbutton", "textbox", "link", "image"} <= {role for role, _ in named}
    assert [role for role, name in named if not name] == []
    assert page.js("return [...document.querySelectorAll('fieldset')].every(e => e.firstElementChild.tagName === 'LEGEND')")
    levels = page.js("return [...document.querySelectorAll('h1, h2, h3')].filter(h => h.checkVisibility()).map(h => h.tagName)")
    assert levels[0] == "H1"
    assert levels.count("H1") == 1
    assert all(int(b[1]) - int(a[1]) <= 1 for a, b in pairwise(levels))
    ids = page.js("return [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    referred = page.js(
        "return [...document.querySelectorAll('[aria-describedby], [aria-labelledby], label[for]')]"
        ".flatMap(e => (e.getAttribute('aria-describedby') ?? e.getAttribute('aria-labelledby') ?? e.htmlFor).split(' '))"
    )
    assert set(referred) <= set(ids)
    undescribed = page.js(
        "return [...document.querySelectorAll('#request :is(input, textarea, select)')].filter(e =>"
        "!(e.getAttribute('aria-describedby') ?? e.closest('fieldset[aria-describedby]'))).map(e => e.id)"
    )
    assert undescribed == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_contrast_is_enough(page: Page, dark: bool) -> None:
    look(page.driver, width=1280, dark=dark)
    drawn_twice(page)
    ratios = page.js(CONTRAST)
    assert len(ratios) > 100
    assert [ratio for ratio in ratios if ratio[1] < ratio[2]] == []
    page.js("document.getElementById('key-dialog').showModal()")
    assert [ratio for ratio in page.js(CONTRAST) if ratio[1] < ratio[2]] == []


def test_it_fits_screens_from_360_pixels_on(page: Page) -> None:
    drawn_twice(page)
    for width in (360, 480, 768, 1024, 1920):
        look(page.driver, width=width)
        assert page.js("return document.documentElement.scrollWidth") <= width
        outside = page.js(
            "const off = ({left, right}) => left < 0 || right > innerWidth + 0.5;"
            "return [...document.querySelectorAll('main *')].filter(e => e.checkVisibility() && off(e.getBoundingClientRect())"
            "&& !e.closest('.scroll, .heard, svg')).map(e => e.outerHTML)"
        )
        assert outside == []


def test_focus_can_be_seen_wherever_it_is(page: Page) -> None:
    page.draw()
    page.wait(lambda: page.focused() == "draw")
    visited = set()
    for _ in range(60):  # past the last one, through the browser's own, to the first again
        page.press(Keys.TAB)
        at = page.js(
            "const e = document.activeElement, s = getComputedStyle(e);"
            "return [e.id || e.textContent.slice(0, 20), e === document.body, s.outlineStyle, parseFloat(s.outlineWidth)]"
        )
        visited.add(at[0])
        assert at[1] or at[2:] == ["solid", 2], at
        if at[0] == "draw":
            break
    expected = {
        "prompt",
        "draw",
        "seed",
        "size",
        "beside",
        "speedup",
        "schedule",
        "steps",
        "mask-ratio",
        "overlay",
        "play",
        "scrub",
    }
    assert expected | {"download"} <= visited


# -- the parts that need no person -----------------------------------------------------------------------------------------
def test_the_page_names_no_other_origin_and_has_no_inline_code() -> None:
    for file in PAGE.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|@import|url\(", text), file.name
        assert not re.search(r"innerHTML|\beval\(|localStorage|sessionStorage", text), file.name
        if file.suffix == ".html":
            assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", text)
        if file.suffix == ".css":
            assert not re.search(r"transition|animation", text)  # nothing moves by itself, so nothing has to be reduced


def test_events_are_read_from_chunks_that_end_anywhere(page: Page) -> None:
    stream = (
        'event: one\ndata: {"text":\ndata: "é€😀"}\n\n: a comment\n\n'
        'event: two\r\ndata: {"n": 2}\r\n\r\ndata: 3\n\nevent: cut\ndata: 4'
    )
    for size in (1, 2, 3, 7, 1000):
        events = page.js_async(
            "const { serverSentEvents } = await import('/page/api.js');"
            "const bytes = new TextEncoder().encode(args[0]), found = [];"
            "const stream = new ReadableStream({ start(to) {"
            "for (let i = 0; i < bytes.length; i += args[1]) to.enqueue(bytes.slice(i, i + args[1])); to.close(); }});"
            "for await (const event of serverSentEvents(stream)) found.push([event.name, event.data]);"
            "return found",
            stream, size,
        )  # fmt: skip
        assert events == [["one", {"text": "é€😀"}], ["two", {"n": 2}], ["message", 3]], size


@pytest.mark.parametrize("shape", [(16, 16), (3, 5), (1, 1), (64, 48)])
def test_bits_are_those_that_numpy_packs(page: Page, shape: tuple[int, int]) -> None:
    mask = np.random.default_rng(3).random(shape) < 0.4
    packed = base64.b64encode(np.packbits(mask).tobytes()).decode()
    bits = page.js_async("return (await import('/page/masks.js')).bitsOf(...args)", packed, mask.size)
    np.testing.assert_array_equal(np.array(bits).reshape(shape), mask)


@pytest.mark.parametrize("model", [(256, 256, 16, 384), (1024, 1024, 16, 1440), (64, 64, 16, 192), (16, 16, 16, 16)])
def test_sizes_are_ones_the_model_draws(page: Page, model: tuple[int, int, int, int]) -> None:
    width, height, side, longest = model
    facts = {"width": width, "height": height, "side": side, "max_side": longest}
    sizes = page.js_async("return (await import('/page/settings.js')).sizes(args[0])", facts)
    pairs = [(size["width"], size["height"]) for size in sizes]
    assert pairs[0] == (width, height)
    assert len(set(pairs)) == len(pairs)
    assert all(edge % side == 0 and side <= edge <= longest for pair in pairs for edge in pair)
    assert len(pairs) == 1 if longest == side else len(pairs) > 3
