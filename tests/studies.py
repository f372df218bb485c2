"""What tests of the studies in benchmarks/ share: they plan commands, which are stood for, and none is run."""

from importlib import import_module
from pathlib import Path

from holdfast.cli.plans import MARKERS, output_of
from holdfast.evaluation.scores import Rate
from holdfast.files import write_json
from holdfast.stress.certificate import assemble
from stress.examples import example_inputs, example_records, example_tax

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def alone(target):
    """The certificate of a search on one of the example's models alone."""
    records = [{**one, "target": "model"} for one in example_records() if one["target"] == target]
    inputs = {**example_inputs(), "counterpart": None, "suite": "standard"}
    tax = {figure: {**found, "counterpart": None, "model": found[target]} for figure, found in example_tax().items()}
    return assemble(records, {**inputs, "model": example_inputs()[target]}, tax)


def results(value=1.0):
    rate = Rate.of(round(value * 96), 96).as_dict()
    harmful = {"refusal_rate": rate, "harmful_score": rate}
    capability = {"capability": rate, "over_refusal": Rate.of(0, 96).as_dict()}
    found = {"capability": capability, "harmful": harmful, "task": {"task_accuracy": rate}}
    return {"results": found, "detection": {"auroc": value}}


class Commands:
    """Stands for `run_commands`: writes what commands would, and is stopped at one of them if asked to."""

    def __init__(self, monkeypatch, plan, stop_at=None, known=lambda name: 1.0):
        self.ran, self.at_once, self.stop_at, self.known = [], [], stop_at, known
        monkeypatch.setattr(plan, "run_commands", self)

    def __call__(self, commands, logs, *, console, processes=2, keep_going=False):
        logs.mkdir(parents=True, exist_ok=True)
        for command in commands:
            self.ran.append(command)
            self.at_once.append(processes)
            words = list(command.words)
            (logs / f"{command.name}.log").write_text(f"$ holdfast {' '.join(words)}\n")
            folder = output_of(command)
            if words[0] == "stress":
                write_json(folder / "stress.json", {})
                if self.stop_at == len(self.ran):
                    raise KeyboardInterrupt
                target = "counterpart" if "align-sft" in command.name else "model"
                write_json(folder / "certificate.json", alone(target))
            else:
                write_json(folder / MARKERS[words[0]], self.found(command))
        return {command.name: 60.0 for command in commands}

    def found(self, command):
        """What a command has written last, if it is no stress test."""
        return results(self.known(command.name))

    def stressed(self):
        return [command.name for command in self.ran if command.words[0] == "stress"]


def understood(command):
    """Parse a command's words as it would."""
    name, *words = command.words
    module, method = import_module(f"holdfast.cli.{name}"), [] if name in ("evaluate", "stress", "audit") else words[:1]
    module.make_parser(*method).parse(words[len(method) :])
