"""A page that segments pictures in the browser: a static folder, made of a run's model."""

import base64
import hashlib
import html
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from string import Template
from typing import Any

from jaxunet.data.drawing import draw
from jaxunet.data.images import encode_png
from jaxunet.errors import ConfigError, RunError
from jaxunet.export.files import check_onnx, metadata
from jaxunet.files import check_writable
from jaxunet.runs.loading import TrainedModel

RUNTIME_VERSION = "1.30.0"
"""Of onnxruntime-web, which runs the model in the browser."""
RUNTIME = {
    "code": (
        "ort.wasm.bundle.min.mjs",
        "sha384-PLWz+nHEVHpjwBsO0YVdvQj6n5814Iv8E3b8FG0Rp/uIAtjFMCKOpP66iPzedrIG",
    ),
    "binary": (
        "ort-wasm-simd-threaded.wasm",
        "sha384-vjBJ1z7qrhkTyYsNqKeF6c7N+nOJSU94czEo+tvZcu8G75JparGq9kB+kTnEUNVM",
    ),
}
"""Its files, of the npm package's `dist/`, and their hashes, which the browser checks."""
CDN = "https://cdn.jsdelivr.net"
ON_CDN = f"{CDN}/npm/onnxruntime-web@{RUNTIME_VERSION}/dist/"

MAX_MEGAPIXELS = 50
"""Of a picture: as much as fits into the 4 GB that WebAssembly can address."""
SAMPLES = 3
SAMPLE_SIDE = 320  # pixels
PAGE = Path(__file__).with_name("page")
GENERATOR = '<meta name="generator" content="jaxunet">'
"""In `index.html`: how a site that was written here is known again."""


def make_site(
    model: Callable[[], TrainedModel], out: Path, *, runtime: Path | None = None
) -> list[Path]:
    """Write a page with a model to the folder `out`; the files, the page last.

    Args:
        model: gives it, once it is known that the page can be written.
        runtime: the folder `dist/` of onnxruntime-web's npm package, whose files are copied;
            by default the browser loads them from a CDN.

    Raises:
        ConfigError: the package onnx is missing, `runtime` is not of `RUNTIME_VERSION`, or
            the model has no form in ONNX.
        RunError: `out` can't be written to, or holds something else than an earlier site.
    """
    check_onnx()
    check_free(out)
    copied = read_runtime(runtime) if runtime else {}
    check_writable(out, "--out")
    trained = model()
    return write_site(trained, metadata(trained), out, copied)


def write_site(
    model: TrainedModel, said: Mapping[str, str], out: Path, copied: Mapping[str, bytes]
) -> list[Path]:
    """As `make_site`, of a model, what is said of it, and the runtime's files, if any."""
    from jaxunet.export.onnx_file import make_onnx, write_onnx  # the extra `[onnx]`

    # All is written beside first: an earlier page goes on working until the new one is whole.
    made = out / ".jaxunet-site"
    shutil.rmtree(made, ignore_errors=True)  # of one that was killed
    try:
        made.mkdir(parents=True)
        write_onnx(make_onnx(model, said, native=True), made / "unet.onnx")
        for name, contents in copied.items():
            (made / name).write_bytes(contents)
        for number in range(SAMPLES):
            picture, _ = draw(0, "test", number, SAMPLE_SIDE)
            (made / _sample(number)).write_bytes(encode_png(picture))
        for name in ("style.css", "worker.js", "page.js"):
            shutil.copyfile(PAGE / name, made / name)
        network = integrity((made / "unet.onnx").read_bytes())
        (made / "index.html").write_text(_page(said, network, bool(copied)), encoding="utf-8")
        return _put(made, out)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def integrity(contents: bytes) -> str:
    """The hash by which a browser knows a file: https://www.w3.org/TR/SRI/"""
    digest = hashlib.sha384(contents).digest()
    return f"sha384-{base64.b64encode(digest).decode()}"


def check_free(out: Path) -> None:
    """Raise `RunError` where `out` is a folder that holds something else than a site.

    Hidden files, such as `.git`, are nobody's page, and stay.
    """
    if not out.is_dir() or all(each.name.startswith(".") for each in out.iterdir()):
        return
    index = out / "index.html"
    if not (index.is_file() and GENERATOR in index.read_text("utf-8", "replace")):
        raise RunError(
            f"--out {out} holds files that are not a page of make_demo.py, and nothing there "
            "is replaced. Choose another folder, or empty this one."
        )


def _put(made: Path, out: Path) -> list[Path]:
    """Move a site's files to where they belong; of an earlier site, the page itself last."""
    names = sorted((each.name for each in made.iterdir()), key="index.html".__eq__)
    for name in names:
        (made / name).replace(out / name)
    for name, _ in RUNTIME.values():  # of an earlier site, where this one loads it
        if name not in names:
            (out / name).unlink(missing_ok=True)
    return [out / name for name in names]


def read_runtime(folder: Path) -> dict[str, bytes]:
    """The runtime's files by name.

    Raises:
        ConfigError: one is missing, or is of another version.
    """
    found = {}
    for name, known in RUNTIME.values():
        try:
            found[name] = (folder / name).read_bytes()
            wrong = "is of another version" if integrity(found[name]) != known else ""
        except OSError as error:
            wrong = f"cannot be read: {error.strerror}"
        if wrong:
            raise ConfigError(
                f"--runtime {folder}: its {name} {wrong}. Give the folder package/dist of what "
                f"`npm pack onnxruntime-web@{RUNTIME_VERSION}` writes, unpacked."
            )
    return found


def _page(said: Mapping[str, str], network: str, has_runtime: bool) -> str:
    place = "" if has_runtime else ON_CDN
    threshold = json.loads(said["threshold"])
    settings = {
        "threshold": threshold,
        "maxMegapixels": MAX_MEGAPIXELS,
        "model": {"url": "unet.onnx", "integrity": network},
        "runtime": {
            part: {"url": f"{place}{name}", "integrity": known}
            for part, (name, known) in RUNTIME.items()
        },
    }
    facts = "\n".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>"
        for name, value in _facts(said).items()
    )
    samples = "\n".join(
        f'<button type="button" class="sample" data-sample="{_sample(number)}">'
        f'<img src="{_sample(number)}" alt="Synthetic sample {number + 1}"></button>'
        for number in range(SAMPLES)
    )
    return Template((PAGE / "index.html").read_text(encoding="utf-8")).substitute(
        policy=_policy(place),
        settings=json.dumps(settings).replace("<", "\\u003c"),
        use=html.escape(said["use"]),
        places="its own server" if has_runtime else f"its own server and to {CDN}",
        samples=samples,
        threshold=threshold,
        facts=facts,
    )


def _policy(place: str) -> str:
    """What the page may load and where it may connect to, for the browser to enforce."""
    rules = {
        "default-src": "'none'",
        # Blobs: what was fetched, and had the hash that is known.
        "script-src": "'self' blob: 'wasm-unsafe-eval'",
        "worker-src": "blob:",
        "connect-src": f"'self' {place}".strip(),
        "style-src": "'self'",
        "img-src": "'self' data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _facts(said: Mapping[str, str]) -> dict[str, str]:
    """The model in a few lines, from what its file says of itself."""
    side = said["image_size"]
    encoder = "" if said["encoder"] == "plain" else f", encoder {said['encoder']}"
    facts = {
        "Network": f"U-Net{encoder}; it sees a picture at {side} x {side} pixels",
        "Trained on": f"{said['data']} ({said['licence']})",
    }
    for result in json.loads(said["results"]):
        scores = f"Dice {_scored('dice', result)}, IoU {_scored('iou', result)}"
        facts[f"Scores, {result['data']}"] = f"{scores}; means over {result['count']} images"
    facts["Written"] = f"{said['made']}, by {said['exported_by'].replace(' jax ', ' and jax ')}"
    return facts


def _scored(name: str, result: dict[str, Any]) -> str:
    ends = result["intervals"].get(name)
    between = f" (95% interval {ends[0]:.3f} to {ends[1]:.3f})" if ends else ""
    return f"{result['scores'][name]:.3f}{between}"


def _sample(number: int) -> str:
    return f"sample-{number + 1}.png"
