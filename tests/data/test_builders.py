import dataclasses
import functools
import hashlib
import http.server
import io
import itertools
import json
import pickle
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from small_data import encoded, half_mask, isic_files, picture, write_files, write_zip
from tensorflow_datasets.core.download.checksums import UrlInfo

from jaxunet.config import DataConfig
from jaxunet.data import Prepared, prepare
from jaxunet.data.isic2018 import Isic2018
from jaxunet.errors import DataError

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "isic2018"


@pytest.fixture
def isic(tmp_path: Path) -> DataConfig:
    """Zips of three training and two validation pairs, no test split."""
    root = tmp_path / "isic"
    root.mkdir()
    for part, ids in {"Training": [12, 3, 7], "Validation": [20, 21]}.items():
        images, masks = isic_files(ids)
        extra = {"LICENSE.txt": b"CC", "ATTRIBUTION.txt": b"ISIC"}
        superpixels = {"ISIC_0000003_superpixels.png": encoded(picture(0))}
        write_zip(root / f"ISIC2018_Task1-2_{part}_Input.zip", images | extra | superpixels)
        write_zip(root / f"ISIC2018_Task1_{part}_GroundTruth.zip", masks | extra)
    return DataConfig(
        name="isic2018", dir=root, prepared_dir=tmp_path / "prepared", stored_size=16
    )


@pytest.fixture
def own(tmp_path: Path) -> DataConfig:
    """Twenty pairs in images/ and masks/."""
    names = [f"case{i:02d}" for i in range(20)]
    root = tmp_path / "own"
    write_files(root / "images", {f"{n}.png": encoded(picture(i)) for i, n in enumerate(names)})
    write_files(root / "masks", {f"{n}_mask.png": encoded(half_mask()) for n in names})
    return DataConfig(
        name="folder", dir=root, prepared_dir=tmp_path / "prepared", stored_size=16
    )


def quiet(config: DataConfig, **changes: object) -> Prepared:
    return prepare(dataclasses.replace(config, **changes), progress=False)


def datasets(config: DataConfig) -> list[Path]:
    """Everything that looks like a dataset, whole or not, in the prepared folder."""
    assert config.prepared_dir is not None
    return sorted(config.prepared_dir.glob("*/*/*1.0.0"))


def test_zips_are_prepared_in_order_of_ids_and_resized_as_pillow_does(isic: DataConfig) -> None:
    prepared = quiet(isic)
    assert prepared.counts == {"train": 3, "validation": 2}
    assert prepared.official_count("train") == 2594
    ids = ["ISIC_0000003", "ISIC_0000007", "ISIC_0000012"]
    assert prepared.ids("train") == ids
    source = prepared.source("train")
    assert len(source) == 3
    assert [example["id"] for example in source] == ids
    image = Image.open(io.BytesIO(encoded(picture(7), "JPEG")))
    expected = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR))
    assert np.array_equal(source[1]["image"], expected)
    expected_mask = np.zeros((16, 16), np.uint8)
    expected_mask[:, :8] = 255
    assert np.array_equal(source[1]["mask"][:, :, 0], expected_mask)


def test_unpacked_folders_give_the_same_examples_as_zips(
    isic: DataConfig, tmp_path: Path
) -> None:
    unpacked = tmp_path / "unpacked"
    assert isic.dir is not None
    for path in isic.dir.glob("*.zip"):
        zipfile.ZipFile(path).extractall(unpacked)
    from_zips, from_folders = quiet(isic), quiet(isic, dir=unpacked)
    assert from_folders.counts == from_zips.counts
    for split in ("train", "validation"):
        for a, b in zip(from_zips.source(split), from_folders.source(split), strict=True):
            assert a["id"] == b["id"]
            assert np.array_equal(a["image"], b["image"])
            assert np.array_equal(a["mask"], b["mask"])


def test_native_keeps_the_original_file_and_size(isic: DataConfig) -> None:
    source = quiet(isic, stored_size="native").source("validation")
    original = encoded(picture(20), "JPEG")
    assert source.stored(0)["image"] == original
    assert np.array_equal(source[0]["image"], np.asarray(Image.open(io.BytesIO(original))))
    assert np.array_equal(source[0]["mask"][:, :, 0], half_mask())


def test_an_absent_split_says_which_files_it_needs(isic: DataConfig) -> None:
    prepared = quiet(isic)
    with pytest.raises(DataError, match="ISIC2018_Task1-2_Test_Input and ISIC2018_Task1_Test_"):
        prepared.source("test")
    with pytest.raises(DataError, match="ISIC2018_Task1-2_Test_Input"):
        prepared.count("test[:50%]")
    with pytest.raises(DataError, match="Known splits: train, validation, test"):
        prepared.source("training")


def test_no_complete_split_is_an_error_that_names_the_files(isic: DataConfig) -> None:
    assert isic.dir is not None
    for path in isic.dir.glob("*GroundTruth.zip"):
        path.unlink()
    with pytest.raises(DataError, match="ISIC2018_Task1_Training_GroundTruth"):
        quiet(isic)


def test_slices_follow_tfds(own: DataConfig) -> None:
    prepared = quiet(own)
    whole = prepared.ids("train")
    assert len(whole) == prepared.count("train") == 16
    assert prepared.ids("train[:25%]") == whole[:4]
    assert [e["id"] for e in prepared.source("train[4:6]+test")] == [
        *whole[4:6],
        *prepared.ids("test"),
    ]
    for malformed in ("train[:0]", "train[a:b]", "train[0:5"):
        with pytest.raises(DataError, match="Split"):
            prepared.source(malformed)


def test_a_source_can_be_pickled_and_ends(own: DataConfig) -> None:
    source = quiet(own).source("validation")
    copy = pickle.loads(pickle.dumps(source))
    assert repr(copy) == repr(source)
    assert np.array_equal(copy[1]["image"], source[1]["image"])
    assert source[-1]["id"] == source[len(source) - 1]["id"]
    with pytest.raises(IndexError):
        source[len(source)]


def test_a_folder_is_split_by_seed_and_the_ids_are_written_down(own: DataConfig) -> None:
    prepared = quiet(own)
    assert prepared.counts == {"train": 16, "validation": 2, "test": 2}
    assert prepared.official_count("train") is None
    written = json.loads((prepared.directory / "split_ids.json").read_text())
    for split, ids in written.items():
        assert ids == sorted(ids) == [example["id"] for example in prepared.source(split)]
    assert sorted(itertools.chain(*written.values())) == [f"case{i:02d}" for i in range(20)]
    other = quiet(own, folder_split_seed=1)
    assert other.directory != prepared.directory
    assert other.ids("test") != prepared.ids("test")


def test_a_folder_with_split_folders_keeps_them(own: DataConfig, tmp_path: Path) -> None:
    root = tmp_path / "splits"
    for split, names in {"train": ["a", "b"], "validation": ["c"]}.items():
        write_files(root / split / "images", {f"{n}.png": encoded(picture(1)) for n in names})
        write_files(root / split / "masks", {f"{n}.png": encoded(half_mask()) for n in names})
    prepared = quiet(own, dir=root)
    assert {split: prepared.ids(split) for split in prepared.counts} == {
        "train": ["a", "b"],
        "validation": ["c"],
    }
    with pytest.raises(DataError, match="test needs test/images and test/masks"):
        prepared.source("test")
    (root / "images").mkdir()
    with pytest.raises(DataError, match="both"):
        quiet(own, dir=root)


def test_all_problems_are_listed_together_and_nothing_is_left(isic: DataConfig) -> None:
    assert isic.dir is not None
    images, masks = isic_files([3, 7, 12])
    images["ISIC_0000003.jpg"] = images["ISIC_0000003.jpg"][:300]
    masks["ISIC_0000007_segmentation.png"] = encoded(half_mask() // 2)
    images["stray.docx"] = b""
    write_zip(isic.dir / "ISIC2018_Task1-2_Training_Input.zip", images)
    write_zip(isic.dir / "ISIC2018_Task1_Training_GroundTruth.zip", masks)
    images, masks = isic_files([20, 21])
    del masks["ISIC_0000020_segmentation.png"]
    masks["ISIC_0000021_segmentation.png"] = encoded(half_mask(8, 8))
    write_zip(isic.dir / "ISIC2018_Task1-2_Validation_Input.zip", images)
    write_zip(isic.dir / "ISIC2018_Task1_Validation_GroundTruth.zip", masks)
    with pytest.raises(DataError) as error:
        quiet(isic)
    heading, *lines = str(error.value).splitlines()
    assert heading.startswith("5 problems found")
    for name, reason in {
        "stray.docx": "is not an image",
        "ISIC_0000020.jpg": "has no mask",
        "ISIC_0000003.jpg": "cannot be decoded",
        "ISIC_0000007_segmentation.png": "holds the values 0, 127",
        "ISIC_0000021_segmentation.png": "is 8 x 8 pixels",
    }.items():
        assert sum(name in line and reason in line for line in lines) == 1, name
    assert datasets(isic) == []


def test_one_damaged_image_late_in_the_data_leaves_nothing(own: DataConfig) -> None:
    assert own.dir is not None
    good = quiet(own)
    test_id = good.ids("test")[-1]
    (own.dir / "images" / f"{test_id}.png").write_bytes(encoded(picture(0))[:1000])
    with pytest.raises(DataError, match="1 problem found"):
        quiet(own)
    assert datasets(own) == [good.directory]


def test_an_id_in_two_splits_is_a_problem(isic: DataConfig) -> None:
    assert isic.dir is not None
    images, masks = isic_files([3])
    write_zip(isic.dir / "ISIC2018_Task1-2_Validation_Input.zip", images)
    write_zip(isic.dir / "ISIC2018_Task1_Validation_GroundTruth.zip", masks)
    with pytest.raises(DataError, match="split 'train'; splits must not share"):
        quiet(isic)


def test_binarize_accepts_other_mask_values(own: DataConfig) -> None:
    assert own.dir is not None
    write_files(own.dir / "masks", {"case00_mask.png": encoded(half_mask() // 255 * 200)})
    with pytest.raises(DataError, match="holds the values 0, 200"):
        quiet(own)
    prepared = quiet(own, binarize=True)
    assert all(set(np.unique(e["mask"])) == {0, 255} for e in prepared.source("train"))


def test_a_prepared_dataset_is_opened_without_reading_the_images(own: DataConfig) -> None:
    first = quiet(own)
    with mock.patch("jaxunet.data.prepare.check_pair", side_effect=AssertionError):
        assert quiet(own) == first


def test_changed_source_data_are_prepared_anew(own: DataConfig) -> None:
    first = quiet(own)
    assert own.dir is not None
    write_files(own.dir / "masks", {"case00_mask.png": encoded(255 - half_mask())})
    second = quiet(own)
    assert second.fingerprint != first.fingerprint
    assert len(datasets(own)) == 2


def test_an_interrupted_or_killed_prepare_is_cleared_up(own: DataConfig) -> None:
    with (
        mock.patch("jaxunet.data.prepare.check_pair", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        quiet(own)
    assert datasets(own) == []
    prepared = quiet(own)
    # What a killed process leaves behind: TFDS's temporary folder.
    prepared.directory.rename(prepared.directory.with_name("incomplete.ABCDEF_1.0.0"))
    assert quiet(own) == prepared
    assert datasets(own) == [prepared.directory]


def test_two_processes_may_prepare_at_once(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from jaxunet.config import DataConfig;"
        "from jaxunet.data import prepare;"
        "config = DataConfig(prepared_dir=Path(sys.argv[1]), image_size=64);"
        "print(len(prepare(config, progress=False).source('train')));"
        "print(*{'tensorflow', 'torch', 'jax'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in both:
        output, errors = process.communicate(timeout=60)
        # Nothing else is printed, and no framework is imported on the way.
        assert (output, errors) == ("384\n\n", "")
    assert len(list(tmp_path.glob("*/*/*1.0.0"))) == 1


def test_a_damaged_dataset_is_noticed(own: DataConfig) -> None:
    prepared = quiet(own)
    shard = next(prepared.directory.glob("*train*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(DataError, match="is damaged"):
        quiet(own)


def test_many_shards_keep_the_order(own: DataConfig) -> None:
    with mock.patch("jaxunet.data.builder.SHARD_BYTES", 5 * 4 * 16 * 16):
        prepared = quiet(own)
    assert len(list(prepared.directory.glob("*train*"))) == 4
    ids = prepared.ids("train")
    assert ids == sorted(ids) == [example["id"] for example in prepared.source("train")]
    assert prepared.ids("train[4:11]") == ids[4:11]


def test_downloads_are_registered_with_size_and_checksum() -> None:
    infos = {url.rsplit("/", 1)[1]: info for url, info in Isic2018.url_infos.items()}
    assert len(infos) == 6
    training = infos["ISIC2018_Task1-2_Training_Input.zip"]
    assert training.size == 11_165_358_566
    assert training.checksum.startswith("80f98572347a2d7a")


class Server(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def served(isic: DataConfig) -> Iterator[DataConfig]:
    """The zips behind a web server, registered as the official ones are, test split too."""
    root = isic.dir
    assert root is not None
    images, masks = isic_files([30])
    write_zip(root / "ISIC2018_Task1-2_Test_Input.zip", images)
    write_zip(root / "ISIC2018_Task1_Test_GroundTruth.zip", masks)
    handler = functools.partial(Server, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        infos = {}
        for path in root.iterdir():
            contents = path.read_bytes()
            checksum = hashlib.sha256(contents).hexdigest()
            infos[address + path.name] = UrlInfo(len(contents), checksum, path.name)
        with (
            mock.patch("jaxunet.data.isic2018.URL", address),
            mock.patch.object(Isic2018, "url_infos", infos),
        ):
            yield dataclasses.replace(isic, dir=None)
        server.shutdown()


def test_without_a_folder_the_zips_are_downloaded_once(served: DataConfig) -> None:
    prepared = quiet(served)
    assert prepared.counts == {"train": 3, "validation": 2, "test": 1}
    assert prepared.ids("test") == ["ISIC_0000030"]
    with mock.patch("jaxunet.data.isic2018.URL", "http://127.0.0.1:9/"):
        assert quiet(served) == prepared


def test_a_download_with_another_checksum_is_refused(served: DataConfig) -> None:
    name = "ISIC2018_Task1_Test_GroundTruth.zip"
    [url] = [url for url in Isic2018.url_infos if url.endswith(name)]
    Isic2018.url_infos[url] = dataclasses.replace(Isic2018.url_infos[url], checksum="0" * 64)
    with pytest.raises(DataError, match=rf"(?s){name}.*wrong checksum.*--data\.dir"):
        quiet(served)
    assert datasets(served) == []


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/isic2018")
def test_real_pairs_are_prepared(tmp_path: Path) -> None:
    root = tmp_path / "real"
    images, masks = "ISIC2018_Task1-2_Validation_Input", "ISIC2018_Task1_Validation_GroundTruth"
    for name in (images, masks):
        (root / name).mkdir(parents=True)
        for path in sorted((SHARED / name).iterdir())[:4]:
            (root / name / path.name).symlink_to(path)
    config = DataConfig(name="isic2018", dir=root, prepared_dir=tmp_path, stored_size=64)
    prepared = prepare(config, progress=False)
    assert prepared.counts == {"validation": 4}
    for example in prepared.source("validation"):
        with Image.open(root / images / f"{example['id']}.jpg") as image:
            expected = np.asarray(image.resize((64, 64), Image.Resampling.BILINEAR))
        assert np.array_equal(example["image"], expected)
        with Image.open(root / masks / f"{example['id']}_segmentation.png") as mask:
            expected = np.asarray(mask.resize((64, 64), Image.Resampling.NEAREST))
        assert np.array_equal(example["mask"][:, :, 0], expected)
