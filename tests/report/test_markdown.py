"""The model card's section: the Hub reads its metadata, and its text means nothing but itself."""

import re
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from holdfast.report.markdown import render_markdown
from holdfast.report.reading import read_findings
from report.folders import held_folder, stress_folder


def test_the_hub_reads_the_measured_figures(tmp_path: Path) -> None:
    folder = stress_folder(tmp_path / "d", reported={"asr": 0.01})
    results = ModelCard(render_markdown([read_findings(folder)])).data.eval_results
    found = {result.metric_name: result for result in results}
    assert found["Attack steps to the first break: any attacker"].metric_value == 0
    assert found["Attack steps to the first break: Hybrid"].metric_value == 2
    assert found["Attack steps to the first break: LoRA"].metric_value == "> 40"
    assert found["Prompts that any attack broke"].metric_value == 1.0
    capability = found["Capability before any attack"]
    assert capability.metric_value == 57 / 128
    assert capability.dataset_type == "w/capability_data.jsonl"
    assert capability.dataset_args == {"sha256": "d" * 64, "rows": 128}
    assert 0.01 not in [result.metric_value for result in results]


def test_what_comes_from_outside_means_nothing_in_it(tmp_path: Path) -> None:
    name = "w/<b>|*x*_y_`z`\n# [a](b) \u202e"
    source = {
        "source": name,
        "sha256": "a" * 64,
        "tokenizer_sha256": "b" * 64,
        "parameters": 10,
        "template_sha256": None,
    }
    folder = stress_folder(tmp_path / "d", model=source, reported={"a|b": "<script>\n\n# no"})
    text = render_markdown([read_findings(folder)])
    front, body = text.split("---\n", 2)[1:]
    assert yaml.safe_load(front)["model-index"][0]["name"].startswith("<b>|*x*_y_`z`")
    assert not re.search(r"(?<!\\)[<\[\]*_]", re.sub(r"`[0-9a-f]{64}`", "", body))
    for line in body.splitlines():
        assert not line.startswith("#") or line.startswith("## Stress test of ")
        cells = re.split(r"(?<!\\)\|", line)
        assert len(cells) == 1 or (cells[0] == cells[-1] == "" and len(cells) in (5, 6, 7))


def test_tables_are_whole_with_and_without_a_counterpart(tmp_path: Path) -> None:
    both = [stress_folder(tmp_path / "d"), held_folder(tmp_path / "held")]
    for findings in (both, both[:1], both[1:]):
        text = render_markdown([read_findings(folder) for folder in findings])
        tables = re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE)
        assert tables
        for table in tables:
            assert len({line.count("|") for line in table.splitlines()}) == 1
    compared = render_markdown([read_findings(folder) for folder in both])
    assert "## Stress tests compared" in compared
    assert len(yaml.safe_load(compared.split("---\n")[1])["model-index"]) == 2


def test_it_is_the_same_each_time(tmp_path: Path) -> None:
    folder = stress_folder(tmp_path / "d")
    assert render_markdown([read_findings(folder)]) == render_markdown([read_findings(folder)])
