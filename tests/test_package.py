"""The package as it is installed, and its namesake on the public index."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import holdfast


@pytest.fixture
def site(tmp_path):
    """A folder that packages are installed in, with Holdfast and its metadata."""
    shutil.copytree(Path(holdfast.__file__).parent, tmp_path / "holdfast", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / f"holdfast_llm-{holdfast.__version__}.dist-info").mkdir()
    return tmp_path


def imported_from(site):
    words = [sys.executable, "-c", "import holdfast; print(holdfast.__file__)"]
    done = subprocess.run(words, env={"PYTHONPATH": str(site)}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == site / "holdfast" / "__init__.py"
    return done.stderr


def test_the_other_project_of_the_same_import_name_is_named_with_the_cure(site):
    (site / "holdfast-0.5.1.dist-info").mkdir()
    said = imported_from(site)
    assert "another project, holdfast 0.5.1, is installed in the same place as holdfast-llm" in said
    assert "`pip uninstall -y holdfast holdfast-llm`, then `pip install holdfast-llm`" in said


def test_alone_it_is_imported_without_a_word(site):
    assert imported_from(site) == ""
