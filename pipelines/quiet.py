"""What DVC, MLflow and Prefect do unasked, set before they are imported (`pipelines` imports this file first).

Nothing is sent home, servers listen on this machine only, and log lines are short. These are defaults: a variable
that is already set stays, so `PREFECT_SERVER_ANALYTICS_ENABLED=true` in the environment turns one back on.
`.dvc/config` says the same to a `dvc` that is called by hand.
"""

import os

DEFAULTS = {
    # The word: MLflow does not take `1`. Prefect's client heeds it too.
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_API_HOST": "127.0.0.1",
    # In memory, the slots that flows hold would never be free again after a restart of the server.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    # Prefect's own 20 s are near what a first start costs (a new database, a slow disk).
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",
    # "12:30:01 | knn | 10,000 of 10,000", not "12:30:01.482 | INFO    | Task run 'knn' - 10,000 of 10,000".
    "PREFECT_LOGGING_FORMATTERS_STANDARD_DATEFMT": "%H:%M:%S",
    "PREFECT_LOGGING_FORMATTERS_STANDARD_FLOW_RUN_FMT": "%(asctime)s | %(message)s",
    "PREFECT_LOGGING_FORMATTERS_STANDARD_TASK_RUN_FMT": "%(asctime)s | %(task_run_name)s | %(message)s",
}

for name, value in DEFAULTS.items():
    os.environ.setdefault(name, value)
