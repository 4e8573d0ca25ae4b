"""The pipeline around `dino`: DVC stages, tracking, and the Prefect flow generated from DVC's graph."""
