"""Class maps and class names: read once, strictly."""

import os
import pickle
from types import SimpleNamespace

import pytest

from tweo_timm.run.class_map import find_class_map, read_class_map
from tweo_timm.run.classes import check_num_classes, check_same_classes, class_names


class Evil:
    def __reduce__(self):
        return os.mkdir, ("made by a pickle",)


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("m.txt", b"a\n\nb\n", "line 2 is empty"),
        ("m.txt", b"a\nb\na\n", "'a' stands there twice"),
        ("m.txt", b"\xff\xfe", "m.txt: "),
        ("m.txt", b"\n", "names no class"),
        ("m.csv", b"a\n", "must be a .txt file"),
        ("m.pkl", pickle.dumps({"a": 0, "b": "1"}), "'b' has the index '1'"),
        ("m.pkl", pickle.dumps({"a": 0, "b": 1.5}), "'b' has the index 1.5"),
        ("m.pkl", pickle.dumps({"a": -1}), "'a' has the index -1"),
        ("m.pkl", pickle.dumps({"a": True}), "'a' has the index True"),
        ("m.pkl", pickle.dumps(["a"]), "it holds a list"),
        ("m.pkl", b"\x80garbage", "m.pkl: "),
        ("m.pkl", pickle.dumps({"a": Evil()}), "is not loaded because it can run code"),
    ],
)
def test_a_file_that_numbers_no_classes_is_refused_by_name(name, content, part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="--class-map") as caught:
        read_class_map(name)
    assert part in str(caught.value)
    assert os.listdir(tmp_path) == [name]


def test_a_class_map_is_found_beside_the_data_and_may_end_in_empty_lines(tmp_path):
    (tmp_path / "m.txt").write_text("ök\n b \n\n", encoding="utf-8")
    assert read_class_map("m.txt", str(tmp_path)) == {"ök": 0, "b": 1}
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "v.txt").write_text("a\n")
    assert read_class_map("v.txt", str(tmp_path), "validation") == {"a": 0}
    assert find_class_map("v.txt", str(tmp_path), "train") is None
    (tmp_path / "m.pkl").write_bytes(pickle.dumps({3: 1, "x": 0}))
    assert read_class_map(str(tmp_path / "m.pkl")) == {3: 1, "x": 0}
    with pytest.raises(ValueError, match=r"did you mean 'm\.txt'"):
        read_class_map(str(tmp_path / "n.txt"))


def test_a_byte_order_mark_is_no_part_of_the_first_class(tmp_path):
    (tmp_path / "m.txt").write_text("a\r\nb\r\n", encoding="utf-8-sig", newline="")
    assert read_class_map(str(tmp_path / "m.txt")) == {"a": 0, "b": 1}


def of(**classes):
    return SimpleNamespace(class_to_idx=classes)


def test_classes_are_compared_by_name_and_by_number():
    check_same_classes({"train": of(a=0, b=1), "val": of(b=1, a=0), "other": SimpleNamespace()})
    with pytest.raises(ValueError, match="val has no image of b"):
        check_same_classes({"train": of(a=0, b=1), "val": of(a=0)})
    with pytest.raises(ValueError, match="train and val number the same classes differently"):
        check_same_classes({"train": of(a=0, b=1), "val": of(a=1, b=0)})


def test_names_are_found_whatever_reads_the_images():
    archive = SimpleNamespace(reader=SimpleNamespace(class_name_to_idx={"a": 0}))
    assert class_names(archive) == class_names(SimpleNamespace(inner=of(a=0))) == {"a": 0}
    assert class_names(SimpleNamespace(reader=SimpleNamespace(class_to_idx={}))) is None


def test_several_names_of_a_class_are_one_class():
    check_num_classes(of(cat=0, tabby=0, dog=1), 2)
    with pytest.raises(ValueError, match="--num-classes 2"):
        check_num_classes(of(cat=0, tabby=0, dog=1), 3)
