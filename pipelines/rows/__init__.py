"""MLflow's side: a row for each pretraining, what it says, and where in the working directory that stands."""
