"""The page in a real browser, beside prediction itself.

Wants Chromium with its driver, selenium (extra `[browser]`), and in JAXUNET_ORT_WEB the folder
`dist/` of onnxruntime-web's npm package; `.ci/run` has them.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from drawn_model import model_of
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from jaxunet.config import ModelConfig
from jaxunet.data.images import read_image
from jaxunet.errors import ConfigError, RunError
from jaxunet.export import site
from jaxunet.export.site import (
    ON_CDN,
    RUNTIME,
    RUNTIME_VERSION,
    check_free,
    integrity,
    read_runtime,
    write_site,
)
from jaxunet.inference.model import Model
from jaxunet.runs.figures import overlay

THRESHOLD = 0.625  # between two of the slider's places
SAID = {
    "use": "not a <medical> device",
    "threshold": f"{THRESHOLD}",
    "image_size": "22",
    "encoder": "plain",
    "data": "synthetic train, 6 images",
    "licence": "apache-2.0",
    "results": json.dumps(
        [
            {
                "data": "synthetic test",
                "count": 5,
                "scores": {"dice": 0.91234, "iou": 0.8},
                "intervals": {"dice": [0.9, 0.92]},
            }
        ]
    ),
    "made": "2026-11-29",
    "exported_by": "jaxunet 1 jax 2",
}
MODEL = model_of(ModelConfig(width=4, depth=2))


def test_a_site_says_what_it_holds_and_connects_to_what_it_names(tmp_path: Path) -> None:
    out = tmp_path / "site"
    write_site(MODEL, SAID, out, {})
    page = (out / "index.html").read_text()
    assert {each.name for each in out.iterdir()} >= {"page.js", "worker.js", "unet.onnx"}
    assert "not a &lt;medical&gt; device" in page
    assert "Dice 0.912 (95% interval 0.900 to 0.920), IoU 0.800; means over 5 images" in page
    settings = json.loads(re.search(r'id="settings">(.*)</script>', page)[1])
    assert settings["threshold"] == THRESHOLD
    assert settings["model"]["integrity"] == integrity((out / "unet.onnx").read_bytes())
    assert settings["runtime"]["code"]["url"] == f"{ON_CDN}ort.wasm.bundle.min.mjs"
    assert f"connect-src 'self' {ON_CDN};" in page
    for name in re.findall(r'(?:src|href|data-sample)="([\w.-]+)"', page):
        assert (out / name).is_file(), name

    # Again, into what is there: another file of the user's stays, an earlier runtime goes.
    (out / "CNAME").write_text("example.org")
    (out / RUNTIME["code"][0]).touch()
    check_free(out)
    write_site(MODEL, {**SAID, "use": "anew"}, out, {})
    assert "anew" in (out / "index.html").read_text()
    assert (out / "CNAME").read_text() == "example.org"
    assert not (out / RUNTIME["code"][0]).exists()
    assert not list(out.glob(".*"))


def test_other_folders_and_other_runtimes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<title>Mine</title>")
    with pytest.raises(RunError, match=r"--out .* holds files that are not a page of"):
        check_free(tmp_path)
    with pytest.raises(ConfigError, match=r"bundle\.min\.mjs cannot be read: No such file"):
        read_runtime(tmp_path)
    (tmp_path / RUNTIME["code"][0]).touch()
    with pytest.raises(ConfigError, match=r"another version.*npm pack onnxruntime-web@1\."):
        read_runtime(tmp_path)
    readme = Path(__file__).parents[2] / "experiments" / "README.md"
    assert f"`npm pack onnxruntime-web@{RUNTIME_VERSION}`" in readme.read_text()


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """A web server's address, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            asked.append(self.path)

        def end_headers(self) -> None:
            self.send_header("Access-Control-Allow-Origin", "*")  # as a CDN does
            super().end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", asked
    finally:
        server.shutdown()
        server.server_close()


@dataclass
class Page:
    """What a visitor does, in a browser of which `driver` is selenium's."""

    driver: Any
    downloads: Path

    def __getitem__(self, name: str) -> Any:
        return self.driver.find_element("id", name)

    def run(self, script: str, *values: Any) -> Any:
        return self.driver.execute_script(script, *values)

    def until(self, condition: Any) -> None:
        from selenium.webdriver.support.wait import WebDriverWait

        WebDriverWait(self.driver, 60, poll_frequency=0.05).until(lambda _: condition())

    def give(self, path: Path) -> str:
        """Choose a file; what the page says in the end."""
        self["file"].send_keys(str(path))
        self.until(lambda: not self["busy"].is_displayed())
        return self["status"].text

    def mask(self, stem: str) -> np.ndarray:
        """The mask as it is downloaded: one channel of 0 and 255."""
        file = self.downloads / f"{stem}_segmentation.png"
        self["download"].click()
        self.until(file.exists)
        with Image.open(file) as image:
            assert image.mode == "L"
            mask = np.asarray(image)
        file.unlink()
        assert set(np.unique(mask)) <= {0, 255}
        return mask


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="extra [browser]")
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    driver, runtime = shutil.which("chromedriver"), os.environ.get("JAXUNET_ORT_WEB")
    if not (browser and driver and runtime):
        pytest.skip("wants Chromium, its driver, and JAXUNET_ORT_WEB")
    place = tmp_path_factory.mktemp("page")
    write_site(MODEL, SAID, place / "site", read_runtime(Path(runtime)))
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for word in ("headless", "no-sandbox", "no-first-run", "disable-background-networking"):
        options.add_argument(f"--{word}")
    options.add_experimental_option("prefs", {"download.default_directory": str(place)})
    with (
        served(place / "site") as (address, _),
        webdriver.Chrome(options, webdriver.ChromeService(driver)) as opened,
    ):
        opened.get(address)
        yield Page(opened, place)


def probability(path: Path) -> np.ndarray:
    return Model(MODEL).probabilities(read_image(path))


def picture(number: int, width: int, height: int) -> Image.Image:
    coarse = np.random.default_rng(number).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def grey(path: Path) -> Path:
    gamma = PngInfo()  # which a browser follows and Pillow does not
    gamma.add(b"gAMA", (100_000).to_bytes(4, "big"))
    picture(0, 301, 97).convert("L").save(path := path / "grey.v2.png", pnginfo=gamma)
    return path


def transparent(path: Path) -> Path:
    image = picture(1, 64, 129)
    faint = Image.linear_gradient("L").resize(image.size).point(lambda value: value // 25)
    image.putalpha(faint)  # of the colours little is left when they are multiplied by it
    image.save(path := path / "transparent.png")
    return path


def turned(path: Path) -> Path:
    exif = Image.Exif()
    exif[0x112] = 6
    picture(2, 640, 333).save(path := path / "turned.JPG", exif=exif, quality=92)
    return path


def palette(path: Path) -> Path:
    image = picture(3, 119, 123).quantize(32)
    image.save(path := path / "palette.png", transparency=5)
    return path


def lossy(path: Path) -> Path:
    picture(4, 257, 256).save(path := path / "lossy.webp", quality=80)
    return path


@pytest.mark.parametrize("write", [grey, transparent, turned, palette, lossy])
def test_masks_are_those_of_prediction(page: Page, tmp_path: Path, write: Any) -> None:
    path = write(tmp_path)
    assert " is done, " in page.give(path)
    expected = np.where(probability(path) > THRESHOLD, 255, 0)
    assert 0.05 < (expected > 0).mean() < 0.95
    mask = page.mask(path.stem)
    assert (mask != expected).mean() < 0.005
    area = f"{(mask > 0).sum():,} of {mask.size:,} pixels are lesion"
    assert page["area"].text.startswith(area)
    # The layer's opaque pixels are the line that predict.py --overlay draws.
    layer = page.run(
        "const layer = document.getElementById('layer');"
        "const copy = new OffscreenCanvas(layer.width, layer.height).getContext('2d');"
        "copy.drawImage(layer, 0, 0);"
        "const {data} = copy.getImageData(0, 0, layer.width, layer.height);"
        "return [...data].filter((_, at) => at % 4 == 3);"
    )
    line = overlay(np.zeros((*mask.shape, 3), np.uint8), mask).any(axis=2)
    np.testing.assert_array_equal(np.reshape(layer, mask.shape) == 255, line)


def test_what_is_no_picture_gets_a_sentence(page: Page, tmp_path: Path) -> None:
    (tmp_path / "notes.jpg").write_text("no picture")
    assert page.give(tmp_path / "notes.jpg").startswith("notes.jpg can't be read as a picture")
    picture(0, 9, 9).quantize(8).save(tmp_path / "a.gif", transparency=1)
    assert page.give(tmp_path / "a.gif").startswith("a.gif is transparent in parts")
    picture(0, 7100, 7100).save(tmp_path / "wide.jpg", quality=10)
    assert "more than 50 megapixels are too many" in page.give(tmp_path / "wide.jpg")
    assert "is done" in page.give(grey(tmp_path))


def test_by_keyboard_alone(page: Page, tmp_path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    page["threshold"].send_keys(Keys.END)
    page.until(lambda: page["area"].text.startswith("0 of"))
    page["threshold"].send_keys(Keys.HOME, *[Keys.ARROW_RIGHT] * 30)
    page.until(lambda: page["status"].text.startswith("Above 0.3,"))
    path = grey(tmp_path)
    page.give(path)
    assert (page.mask(path.stem) != 255 * (probability(path) > 0.3)).mean() < 0.005
    page["reset"].send_keys(Keys.ENTER)
    page.until(lambda: page["status"].text.startswith(f"Above {THRESHOLD},"))
    page["opacity"].send_keys(Keys.HOME)
    assert page["layer"].value_of_css_property("opacity") == "0"
    page["alone"].send_keys(Keys.SPACE)
    assert not page["layer"].is_displayed()
    page["alone"].send_keys(Keys.SPACE)
    page["opacity"].send_keys(Keys.END)
    assert page["layer"].is_displayed()
    page.driver.find_element("css selector", "[data-sample]").send_keys(Keys.ENTER)
    page.until(lambda: page["status"].text.startswith("sample-1.png is done"))


def test_everything_has_a_name_and_fits_on_a_phone(page: Page) -> None:
    for each in page.driver.find_elements("css selector", "input, button, canvas, progress"):
        assert each.accessible_name or not each.is_displayed(), each.get_attribute("outerHTML")
    page.driver.set_window_size(390, 844)
    assert page.run("return document.documentElement.scrollWidth <= window.innerWidth")


def test_the_page_can_reach_nobody_else(page: Page, tmp_path: Path) -> None:
    with served(tmp_path) as (address, asked):
        send = f"fetch({address!r}, {{method: 'POST', mode: 'no-cors', body: 'picture'}})"
        for script in (  # in the page itself, and in a worker as it starts one
            f"{send}.then(() => done('sent'), (error) => done(error.name));",
            f"const code = {send!r} + '.then(() => postMessage(`sent`),' +"
            "'(error) => postMessage(error.name))';"
            "const worker = new Worker(URL.createObjectURL(new Blob([code])));"
            "worker.onmessage = ({data}) => done(data);",
        ):
            said = page.driver.execute_async_script(f"const done = arguments[0]; {script}")
            assert said == "TypeError"
    assert asked == []
    fetched = page.run("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert all(name.startswith((page.driver.current_url, "blob:")) for name in fetched)


def test_a_runtime_from_elsewhere_is_used_only_as_it_is_known(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(Path(os.environ["JAXUNET_ORT_WEB"])) as (elsewhere, asked):
        monkeypatch.setattr(site, "ON_CDN", elsewhere)
        write_site(MODEL, SAID, tmp_path, {})
        index = tmp_path / "index.html"
        (tmp_path / "other.html").write_text(
            index.read_text().replace(RUNTIME["binary"][1], integrity(b"other"))
        )
        with served(tmp_path) as (address, _):
            page.driver.get(address)
            page.until(lambda: page["status"].text.startswith("Ready"))
            assert {path.strip("/") for path in asked} == {name for name, _ in RUNTIME.values()}
            page.driver.get(f"{address}other.html")
            page.until(lambda: "is not the file that this page was made" in page["status"].text)
