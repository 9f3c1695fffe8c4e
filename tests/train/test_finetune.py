"""What a training begins with: which of a file's weights are taken, what is said, and what becomes of the head."""

import pytest
import torch
from timm.models import create_model

from tests.models import SWIN, SWIN_ARCH, as_words, tiny_swin, tiny_vit
from tests.train.runs import command, session_of, train
from tweo_timm.train.cli import main

NAMES = ["class0", "class1", "class2"]  # the folders of `images`


def vit(num_classes=3, **more):
    return tiny_vit(seed=7, num_classes=num_classes, **more)


def begin(images, tmp_path, content, *more):
    """The model of a training that begins with a file."""
    torch.save(content, tmp_path / "base.pth")
    return session_of(images, tmp_path, "--pretrained", "--pretrained-path", str(tmp_path / "base.pth"), *more).model


def wrapped(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


def body(state):
    return {name: tensor for name, tensor in state.items() if not name.startswith("head.")}


STATE = vit(12).state_dict()
FILES = {
    "plain": (STATE, ""),
    "ddp, compiled": ({"state_dict": wrapped(STATE, "module._orig_mod.")}, ""),
    "a backbone and another head": ({**wrapped(STATE, "backbone."), "fc.weight": torch.zeros(3, 32)}, "backbone."),
    "two wrappers": ({"model": wrapped(STATE, "encoder.model.")}, "encoder.model."),
    "a teacher and a student": (
        {
            "student": wrapped(vit(1).state_dict(), "module.backbone."),
            "teacher": wrapped(STATE, "backbone."),
            "epoch": 1,
        },
        "teacher.backbone.",
    ),
    "both in one mapping": (
        wrapped(vit(12, depth=1).state_dict(), "student.backbone.") | wrapped(STATE, "teacher.backbone."),
        "teacher.backbone.",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_weights_are_found_under_the_names_of_other_code_and_what_was_loaded_is_said(kind, images, tmp_path, caplog):
    caplog.set_level("INFO")
    content, prefix = FILES[kind]
    found = begin(images, tmp_path, content).state_dict()
    for name, tensor in body(STATE).items():
        assert torch.equal(found[name], tensor), name
    assert f"Loaded {len(found) - 2} of {len(found)} tensors" in caplog.text
    assert "these are new: head" in caplog.text
    assert (f"names begin with {prefix} there" in caplog.text) == bool(prefix)
    assert "The head begins anew" in caplog.text


def test_a_prefix_is_taken_off_before_an_architecture_s_own_loader_sees_the_names(images, tmp_path):
    """That of Swin asks the model for the modules that the names of tables speak of."""
    state = tiny_swin(num_classes=12).state_dict()
    torch.save(wrapped(state, "backbone."), tmp_path / "base.pth")
    words = ["--model", SWIN_ARCH, "--num-classes", "3", "--input-size", "3", "32", "32"]
    words += ["--model-kwargs", *as_words(SWIN)]
    begins = ("--pretrained", "--pretrained-path", str(tmp_path / "base.pth"))
    found = session_of(images, tmp_path, *begins, model=words).model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items() if not name.startswith("head."))


def test_no_weights_stay_behind_in_the_configuration_of_the_model(images, tmp_path):
    model = begin(images, tmp_path, wrapped(STATE, "visual."))
    assert not model.pretrained_cfg.get("state_dict")
    assert model.default_cfg is model.pretrained_cfg


OTHERS = {
    "a resnet": create_model("resnet10t", num_classes=3).state_dict(),
    "something else": {"hello": torch.zeros(2)},
}


@pytest.mark.parametrize("content", OTHERS.values(), ids=list(OTHERS))
def test_a_file_of_which_nothing_fits_is_refused(content, images, tmp_path):
    with pytest.raises(ValueError, match=r"0 of the model's 32 tensors are in it, .* random weights"):
        begin(images, tmp_path, content)


def test_a_pickled_model_is_refused_with_the_way_to_save_its_weights(images, tmp_path):
    with pytest.raises(ValueError, match=r"is a pickled model, .*torch\.save\(model\.state_dict\(\)"):
        begin(images, tmp_path, vit())


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_a_head_is_kept_if_its_classes_are_those_of_the_data_by_name(prefix, images, tmp_path, caplog):
    caplog.set_level("INFO")
    state = vit().state_dict()
    found = begin(images, tmp_path, {"state_dict": wrapped(state, prefix), "class_names": NAMES}).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert "The head is kept: the classes" in caplog.text


@pytest.mark.parametrize(
    ("names", "more", "part"),
    [
        (None, (), "names no classes"),
        (NAMES[::-1], (), "the 3 classes of"),
        (NAMES, ("--head-init-scale", "0.01"), "as --head-init-scale"),
    ],
)
def test_a_head_of_other_classes_begins_anew_and_the_log_says_why(names, more, part, images, tmp_path, caplog):
    caplog.set_level("INFO")
    state = vit().state_dict()
    found = begin(images, tmp_path, {"state_dict": state, "class_names": names}, *more).state_dict()
    assert not torch.equal(found["head.weight"], state["head.weight"])
    assert torch.equal(found["norm.weight"], state["norm.weight"])
    assert "The head begins anew" in caplog.text
    assert part in caplog.text


def test_an_initial_checkpoint_that_does_not_fit_names_the_way_that_adapts_it(images, tmp_path, capsys, caplog):
    torch.save(vit(12).state_dict(), tmp_path / "base.pth")
    assert main(command(images, tmp_path, "--initial-checkpoint", str(tmp_path / "base.pth"))) == 1
    assert f"--pretrained --pretrained-path {tmp_path / 'base.pth'} adapts them" in capsys.readouterr().err
    torch.save({"state_dict": vit().state_dict(), "class_names": NAMES[::-1]}, tmp_path / "other.pth")
    session_of(images, tmp_path, "--initial-checkpoint", str(tmp_path / "other.pth"))
    assert "class 0 is 'class2' there and 'class0' in the data" in caplog.text


def test_weights_of_another_softmax_are_not_taken_over_without_a_word(images, tmp_path, caplog, capsys):
    clipped = train(images, tmp_path, "--clipped-softmax", "0.9", name="clipped") / "last.pth.tar"
    plain = train(images, tmp_path, name="plain") / "last.pth.tar"
    for words, said in (
        (
            ["--initial-checkpoint", str(clipped)],
            "was trained with --clipped-softmax 0.9, and this model computes with 0",
        ),
        (["--initial-checkpoint", str(plain), "--clipped-softmax", "0.9"], "with --clipped-softmax 0, and this model"),
    ):
        session_of(images, tmp_path, *words)
        assert said in caplog.text
    caplog.clear()
    session_of(images, tmp_path, "--initial-checkpoint", str(clipped), "--clipped-softmax", "0.9")
    assert "clipped-softmax" not in caplog.text
    side = ["--side", "last", "--side-rank", "4", "--side-gap", "1", "--initial-checkpoint", str(clipped)]
    assert main(command(images, tmp_path, *side, name="d")) == 1
    assert "give a side network a backbone without" in capsys.readouterr().err
