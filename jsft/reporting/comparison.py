"""Our scores compared with the paper's: tables, and what our runs say about the paper's claims."""

from jsft.evaluation.tasks import TASKS
from jsft.reporting import claims
from jsft.reporting.claims import CLAIMS, Evidence
from jsft.reporting.collect import Curve, Point, Run
from jsft.reporting.published import Score, all_runs
from jsft.reporting.tables import Table, number, step_name, with_interval

ONE_SEED = (
    "Every published score is of one run with one seed, and has no interval; AIME24 has 30 problems. "
    "Brackets: 95 % interval of ours over problems, without the seed of training."
)
MARKS = "*: in one transcription of the paper only. ?: doubtful"


def last_table(run: Run) -> Table | None:
    """Base model and last checkpoint of a published run: every benchmark, ours and the paper's."""
    rows, doubts = [], []
    for (task, metric), scores in run.scores.items():
        curve = run.curves.get(task)
        for step in _ends(curve, scores):
            point, score = _point(curve, metric, step), scores.get(step)
            if score is None and point is None:
                continue
            title = TASKS[task].title + ("" if metric == TASKS[task].primary else f", {metric}")
            rows.append([title, str(step), *_pair(task, curve, point, score), _size(run.curves.get(task), step)])
            if score is not None and score.doubt:
                doubts.append((title, step, score.doubt))
    if not any(row[2] != "–" for row in rows):
        return None
    header = ["benchmark", "step", "ours", "paper", "diff", "paper's", "samples"]
    note = (
        "paper's: where the paper's score lies, inside our interval, higher or lower. samples: ours, problems x samples; "
        "!: with --limit, not the whole benchmark. "
    )
    return Table(f"{run.name}: compared with the paper", header, rows, note + _note(run, doubts))


def course_table(run: Run) -> Table | None:
    """Every step of a run whose course the paper publishes, benchmark by benchmark."""
    pairs = [(c, run.scores.get((c.task, c.metric), {})) for c in run.curves.values()]
    pairs = [(curve, scores) for curve, scores in pairs if sum(step > 0 for step in scores) > 1]
    if not pairs:
        return None
    rows = []
    for step in sorted({n for c, scores in pairs for n in (*scores, *(p.step for p in c.points))}):
        cells = []
        for curve, scores in pairs:
            point, score = _point(curve, curve.metric, step), scores.get(step)
            cells += _pair(curve.task, curve, point, score)[:2]
        rows.append([step_name(step), *cells])
    header = ["step", *(name for curve, _ in pairs for name in (curve.title, "paper"))]
    doubts = [(c.title, step, score.doubt) for c, scores in pairs for step, score in scores.items() if score.doubt]
    return Table(f"{run.name}: compared with the paper, step by step", header, rows, _note(run, doubts))


def grid_table(runs: list[Run]) -> Table | None:
    """Last checkpoints of several published runs, as in the paper's tables: ours / the paper's."""
    chosen = [run for run in runs if run.published and any(curve.trained for curve in run.curves.values())]
    tasks = [task for task in TASKS if any(task in run.curves and run.curves[task].trained for run in chosen)]
    if len(chosen) < 2:
        return None
    rows = []
    for run in chosen:
        cells = []
        for task in tasks:
            curve = run.curves.get(task)
            point = curve.trained[-1] if curve and curve.trained else None
            scores = run.scores.get((task, TASKS[task].primary), {})
            last = point.step if point else max((step for step in scores if step > 0), default=None)
            cells.append(f"{number(point.score, curve) if point else '–'} / {_published(scores.get(last), task)}")
        rows.append([run.name, *cells])
    title = "Last checkpoints: ours / the paper's at the same step"
    return Table(title, ["run", *(TASKS[task].title for task in tasks)], rows, f"{ONE_SEED} {MARKS}.{_changes(runs)}")


def claims_table(runs: list[Run]) -> Table | None:
    """Each claim of the paper: what our runs say, and what its published scores say under the same rule."""
    ours = [evidence for run in runs if (evidence := evidence_of(run))]
    if not ours:
        return None
    paper = [evidence for run in all_runs() if (evidence := claims.as_published(run))]
    rows = []
    for claim in CLAIMS:
        found, theirs = claims.judge(claim, ours), claims.judge(claim, paper)
        published = theirs.verdict if claim.look(paper) else "no scores published"
        rows.append([f"{claim.topic}: {claim.statement}", found.verdict, found.text, published])
    note = (
        "Differences in points, ± 95 %. A verdict needs an interval that leaves out 0. Two evaluations of the same "
        "problems are compared problem by problem; without per_problem.json (earlier versions, the paper) two scores are "
        "taken as independent, and 'cannot be said' comes too often rather than too rarely. Intervals cover problems, not seeds of training. Last column: the paper's own scores under this rule, with binomial errors."
    )
    return Table(
        "The paper's claims",
        ["claim", "these runs", "why", "the paper's scores"],
        rows,
        note + _changes(runs),
        prose=True,
    )


def evidence_of(run: Run) -> Evidence | None:
    """Our scores of a published run, for the claims; None for any other run, or one without a trained step."""
    if run.published is None or not any(curve.trained for curve in run.curves.values()):
        return None
    scores = {
        task: {p.step: claims.Score(p.score, _error(p), p.problems, p.asked) for p in curve.points}
        for task, curve in run.curves.items()
        if curve.share
    }
    return Evidence(run.name, *run.published, scores)


def _error(point: Point) -> float | None:
    return None if point.low is None else (point.high - point.low) / (2 * 1.96)


def _ends(curve: Curve | None, scores: dict[int, Score]) -> list[int]:
    """Update 0, the last update of both, and our last one."""
    ours = {p.step for p in curve.trained} if curve else set()
    theirs = {step for step in scores if step > 0}
    last = {max(found) for found in (ours & theirs or theirs, ours) if found}
    return sorted({0} | last)


def _point(curve: Curve | None, metric: str, step: int) -> Point | None:
    """Our score at a step; of a metric that the curve does not show, a point with that metric's numbers."""
    point = next((p for p in curve.points if p.step == step), None) if curve else None
    if point is None or metric == curve.metric:
        return point
    average = point.results["metrics"].get(metric, {}).get("avg")
    if average is None or average["mean"] is None:
        return None
    low, high = average["ci95"] or (None, None)
    scale = 100.0 if curve.share else 1.0
    values = [None if value is None else scale * value for value in (average["mean"], low, high)]
    return Point(step, *values, point.tokens, point.cut, point.no_think_end, point.results)


def _pair(task: str, curve: Curve | None, point: Point | None, score: Score | None) -> list[str]:
    """Cells: ours, the paper's, difference, whether the paper's lies within our interval."""
    ours = with_interval(point, curve) if point else "–"
    theirs = _published(score, task)
    if point is None or score is None:
        return [ours, theirs, "–", "–"]
    place = "–"
    if point.low is not None:
        place = "higher" if score.value > point.high else "lower" if score.value < point.low else "inside"
    digits = 1 if curve.share else 2
    return [ours, theirs, f"{point.score - score.value:+.{digits}f}", place]


def _published(score: Score | None, task: str) -> str:
    return "–" if score is None else f"{score.value:.{1 if TASKS[task].share else 2}f}{score.mark}"


def _size(curve: Curve | None, step: int) -> str:
    point = next((p for p in curve.points if p.step == step), None) if curve else None
    if point is None:
        return "–"
    limit = (point.results.get("settings") or {}).get("limit")
    return f"{point.results['problems']} x {point.results['samples_per_problem']}{'!' if limit else ''}"


def _note(run: Run, doubts: list[tuple[str, int, str]]) -> str:
    """doubts: (benchmark, step, what is uncertain) of the scores shown."""
    found: dict[tuple[str, str], list[str]] = {}
    for title, step, doubt in doubts:
        found.setdefault((title, doubt), []).append(str(step))
    listed = "; ".join(f"{title} at {', '.join(steps)}: {doubt}" for (title, doubt), steps in found.items())
    note = f"{ONE_SEED} {MARKS}{': ' if listed else ''}{listed}."
    return note + _changes([run])


def _changes(runs: list[Run]) -> str:
    """A sentence that names the runs that were not trained as published; '' where there is none."""
    changed = [f"{run.name} ({', '.join(run.changes)})" for run in runs if run.changes]
    return f" Trained otherwise than published: {'; '.join(changed)}." if changed else ""
