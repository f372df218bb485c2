"""Importing with the garbage collector at rest."""

import gc

import pytest

from holdfast.importing import import_heavy


@pytest.fixture
def probe(tmp_path, monkeypatch):
    """A module that notes whether the collector was on while it was imported, or fails."""

    def write(name, ending=""):
        (tmp_path / f"{name}.py").write_text(f"import gc\nCOLLECTED = gc.isenabled()\n{ending}\n")
        monkeypatch.syspath_prepend(tmp_path)
        return name

    return write


def test_nothing_is_collected_during_an_import_and_all_is_as_before_afterwards(probe):
    frozen = gc.get_freeze_count()
    assert import_heavy(probe("probe_plain")).COLLECTED is False
    assert gc.isenabled()
    assert gc.get_freeze_count() == frozen


def test_a_collector_that_was_off_stays_off(probe):
    gc.disable()
    try:
        import_heavy(probe("probe_off"))
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_an_import_that_fails_leaves_the_collector_on(probe):
    with pytest.raises(ValueError, match="broken"):
        import_heavy(probe("probe_broken", ending="raise ValueError('broken')"))
    assert gc.isenabled()


def test_for_good_freezes_what_is_alive_but_only_when_there_is_something_to_import(probe):
    try:
        module = import_heavy(probe("probe_good"), for_good=True)
        frozen = gc.get_freeze_count()
        assert frozen > 0
        gc.unfreeze()
        assert import_heavy("probe_good", for_good=True) is module
        assert gc.get_freeze_count() == 0
    finally:
        gc.unfreeze()
