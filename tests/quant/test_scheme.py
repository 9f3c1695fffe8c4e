from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tweo_timm.quant.scheme import Scheme

SCHEMES = st.builds(
    Scheme,
    weight_bits=st.sampled_from((8, 7, 6, 4)),
    activation_bits=st.sampled_from((8, 6, 4)),
    per_channel=st.booleans(),
    per_token=st.booleans(),
    residual=st.booleans(),
    attention=st.booleans(),
    smooth=st.booleans(),
    compensation=st.sampled_from(("", "qwt", "qwtblock", "qwtlinear")),
    rotation=st.sampled_from(("", "rot", "rotr")),
).flatmap(lambda scheme: st.booleans().map(lambda on: replace(scheme, zero_point=on and not scheme.per_token)))


@settings(derandomize=True, deadline=None)
@given(SCHEMES)
def test_every_scheme_survives_the_round_trip_through_its_string(scheme):
    assert Scheme.parse(str(scheme)) == scheme


@pytest.mark.parametrize(
    "text",
    [
        "w8a8-tt",
        "w8a8-ck",
        "w7a8-tt",
        "w6a6-tt+res",
        "w4a8-ck",
        "w8a8-tt+res+attn+zero+rot+smooth+qwt",
        "w4a4-ct+qwtlinear",
        "fp8-unit+res",
    ],
)
def test_canonical_strings_are_written_as_they_are_read(text):
    assert str(Scheme.parse(text)) == text


def test_suffixes_come_in_any_order_and_case():
    assert str(Scheme.parse(" W8A8-tt+Smooth+RES ")) == "w8a8-tt+res+smooth"


def test_letters_mean_tensor_channel_token():
    scheme = Scheme.parse("w6a4-ck")
    assert (scheme.weight_bits, scheme.activation_bits) == (6, 4)
    assert scheme.per_channel
    assert scheme.per_token


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("w5a8-tt", "w5"),
        ("w7a7-tt", "a7"),
        ("w8a3-tt", "a3"),
        ("w8a8-kt", "weights k"),
        ("w8a8-tc", "activations c"),
        ("w8a8-tt+foo", "+foo"),
        ("w8a8-tt+res+res", "+res"),
        ("w8a8-tt+qwt+qwtlinear", "+qwt+qwtlinear"),
        ("w8a8-tt+rot+rotr", "+rot+rotr"),
        ("int8", "int8"),
        ("w8a8", "w8a8"),
        ("", ""),
    ],
)
def test_a_wrong_scheme_is_refused_by_naming_the_part_and_the_grammar(text, part):
    with pytest.raises(ValueError, match=r"w\{8,7,6,4\}a\{8,6,4\}") as caught:
        Scheme.parse(text)
    assert repr(part) in str(caught.value)


def test_fields_are_checked_when_a_scheme_is_built_by_hand():
    with pytest.raises(ValueError, match="activation_bits is 5"):
        Scheme(activation_bits=5)
    with pytest.raises(ValueError, match="'magic'"):
        Scheme(compensation="magic")
    with pytest.raises(ValueError, match="'magic'"):
        Scheme(rotation="magic")


def test_zero_points_need_static_scales():
    with pytest.raises(ValueError, match="static activation scales"):
        Scheme.parse("w8a8-ck+zero")
