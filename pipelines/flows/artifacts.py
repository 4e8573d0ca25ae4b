"""What a person looks for on a flow run's page besides tasks and logs: Prefect's artifacts."""

import base64
from collections.abc import Mapping, Sequence

from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)

from pipelines import paths
from pipelines.flows import summary
from pipelines.processes.graph import Graph
from pipelines.processes.runner import Outcome, StageResult

MAX_PICTURE_BYTES = 400_000  # each is kept in Prefect's database, whole


def show_run(plan: Graph, results: Mapping[str, StageResult], *, whole: bool, more: Sequence[str] = ()) -> None:
    """The page of a run, and pictures of new results.

    Args:
        plan: The stages that were to run.
        results: What became of them, and of other steps.
        whole: Whether the plan is all there is.
        more: Paragraphs for the page's end.
    """
    page = summary.markdown(plan, results, whole=whole, more=more)
    create_markdown_artifact(page, key="dino", description="Scores, and what became of each stage")
    news = any(results[stage].outcome is not Outcome.UNCHANGED for stage in plan if stage in results)
    if whole and news and summary.succeeded(plan, results):
        show_pictures()


def show_pictures() -> None:
    """The report's pictures, within Prefect's page: a server elsewhere does not see our files."""
    for picture in [*sorted(paths.REPORT.glob("*.png")), paths.CROPS_PICTURE]:
        if picture.is_file() and picture.stat().st_size <= MAX_PICTURE_BYTES:
            data = base64.b64encode(picture.read_bytes()).decode()
            create_image_artifact(
                f"data:image/png;base64,{data}", key=f"dino-{picture.stem.replace('_', '-')}", description=str(picture)
            )


def show_comparison(rows: list[dict[str, str]], words: str) -> None:
    """A table of this run against the champion."""
    create_table_artifact(rows, key="dino-champion", description=words)


def show_row(address: str) -> None:
    """A link to the run's row in MLflow."""
    create_link_artifact(address, "The run in MLflow", key="dino-mlflow", description="Parameters, curves, pictures")
