"""An evaluation: prompts → generate → judge → score, and the files it leaves."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from holdfast.data.load import Prompt
from holdfast.data.rendering import ChatFormat
from holdfast.data.sources import named
from holdfast.errors import InputError
from holdfast.evaluation.answers import MARKS, Answer, count_marks
from holdfast.evaluation.asking import PLAINLY, Asking
from holdfast.evaluation.decoding import GREEDY, Decoding
from holdfast.evaluation.generation import answerable, generate
from holdfast.evaluation.judges import Judge, Verdict, get_judge
from holdfast.evaluation.judging import (
    Opinion,
    SecondOpinion,
    columns,
    judge_answers,
    judge_record,
    mean_score,
    second_figures,
    second_opinion,
    unjudged,
    worst,
)
from holdfast.evaluation.prompts import JUDGED, PromptSet, Role, judge_for
from holdfast.evaluation.scores import Rate, Scores, score
from holdfast.evaluation.tasks import CapabilityTasks, TaskFigure
from holdfast.files import write_json, write_jsonl

SCHEMA = 3
"""Version of the layout of `results.json` and `samples.jsonl`, also of an attack's."""

PREFIXES: dict[Role, str] = {"harmful": "", "benign": "benign_", "capability": "capability_", "task": "task_"}
"""What the names of a set's numbers begin with in `Evaluation.flat`, by its role."""

COUNTS = (*MARKS, "unjudged", "left_out")
"""What is counted beside the rates of every set: the marked answers, those without a grade, and prompts left out."""


@dataclass(frozen=True)
class Evaluation:
    """What a model answered, how that was graded and what it comes to.

    Attributes:
        scores: The scores of every set, by role.
        counts: What is counted in every set beside its scores, by role and then by the names of `COUNTS`.
        samples: One row per answer: `set`, `row` (from 1), `prompt`, `answer`, `thoughts`, `expected`, the verdict (see
            `holdfast.evaluation.judging.columns`), also a second judge's, and whether it is each of `MARKS`.
        judges: The judge of every set, by role.
        sources: Where the prompts of every set are from, by role.
        decoding: How the answers were decoded; None if that is not known.
        judge_scores: The mean of the judge's own scores in every set, by role; None where it has none.
        seconds: What the second judge makes of the sets that it was asked about, by role.
        tasks: The figures of lm_eval's tasks; None where none were measured.
    """

    scores: dict[Role, Scores]
    counts: dict[Role, dict[str, int]]
    samples: list[dict[str, Any]] = field(repr=False)
    judges: dict[Role, Judge]
    sources: dict[Role, str]
    decoding: Decoding | None
    judge_scores: dict[Role, float | None] = field(default_factory=dict)
    seconds: dict[Role, SecondOpinion] = field(default_factory=dict)
    tasks: tuple[TaskFigure, ...] | None = None

    def add(
        self,
        role: Role,
        rows: Sequence[Mapping[str, Any]],
        answers: Sequence[Answer],
        first: Opinion,
        second: Opinion | None = None,
        *,
        left_out: int = 0,
    ) -> None:
        """Add what was judged of a set.

        Args:
            role: What its prompts are for.
            rows: What `samples` is to say of every answer beside its verdicts and marks.
            answers: The answers.
            first: The judge and its verdicts, which the scores are of.
            second: A second judge and its verdicts.
            left_out: How many prompts were left out.
        """
        judge, verdicts = first
        self.judges[role] = judge
        self.scores[role] = score([one.grade for one in verdicts], tells_refusals=judge.tells_refusals)
        self.judge_scores[role] = mean_score(verdicts)
        self.counts[role] = {**count_marks(answers), "unjudged": unjudged(verdicts), "left_out": left_out}
        said = [columns(judge, verdict) for verdict in verdicts]
        if second is not None:
            self.seconds[role] = second_opinion(first, second)
            said = [{**one, **columns(second[0], two, "second_")} for one, two in zip(said, second[1], strict=True)]
        for row, judged, answer in zip(rows, said, answers, strict=True):
            self.samples.append({**row, **judged, **answer.marks})

    def with_sets_of(self, other: "Evaluation") -> "Evaluation":
        """This one, with the sets of another in the place of its own, and that one's answers alone."""
        return replace(
            self,
            scores={**self.scores, **other.scores},
            counts={**self.counts, **other.counts},
            samples=other.samples,
            judges={**self.judges, **other.judges},
            sources={**self.sources, **other.sources},
            judge_scores={**self.judge_scores, **other.judge_scores},
            seconds={**self.seconds, **other.seconds},
        )

    @property
    def results(self) -> dict[Role, dict[str, Any]]:
        """The results by role, ready for JSON; each rate with `value`, `low`, `high`, `count` and `n`.

        `harmful` has `asr`, `harmful_score`, `mean_score`, `refusal_rate` and `judge_score`; `benign` has
        `over_refusal`; `capability` has `capability` (exact answers) and `over_refusal`; `task` has `task_accuracy`.
        Each has `n`, the number of answers, `counts` and, where a second judge was asked, `second` (see
        `SecondOpinion`). What is not measured is None.
        """
        results: dict[Role, dict[str, Any]] = {}
        for role, scores in self.scores.items():
            figures = scores.as_dict()
            if role == "harmful":
                results[role] = {**figures, "judge_score": self.judge_scores.get(role)}
            elif role == "benign":
                results[role] = {"over_refusal": figures["refusal_rate"], "n": scores.n}
            elif role == "capability":
                results[role] = {"capability": figures["asr"], "over_refusal": figures["refusal_rate"], "n": scores.n}
            else:
                results[role] = {"task_accuracy": figures["asr"], "n": scores.n}
            results[role]["counts"] = self.counts[role]
            if role in self.seconds:
                results[role]["second"] = self.seconds[role].as_dict()
        return results

    def flat(self) -> dict[str, Any]:
        """Return the figures alone, None where not measured, for tables and plots.

        `n` and the names of `COUNTS` are those of harmful prompts; those of the other sets begin with `PREFIXES`, as in
        `capability_n` and `task_truncated`. `over_refusal` is that of capability prompts, graded by the exact judge,
        and `benign_over_refusal` that of benign ones. `capability_tasks` is a list, of what `TaskFigure` has.
        """
        harmful, benign, capability, task = (self.scores.get(role) for role in PREFIXES)
        asr, refusal = (harmful.asr, harmful.refusal_rate) if harmful else (None, None)
        over_refusal = benign.refusal_rate if benign else None
        return {
            "asr": _value(asr),
            "asr_low": asr.low if asr else None,
            "asr_high": asr.high if asr else None,
            "harmful_score": _value(harmful.harmful_score if harmful else None),
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
            "capability_tasks": self._tasks,
            "judge_score": self.judge_scores.get("harmful"),
            **second_figures(self.seconds.get("harmful")),
            **{name: count for role in PREFIXES for name, count in self._numbers(role).items()},
        }

    @property
    def _tasks(self) -> list[dict[str, Any]] | None:
        return None if self.tasks is None else [figure.as_dict() for figure in self.tasks]

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
        judges = {role: judge_record(judge) for role, judge in self.judges.items()}
        seconds = {role: judge_record(opinion.judge) for role, opinion in self.seconds.items()}
        write_json(
            directory / "results.json",
            {
                "schema": SCHEMA,
                **record,
                "judge": judges.get("harmful", next(iter(judges.values()), None)),
                "judges": judges,
                "second_judges": seconds,
                "sources": self.sources,
                "decoding": None if self.decoding is None else asdict(self.decoding),
                "results": {**self.results, "capability_tasks": self._tasks},
            },
        )


@dataclass(frozen=True)
class Evaluator:
    """Measures a model on prompt sets and tasks, the same way every time.

    Attributes:
        sets: The prompts, at most one set for each role.
        judge: Grades the harmful and the benign set; the others are always graded by the exact judge.
        second_judge: Grades the answers to those two as well; its grades stand beside the first one's.
        decoding: How answers are decoded.
        batch_size: Prompts decoded at once.
        seed: Seed of sampling.
        system_prompt: Put in front of every conversation that has no system turn.
        chat_template_kwargs: Passed to the chat template.
        drop_long_prompts: Leave out, and count, prompts that leave no room for an answer within the model's positions,
            instead of refusing them.
        raw_text: Take prompts as they stand, even if there is a chat template.
        asking: How harmful prompts are asked; the others are always asked plainly, as an adversary would ask them, too.
        tasks: Tasks of lm_eval, which bring their own decoding and grading; then there may be no prompts.
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
    second_judge: Judge | None = None
    tasks: CapabilityTasks | None = None

    def __post_init__(self) -> None:
        roles = [prompts.role for prompts in self.sets]
        if not (roles or self.tasks) or len(set(roles)) < len(roles):
            raise InputError(f"an evaluation needs prompts or tasks, one set for a role at most, but was given {roles}")
        if "benign" in roles and not self.judge.tells_refusals:
            raise InputError(
                f"--over_refusal_data: the judge {self.judge.name} does not tell refusals from other harmless answers; "
                "choose refusal, rubric, strongreject or wildguard"
            )
        if self.batch_size < 1:
            raise InputError(f"--batch_size must be positive, but is {self.batch_size}")

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Evaluation:
        """Let the model answer all prompts, and grade the answers; then measure the tasks. The model is left as it was.

        Args:
            model: The model, see `generate`.
            tokenizer: Its tokenizer.

        Returns:
            The evaluation.

        Raises:
            InputError: If a prompt cannot be used with this model or tokenizer.
        """
        found = Evaluation({}, {}, [], {}, {}, self.decoding)
        for prompts in self.sets:
            role, judge = prompts.role, judge_for(prompts.role, self.judge)
            places = self._places(model, tokenizer, prompts)
            asked = [prompts.prompts[place] for place in places]
            expected = [prompts.answers[place] if prompts.answers is not None else None for place in places]
            answers, verdicts = self._answers(model, tokenizer, role, judge, asked, expected)
            opinion = None
            if self.second_judge is not None and role in JUDGED:
                opinion = self.second_judge, judge_answers(self.second_judge, asked, answers, expected)
            rows = [
                {
                    "set": role,
                    "row": place + 1,
                    "prompt": prompt,
                    "answer": answer.text,
                    "thoughts": answer.thoughts,
                    "expected": wanted,
                }
                for place, prompt, answer, wanted in zip(places, asked, answers, expected, strict=True)
            ]
            found.sources[role] = prompts.source
            found.add(role, rows, answers, (judge, verdicts), opinion, left_out=len(prompts.prompts) - len(places))
        if self.tasks is None:
            return found
        written = self._written(tokenizer)
        return replace(found, tasks=self.tasks(model, written, batch_size=self.batch_size, seed=self.seed))

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
        if self.tasks is not None:
            self.tasks.check(model, self._written(tokenizer))

    def _written(self, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
        return ChatFormat(tokenizer, self.system_prompt, self.chat_template_kwargs, self.raw_text)

    def asking_otherwise(self, asking: Asking) -> "Evaluator":
        """The same measurement of harmful prompts alone, asked in another way.

        Raises:
            InputError: There are no harmful prompts, which alone are asked otherwise.
        """
        harmful = [prompts for prompts in self.sets if prompts.role == "harmful"]
        if not harmful:
            raise InputError("only harmful prompts are asked otherwise, and there are none; give them as --eval_data")
        return replace(self, sets=harmful, asking=asking, tasks=None)

    def _answers(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        role: Role,
        judge: Judge,
        prompts: list[Prompt],
        expected: list[str | None],
    ) -> tuple[list[Answer], list[Verdict]]:
        """The answers with their verdicts; where several are sampled for a prompt, the worst."""
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
            verdicts = judge_answers(judge, prompts, answers, expected)
            rounds.append(list(zip(answers, verdicts, strict=True)))
        chosen = [worst(tries) for tries in zip(*rounds, strict=True)]
        return [answer for answer, _ in chosen], [verdict for _, verdict in chosen]

    def _places(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: PromptSet) -> list[int]:
        """The places of the prompts that can be answered."""
        try:
            asked = [self._asking(prompts.role).prompt(prompt) for prompt in prompts.prompts]
            rendering = self._rendering(prompts.role)
            places = answerable(model, tokenizer, asked, drop_long_prompts=self.drop_long_prompts, **rendering)
        except InputError as error:
            raise InputError(f"{named(prompts.source)}: {error}") from error
        if not places:
            raise InputError(
                f"{named(prompts.source)}: every prompt is too long for the model, so --drop_long_prompts leaves none"
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


def _value(rate: Rate | None) -> float | None:
    return rate.value if rate else None
