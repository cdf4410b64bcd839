"""Numbers for people."""

import pytest

from sft_recipe.display import byte_size


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (999, "999 bytes"),
        (1000, "1.00 KB"),
        (999_994, "999.99 KB"),
        (1_500_000, "1.50 MB"),
        (2_340_000_000, "2.34 GB"),
        (5 * 10**12, "5000.00 GB"),
    ],
)
def test_a_size_has_the_unit_that_shows_it(size, text):
    assert byte_size(size) == text
