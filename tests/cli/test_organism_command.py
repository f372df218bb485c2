"""`holdfast organism` hands its words on; what it builds is tested with the organism."""

from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast.cli import main


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, int, str]]:
    calls = []

    def build(directory: Path, seed: int, size: str, progress: Callable[[int, int], None]) -> None:
        directory.mkdir(exist_ok=True)
        for step in range(20):
            progress(step + 1, 20)
        calls.append((directory, seed, size))

    monkeypatch.setattr("holdfast.organism.build_organism", build)
    return calls


def test_folder_and_seed(
    built: list[tuple[Path, int, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["organism", str(tmp_path / "w"), "--seed", "3"]) == 0
    assert built == [(tmp_path / "w", 3, "small")]
    shown = capsys.readouterr().err
    assert "this takes about a minute" in shown
    assert "organism: step 20/20" in shown
    assert f"wrote {tmp_path / 'w'}" in shown


def test_seed_from_a_recipe_and_overwriting(built: list[tuple[Path, int, str]], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 7\n")
    assert main(["organism", "--config", str(recipe), str(tmp_path)]) == 2
    assert main(["organism", "--config", str(recipe), str(tmp_path), "--overwrite_output_dir"]) == 0
    assert built == [(tmp_path, 7, "small")]


def test_folder_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["organism"]) == 2
    assert capsys.readouterr().err == "holdfast organism: error: the following arguments are required: DIR\n"


def test_size(built: list[tuple[Path, int, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["organism", str(tmp_path / "w"), "--size", "large"]) == 0
    assert built == [(tmp_path / "w", 0, "large")]
    assert "this takes about two minutes" in capsys.readouterr().err


def test_an_unknown_size_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["organism", str(tmp_path / "w"), "--size", "huge"]) == 2
    assert capsys.readouterr().err == (
        "holdfast organism: error: argument --size: invalid choice: 'huge' (choose from 'small', 'large')\n"
    )
    assert not (tmp_path / "w").exists()
