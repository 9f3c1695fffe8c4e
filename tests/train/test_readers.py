"""Input as ImageNet comes: tar archives, WebDataset shards, Hugging Face datasets."""

import io
import json
import tarfile

import datasets
import numpy as np
import pytest
from PIL import Image

from tests.train.runs import RUN, VIT, last, same_tensors, train_together, write_images
from tweo_timm.train.cli import main


def run(tmp_path, *words, name="run"):
    assert main([*VIT, *RUN, "--output", str(tmp_path), "--experiment", name, "--epochs", "2", *words]) == 0
    return tmp_path / name


def add(tar, name, data):
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def write_shards(root, split, shards, each):
    """Write WebDataset shards of noise and return their description for _info.json."""
    rng = np.random.default_rng(len(split))
    names = []
    for shard in range(shards):
        names.append(f"toy-{split}-{shard:04d}.tar")
        with tarfile.open(root / names[-1], "w") as tar:
            for index in range(each):
                pixels = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(pixels, "PNG")
                add(tar, f"{shard:02d}{index:04d}.png", pixels.getvalue())
                add(tar, f"{shard:02d}{index:04d}.cls", str(index % 3).encode())
    return {"name": split, "filenames": names, "shard_lengths": [each] * shards, "num_samples": shards * each}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    splits = {"train": write_shards(root, "train", 4, 14), "validation": write_shards(root, "validation", 2, 6)}
    (root / "_info.json").write_text(json.dumps({"splits": splits}))
    return root


WDS = ("--dataset", "wds/toy", "--reprob", "0.3", "--mixup", "0.5", "--recovery-interval", "1")


@pytest.mark.parametrize("workers", ["0", "2"])
def test_webdataset_shards_train_and_continue_bit_for_bit(workers, shards, tmp_path, interrupt):
    words = (*WDS, "--data-dir", str(shards), "-j", workers)
    whole = run(tmp_path, *words, name="whole")
    assert last(whole)["exact"]["updates"] == 2 * (7 if workers == "0" else 8)  # whole batches of each worker
    where = ["--output", str(tmp_path), "--experiment", "cut", "--epochs", "2", "--resume", "auto"]
    interrupt(11)
    assert main([*VIT, *RUN, *where, *words]) == 143
    assert main([*VIT, *RUN, *where, *words]) == 0
    assert same_tensors(last(tmp_path / "cut")["state_dict"], last(whole)["state_dict"])


def test_a_stream_continues_inside_an_epoch_with_as_many_workers_only(shards, tmp_path, interrupt, capsys):
    words = [*VIT, *RUN, *WDS, "--data-dir", str(shards), "--output", str(tmp_path), "--experiment", "run"]
    interrupt(3)
    assert main([*words, "-j", "1"]) == 143
    assert main([*words, "-j", "0", "--resume", "auto"]) == 1
    assert "--workers 1, now 0" in capsys.readouterr().err


def test_fewer_shards_than_workers_of_several_processes_are_refused_with_the_number_that_works(shards, tmp_path, capfd):
    words = [*VIT, *RUN, "--dataset", "wds/toy", "--data-dir", str(shards), "--output", str(tmp_path), "-b", "4"]
    words += ["--experiment", "run", "--epochs", "1"]
    assert train_together([*words, "-j", "3"]) == [1, 1]
    assert "4 shards, which 2 processes x 3 workers cannot share: pass --workers 2 at most" in capfd.readouterr().err
    assert train_together([*words, "-j", "2"]) == [0, 0]


def test_shards_without_a_description_name_their_number_of_samples(shards, tmp_path):
    run(
        tmp_path,
        *("--dataset", "wds/toy", "--data-dir", str(shards)),
        *("--train-split", "toy-train-{0000..0003}.tar|56", "--val-split", "toy-validation-{0000..0001}.tar|12"),
    )


@pytest.mark.filterwarnings("ignore:This DataLoader will create 6 worker processes:UserWarning")
def test_a_stream_that_ends_early_leaves_recovery_files_to_continue_from(shards, tmp_path, caplog):
    """More workers than shards: some have nothing to give, and the others cannot give what was announced."""
    words = ("--dataset", "wds/toy", "--data-dir", str(shards), "-j", "6", "-b", "4", "--grad-accum-steps", "3")
    folder = run(tmp_path, *words, "--recovery-interval", "1")
    assert last(folder)["exact"]["updates"] < 2 * 5
    assert "The training data ended after" in caplog.text
    assert all(int(update) > 0 for *_, update in (path.stem.split(".")[0].split("-") for path in folder.glob("rec*")))
    run(tmp_path, *words, "--recovery-interval", "1", "--epochs", "3", "--resume", "auto")
    assert last(folder)["epoch"] == 2


def test_a_split_that_the_shards_do_not_have_is_one_message(shards, tmp_path, capsys):
    words = ["--dataset", "wds/toy", "--data-dir", str(shards), "--train-split", "nowhere"]
    assert main([*VIT, *RUN, "--output", str(tmp_path), *words]) == 1
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("workers", ["0", "2"])
def test_tar_archives_train_as_the_folders_that_they_hold(workers, tmp_path):
    data = write_images(tmp_path / "data", train=24, val=6)
    (tmp_path / "tars").mkdir()
    for split in ("train", "val"):
        with tarfile.open(tmp_path / "tars" / f"{split}.tar", "w") as tar:
            for path in sorted((data / split).rglob("*.png")):
                tar.add(path, arcname=str(path.relative_to(data / split)))
    archives = ("--data-dir", str(tmp_path / "tars"), "--train-split", "train.tar", "--val-split", "val.tar")
    from_tars = run(tmp_path, *archives, "-j", workers, name="tars")
    from_folders = run(tmp_path, "--data-dir", str(data), "-j", workers, name="folders")
    assert same_tensors(last(from_tars)["state_dict"], last(from_folders)["state_dict"])


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory):
    """A folder as the Hugging Face hub keeps datasets: a Parquet file a split, images and labels inside."""
    root = tmp_path_factory.mktemp("hub")
    noise = np.random.default_rng(0)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=3)})
    (root / "data").mkdir()
    for split, count in (("train", 56), ("validation", 12)):
        pixels = noise.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        columns = {"image": [Image.fromarray(one) for one in pixels], "label": [index % 3 for index in range(count)]}
        table = datasets.Dataset.from_dict(columns, features=features)
        table.to_parquet(str(root / "data" / f"{split}-00000-of-00001.parquet"))
    return root


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("reader", ["hfds", "hfids"])
def test_a_hugging_face_dataset_trains_and_continues_bit_for_bit(reader, workers, hub_folder, tmp_path, interrupt):
    words = ["--dataset", f"{reader}/{hub_folder}", "--data-dir", str(tmp_path / "cache"), "--val-split", "validation"]
    words += ["-j", workers, "--reprob", "0.3"]
    words += ["--train-num-samples", "56", "--val-num-samples", "12"] if reader == "hfids" else []
    whole = run(tmp_path, *words, name="whole")
    where = ["--output", str(tmp_path), "--experiment", "cut", "--epochs", "2", "--resume", "auto"]
    interrupt(11)
    assert main([*VIT, *RUN, *where, *words]) == 143
    assert main([*VIT, *RUN, *where, *words]) == 0
    assert same_tensors(last(tmp_path / "cut")["state_dict"], last(whole)["state_dict"])


def test_a_stream_of_unknown_length_asks_for_it(hub_folder, tmp_path, capsys):
    words = ["--dataset", f"hfids/{hub_folder}", "--data-dir", str(tmp_path / "cache")]
    assert main([*VIT, *RUN, "--output", str(tmp_path), *words]) == 1
    assert "--train-num-samples" in capsys.readouterr().err
