"""Laws of `dvc plots show`: every plot that dvc.yaml names is drawn, and nothing is loaded from a network."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from results_folder import REPOSITORY, make_results

PLOTS = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())
DRAWN = "vegaEmbed('#"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def entries() -> Iterator[Any]:
    """Plots of every stage and of the whole, as dvc.yaml writes them."""
    for stage in PLOTS["stages"].values():
        yield from stage.get("plots", [])
    yield from PLOTS["plots"]


def dvc(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of DVC below root."""
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(command, cwd=root, env=os.environ, capture_output=True, text=True)


@pytest.fixture(scope="module", params=[True, False], ids=["labelled", "unlabelled"])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `dvc plots show` writes, in a repository with our configuration and results but without stages."""
    root = make_results(tmp_path_factory.mktemp("plots"), labelled=request.param)
    if not request.param:
        (root / "plots/knn_predictions.csv").write_text("actual,predicted\n")  # what stage knn writes then
    (root / "report").mkdir()
    for name in ("scores", "neighbours", "attention"):  # those that stage report writes in any case
        shutil.copy(root / "plots/samples.png", root / f"report/{name}.png")
    (root / "dvc.yaml").write_text(yaml.safe_dump({"plots": list(entries())}))
    shutil.copytree(REPOSITORY / ".dvc", root / ".dvc", ignore=shutil.ignore_patterns("tmp", "cache", "config.local"))
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    ended = dvc(root, "plots", "show")
    assert ended.returncode == 0 and not ended.stderr, ended.stderr
    return root / "dvc_plots/index.html"


def test_every_plot_is_on_the_page_and_nothing_is_loaded(page: Path):
    source = page.read_text(encoding="utf-8")
    names = [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries()]
    pictures = [name for name in names if name.endswith(".png")]
    assert source.count(DRAWN) == len(names) - len(pictures)
    shown = re.findall(r'<img src="([^"]+)">', source[source.index("<main>") :])
    assert len(shown) == len(pictures) and all((page.parent / path).is_file() for path in shown)
    assert not re.search(r"<(?:script|link)\b[^>]*\b(?:src|href)=", source)
    assert source.index('data-from="vega ') < source.index('data-from="vega-lite') < source.index(DRAWN)


def test_the_scripts_licences_are_kept():
    folder = REPOSITORY / ".dvc/plots"
    licences = (folder / "vega-licences.txt").read_text(encoding="utf-8")
    for package in re.findall(r'data-from="([^"]+)"', (folder / "offline.html").read_text(encoding="utf-8")):
        assert package in licences
    assert licences.count("Redistribution and use in source and binary forms") >= 4


def browser(page: Path, profile: Path) -> tuple[str, list[str]]:
    """The page's tree after its scripts have run, and what the browser complains of; no name is resolved."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND",
             "--enable-logging=stderr", f"--user-data-dir={profile}", "--virtual-time-budget=5000"]  # fmt: skip
    ended = subprocess.run(
        [CHROMIUM, *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    said = [line for line in ended.stderr.splitlines() if "CONSOLE" in line]
    return ended.stdout, [line for line in said if '"WARN ' not in line]  # Vega's own, of the specs that DVC writes


@pytest.mark.acceptance
def test_a_browser_draws_every_plot_without_a_network(page: Path, tmp_path: Path):
    tree, complaints = browser(page, tmp_path)
    assert tree.count("<canvas") == page.read_text(encoding="utf-8").count(DRAWN) > 3
    assert not complaints


@pytest.mark.acceptance
def test_a_browser_shows_the_report_without_complaint(tmp_path: Path):
    root = make_results(tmp_path / "results")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "DINO_ROOT": str(root)}
    command = [sys.executable, "-m", "pipelines.stages.report"]
    subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True)
    tree, complaints = browser(root / "report/index.html", tmp_path / "profile")
    assert "The trained backbone beats" in tree
    assert not complaints
