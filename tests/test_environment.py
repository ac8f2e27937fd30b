"""What the system tells of its processor."""

import pytest

from lightning_estdgm import _environment

HIDDEN = "processor\t: 0\ncpu family\t: {family}\nmodel\t\t: {model}\nmodel name\t: AMD EPYC\n"
TOLD = "processor\t: 0\ncpu family\t: 6\nmodel\t\t: 85\nmodel name\t: Intel(R) Xeon(R) Gold 6252 CPU @ 2.10GHz\n"


@pytest.fixture
def processors(monkeypatch, tmp_path):
    """A list of processors in the place of the system's."""
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(_environment, "_PROCESSORS", path)
    return path


def test_generations_with_one_hidden_name_are_told_apart(processors):
    names = []
    for family, model in ((25, 17), (26, 2)):
        processors.write_text(HIDDEN.format(family=family, model=model))
        names.append(_environment.processor_name())
    assert names == ["AMD EPYC, family 25 model 17", "AMD EPYC, family 26 model 2"]


def test_a_name_with_its_number_stays(processors):
    processors.write_text(TOLD)
    assert _environment.processor_name() == "Intel(R) Xeon(R) Gold 6252 CPU @ 2.10GHz"


def test_a_system_without_such_a_list_has_a_name_too(processors):
    assert _environment.processor_name()
    assert _environment.instruction_sets() == ()
