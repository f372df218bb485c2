"""The gate: a certificate held against a policy, which ends in pass, fail, or inconclusive."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from holdfast.stress.policy import Policy
from holdfast.stress.rules import ALL, RULES, UNEXPIRED, Rule
from holdfast.stress.suites import SUITES

Verdict = Literal["pass", "fail", "inconclusive"]


class Finding(NamedTuple):
    """What one rule says of a certificate.

    Attributes:
        rule: Its name, and the kind of attacker where it has thresholds for several.
        verdict: Whether the certificate meets it.
        measured: What was measured, with its interval, in words.
        asked: What was asked for, in words.
        why: Why nothing can be concluded; empty where something can.
    """

    rule: str
    verdict: Verdict
    measured: str
    asked: str
    why: str


def examine(certificate: Mapping[str, Any], policy: Policy) -> list[Finding]:
    """Hold a certificate against a policy.

    A rule passes where the whole interval of what was measured lies on the right side of its threshold, and fails where
    the whole of it lies on the wrong one. In between, where nothing was measured, and where not enough was, nothing
    can be concluded.

    Args:
        certificate: As `read_certificate` gives it.
        policy: As `read_policy` gives it.

    Returns:
        One finding for every threshold, in the policy's order, and one on whether the certificate has expired.
    """
    asked = [(name, RULES[name], kind, one) for name, thresholds in policy.items() for kind, one in thresholds.items()]
    found = [_finding(certificate, name, rule, kind, threshold) for name, rule, kind, threshold in asked]
    return [*found, _finding(certificate, "expires", UNEXPIRED, ALL, 0)]


def verdict(findings: Iterable[Finding]) -> Verdict:
    """Fail if any rule fails, else inconclusive if any is, else pass."""
    found = {finding.verdict for finding in findings}
    return "fail" if "fail" in found else "inconclusive" if "inconclusive" in found else "pass"


def _finding(certificate: Mapping[str, Any], name: str, rule: Rule, kind: str, threshold: Any) -> Finding:
    figure = rule.figure(certificate, kind)
    limit = list(SUITES).index(threshold) if rule.form == "suite" else threshold
    if rule.sense == "at least":
        meets, misses = figure.low >= limit, figure.high < limit
    else:
        meets, misses = figure.high <= limit, figure.low > limit
    end: Verdict = "inconclusive"
    why = figure.doubt
    if not why and meets:
        end = "pass"
    elif not why and misses and not rule.evidence:
        end = "fail"
    elif not why and rule.evidence:
        why = "too little to conclude from"
    elif not why:
        why = "measured no further" if math.isinf(figure.high) else "the interval lies on both sides"
    asked = "one" if rule.form == "true" else f"{rule.sense} {threshold}"
    return Finding(name if kind == ALL else f"{name} {kind}", end, figure.shown, asked, why)
