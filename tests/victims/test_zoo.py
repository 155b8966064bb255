"""Victims by name: one line for a name, weights or an option that do not exist."""

import pytest

from extraction.victims.zoo import load_victim


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (dict(name="swin_x"), "no victim is called 'swin_x'"),
        (dict(answers="everything"), "no answers are called 'everything'"),
        (dict(query_budget=-1), "query budget -1"),
        (dict(name="swin_t_k400"), "swin_tiny_patch244_window877_kinetics400_1k.pth"),
        (dict(name="trained"), "--victim-weights"),
    ],
)
def test_bad_arguments_get_one_line(error_line, change, line):
    assert line in error_line(load_victim, **(dict(name="demo_swin") | change))
