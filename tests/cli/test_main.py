"""What `holdfast` does before and after a command runs: help, unknown words, exit codes."""

import subprocess
import sys

import pytest

from holdfast import __version__
from holdfast.cli import main


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for command in ("demo", "organism", "align METHOD", "finetune METHOD", "audit", "repair METHOD", "report"):
        assert f"  {command} " in shown
    for methods in ("sft, patcher, vaccine, booster, antibody", "sft, lisa, spard, antibody", "antidote"):
        assert f" ({methods})\n" in shown
    assert " (full, lora, ablation, dropping, " in shown
    assert max(map(len, shown.splitlines())) <= 110


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"holdfast {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "no command given"),
        (["harden"], "unknown command 'harden'"),
        (["align"], "usage: holdfast align {sft,patcher,vaccine,booster,antibody}"),
        (["align", "lisa"], "unknown method 'lisa'"),
        (["finetune", "vaccine"], "usage: holdfast finetune {sft,lisa,spard,antibody}"),
        (["attack", "--model", "m"], "unknown method '--model'"),
    ],
)
def test_wrong_words_are_one_sentence(argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert expected in shown.err
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize("name", ["align", "finetune", "attack"])
def test_help_lists_methods(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert "methods:" in capsys.readouterr().out


def test_nothing_heavy_is_imported_for_help() -> None:
    program = (
        "import sys, holdfast, holdfast.cli\n"
        "assert holdfast.cli.main(['--help']) == 0 and holdfast.cli.main(['align', '--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'peft', 'rich', 'numpy', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=60)


def test_python_dash_m() -> None:
    done = subprocess.run([sys.executable, "-m", "holdfast", "fly"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("holdfast: unknown command 'fly'")
