"""Input as ImageNet comes: tar archives, WebDataset shards, Hugging Face datasets."""

import json
import pickle
import shutil
import tarfile

import datasets
import numpy as np
import pytest
from PIL import Image

from tests.images import add, noise, png, write_images
from tests.train.runs import RUN, VIT, last, same_tensors, session_of, train_together
from tweo_timm.evaluate.cli import main as validate
from tweo_timm.train.cli import main


def run(tmp_path, *words, name="run"):
    assert main([*VIT, *RUN, "--output", str(tmp_path), "--experiment", name, "--epochs", "2", *words]) == 0
    return tmp_path / name


def write_shards(root, split, shards, each):
    """Write WebDataset shards of noise and return their description for _info.json."""
    rng = np.random.default_rng(len(split))
    names = []
    for shard in range(shards):
        names.append(f"toy-{split}-{shard:04d}.tar")
        with tarfile.open(root / names[-1], "w") as tar:
            for index in range(each):
                add(tar, f"{shard:02d}{index:04d}.png", png(noise(rng)))
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


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    """A checkpoint, and the words that validate it on shards."""
    folder = run(tmp_path_factory.mktemp("trained"), "--dataset", "wds/toy", "--data-dir", str(shards), "--epochs", "1")
    return ["--checkpoint", str(folder / "last.pth.tar"), "--device", "cpu", "-b", "8", "--dataset", "wds/toy"]


def rewrite(path, change):
    """Pass every file of an archive through `change(name, data)`; None leaves it out."""
    with tarfile.open(path) as tar:
        files = [(member.name, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(path, "w") as tar:
        for name, data in ((name, change(name, data)) for name, data in files):
            if data is not None:
                add(tar, name, data)


def replace(wanted, data):
    return lambda path: rewrite(path, lambda name, old: data if name == wanted else old)


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 // 512 * 512])


DAMAGE = {
    "missing": (lambda path: path.unlink(), "toy-validation-0001.tar is missing"),
    "cut off": (halve, "toy-validation-0001.tar"),
    "two images fewer": (
        lambda path: rewrite(path, lambda name, data: None if "5." in name else data),
        "holds 5 samples",
    ),
    "a damaged image": (replace("010003.png", b"no image"), "toy-validation-0001.tar, 010003"),
    "an image without its label": (replace("010003.cls", None), "010003: there is no 'cls'"),
    "a label of another model": (replace("010003.cls", b"7"), "has the label 7, and labels are 0 to 2"),
}


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_stream_with_a_fault_is_named_and_not_scored_on_the_rest(damage, workers, shards, trained, tmp_path, capsys):
    spoil, part = DAMAGE[damage]
    shutil.copytree(shards, tmp_path / "data")
    spoil(tmp_path / "data" / "toy-validation-0001.tar")
    capsys.readouterr()
    assert validate([*trained, "--data-dir", str(tmp_path / "data"), "-j", workers]) == 1
    out, err = capsys.readouterr()
    assert part in err
    assert "top1" not in out


def test_a_training_shard_that_is_cut_off_ends_the_run_by_name(shards, tmp_path, capsys):
    shutil.copytree(shards, tmp_path / "data")
    halve(tmp_path / "data" / "toy-train-0002.tar")
    words = ["--dataset", "wds/toy", "--data-dir", str(tmp_path / "data"), "--output", str(tmp_path)]
    assert main([*VIT, *RUN, *words]) == 1
    assert "toy-train-0002.tar" in capsys.readouterr().err


def test_fewer_images_than_announced_are_no_result(shards, trained, capsys):
    whole = [*trained, "--data-dir", str(shards), "-j", "0"]
    assert validate(whole) == 0
    capsys.readouterr()
    assert validate([*whole, "--num-samples", "5"]) == 1
    out, err = capsys.readouterr()
    assert "holds 12 images and 5 were announced" in err
    assert "--num-samples" in err
    assert "top1" not in out


def test_a_class_map_of_shards_maps_numbers(shards, trained, tmp_path, capsys):
    words = [*trained, "--data-dir", str(shards), "-j", "0", "--class-map"]
    (tmp_path / "m.txt").write_text("a\nb\nc\n")
    assert validate([*words, str(tmp_path / "m.txt")]) == 1
    assert ".pkl file of {number: index}" in capsys.readouterr().err
    (tmp_path / "m.pkl").write_bytes(pickle.dumps({0: 2, 1: 1, 2: 0}))
    assert validate([*words, str(tmp_path / "m.pkl")]) == 0


def test_a_description_without_a_name_is_one_message(shards, tmp_path, capsys):
    shutil.copytree(shards, tmp_path / "data")
    described = json.loads((shards / "_info.json").read_text())
    del described["splits"]["train"]["name"]
    (tmp_path / "data" / "_info.json").write_text(json.dumps(described))
    words = ["--dataset", "wds/toy", "--data-dir", str(tmp_path / "data"), "--output", str(tmp_path)]
    assert main([*VIT, *RUN, *words]) == 1
    assert "_info.json of wds/) lacks 'name'" in capsys.readouterr().err


def test_torchvisions_folders_are_checked_as_timms(tmp_path, capsys):
    data = write_images(tmp_path / "data", train=9, val=6)  # 10.png would come before 2.png there
    words = ("--data-dir", str(data), "--dataset", "torch/image_folder")
    by_torchvision, by_timm = run(tmp_path, *words, name="torch"), run(tmp_path, *words[:2], name="timm")
    assert same_tensors(last(by_torchvision)["state_dict"], last(by_timm)["state_dict"])
    capsys.readouterr()
    shutil.rmtree(data / "val" / "class1")
    assert main([*VIT, *RUN, *words, "--output", str(tmp_path)]) == 1
    assert "validation has no image of class1" in capsys.readouterr().err
    shutil.rmtree(data / "val")
    assert main([*VIT, *RUN, *words, "--output", str(tmp_path)]) == 1
    assert "no split 'validation'" in capsys.readouterr().err


def test_an_archive_is_checked_as_a_folder_and_is_not_both_splits(tmp_path, capsys):
    data = write_images(tmp_path / "data", train=24, val=6)
    shutil.rmtree(data / "val" / "class1")
    for split in ("train", "val"):
        with tarfile.open(data / f"{split}.tar", "w") as tar:
            tar.add(data / split, arcname="")
        shutil.rmtree(data / split)
    words = [*VIT, *RUN, "--output", str(tmp_path), "--data-dir"]
    assert main([*words, str(data / "train.tar")]) == 1
    assert "one archive, all of which would be used for both splits" in capsys.readouterr().err
    assert main([*words, str(data), "--train-split", "train.tar", "--val-split", "val.tar"]) == 1
    assert "val.tar has no image of class1" in capsys.readouterr().err


def test_two_names_of_one_folder_are_not_two_splits(tmp_path, capsys):
    data = write_images(tmp_path / "data", train=6, val=6)
    words = [*VIT, *RUN, "--output", str(tmp_path), "--data-dir", str(data), "--train-split", "val"]
    assert main(words) == 1
    assert "--train-split val and --val-split validation are both" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dataset", "split", "part"),
    [
        ("torch/cifar10", "trian", "no split 'trian': use train or test; did you mean 'train'"),
        ("tfds/mnist", "train", "tensorflow"),
        ("torch/cifar11", "train", "cifar11"),
    ],
)
def test_a_dataset_that_cannot_be_opened_is_one_message(dataset, split, part, tmp_path, capsys):
    pytest.importorskip("torchvision")
    words = ["--dataset", dataset, "--train-split", split, "--data-dir", str(tmp_path), "--output", str(tmp_path)]
    assert main([*VIT, *RUN, *words]) == 1
    assert part in capsys.readouterr().err


def test_labels_of_a_hugging_face_dataset_are_compared_with_the_model(hub_folder, tmp_path, capsys):
    words = ["--dataset", f"hfds/{hub_folder}", "--data-dir", str(tmp_path / "cache"), "--output", str(tmp_path)]
    assert main([*VIT, "--num-classes", "2", *RUN, *words]) == 1
    assert "--num-classes 3" in capsys.readouterr().err
    halves = ("--train-split", "train[:75%]", "--val-split", "train[75%:]")
    session = session_of(tmp_path, tmp_path, *words, *halves)
    assert [len(loader.dataset) for loader in (session.data.replay.loader, session.data.val)] == [42, 14]
