"""docs/team.md as it stands: a group's servers on one machine, and two people with a checkout each."""

import base64
import json
import re
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from team import PAGE, ROOT, Team, missing, servers
from tiny_settings import TINY

from pipelines.processes.scratch import copy_repository

pytestmark = [pytest.mark.acceptance, pytest.mark.skipif(bool(missing()), reason=missing())]


SHORT: dict[str, dict[str, Any]] = {
    "pretrain": TINY["pretrain"] | {"epochs": 1},
    "linear": TINY["linear"] | {"epochs": 1},
}


@dataclass
class Evening:
    """What was said, and what the servers hold at the end."""

    team: Team
    ada: str
    ben: str
    ben_experiment: str
    runs: list[dict[str, Any]]
    dumps: str
    objects: dict[str, bytes] = field(default_factory=dict)


@pytest.fixture(scope="module")
def evening() -> Iterator[Evening]:
    """All of it, once; its folder is short and open to PostgreSQL's user, which pytest's are not."""
    folder = Path(tempfile.mkdtemp(prefix="dino-team-"))
    folder.chmod(0o755)
    try:
        with servers(folder) as team:
            yield two_people(team)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def two_people(team: Team) -> Evening:
    seed = team.folder / "admin" / "dino"
    copy_repository(seed, {**TINY, **SHORT}, root=ROOT)
    bare = team.folder / "dino.git"
    subprocess.run(["git", "clone", "--quiet", "--bare", seed, bare], check=True)
    subprocess.run(["git", "remote", "add", "origin", bare], cwd=seed, check=True)
    (project,) = PAGE["The project"]
    team.run(project, team.admin(), "project.said", cwd=seed)
    keys = {name: team.secrets[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    keys |= {"PREFECT_SERVER_API_AUTH_STRING": team.secrets["PREFECT_SERVER_API_AUTH_STRING"]}

    ada = team.environment("ada", keys | {"ADA_PASSWORD": team.secrets["ADA_PASSWORD"]})
    said_ada = team.run("\n".join(PAGE["Ada trains and pushes"]), ada, "ada.said", cwd=Path(ada["HOME"]))
    ben = team.environment("ben", keys | {"BEN_PASSWORD": team.secrets["BEN_PASSWORD"]})
    pull, experiment = PAGE["Ben pulls, and reruns nothing"]
    said_ben = team.run(pull, ben, "ben.said", cwd=Path(ben["HOME"]))
    names = "export MLFLOW_TRACKING_USERNAME=ben MLFLOW_TRACKING_PASSWORD=$BEN_PASSWORD\n"
    said_experiment = team.run(names + experiment, ben, "ben.said", cwd=Path(ben["HOME"]) / "dino")

    runs = ask(team, "runs/search", {"experiment_ids": [experiment_id(team)]})["runs"]
    databases = "".join(f"pg_dump --host $TEAM {name}\n" for name in ("mlflow", "mlflow_auth", "prefect"))
    dumps = team.run(databases, team.admin(), "dumps.said", postgres=True, cwd=team.folder)
    return Evening(team, said_ada, said_ben, said_experiment, runs, dumps, objects(team))


def ask(team: Team, what: str, question: dict[str, Any] | None = None) -> Any:
    """MLflow's answer to ben."""
    address = f"http://127.0.0.1:{team.ports['MLFLOW_PORT']}/api/2.0/mlflow/{what}"
    password = base64.b64encode(f"ben:{team.secrets['BEN_PASSWORD']}".encode()).decode()
    headers = {"Authorization": f"Basic {password}", "Content-Type": "application/json"}
    body = json.dumps(question).encode() if question else None
    with urllib.request.urlopen(urllib.request.Request(address, body, headers)) as answer:
        return json.load(answer)


def experiment_id(team: Team) -> str:
    return str(ask(team, "experiments/get-by-name?experiment_name=dino")["experiment"]["experiment_id"])


def objects(team: Team) -> dict[str, bytes]:
    """Everything in both buckets."""
    import boto3  # here: without it this file is skipped with a word

    s3 = boto3.client(
        "s3", endpoint_url=f"http://127.0.0.1:{team.ports['S3_PORT']}", region_name="us-east-1",
        aws_access_key_id="any", aws_secret_access_key="any",
    )  # fmt: skip
    return {
        f"{bucket}/{entry['Key']}": s3.get_object(Bucket=bucket, Key=entry["Key"])["Body"].read()
        for bucket in ("dino-dvc", "dino-mlflow")
        for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        for entry in page.get("Contents", [])
    }


def tags(run: dict[str, Any]) -> dict[str, str]:
    return {tag["key"]: tag["value"] for tag in run["data"]["tags"]}


def locked(folder: Path) -> dict[str, str]:
    """md5 of every out in dvc.lock."""
    lock = yaml.safe_load((folder / "dvc.lock").read_text())
    return {out["path"]: out["md5"] for stage in lock["stages"].values() for out in stage["outs"]}


STAGES = list(yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"])


def test_one_trains_by_prefect_and_pushes(evening: Evening) -> None:
    assert all(re.search(rf"{stage} .*\bran\b", evening.ada) for stage in STAGES), evening.ada
    held = [name for name in evening.objects if name.startswith("dino-dvc/store/files/md5/")]
    assert len(held) > len(STAGES)
    assert any(name.endswith("/report/index.html") for name in evening.objects), "no report beside MLflow's row"
    assert "not up to date" not in evening.ada


def test_another_pulls_and_reruns_nothing(evening: Evening) -> None:
    for said in (evening.ben, evening.ben_experiment):
        assert "Running stage" not in said
        assert sorted(set(re.findall(r"Stage '(\w+)' didn't change, skipping", said))) == sorted(STAGES)
    assert all(re.search(rf"{stage} .*unchanged", evening.ben) for stage in STAGES), evening.ben
    ada, ben = (evening.team.folder / person / "dino" for person in ("ada", "ben"))
    assert locked(ada) == locked(ben)
    teacher = "models/teacher.safetensors"
    assert (ada / teacher).read_bytes() == (ben / teacher).read_bytes()


def test_both_rows_are_seen_and_stay_two(evening: Evening) -> None:
    assert len(evening.runs) == 2
    assert {run["info"]["status"] for run in evening.runs} == {"FINISHED"}
    assert {tags(run)["mlflow.user"] for run in evening.runs} == {"ada"}
    assert {tags(run).get("dvc.exp_name") for run in evening.runs} == {None, "wider"}
    assert all(run["info"]["artifact_uri"].startswith("mlflow-artifacts:/") for run in evening.runs)
    assert len({tags(run)["dvc.models/teacher.safetensors"] for run in evening.runs}) == 2
    assert "completed in http://127.0.0.1" in evening.ben_experiment
    page = f"http://127.0.0.1:{evening.team.ports['MLFLOW_PORT']}/#/experiments/{experiment_id(evening.team)}/runs"
    assert f"Experiments: {page}" in evening.ben_experiment


def test_the_flow_runs_of_both_are_in_prefects_database(evening: Evening) -> None:
    flow_runs = re.search(r"^COPY public\.flow_run \(.*?\n(.*?)^\\\.$", evening.dumps, re.MULTILINE | re.DOTALL)
    assert flow_runs and flow_runs[1].count("\tCOMPLETED\t") >= 2


STORES = ("secrets.env", "pgpass", "ada/dino/.dvc/config.local", "ada/.mlflow/credentials")


def test_secrets_stand_in_their_stores_and_nowhere_else(evening: Evening) -> None:
    """Looked for in every file (repositories, .work, homes, servers' logs), table and object that the evening left."""
    words = [word.removeprefix("team:").encode() for word in evening.team.secrets.values()]
    assert len(words) == len(set(words)) >= 9 and min(map(len, words)) >= 20
    folder, found = evening.team.folder, set()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            found |= {str(path.relative_to(folder)) for word in words if word in content}
    assert found == set(STORES)
    for store in STORES:
        assert not (folder / store).stat().st_mode & 0o077 or store.endswith("config.local")
    for name in ("ada", "ben"):
        assert not subprocess.run(
            ["git", "ls-files", ".dvc/config.local"], cwd=folder / name / "dino", capture_output=True
        ).stdout
        history = subprocess.run(
            ["git", "log", "--all", "-p"], cwd=folder / name / "dino", capture_output=True, check=True
        )
        assert b"Date:" in history.stdout and not any(word in history.stdout for word in words)
    assert not any(word in content for word in words for content in evening.objects.values())
    assert "ada" in evening.dumps and not any(word.decode() in evening.dumps for word in words)
