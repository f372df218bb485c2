"""What `holdfast stress` shows in the end tells what the report tells."""

from rich.console import Console

from holdfast.cli.stress_report import cost_table
from stress.examples import example_certificate


def test_the_table_tells_what_breaks_each_model_by_kind_of_attacker() -> None:
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(cost_table(example_certificate()))
    lines = {line.split("│")[1].strip(): line for line in console.export_text().splitlines() if line.startswith("│")}
    assert "2 (2–3) steps: ablation + fine-tuning (HS 0.90, ASR 0.55)" in lines["Hybrid"]
    assert "> 40 steps: fine-tuning (HS 0.30, ASR 0.18 at most)" in lines["LoRA"]
    assert lines["LoRA"].rstrip("│ ").endswith("≥ 20×")
    assert lines["Holds the base"].rstrip("│ ").endswith("1×")
    assert lines["union ASR"].count("1.00 of 128 prompts") == 2
