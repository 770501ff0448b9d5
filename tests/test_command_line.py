"""Values on the command line that are more than a number or a word."""

import pytest

from retnet_jax.programs.command_line import SharesParser


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("data/pile:0.6,gs://b/c4:2", {"data/pile": 0.6, "gs://b/c4": 2.0}),
        ("", {}),
        ({"data/pile": 1.0}, {"data/pile": 1.0}),
    ],
)
def test_shares_of_a_mixture(text, shares):
    assert SharesParser().parse(text) == shares


@pytest.mark.parametrize("text", ["data/pile", "data/pile:x", ":0.5", "data/a:1,"])
def test_shares_that_are_none_are_named(text):
    with pytest.raises(ValueError, match=r"is no store and share, such as data/pile:0.6"):
        SharesParser().parse(text)
