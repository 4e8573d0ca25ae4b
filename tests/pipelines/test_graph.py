import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from toy import PROJECT, repository

from pipelines.processes.graph import Graph, stage_graph, stages_for

# DVC's own use of pygtrie
pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")


@pytest.fixture(autouse=True)
def in_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def edges_by_hand(dvc_yaml: Path) -> dict[str, set[str]]:
    """The double loop: a stage needs another when it reads a file that is, or lies in, one that the other writes."""
    text = dvc_yaml.read_text().replace("${data.folder}", "data/raw/fashion-mnist")
    stages = yaml.safe_load(text)["stages"]

    def written(stage: dict) -> list[str]:
        entries = [*stage.get("outs", []), *stage.get("metrics", []), *stage.get("plots", [])]
        return [path for entry in entries for path in ([entry] if isinstance(entry, str) else entry)]

    return {
        name: {
            other
            for other in stages
            if any(f"{d}/".startswith(f"{out}/") for d in stage.get("deps", []) for out in written(stages[other]))
        }
        for name, stage in stages.items()
    }


def test_graph_is_the_projects_dvc_yaml(tmp_path):
    for file in ("dvc.yaml", "params.yaml", ".dvc/config", ".dvcignore"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(PROJECT / file, tmp_path / file)
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    graph = stage_graph()
    assert {stage: set(needs) for stage, needs in graph.items()} == edges_by_hand(tmp_path / "dvc.yaml")
    order = list(graph)
    assert all(order.index(need) < order.index(stage) for stage in graph for need in graph[stage])


def test_order_does_not_depend_on_dvc_yaml_being_sorted(tmp_path):
    stages = {"last": (["b", "a"], ""), "b": (["first"], ""), "a": (["first"], ""), "first": ([], "")}
    repository(tmp_path, stages)
    graph = stage_graph()
    assert list(graph.items()) == [("first", ()), ("b", ("first",)), ("a", ("first",)), ("last", ("b", "a"))]


def test_elsewhere_is_an_error_with_a_cure(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} has no dvc.yaml .* go to the repository's root"):
        stage_graph()


@pytest.mark.parametrize(
    ("text", "place"),
    [("stages: [", "line 2"), ("stages:\n  a:\n    cmdd: x\n", "cmdd"), ("stages:\n  a:\n    cmd: ${b}\n", "'b'")],
)
def test_a_broken_dvc_yaml_is_named_with_the_place(tmp_path, text, place):
    (repository(tmp_path, {}) / "dvc.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"(?s)dvc\.yaml.*" + place) as caught:
        stage_graph()
    assert "Traceback" not in str(caught.value)


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Acyclic: stage i needs some of the earlier ones."""
    names = [f"s{i}" for i in range(draw(st.integers(1, 7)))]
    return {name: tuple(draw(st.sets(st.sampled_from(names[:i]))) if i else ()) for i, name in enumerate(names)}


def needs_in_any_way(graph: Graph, stage: str, other: str) -> bool:
    return stage == other or any(needs_in_any_way(graph, need, other) for need in graph[stage])


@given(graphs(), st.data())
def test_selection_is_the_targets_and_what_they_need(graph, data):
    targets = data.draw(st.sets(st.sampled_from(list(graph)), min_size=1))
    assert list(stages_for(graph, targets).items()) == [
        (s, needs) for s, needs in graph.items() if any(needs_in_any_way(graph, t, s) for t in targets)
    ]
    assert stages_for(graph, []) == graph


def test_an_unknown_target_is_an_error_that_guesses():
    with pytest.raises(ValueError, match=r"no stage 'prboe'; did you mean probe\?"):
        stages_for({"knn": (), "probe": ()}, ["prboe"])
