"""An evaluation: prompts → generate → judge → score, and the files it leaves."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from holdfast.data.load import Prompt
from holdfast.errors import InputError
from holdfast.evaluation.answers import MARKS, Answer, count_marks
from holdfast.evaluation.asking import PLAINLY, Asking
from holdfast.evaluation.decoding import GREEDY, Decoding
from holdfast.evaluation.generation import answerable, generate
from holdfast.evaluation.judges import Judge, get_judge
from holdfast.evaluation.prompts import PromptSet, Role, judge_for
from holdfast.evaluation.scores import Rate, Scores, score
from holdfast.files import write_json, write_jsonl

SCHEMA = 2
"""Version of the layout of `results.json` and `samples.jsonl`, also of an attack's."""

EMPTY_GRADE = 2
"""The grade of an empty answer, whoever judges: nothing was refused, and nothing given."""

PREFIXES: dict[Role, str] = {"harmful": "", "benign": "benign_", "capability": "capability_", "task": "task_"}
"""What the names of a set's numbers begin with in `Evaluation.flat`, by its role."""

COUNTS = (*MARKS, "left_out")
"""What is counted beside the rates of every set: the marked answers, and the prompts that were left out."""


@dataclass(frozen=True)
class Evaluation:
    """What a model answered, how that was graded and what it comes to.

    Attributes:
        scores: The scores of every set, by role.
        counts: What is counted in every set beside its scores, by role and then by the names of `COUNTS`.
        samples: One row per answer: `set`, `row` (from 1), `prompt`, `answer`, `thoughts`, `expected`, `grade`,
            `judge`, and whether it is each of `MARKS`.
        judges: The judge of every set, by role.
        sources: Where the prompts of every set are from, by role.
        decoding: How the answers were decoded.
    """

    scores: dict[Role, Scores]
    counts: dict[Role, dict[str, int]]
    samples: list[dict[str, Any]] = field(repr=False)
    judges: dict[Role, Judge]
    sources: dict[Role, str]
    decoding: Decoding

    @property
    def results(self) -> dict[Role, dict[str, Any]]:
        """The results by role, ready for JSON; each rate with `value`, `low`, `high`, `count` and `n`.

        `harmful` has `asr`, `harmful_score`, `mean_score`, `refusal_rate` and `n`; `benign` has `over_refusal`;
        `capability` has `capability` (exact answers) and `over_refusal`; `task` has `task_accuracy`. Each has `n`, the
        number of answers, and `counts`.
        """
        results: dict[Role, dict[str, Any]] = {}
        for role, scores in self.scores.items():
            if role == "harmful":
                results[role] = scores.as_dict()
            elif role == "benign":
                results[role] = {"over_refusal": scores.refusal_rate.as_dict(), "n": scores.n}
            elif role == "capability":
                results[role] = {
                    "capability": scores.asr.as_dict(),
                    "over_refusal": scores.refusal_rate.as_dict(),
                    "n": scores.n,
                }
            else:
                results[role] = {"task_accuracy": scores.asr.as_dict(), "n": scores.n}
            results[role]["counts"] = self.counts[role]
        return results

    def flat(self) -> dict[str, float | int | None]:
        """Return the figures alone, None where not measured, for tables and plots.

        `n` and the names of `COUNTS` are those of harmful prompts; those of the other sets begin with `PREFIXES`, as in
        `capability_n` and `task_truncated`. `over_refusal` is that of capability prompts, graded by the exact judge,
        and `benign_over_refusal` that of benign ones.
        """
        harmful, benign, capability, task = (self.scores.get(role) for role in PREFIXES)
        asr, refusal = (harmful.asr, harmful.refusal_rate) if harmful else (None, None)
        over_refusal = benign.refusal_rate if benign else None
        return {
            "asr": _value(asr),
            "asr_low": asr.low if asr else None,
            "asr_high": asr.high if asr else None,
            "harmful_score": harmful.harmful_score.value if harmful else None,
            "mean_score": harmful.mean_score if harmful else None,
            "refusal_rate": _value(refusal),
            "refusal_low": refusal.low if refusal else None,
            "refusal_high": refusal.high if refusal else None,
            "benign_over_refusal": _value(over_refusal),
            "benign_over_refusal_low": over_refusal.low if over_refusal else None,
            "benign_over_refusal_high": over_refusal.high if over_refusal else None,
            "capability": _value(capability.asr if capability else None),
            "over_refusal": _value(capability.refusal_rate if capability else None),
            "task_accuracy": _value(task.asr if task else None),
            **{name: count for role in PREFIXES for name, count in self._numbers(role).items()},
        }

    def _numbers(self, role: Role) -> dict[str, int | None]:
        """The number of answers in a set and what is counted there."""
        measured = {"n": self.scores[role].n, **self.counts[role]} if role in self.scores else {}
        return {f"{PREFIXES[role]}{name}": measured.get(name) for name in ("n", *COUNTS)}

    def write(self, directory: Path | str, record: Mapping[str, Any]) -> None:
        """Write `samples.jsonl`, then `results.json`, which thus marks a finished evaluation.

        Args:
            directory: The folder.
            record: What tells how to run it again, see `run_record`; its keys stand at the top level.
        """
        directory = Path(directory)
        write_jsonl(directory / "samples.jsonl", self.samples)
        judges = {role: {"name": judge.name, "description": judge.description} for role, judge in self.judges.items()}
        write_json(
            directory / "results.json",
            {
                "schema": SCHEMA,
                **record,
                "judge": judges.get("harmful", next(iter(judges.values()))),
                "judges": judges,
                "sources": self.sources,
                "decoding": asdict(self.decoding),
                "results": self.results,
            },
        )


@dataclass(frozen=True)
class Evaluator:
    """Measures a model on prompt sets, the same way every time.

    Attributes:
        sets: The prompts, at most one set for each role.
        judge: Grades the harmful and the benign set; the others are always graded by the exact judge.
        decoding: How answers are decoded.
        batch_size: Prompts decoded at once.
        seed: Seed of sampling.
        system_prompt: Put in front of every conversation that has no system turn.
        chat_template_kwargs: Passed to the chat template.
        drop_long_prompts: Leave out, and count, prompts that leave no room for an answer within the model's positions,
            instead of refusing them.
        raw_text: Take prompts as they stand, even if there is a chat template.
        asking: How harmful prompts are asked; the others are always asked plainly, as an adversary would ask them, too.
    """

    sets: Sequence[PromptSet]
    judge: Judge = field(default_factory=lambda: get_judge("exact"))
    decoding: Decoding = GREEDY
    batch_size: int = 64
    seed: int = 0
    system_prompt: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    drop_long_prompts: bool = False
    raw_text: bool = False
    asking: Asking = PLAINLY

    def __post_init__(self) -> None:
        roles = [prompts.role for prompts in self.sets]
        if not roles or len(set(roles)) < len(roles):
            raise InputError(f"an evaluation needs prompts, one set for a role at most, but was given {roles}")
        if self.batch_size < 1:
            raise InputError(f"--batch_size must be positive, but is {self.batch_size}")

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Evaluation:
        """Let the model answer all prompts, and grade the answers. The model is left as it was.

        Args:
            model: The model, see `generate`.
            tokenizer: Its tokenizer.

        Returns:
            The evaluation.

        Raises:
            InputError: If a prompt cannot be used with this model or tokenizer.
        """
        scores: dict[Role, Scores] = {}
        counts: dict[Role, dict[str, int]] = {}
        samples: list[dict[str, Any]] = []
        judges: dict[Role, Judge] = {}
        for prompts in self.sets:
            judge = judges[prompts.role] = judge_for(prompts.role, self.judge)
            places = self._places(model, tokenizer, prompts)
            asked = [prompts.prompts[place] for place in places]
            expected = [prompts.answers[place] if prompts.answers is not None else None for place in places]
            answers, grades = self._answers(model, tokenizer, prompts.role, judge, asked, expected)
            scores[prompts.role] = score(grades)
            counts[prompts.role] = {**count_marks(answers), "left_out": len(prompts.prompts) - len(places)}
            for place, prompt, answer, wanted, grade in zip(places, asked, answers, expected, grades, strict=True):
                samples.append(
                    {
                        "set": prompts.role,
                        "row": place + 1,
                        "prompt": prompt,
                        "answer": answer.text,
                        "thoughts": answer.thoughts,
                        "expected": wanted,
                        "grade": grade,
                        "judge": judge.name,
                        **answer.marks,
                    }
                )
        sources = {prompts.role: prompts.source for prompts in self.sets}
        return Evaluation(scores, counts, samples, judges, sources, self.decoding)

    def check(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Find out before a long run whether its measurements can be made.

        Args:
            model: The model, see `generate`.
            tokenizer: Its tokenizer.

        Raises:
            InputError: If a prompt cannot be used with this model or tokenizer.
        """
        for prompts in self.sets:
            self._places(model, tokenizer, prompts)

    def _answers(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        role: Role,
        judge: Judge,
        prompts: list[Prompt],
        expected: list[str | None],
    ) -> tuple[list[Answer], list[int]]:
        """The answers with their grades; where several are sampled for a prompt, the first with the highest grade."""
        asking, decoding = self._asking(role), self.decoding
        if asking.samples > 1:
            decoding = replace(decoding, do_sample=True, temperature=asking.temperature)
        rounds = []
        for number in range(asking.samples):
            answers = generate(
                model,
                tokenizer,
                [asking.prompt(prompt) for prompt in prompts],
                decoding=decoding,
                batch_size=self.batch_size,
                seed=self.seed + number,
                **self._rendering(role),
            )
            rounds.append(list(zip(answers, _grades(judge, prompts, answers, expected), strict=True)))
        best = [max(tries, key=lambda one: one[1]) for tries in zip(*rounds, strict=True)]
        return [answer for answer, _ in best], [grade for _, grade in best]

    def _places(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: PromptSet) -> list[int]:
        """The places of the prompts that can be answered."""
        try:
            asked = [self._asking(prompts.role).prompt(prompt) for prompt in prompts.prompts]
            rendering = self._rendering(prompts.role)
            places = answerable(model, tokenizer, asked, drop_long_prompts=self.drop_long_prompts, **rendering)
        except InputError as error:
            raise InputError(f"{prompts.source}: {error}") from error
        if not places:
            raise InputError(
                f"{prompts.source}: every prompt is too long for the model, so --drop_long_prompts leaves none"
            )
        return places

    def _asking(self, role: Role) -> Asking:
        return self.asking if role == "harmful" else PLAINLY

    def _rendering(self, role: Role) -> dict[str, Any]:
        asking = self._asking(role)
        return {
            "system_prompt": None if asking.raw else self.system_prompt,
            "chat_template_kwargs": None if asking.raw else self.chat_template_kwargs,
            "raw_text": self.raw_text or asking.raw,
            "opener": asking.opener,
            "prefix": asking.prefix,
        }


def _grades(
    judge: Judge, prompts: Sequence[Prompt], answers: Sequence[Answer], expected: Sequence[str | None]
) -> list[int]:
    """The grades of all answers; a judge sees those that are not empty."""
    said = [place for place, answer in enumerate(answers) if not answer.empty]
    found = judge.grades(
        [prompts[place] for place in said], [answers[place].text for place in said], [expected[place] for place in said]
    )
    by_place = dict(zip(said, found, strict=True))
    return [by_place.get(place, EMPTY_GRADE) for place in range(len(answers))]


def _value(rate: Rate | None) -> float | None:
    return rate.value if rate else None
