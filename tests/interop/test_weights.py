"""PyTorch weight files to run directories and back."""

import json
import math
import os
import pickle
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from bad_input.ground import run
from PIL import Image
from pytorch_designs import MilesialUNet, ReferenceUNet, arrays, enliven

from jaxunet.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxunet.data import prepare
from jaxunet.errors import ConfigError, DataError, JaxUNetError, RunError
from jaxunet.interop import pytorch, runs
from jaxunet.interop.layouts import layout_of
from jaxunet.interop.pytorch import variables_from_state_dict
from jaxunet.interop.runs import IMPORT_FILE, export_weights, import_weights
from jaxunet.model.unet import make_unet
from jaxunet.runs.loading import load
from jaxunet.runs.training import train

DESIGNS = {
    "reference": lambda: ReferenceUNet(4),
    "reference of depth 3, two logits": lambda: ReferenceUNet(6, depth=3, num_logits=2),
    "milesial": lambda: MilesialUNet(4),
    "milesial bilinear, one logit": lambda: MilesialUNet(4, num_logits=1, bilinear=True),
    "milesial with biases": lambda: MilesialUNet(2, depth=3, bias=True),
}


def save(model: torch.nn.Module, path: Path) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(model.state_dict(), path)
    else:
        # As milesial's train.py does, and in order's sake for every design.
        torch.save({**model.state_dict(), "mask_values": [0, 255]}, path)
    return path


def read(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("design", DESIGNS)
def test_import_then_export_gives_the_same_tensors_bit_for_bit(design, suffix, tmp_path):
    model = enliven(DESIGNS[design]())
    weights = save(model, tmp_path / f"weights{suffix}")
    import_weights(weights, tmp_path / "run", Config())
    export_weights(tmp_path / "run", tmp_path / f"back{suffix}")
    found, expected = read(tmp_path / f"back{suffix}"), model.state_dict()
    if suffix == ".pth":  # the other format sorts
        assert list(found) == list(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert found[key].shape == tensor.shape, key
        assert found[key].numpy().tobytes() == tensor.numpy().tobytes(), key
    DESIGNS[design]().load_state_dict(found, strict=True)


@pytest.mark.parametrize("design", DESIGNS)
def test_the_layout_and_the_sizes_are_recognised_and_the_logits_are_pytorchs(design, tmp_path):
    model = enliven(DESIGNS[design]())
    run = tmp_path / "run"
    config, layout = import_weights(save(model, tmp_path / "w.pth"), run, Config())
    assert layout == layout_of(config.model) == design.split()[0]
    assert config.model.depth == model.depth
    trained = load(run)
    images = np.random.default_rng(0).uniform(-1, 1, (1, 40, 32, 3)).astype(np.float32)
    found = jax.jit(make_unet(trained.config.model).apply)(trained.variables, images)
    with torch.no_grad():
        expected = model(torch.from_numpy(images).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    scale = expected.abs().max().item()
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4 * scale)


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", None])
def test_wrapped_parallel_and_half_precision_weights_are_taken(wrapper, tmp_path):
    model = enliven(ReferenceUNet(4, depth=3))
    state = {f"module.{k}": v.half() for k, v in model.state_dict().items()}
    path = tmp_path / "w.pt"
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, path)
    import_weights(path, tmp_path / "run", Config())
    export_weights(tmp_path / "run", tmp_path / "back.pth")
    for key, tensor in read(tmp_path / "back.pth").items():
        assert torch.equal(tensor, state[f"module.{key}"].float()), key


def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    state = {**ReferenceUNet(4).state_dict(), "mask_values": Hostile()}
    torch.save(state, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Hostile(), protocol=2))
    for name in ("zip.pth", "plain.pth"):
        with pytest.raises(DataError, match="would run code"):
            import_weights(tmp_path / name, tmp_path / "run", Config())
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "run").exists()


def without(key: str):
    return lambda state: {k: v for k, v in state.items() if k != key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("upConv2.2.bias"), r"upConv2\.2\.bias is missing, expected \[16\]"),
        (without("downConv1.0.weight"), r"downConv1\.0\.weight is missing.*\[4, 3, 3, 3\]"),
        (lambda s: {**s, "head.weight": torch.ones(3)}, r"head\.weight is left over"),
        (
            lambda s: {**s, "upTrans1.weight": torch.ones(64, 32, 3, 3)},
            r"upTrans1\.weight is \[64, 32, 3, 3\], expected \[64, 32, 2, 2\]",
        ),
        (
            lambda s: {**s, "out.bias": torch.ones(1, dtype=torch.int64)},
            r"out\.bias is int64, expected floating point",
        ),
        (lambda s: {"layer.weight": torch.ones(3)}, "downConv1.0.weight.*inc.double_conv"),
        (lambda s: {}, "not the weights of a U-Net"),
        (lambda s: {**s, "note": "mine"}, "no tensors: note"),
        (lambda s: [1, 2], "holds a list, not a state_dict"),
    ],
)
def test_what_does_not_fit_is_named_with_what_was_expected(change, message, tmp_path):
    torch.save(change(ReferenceUNet(4).state_dict()), tmp_path / "w.pth")
    with pytest.raises(DataError, match=message):
        import_weights(tmp_path / "w.pth", tmp_path / "run", Config())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_truncated_weight_file_is_refused(suffix, tmp_path):
    path = save(ReferenceUNet(4), tmp_path / f"w{suffix}")
    contents = path.read_bytes()
    for length in (0, 4, 100, len(contents) // 2, len(contents) - 1):
        path.write_bytes(contents[:length])
        with pytest.raises(DataError, match="w"):
            import_weights(path, tmp_path / "run", Config())


def test_a_weight_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.pth cannot be read"):
        import_weights(tmp_path / "nowhere.pth", tmp_path / "run", Config())


def test_a_run_is_not_overwritten(tmp_path):
    weights = save(ReferenceUNet(4), tmp_path / "w.pth")
    import_weights(weights, tmp_path / "run", Config())
    with pytest.raises(RunError, match="already holds"):
        import_weights(weights, tmp_path / "run", Config())


def test_an_imported_run_is_trained_on_and_exported(tmp_path):
    config = Config(
        optimizer=OptimizerConfig(schedule="cosine", warmup_steps=3),
        data=DataConfig(
            image_size=16, prepared_dir=tmp_path, synthetic_train=16, synthetic_validation=4
        ),
        train=TrainConfig(epochs=2, batch_size=8, eval_batch_size=8),
    )
    model = enliven(MilesialUNet(4, depth=3))
    run = tmp_path / "run"
    config, _ = import_weights(save(model, tmp_path / "w.pth"), run, config)
    train(config, prepare(config.data, progress=False), run, resume=True, show_progress=False)
    card = (run / "MODEL_CARD.md").read_text()
    assert "- Data: synthetic train, 16 images (pictures drawn" in card
    assert "- Start: imported from w.pth" in card
    assert 'license: "other"' in card
    trained = load(run)
    assert trained.step == 4
    export_weights(run, tmp_path / "back.safetensors")
    state = read(tmp_path / "back.safetensors")
    assert int(state["inc.double_conv.1.num_batches_tracked"]) == 17 + 4
    back = MilesialUNet(4, depth=3).eval()
    back.load_state_dict(state, strict=True)
    _, _, variables = variables_from_state_dict(arrays(back))
    jax.tree.map(np.testing.assert_array_equal, variables, dict(trained.variables))
    before = variables_from_state_dict(arrays(model))[2]["params"]["head"]["kernel"]
    assert not np.array_equal(before, variables["params"]["head"]["kernel"])


def nothing_is_made_of(weights: Path, out: Path, message: str, error=DataError) -> None:
    with pytest.raises(error, match=message):
        import_weights(weights, out, Config())
    assert not out.exists()


def test_weights_that_are_not_finite_are_neither_imported_nor_used_nor_exported(
    tmp_path, monkeypatch
):
    model = enliven(MilesialUNet(2, depth=3))
    model.state_dict()["up1.conv.double_conv.1.running_mean"][1] = math.inf
    weights = save(model, tmp_path / "w.safetensors")
    message = (
        r"up1\.conv\.double_conv\.1\.running_mean holds 1 values that are not finite, of 4"
    )
    nothing_is_made_of(weights, tmp_path / "run", message)
    monkeypatch.setattr(pytorch, "_wrong_values", lambda *_: "")  # as a version before did
    import_weights(weights, tmp_path / "run", Config())
    for use in (load, lambda run: export_weights(run, tmp_path / "back.pth")):
        with pytest.raises(
            RunError, match=r"batch_stats\.decoder\.level_1\..*mean holds 1 val"
        ):
            use(tmp_path / "run")
    assert not (tmp_path / "back.pth").exists()


def test_a_run_that_no_memory_holds_is_refused(tmp_path, monkeypatch):
    weights = save(ReferenceUNet(1, depth=2), tmp_path / "w.pth")
    bytes_of_adam = 3 * 4 * sum(p.numel() for p in ReferenceUNet(1, depth=2).parameters())
    monkeypatch.setattr(runs, "_memory", lambda: bytes_of_adam)  # and eight for two counters
    nothing_is_made_of(
        weights, tmp_path / "run", r"state takes .* GB.*choose optimizer\.name 'sgd'"
    )
    sgd = Config(optimizer=OptimizerConfig(name="sgd"))
    import_weights(weights, tmp_path / "run", sgd)


def test_where_nothing_can_be_written_nothing_is_read(tmp_path):
    (tmp_path / "file").write_text("")
    missing = tmp_path / "missing.pth"
    out = tmp_path / "file" / "run"
    nothing_is_made_of(missing, out, "--out .* cannot be written to: .*no directory", RunError)
    import_weights(
        save(ReferenceUNet(2, depth=2), tmp_path / "w.pth"), tmp_path / "r", Config()
    )
    with pytest.raises(RunError, match="already holds"):
        import_weights(missing, tmp_path / "r", Config())
    with pytest.raises(DataError, match="cannot be written"):
        export_weights(tmp_path / "no run", out / "w.pth")
    with pytest.raises(ConfigError, match="must end with"):
        export_weights(tmp_path / "no run", tmp_path / "w.onnx")


def test_the_record_of_an_import_says_what_was_taken_and_gives_back_the_counts(tmp_path):
    model, run = enliven(MilesialUNet(2, depth=2)), tmp_path / "run"
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"net": {**state, "n_averaged": torch.tensor(1)}}, tmp_path / "w.pth")
    import_weights(tmp_path / "w.pth", run, Config())
    record = json.loads((run / IMPORT_FILE).read_text())
    taken = [record[key] for key in ("dictionary", "prefix", "left_out")]
    assert taken == ["net", "model.", ["n_averaged"]]
    for key in ("dictionary", "prefix", "left_out"):  # which earlier versions did not write
        del record[key]
    (run / IMPORT_FILE).write_text(json.dumps(record))
    export_weights(run, tmp_path / "back.pth")
    assert torch.equal(
        read(tmp_path / "back.pth")["inc.double_conv.1.num_batches_tracked"], torch.tensor(17)
    )
    for damaged in ("{", "[]", "{}", '{"num_batches_tracked": {"a": null}}'):
        (run / IMPORT_FILE).write_text(damaged)
        with pytest.raises(RunError, match=r"pytorch\.json is not the record of an import"):
            export_weights(run, tmp_path / "again.pth")


def test_a_model_without_a_pytorch_layout_and_a_wrong_ending_are_refused(tmp_path):
    import_weights(save(ReferenceUNet(4), tmp_path / "w.pth"), tmp_path / "run", Config())
    with pytest.raises(ConfigError, match=r"\.onnx.*must end with"):
        export_weights(tmp_path / "run", tmp_path / "w.onnx")
    assert not (tmp_path / "w.onnx").exists()
    with pytest.raises(ConfigError, match=r"reference needs.*milesial needs"):
        layout_of(ModelConfig(norm="batch"))
    with pytest.raises(JaxUNetError, match="not a run directory"):
        export_weights(tmp_path / "nothing", tmp_path / "x.pth")


def run_script(*words: object, expect: int = 0) -> str:
    status, output = run(list(words))
    assert status == expect, output
    return output


def test_the_scripts_import_evaluate_predict_and_export(tmp_path):
    weights = save(enliven(MilesialUNet(4, depth=3)), tmp_path / "w.pth")
    run, data = tmp_path / "run", tmp_path / "data"
    options = ("--data.name", "synthetic", "--data.image-size", 32, "--data.synthetic-train", 8)
    options += ("--data.synthetic-validation", 4, "--data.prepared-dir", data)
    wrapped = {f"module.{name}": tensor for name, tensor in read(weights).items()}
    del wrapped["module.mask_values"]
    torch.save({"net": {**wrapped, "n_averaged": torch.tensor(1)}}, tmp_path / "wrapped.pth")
    options += ("--optimizer.schedule", "cosine", "--optimizer.warmup-steps", 5)
    options += ("--train.eval-batch-size", 8)
    output = run_script("import_pytorch.py", tmp_path / "wrapped.pth", "--out", run, *options)
    assert "Taken:      what is under net.module.; left out: n_averaged" in output
    assert "milesial layout: width 4, 3 levels, transposed upsampling, 2 logit(s)" in output
    assert "synthetic validation (4 images)" in run_script("evaluate.py", run)
    picture = tmp_path / "lesion.png"
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(picture)
    run_script("predict.py", run, picture, "--out", tmp_path / "masks")
    (mask,) = (tmp_path / "masks").glob("lesion*.png")
    model = MilesialUNet(4, depth=3).eval()
    model.load_state_dict({k: v for k, v in read(weights).items() if k != "mask_values"})
    with torch.no_grad():
        logits = model((torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5)[0]
    expected = (logits[1] > logits[0]).numpy()
    assert 0.02 < expected.mean() < 0.98
    assert np.mean((np.asarray(Image.open(mask)) > 127) == expected) > 0.995
    run_script("export_pytorch.py", run, "--out", tmp_path / "back.pth")
    assert read(tmp_path / "back.pth").keys() == read(weights).keys() - {"mask_values"}
    output = run_script("import_pytorch.py", picture, "--out", tmp_path / "x", expect=1)
    assert "was not loaded" in output
