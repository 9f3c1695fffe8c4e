"""A setting is declared once: command line, YAML, help and refusals follow from its field. A toy group shows it."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tweo_timm.run.flags import CommandLine
from tweo_timm.run.recipe import RecipeError, load_recipe
from tweo_timm.run.rules import out_of_bounds
from tweo_timm.settings import Bounds, SettingError, check_settings, flag, setting


@dataclass
class Toy:
    """A toy group of flags."""

    toy_share: float = flag(0.5, "Share of the toys.", bounds=Bounds(0, 1))
    toy_colour: str = flag("red", "Colour of the toys.", choices=("red", "blue"))


@dataclass(frozen=True)
class ToyConfig:
    share: float = setting(0.5, Bounds(0, 1, open="low"), hint="a half is usual")
    colour: str = setting("red", choices=("red", "blue"))

    def __post_init__(self) -> None:
        check_settings(self)


def test_a_field_of_a_group_is_a_flag_with_help_default_and_choices(capsys):
    parser = CommandLine(Toy, "toys", "Plays.")
    assert parser.parse(["--toy-share", "0.25"]) == {"toy_share": 0.25}
    with pytest.raises(SystemExit):
        parser.parse(["--toy-colour", "green"])
    assert "red" in capsys.readouterr().err
    shown = parser.parser.format_help()
    assert all(words in shown for words in ("A toy group of flags", "Share of the toys", "0.5"))


def test_the_same_field_is_a_key_of_a_recipe(tmp_path: Path):
    recipe = tmp_path / "toys.yaml"
    recipe.write_text("toy_share: 5e-1\ntoy_colour: blue\n")
    assert load_recipe(recipe, Toy).values == {"toy_share": 0.5, "toy_colour": "blue"}
    recipe.write_text("toy_colour: green\n")
    with pytest.raises(RecipeError, match="toy_colour"):
        load_recipe(recipe, Toy)


@given(st.floats())
def test_a_number_is_refused_by_the_name_of_its_flag_exactly_where_it_is_out_of_bounds(number):
    complaints = list(out_of_bounds(Toy(toy_share=number)))
    assert bool(complaints) == (not 0 <= number <= 1)
    assert all(complaint.startswith("--toy-share is ") for complaint in complaints)


@pytest.mark.parametrize(("given_", "reason"), [({"share": 0.0}, "above 0"), ({"colour": "rot"}, "'red'")])
def test_a_component_refuses_in_its_own_words_and_in_those_of_a_flag(given_, reason):
    with pytest.raises(SettingError, match=f"ToyConfig.{next(iter(given_))}.*{reason}") as caught:
        ToyConfig(**given_)
    assert caught.value.spelled("--toy").startswith("--toy is ")
