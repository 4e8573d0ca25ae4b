"""What a run of the flow is told as: a markdown page for Prefect, and plain lines for the terminal."""

from collections.abc import Iterable, Mapping, Sequence

from pipelines import paths
from pipelines.evaluation import scores
from pipelines.processes.graph import Graph
from pipelines.processes.runner import Outcome, StageResult

Results = Mapping[str, StageResult]


def succeeded(plan: Iterable[str], results: Results) -> bool:
    """Whether every stage of the plan is up to date now, and no other step failed."""
    bad = (Outcome.FAILED, Outcome.OVERTIME, Outcome.CANCELLED)
    return set(plan) <= set(results) and all(result.outcome not in bad for result in results.values())


def failed(results: Iterable[StageResult]) -> list[StageResult]:
    """The stages whose command failed, or was ended at its time limit."""
    return [result for result in results if result.outcome in (Outcome.FAILED, Outcome.OVERTIME)]


def cancelled(results: Results) -> bool:
    """Whether a stage was ended because the run was."""
    return any(result.outcome is Outcome.CANCELLED for result in results.values())


def unchanged(results: Results) -> bool:
    """Whether nothing was done at all."""
    return all(result.outcome is Outcome.UNCHANGED for result in results.values())


def markdown(plan: Iterable[str], results: Results, *, whole: bool, more: Sequence[str] = ()) -> str:
    """The page of one run: scores, where the report lies, and what became of each stage.

    Args:
        plan: the stages, and other steps, that were to run.
        results: those that did.
        whole: whether the plan is all there is; scores are shown only then, lest they be an earlier run's.
        more: paragraphs behind the scores.
    """
    plan = list(plan)
    parts = [_scores(), *_report()] if whole and succeeded(plan, results) else []
    parts += [*more, _stages(plan, results)]
    parts += [_failure(result) for result in failed(results.values())]
    return "\n\n".join(part for part in parts if part) + "\n"


def last_words(plan: Graph, results: Results, seconds: float) -> list[str]:
    """Lines that tell a person how it went; the last one says where the result is, or what to do."""
    if unchanged(results) and succeeded(plan, results):
        stages = "stage is as it was" if len(plan) == 1 else "stages are as they were"
        return [f"Nothing changed: {len(plan)} {stages} ({seconds:.0f} s).", *_report()]
    if succeeded(plan, results):
        outcomes = [results[stage].outcome for stage in plan]
        counts = ", ".join(f"{outcomes.count(o)} {o}" for o in Outcome if o in outcomes)
        stages = "stage" if len(outcomes) == 1 else "stages"
        return [f"Done in {seconds:.0f} s: {len(outcomes)} {stages}, {counts}.", *_report()]
    lines: list[str] = []
    for result in failed(results.values()):
        lines += [f"{in_words(result)}. Its last lines:", *(f"    {line}" for line in result.last_lines)]
        lines += [f"All that it said: {result.log}"] if result.log else []
    if never := [stage for stage in plan if stage not in results]:
        lines.append(f"Not started, as they need it: {', '.join(never)}")
    commands = " and ".join(result.rerun for result in failed(results.values()))
    return [*lines, f"When that is mended: {commands}"] if commands else [*lines, "Ended before it was done."]


def in_words(result: StageResult) -> str:
    """How a stage ended, as half a sentence."""
    if result.outcome is Outcome.OVERTIME:
        minutes = result.seconds / 60
        return f"{result.stage} was ended at its time limit, after {minutes:.1f} minutes (runtime.stages)"
    return f"{result.stage} failed"


def _failure(result: StageResult) -> str:
    """What a person needs who mends it."""
    where = f"All that it said: `{result.log}`\n\n" if result.log else ""
    lines = "\n".join(["```", *result.last_lines, "```"])
    return f"### {in_words(result)}\n\n{lines}\n\n{where}To run it again: `{result.rerun}`"


def _stages(plan: Iterable[str], results: Results) -> str:
    rows = ["| stage | | seconds |", "| --- | --- | ---: |"]
    for stage in plan:
        result = results.get(stage)
        told = f"{result.outcome} | {result.seconds:.1f}" if result else "not started |"
        rows.append(f"| {stage} | {told} |")
    return "\n".join(rows)


def _scores() -> str:
    """Test top-1 of every kind of features, by every evaluation that was made."""
    found = scores.evaluations()
    shown = [evaluation for evaluation in found if evaluation.scores]
    if not shown:
        return ""
    rows = [f"| test top-1, % | {' | '.join(e.name for e in shown)} |", "| --- |" + " ---: |" * len(shown)]
    for kind, title in scores.KINDS.items():
        cells = [str(e.scores[kind].test) if kind in e.scores else "" for e in shown]
        rows.append(f"| {title} | {' | '.join(cells)} |")
    notes = ["", "In brackets: the 95 % interval."]
    notes += [f"{e.name}: left out, {e.skipped}" for e in found if e.skipped]
    return "\n".join([*rows, *notes])


def _report() -> list[str]:
    """Where the report lies, if there is one."""
    return [f"Report: {page}" for page in sorted(paths.REPORT.glob("*.html"))[:1]]
