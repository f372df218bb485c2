"""`holdfast gate`: exit codes for CI, one line a rule for people, and what is refused."""

import datetime
import json
import shlex
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from holdfast.cli import main
from holdfast.files import write_json
from holdfast.stress.certificate import seal
from holdfast.stress.identity import describe_model
from holdfast.stress.policy import read_policy
from stress.examples import example_certificate

RECIPES = Path(__file__).parents[2] / "recipes" / "gate"
TODAY = datetime.datetime.now(datetime.UTC).date()


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    path = tmp_path / "certificate.json"
    dates = {"issued": str(TODAY), "expires": str(TODAY + datetime.timedelta(365))}
    write_json(path, example_certificate(suite="standard", **dates))
    return path


@pytest.fixture
def policy(tmp_path: Path) -> Callable[..., str]:
    def save(**rules: Any) -> str:
        path = tmp_path / "policy.yaml"
        path.write_text(yaml.safe_dump(rules), encoding="utf-8")
        return str(path)

    return save


@pytest.mark.parametrize(
    ("rules", "code", "lines"),
    [
        (
            {"min_steps": {"full": 20}, "counterpart_required": True},
            0,
            [
                "pass          min_steps full        20 [20–40 over 3 seeds]; asked: at least 20",
                "pass          counterpart_required  there is one; asked: one",
                "PASS: w/patcher by {policy} (3 pass, 0 fail, 0 inconclusive)",
            ],
        ),
        (
            {"min_steps": {"full": 30, "hybrid": 4}},
            1,
            [
                "inconclusive  min_steps full    20 [20–40 over 3 seeds]; asked: at least 30 "
                "(the interval lies on both sides)",
                "fail          min_steps hybrid  2 [2–3 over 3 seeds]; asked: at least 4",
                "FAIL: w/patcher by {policy} (1 pass, 1 fail, 1 inconclusive)",
            ],
        ),
        (
            {"min_steps": {"lora": 100}, "min_suite": "full"},
            3,
            [
                "inconclusive  min_steps lora  more than 40, not broken; asked: at least 100 (measured no further)",
                "inconclusive  min_suite       standard; asked: at least full (too little to conclude from)",
                "INCONCLUSIVE: w/patcher by {policy} (1 pass, 0 fail, 2 inconclusive)",
            ],
        ),
    ],
    ids=["pass", "fail", "inconclusive"],
)
def test_the_verdict_is_the_exit_code(
    rules, code: int, lines: list[str], certificate: Path, policy, capsys: pytest.CaptureFixture[str]
) -> None:
    path = policy(**rules)
    assert main(["gate", str(certificate), "--policy", path]) == code
    shown = capsys.readouterr()
    assert shown.err == ""
    found = shown.out.splitlines()
    assert len(found) == sum(len(one) if isinstance(one, dict) else 1 for one in rules.values()) + 2
    for line in lines:
        assert line.format(policy=path) in found


def test_a_certificate_that_was_tampered_with_is_refused(certificate: Path, policy, refused) -> None:
    content = json.loads(certificate.read_text(encoding="utf-8"))
    content["attackers"]["hybrid"]["model"]["steps"]["low"] = 50
    certificate.write_text(json.dumps(content), encoding="utf-8")
    said = refused("gate", str(certificate), "--policy", policy(min_steps=1), output=False)
    assert said == (
        f"holdfast: {certificate}: its sha256 does not fit what it says, so it was changed after it was written; "
        "expected it as holdfast stress wrote it"
    )


@pytest.mark.parametrize(("name", "value"), [("attackers", []), ("cheapest", "none"), ("union", 0), ("tax", None)])
def test_one_that_was_sealed_again_with_what_is_no_entry_is_refused(
    name: str, value: Any, certificate: Path, policy, refused
) -> None:
    content = json.loads(certificate.read_text(encoding="utf-8")) | {name: value}
    write_json(certificate, content | {"sha256": seal(content)})
    for words in (["gate", str(certificate), "--policy", policy(min_steps=0)], ["report", str(certificate.parent)]):
        output = [] if words[0] == "gate" else ["--output", str(certificate.parent / "report.html")]
        said = refused(*words, *output, output=False)
        assert said.startswith(f"holdfast: {certificate}: its {name!r} is ")
        assert said.endswith("not an object; expected a certificate of holdfast stress")
    assert not (certificate.parent / "report.html").exists()


def test_one_of_another_schema_is_refused(certificate: Path, policy, refused) -> None:
    content = json.loads(certificate.read_text(encoding="utf-8")) | {"schema": 2}
    write_json(certificate, content | {"sha256": seal(content)})
    said = refused("gate", str(certificate), "--policy", policy(min_steps=1), output=False)
    assert said == f"holdfast: {certificate}: is a certificate of schema 2; this Holdfast reads schema 1"


def test_an_unknown_rule_is_refused(certificate: Path, policy, refused) -> None:
    path = policy(max_union_ars=0.5)
    said = refused("gate", str(certificate), "--policy", path, output=False)
    assert said == f"holdfast: --policy {path}: unknown rule 'max_union_ars'; did you mean max_union_asr?"


@pytest.mark.parametrize("words", [[], ["--policy", ""], ["--policy", "p.yaml", "--model", ""]])
def test_words_that_are_missing(words: list[str], certificate: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gate", str(certificate), *words]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_model_has_to_be_the_one_that_was_measured(
    model_dir: Path, tmp_path: Path, policy, refused, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = describe_model(str(model_dir))
    dates = {"issued": str(TODAY), "expires": str(TODAY)}
    write_json(tmp_path / "certificate.json", example_certificate(model=measured, **dates))
    words = ["gate", str(tmp_path / "certificate.json"), "--policy", policy(min_seeds=3), "--model"]
    moved = Path(shutil.copytree(model_dir, tmp_path / "released"))
    assert main([*words, str(moved)]) == 0
    capsys.readouterr()
    template = moved / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8") + " ", encoding="utf-8")
    assert "the hash of its chat template is another one" in refused(*words, str(moved), output=False)
    weights = moved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    said = refused(*words, str(moved), output=False)
    assert (
        f"--model {moved} is not the model of {tmp_path / 'certificate.json'}: the hash of its weights or conf" in said
    )
    assert "is neither a folder nor a model on the Hub" in refused(*words, str(tmp_path / "none"), output=False)


@pytest.mark.parametrize("name", ["release", "service"])
def test_the_policies_that_are_shipped(name: str, certificate: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = RECIPES / f"{name}.yaml"
    assert path.read_text(encoding="utf-8").startswith(
        f"# holdfast gate D/certificate.json --policy recipes/gate/{name}.yaml\n"
    )
    assert {"min_suite", "min_seeds", "min_prompts", "counterpart_required"} <= read_policy(path).keys()
    assert main(["gate", str(certificate), "--policy", str(path)]) == 1  # Patcher's own tax fails either
    assert "fail          min_capability_of_base" in capsys.readouterr().out


def test_the_workflow_that_is_shipped() -> None:
    """It is YAML, its commands are ones that the parsers take, and the last one is a gate for the model measured."""
    workflow = yaml.safe_load((RECIPES / "github-actions.yml").read_text(encoding="utf-8"))
    steps = workflow["jobs"]["stress"]["steps"]
    commands = [shlex.split(step["run"]) for step in steps if step.get("run", "").startswith("holdfast")]
    assert [words[1] for words in commands] == ["stress", "report", "gate"]
    for _, command, *words in commands:
        import_module(f"holdfast.cli.{command}").make_parser().parse(words)
    (stress, report, gate) = commands
    folder = stress[stress.index("--output_dir") + 1]
    assert report[2] == folder
    assert Path(gate[2]) == Path(folder, "certificate.json")
    policy = gate[gate.index("--policy") + 1]
    assert Path(RECIPES.parents[1], policy).is_file()
    assert stress[stress.index("--model") + 1] == gate[gate.index("--model") + 1] == "$MODEL"
    assert not any("continue-on-error" in step for step in steps)
