from dataclasses import FrozenInstanceError

import pytest

from tweo_timm import Fp8Recipe


def test_defaults_are_the_published_configuration():
    recipe = Fp8Recipe()
    assert (recipe.format, recipe.amax_history_len, recipe.amax_compute_algo, recipe.margin) == ("hybrid", 16, "max", 0)
    assert (recipe.backend, recipe.scaling, recipe.include, recipe.exclude) == ("auto", "delayed", (), ())


@pytest.mark.parametrize(
    ("field", "value", "nearest"),
    [
        ("format", "HYBRID", "hybrid"),
        ("format", "e4m3fn", "e4m3"),
        ("backend", "nativ", "native"),
        ("backend", "emulate", "emulated"),
        ("scaling", "delay", "delayed"),
        ("amax_compute_algo", "most-recent", "most_recent"),
        ("amax_history_len", 0, "1"),
        ("margin", 1000, "64"),
    ],
)
def test_value_outside_the_accepted_set_is_refused_and_the_nearest_is_named(field, value, nearest):
    with pytest.raises(ValueError, match=f"{field}.*(did you mean '{nearest}'|between .*{nearest})"):
        Fp8Recipe(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", 8),
        ("amax_history_len", "16"),
        ("amax_history_len", True),
        ("margin", 0.5),
        ("exclude", 3),
        ("include", [1]),
    ],
)
def test_wrong_type_is_refused(field, value):
    with pytest.raises(TypeError, match=field):
        Fp8Recipe(**{field: value})


def test_misspelt_option_is_refused():
    with pytest.raises(TypeError, match="amax_history_length"):
        Fp8Recipe(amax_history_length=16)


def test_invalid_regular_expression_is_refused():
    with pytest.raises(ValueError, match=r"exclude.*regular expression"):
        Fp8Recipe(exclude=["blocks.("])


def test_recipe_cannot_be_changed_and_can_be_a_key():
    recipe = Fp8Recipe(exclude=["head"])
    with pytest.raises(FrozenInstanceError):
        recipe.margin = 1
    assert {recipe: 1}[Fp8Recipe(exclude=("head",))] == 1


def test_include_and_exclude_are_searched_in_names_and_say_why():
    recipe = Fp8Recipe(include=r"^blocks\.", exclude=[r"fc2$"])
    assert recipe.selects("blocks.0.mlp.fc1") is None
    assert "include" in recipe.selects("head")
    assert "'fc2$'" in recipe.selects("blocks.0.mlp.fc2")
