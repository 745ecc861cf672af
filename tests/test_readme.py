"""The README's code runs."""

import pathlib
import re

import pytest

README = pathlib.Path(__file__).parent.parent / "README.md"


@pytest.mark.slow
def test_the_code_of_the_readme_runs(capsys):
    """The python blocks run in order, and the fit they print has converged and is to be trusted."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 3
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    printed = capsys.readouterr().out
    assert "CONVERGED" in printed
    assert "Trust this" in printed
    assert names["losses"].shape == (5, 500)
