"""The fault sweep, thinned to what fits into a test run; `make faults` visits every call site."""

import pytest

import faults

pytestmark = pytest.mark.strace

STRIDES = {"accept": 24, "save": 56, "rollback": 48}


@pytest.mark.parametrize("name", STRIDES)
def test_no_fault_tears_or_loses_what_was_acknowledged(name, capsys):
    said: list[str] = []
    runs, problems = faults.sweep(name, STRIDES[name], said.append)
    with capsys.disabled():
        print(f"\n  {said[0]}: {runs} faults")
    assert runs > 5
    assert not problems
