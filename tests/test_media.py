"""Names of strangers show as they are in every medium, and do nothing there."""

import csv
import html as python_html
import io
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tweo_timm.media import cell, code, html, markdown, one_line, picture, terminal

PLAIN = ["blocks.0", "vit_tiny_patch16_224", "w8a8-tt+res", "ök1", "out/run 2", "448"]
derandomized = settings(derandomize=True, deadline=None, max_examples=200)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_names_stay_as_they_are(name):
    assert {terminal(name), one_line(name), html(name), markdown(name), cell(name), picture(name)} == {name}
    assert code(name) == f"`{name}`"


@derandomized
@given(st.text())
def test_a_terminal_gets_nothing_but_printable_signs_and_everything_can_be_read_back(text):
    shown = terminal(text)
    assert shown.isprintable()
    assert not text.isprintable() or shown == text
    assert one_line(text).isprintable()


@derandomized
@given(st.text())
def test_html_is_the_text_and_no_tag(text):
    assert not re.search(r"[<>\"']", html(text))
    assert python_html.unescape(html(text)) == terminal(text)


@derandomized
@given(st.text(alphabet="ab_*`|<>[]()!&\\~$\n#x 1"))
def test_a_cell_of_markdown_is_one_cell_without_tags_links_or_emphasis(text):
    shown = markdown(text)
    assert "\n" not in shown
    assert not re.search(r"[<>]", shown)
    unescaped = re.sub(r"\\[\\`*\[\]|~$_]", "", shown)  # what a reader of Markdown would still act upon
    assert not re.search(r"[`*\[\]|~$\\]", unescaped)
    assert not re.search(r"(?<![a-z0-9])_|_(?![a-z0-9])", re.sub(r"\\.", "a", shown))
    assert python_html.unescape(re.sub(r"\\(?=[\\`*\[\]|~$_])(.)", r"\1", shown)) == terminal(text)


@derandomized
@given(st.text(alphabet="a`\n "))
def test_a_code_span_ends_where_the_text_ends(text):
    shown = code(text)
    fence = re.match("`+", shown)
    inner = shown[len(fence[0]) : -len(fence[0])] if text.strip("`\n ") else None
    if inner is not None:
        assert all(len(run) < len(fence[0]) for run in re.findall("`+", inner))
        assert inner.strip() == terminal(text).strip()


@derandomized
@given(st.text())
def test_no_text_in_a_sheet_begins_as_a_formula_does(text):
    file = io.StringIO()
    csv.writer(file).writerow([cell(text), cell(-1.5), cell(None)])
    ((shown, number, nothing),) = csv.reader(io.StringIO(file.getvalue()))
    assert not shown.startswith(("=", "+", "-", "@", "\t", "\r"))
    assert (number, nothing) == ("-1.5", "")


@pytest.mark.parametrize("name", ["$\\frac$", "_hidden", "a$b$c", "$", "\\"])
def test_a_label_of_a_picture_is_no_formula_and_is_in_the_legend(name):
    figure = Figure()
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([0, 1], label=picture(name))
    axes.legend()
    assert len(axes.get_legend_handles_labels()[1]) == 1
    figure.savefig(io.BytesIO(), format="png")
