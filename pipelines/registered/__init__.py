"""MLflow's model registry: versions, the champion, and the model as others load it."""
