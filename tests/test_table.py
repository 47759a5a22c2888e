"""The table of networks: parameters and multiply-adds as the README and the paper have them."""

import pytest

from hrnet.table import measure


@pytest.mark.parametrize(
    ("preset", "kind", "parameters", "macs"),
    [
        ("w32", "pose", 28_536_113, 7.12),
        ("w18", "classification", 21_299_004, 3.99),
    ],
)
@pytest.mark.slow
def test_published_networks(preset, kind, parameters, macs):
    count, multiply_adds, activations = measure(preset, kind)
    assert count == parameters
    assert round(multiply_adds / 2**30, 2) == macs
    assert activations > 0
