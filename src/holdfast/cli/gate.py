"""`holdfast gate CERTIFICATE --policy POLICY.yaml`: may this model be released? For people and for CI."""

from __future__ import annotations

from dataclasses import dataclass, field

from holdfast.cli.console import set_up_logging, stdout
from holdfast.cli.parser import HoldfastParser
from holdfast.errors import InputError
from holdfast.stress.certificate import read_certificate
from holdfast.stress.gate import examine, verdict
from holdfast.stress.identity import describe_model
from holdfast.stress.policy import read_policy

#: The exit code of every verdict.
_CODES = {"pass": 0, "fail": 1, "inconclusive": 3}

#: The hashes that make a model the one that was measured, in words.
_HASHES = {
    "sha256": "weights or configuration",
    "template_sha256": "chat template",
    "tokenizer_sha256": "tokenizer",
}


@dataclass
class GateArguments:
    """The flags of `gate`."""

    policy: str = field(metadata={"help": "YAML file of rules with thresholds; recipes/gate has two."})
    model: str | None = field(
        default=None, metadata={"help": "The model to be released: it has to be the one that was measured."}
    )


def make_parser() -> HoldfastParser:
    """Return the parser of `gate`."""
    parser = HoldfastParser(
        (GateArguments,),
        prog="holdfast gate",
        description="Hold a certificate against a policy. Exit code 0: pass, 1: fail, 3: inconclusive, 2: refused.",
        positional="CERTIFICATE",
    )
    parser.add_argument("certificate", metavar="CERTIFICATE", help="The certificate.json of a stress test.")
    return parser


def run(argv: list[str]) -> int:
    """Print one line a rule, and the verdict.

    Args:
        argv: The words after `gate`.

    Returns:
        0 pass, 1 fail, 3 inconclusive.

    Raises:
        InputError: The certificate was tampered with or is of another schema, the model is not the one that was
            measured, or the policy cannot be used.
    """
    set_up_logging()
    options, rest = make_parser().parse(argv)
    policy = read_policy(options.policy)
    certificate = read_certificate(rest.certificate)
    if options.model is not None:
        _require_same(options.model, certificate["model"], rest.certificate)
    findings = examine(certificate, policy)
    width = max(len(finding.rule) for finding in findings)
    for one in findings:
        why = f" ({one.why})" if one.why else ""
        line = f"{one.verdict:<12}  {one.rule:<{width}}  {one.measured}; asked: {one.asked}{why}"
        stdout.print(line, markup=False, soft_wrap=True)
    end = verdict(findings)
    counts = [f"{sum(one.verdict == kind for one in findings)} {kind}" for kind in _CODES]
    stdout.print(
        f"{end.upper()}: {certificate['model']['source']} by {options.policy} ({', '.join(counts)})",
        markup=False,
        soft_wrap=True,
    )
    return _CODES[end]


def _require_same(source: str, measured: dict[str, str], certificate: str) -> None:
    """Refuse a model that is not the one of the certificate."""
    found = describe_model(source)
    for name, what in _HASHES.items():
        if found[name] != measured[name]:
            raise InputError(
                f"--model {source} is not the model of {certificate}: the hash of its {what} is another one "
                f"({str(found[name])[:12]}, measured {str(measured[name])[:12]})"
            )
