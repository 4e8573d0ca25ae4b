"""Prefect's side: a task for each stage, artifacts, cancels, and what a tick does besides stages."""
