"""A file of class indices is read without running code from it."""

import os
import pickle

import pytest

from tweo_timm.run.class_map import read_class_map


class Command:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_pickled_dictionary_is_read_and_code_in_it_is_not_run(tmp_path):
    path = tmp_path / "map.pkl"
    path.write_bytes(pickle.dumps({"ant": 0, "bee": 1, 7: 2}))
    assert read_class_map(str(path)) == {"ant": 0, "bee": 1, 7: 2}
    path.write_bytes(pickle.dumps({"ant": Command(tmp_path / "harm")}))
    with pytest.raises(ValueError, match=r"--class-map .*map.pkl: it holds posix.mkdir, which is not loaded"):
        read_class_map(str(path))
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps([1]), pickle.dumps({"a": "b"}), b"\x80\x05" * 50])
def test_what_is_no_dictionary_of_indices_is_named(content, tmp_path):
    path = tmp_path / "map.pkl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"--class-map .*map.pkl: .*dict of name to index"):
        read_class_map(str(path))
