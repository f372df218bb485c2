"""`holdfast report` on the command line: both files or none, and one sentence for what cannot be used."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast.cli import main
from report.folders import held_folder, stress_folder


def test_a_page_and_a_card_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, other = stress_folder(tmp_path / "d"), held_folder(tmp_path / "held")
    page = tmp_path / "report.html"
    assert main(["report", str(folder), "--output", str(page)]) == 0
    assert "patcher is broken by" in capsys.readouterr().out
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "## Stress test of patcher" in page.with_suffix(".md").read_text(encoding="utf-8")
    first = page.read_bytes()
    assert main(["report", str(folder), str(other), "--output", str(page), "--overwrite"]) == 0
    assert "2 models compared" in page.read_text(encoding="utf-8")
    assert main(["report", str(folder), "--output", str(page), "--overwrite"]) == 0
    assert page.read_bytes() == first


def test_bad_input_is_one_sentence(tmp_path: Path, refused: Callable[..., str]) -> None:
    folder = stress_folder(tmp_path / "d")
    page, words = tmp_path / "report.html", ["--output", str(tmp_path / "report.html")]

    def told(*argv: str) -> str:
        said = refused("report", *argv, output=False)
        assert not page.exists() or page.read_text() == "mine"
        return said

    assert "nowhere: is not there; expected a folder" in told(str(tmp_path / "nowhere"), *words)
    certificate = folder / "certificate.json"
    assert "is a file; expected a folder, the --output_dir of holdfast stress" in told(str(certificate), *words)
    assert "is given twice" in told(str(folder), f"{folder}/", *words)
    for output, expected in (
        ("report.pdf", "expected a name that ends with .html"),
        ("none/report.html", f"there is no folder {tmp_path / 'none'}; expected one to write into"),
        ("d", "expected a name that ends with .html"),
    ):
        assert expected in told(str(folder), "--output", str(tmp_path / output))
    (tmp_path / "sub.html").mkdir()
    assert "is a folder; expected a file to write" in told(str(folder), "--output", str(tmp_path / "sub.html"))

    page.write_text("mine")
    assert f"{page} is there already; choose another name or pass --overwrite" in told(str(folder), *words)
    page.unlink()
    page.with_suffix(".md").write_text("mine")
    assert f"{page.with_suffix('.md')} is there already" in told(str(folder), *words)
    assert page.with_suffix(".md").read_text() == "mine"
    page.with_suffix(".md").unlink()

    changed = json.loads(certificate.read_text())
    changed["attackers"]["hybrid"]["model"]["steps"]["value"] = 200
    certificate.write_text(json.dumps(changed))
    assert "its sha256 does not fit what it says" in told(str(folder), *words)
    certificate.write_text(json.dumps({**changed, "schema": 2}))
    assert "is a certificate of schema 2; this Holdfast reads schema 1" in told(str(folder), *words)
    certificate.unlink()
    assert "its search is not over" in told(str(folder), *words)
    assert "the same holdfast stress command again goes on with it" in told(str(folder), *words)
    (folder / "stress.json").unlink()
    assert "holds no certificate.json; expected the --output_dir of holdfast stress" in told(str(folder), *words)
    assert not page.exists()
    assert not page.with_suffix(".md").exists()
