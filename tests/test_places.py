"""Where the penalty can look: the expressions of docs/recipes.md name what its table says, and see what is meant."""

import re
from pathlib import Path

import pytest
import torch

from tests.models import BUILDERS, batch
from tweo_timm import Tweo, find_blocks

TEXT = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text().split("## Where the penalty looks")[1]
ROWS = [re.split(r"(?<!\\)\|", line)[1:-1] for line in TEXT.splitlines() if line.startswith("| ")][1:]
EXPRESSIONS = [
    (family, index, cells[column].strip().strip("`").replace("\\|", "|"))
    for index, cells in enumerate(ROWS[:3])
    for family, column in (("vit", 1), ("swin", 2))
]


@pytest.mark.parametrize(("family", "index", "expression"), EXPRESSIONS)
def test_each_choice_of_the_table_names_its_modules(family, index, expression):
    model = BUILDERS[family]()
    found, usual = set(find_blocks(model, expression)), set(find_blocks(model))
    if index == 0:
        assert found == usual
    elif index == 1:
        assert found > usual
        assert any(name in ("norm_pre", "patch_embed") for name in found)
        assert family == "vit" or any("downsample" in name for name in found)
    else:
        assert found == {f"{name}.mlp" for name in usual}


def test_an_outlier_among_the_embeddings_is_seen_where_they_enter_the_first_block():
    expression = next(text for family, index, text in EXPRESSIONS if (family, index) == ("vit", 1))
    model = BUILDERS["vit"]().train()
    with torch.no_grad():
        model.pos_embed[0, 1, 7] = 300
    tweo = Tweo(model, blocks=expression)
    model(batch()[0])
    assert dict(zip(tweo.block_names, tweo.block_peaks.tolist(), strict=True))["norm_pre"] > 290


def test_blocks_and_their_mlps_are_two_penalties():
    model = BUILDERS["vit"]().train()
    both = [Tweo(model), Tweo(model, blocks=r"blocks\.\d+\.mlp")]
    model(batch()[0])
    penalties = [tweo.penalty() for tweo in both]
    assert all(float(penalty.detach()) > 0 for penalty in penalties)
    sum(penalties).backward()
