"""The pipeline around `dino`: DVC stages, tracking, and the Prefect flow generated from DVC's graph."""

from pipelines import quiet as quiet  # before DVC, MLflow and Prefect are imported anywhere
