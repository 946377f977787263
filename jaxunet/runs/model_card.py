"""What a model is, for those who get it without its run: facts, and `MODEL_CARD.md` from them.

The card has the form that model hubs read, Markdown with a head in YAML.
"""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jaxunet.files import write_atomically
from jaxunet.runs.record import load_config, read_record, recorded_dataset

WARNING = "Research software, not a medical device: not to be used to examine or treat anybody."
LICENCES = {
    "isic2018": ("cc-by-nc-4.0", "ISIC 2018 Task 1, CC BY-NC 4.0: non-commercial use only"),
    "synthetic": ("apache-2.0", "pictures drawn from a seed, no licence but the code's"),
    "folder": ("other", "the user's own pictures, under whatever licence they are"),
    None: ("other", "not recorded"),
}
"""Of models by what they were trained on: the hubs' word for it, and in words."""
AS_IT_IS = {"views": "none", "temperature": 1.0, "clean": False, "runs": 1}
"""How a run is scored if nothing is asked for; of `runs` how many."""


def facts(run: Path) -> dict[str, Any]:
    """What the run directory says of its model.

    Raises:
        RunError: `run` is no run directory.
        ConfigError: its config.json is damaged.
    """
    config, record = load_config(run), read_record(run)
    data, versions = recorded_dataset(record), record.get("versions", {})
    known = config.data.name if "split" in data else None  # an import alone says of none
    described = f"{data.get('name')} {data.get('split')}, {data.get('count')} images"
    return {
        "use": WARNING,
        "made": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": {name: versions.get(name) for name in ("jaxunet", "jax", "flax")},
        "commit": record.get("git_commit"),
        "command": record.get("command"),
        "encoder": config.model.encoder,
        "pretrained": record.get("weights"),
        "fine_tuned_from": record.get("init_from"),
        "imported_from": data.get("imported_from"),
        "image_size": config.data.image_size,
        "threshold": config.train.threshold,
        "data": described if known else "not recorded",
        "licence": LICENCES[known][1],
        # What it began with may have another.
        "licence_id": "other"
        if "init_from" in record or "imported_from" in data
        else LICENCES[known][0],
        "results": _results(run, config.train.threshold),
    }


def _results(run: Path, threshold: float) -> list[dict[str, Any]]:
    """Each result in the run's folder: of which data, after how many steps, scored in which
    way, which scores."""
    found = []
    for path in [run / "summary.json", *sorted(run.glob("evaluation-*.json"))]:
        try:
            result = json.loads(path.read_bytes())
            dataset, scores = result["dataset"], result["scores"]["per_image"]
            found.append(
                {
                    "file": path.name,
                    "data": f"{dataset['name']} {dataset['split']}",
                    "count": dataset["count"],
                    "step": result["step"],
                    "way": {
                        **{name: result.get(name, usual) for name, usual in AS_IT_IS.items()},
                        "runs": len(result.get("runs", [run])),
                        "threshold": result.get("threshold", threshold),
                    },
                    "scores": {name: scores[name] for name in ("dice", "iou")},
                    "intervals": result.get("intervals", {}).get("per_image", {}),
                }
            )
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not there yet, or of another kind
    return found


def write_card(run: Path) -> Path:
    """Write `MODEL_CARD.md` into the run directory; for errors see `facts`."""
    path = run / "MODEL_CARD.md"
    write_atomically(path, card(facts(run), run.resolve().name))
    return path


def card(known: dict[str, Any], name: str) -> str:
    """The card's text.

    Args:
        known: what `facts` gives.
        name: of the model.
    """
    as_it_is = {**AS_IT_IS, "threshold": known["threshold"]}
    results = [each for each in known["results"] if each["way"] == as_it_is]
    head = {
        "license": known["licence_id"],
        "library_name": "jaxunet",
        "pipeline_tag": "image-segmentation",
        "tags": ["jax", "flax", "unet", "image-segmentation", "dermoscopy"],
        "model-index": [{"name": name, "results": list(map(_indexed, results))}],
    }
    versions = ", ".join(f"{package} {v}" for package, v in known["versions"].items() if v)
    rows = "\n".join(map(_row, known["results"])) or "| none yet | | | | |"
    # JSON is YAML, too, and quotes whatever a name may hold.
    lines = [f"{key}: {json.dumps(value)}" for key, value in head.items()]
    return f"""---
{chr(10).join(lines)}
---

# {name}

A U-Net that marks skin lesions in dermoscopic pictures: encoder {known["encoder"]}, pictures of
{known["image_size"]} px, a pixel is lesion above {known["threshold"]}.

**{known["use"]}**
What it does on pictures unlike those it was trained on, of another camera or another skin, is
not known, and nothing here was tested on patients.

## Training

- Data: {known["data"]} ({known["licence"]})
- Start: {_start(known)}
- Command: `{known["command"] or "not recorded"}`
- Versions: {versions or "not recorded"}; commit {known["commit"] or "not recorded"}

## Scores

Means over images, with 95% bootstrap intervals over images, which say nothing of other cameras,
hospitals or seeds. Validation flatters: the model was chosen on it.

| data | images | step | Dice | IoU |
|---|---|---|---|---|
{rows}

## Use

```python
import jaxunet

mask = jaxunet.load("{name}").predict(image)  # uint8 [height, width, 3] to 0 or 255
```

Written by jaxunet on {known["made"]}.
"""


def _start(known: dict[str, Any]) -> str:
    if known["imported_from"]:
        return f"imported from {known['imported_from']}, of which no more is recorded"
    if given := known["fine_tuned_from"]:
        licence = given.get("licence", "not recorded")
        return f"fine-tuned from {given['source']} (SHA-256 {given['sha256']}; {licence})"
    if encoder := known["pretrained"]:
        return f"the encoder from {encoder['source']} ({encoder['licence']})"
    return "random weights"


def _indexed(result: dict[str, Any]) -> dict[str, Any]:
    return {
        "task": {"type": "image-segmentation"},
        "dataset": {"type": result["data"].split()[0], "name": result["data"]},
        "metrics": [
            {"type": kind, "name": f"{kind}, mean over images", "value": round(value, 4)}
            for kind, value in result["scores"].items()
        ],
    }


def _row(result: dict[str, Any]) -> str:
    def cell(kind: str) -> str:
        ends = result["intervals"].get(kind)
        between = f" ({ends[0]:.3f} to {ends[1]:.3f})" if ends else ""
        return f"{result['scores'][kind]:.4f}{between}"

    first = f"{result['data']} (`{result['file']}`)"
    return (
        f"| {first} | {result['count']} | {result['step']} | {cell('dice')} | {cell('iou')} |"
    )
