"""The registered model: features as `dino.load` gives them, weights by DVC's md5, images in any form."""

import base64
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import evidence
import mlflow
import mlflow_witness as witness
import numpy as np
import pandas as pd
import pytest
from PIL import Image

import dino
from dino.backbones import seeded_backbone
from dino.checkpoint import BACKBONE_FORMAT, save_tensors
from pipelines import paths, promote
from pipelines.rows import workspace

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # mlflow's own
    pytest.mark.filterwarnings("ignore:.*[Tt]ype hint:UserWarning"),  # mlflow's advice, to its own code too
]
ARCH = {"family": "vit", "img_size": 12, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "in_chans": 3}
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def registered(creation: witness.Creation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a real network, registered; its weights lie in a DVC cache and, for comparison, in reference."""
    home = tmp_path_factory.mktemp("registered")
    shutil.copy(creation.path, home / "mlflow.db")
    evidence.lay(home)
    facts = {"format": BACKBONE_FORMAT, "arch": ARCH, "seed": 5, "channels": 3, "mean": [0.2, 0.25, 0.3],
             "std": [0.3, 0.2, 0.25], "params": evidence.RESOLVED, "evaluation": {"resize_px": 14, "crop_px": 12},
             "key": "k1"}  # fmt: skip
    save_tensors(home / paths.TEACHER, seeded_backbone(ARCH, 5).state_dict(), facts)
    evidence.write_lock(home)
    (home / ".dvc").mkdir()
    (home / ".dvc/config").write_text("[core]\n    no_scm = true\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for name in ("MLFLOW_TRACKING_URI", "DINO_ROOT", "DVC_EXP_NAME", "DINO_FLOW_RUN_ID", "RANK"):
            patch.delenv(name, raising=False)
        assert promote.consider(evidence.SETTINGS).moved
    cached = stored(home / ".dvc/cache", workspace.file_md5(home / paths.TEACHER))
    (home / paths.TEACHER).rename(cached)
    (home / "reference.safetensors").write_bytes(cached.read_bytes())
    return home


@pytest.fixture
def home(registered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as the working directory, to be spoilt; its database names the artifacts of the first."""
    home = Path(shutil.copytree(registered, tmp_path / "home"))
    monkeypatch.setattr(sys, "path", [*sys.path])  # mlflow puts the model's code first
    monkeypatch.delenv("DINO_ROOT", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home}/mlflow.db")
    monkeypatch.chdir(home)
    return home


@pytest.fixture
def champion(home: Path) -> Path:
    """The weights of the registered network."""
    return home / "reference.safetensors"


def stored(place: Path, md5: str) -> Path:
    """Where a DVC cache or a remote keeps it."""
    path = place / "files/md5" / md5[:2] / md5[2:]
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def pixels(count: int = 3) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, 17, 15, 3), dtype=np.uint8)


def encoded(image: np.ndarray, form: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, form)
    return file.getvalue()


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_the_champion_loads_and_gives_the_features_of_the_file(champion: Path) -> None:
    model = mlflow.pyfunc.load_model("models:/dino@champion")
    reference = dino.load(champion)
    images = pixels()
    expected = reference(images).numpy()
    png, jpeg = ([encoded(image, form) for image in images] for form in ("PNG", "JPEG"))
    for given in (images, list(images), png, [*map(text, png)], np.array([*map(text, png)]),
                  [f"data:image/png;base64,{text(one)}" for one in png], images.astype(np.int64),
                  pd.DataFrame({"image": png}), {"image": [*map(text, png)]}):  # fmt: skip
        found = model.predict(given)
        assert found.dtype == np.float32 and np.array_equal(found, expected), type(given)
    assert np.array_equal(model.predict(jpeg), reference(jpeg).numpy())
    for one in (images[0], png[0], text(png[0])):
        assert np.array_equal(model.predict(one), reference([images[0]]).numpy())


def test_a_version_holds_code_and_no_weights(champion: Path, home: Path) -> None:
    files = [path for path in (home / "mlartifacts/models").rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"served.py", "pretrained.py", "MLmodel"} <= names and not {path.suffix for path in files} & {".safetensors"}
    assert all(champion.read_bytes() not in path.read_bytes() for path in files)


def test_what_is_no_image_is_refused_in_words(champion: Path) -> None:
    model = mlflow.pyfunc.load_model("models:/dino@champion")
    for given, why in (
        ([str(champion)], "text that is no base64"),  # a stranger's path is not opened
        ([text(b"no image")], "not an image"),
        ([np.zeros((4, 4), np.float32)], "an array of float32; give uint8"),
        (np.full((4, 4), 256), "pixels from 256 to 256; give 0 to 255"),
        (pd.DataFrame({"x": [1]}), "columns ['x']; give one with the name 'image'"),
        ([None], "an array of object; give uint8"),
    ):
        with pytest.raises(mlflow.MlflowException) as refused:
            model.predict(given)
        assert why in str(refused.value)


def test_weights_come_from_the_remote_if_they_lie_in_no_cache(home: Path, champion: Path) -> None:
    from pipelines.registered import served

    md5 = workspace.file_md5(champion)
    cached = stored(home / ".dvc/cache", md5)
    cached.unlink()
    with pytest.raises(
        ValueError, match=rf"weights with md5 {md5} lie not in the DVC cache of .*no remote.*`dvc push`"
    ):
        served.weights(md5, str(home))
    (home / ".dvc/config").write_text(
        f"[core]\n    no_scm = true\n    remote = there\n['remote \"there\"']\n    url = {home / 'remote'}\n"
    )
    with pytest.raises(ValueError, match=rf"weights with md5 {md5} .*remote"):
        served.weights(md5, str(home))
    stored(home / "remote", md5).write_bytes(champion.read_bytes())
    assert served.weights(md5, str(home)) == cached and cached.read_bytes() == champion.read_bytes()


def test_other_bytes_than_the_md5_says_are_refused(home: Path, champion: Path) -> None:
    from pipelines.registered import served

    md5 = workspace.file_md5(champion)
    cached = stored(home / ".dvc/cache", md5)
    cached.write_bytes(champion.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"is damaged .* remove it and load again"):
        served.weights(md5, str(home))


def test_the_repository_is_found_from_anywhere(
    home: Path, champion: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.registered import served

    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    assert served.repository_with_weights(str(home)) == str(home)
    with pytest.raises(ValueError, match="DINO_ROOT=FOLDER"):
        served.repository_with_weights(str(elsewhere))
    monkeypatch.setenv("DINO_ROOT", "/chosen")
    assert served.repository_with_weights(str(home)) == "/chosen"


@pytest.fixture
def server(champion: Path, home: Path) -> Iterator[str]:
    """`mlflow models serve` of the champion, from a folder that is no checkout."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "models",
        "serve",
        "-m",
        "models:/dino@champion",
        "--env-manager",
        "local",
    ]
    command += ["--host", "127.0.0.1", "--port", address.rpartition(":")[2], "--workers", "1"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    (home.parent / "nowhere").mkdir()
    with (home / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=home.parent / "nowhere", env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            patience = time.monotonic() + 120
            while True:
                try:
                    urllib.request.urlopen(f"http://{address}/ping", timeout=2).close()
                    break
                except OSError:
                    assert process.poll() is None and time.monotonic() < patience, (home / "serve.log").read_text()
                    time.sleep(0.2)
            yield f"http://{address}"
        finally:
            os.killpg(process.pid, 9)
            process.wait()


def asked(server: str, body: dict[str, Any]) -> np.ndarray:
    request = urllib.request.Request(
        f"{server}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return np.array(json.load(answer)["predictions"], dtype=np.float32)


@pytest.mark.acceptance
def test_it_answers_requests(server: str, champion: Path) -> None:
    images = pixels()
    expected = dino.load(champion)(images).numpy()
    coded = [text(encoded(image, "PNG")) for image in images]
    for body in ({"inputs": coded}, {"dataframe_records": [{"image": one} for one in coded]},
                 {"instances": [{"image": one} for one in coded]}, {"inputs": images.tolist()}):  # fmt: skip
        assert np.allclose(asked(server, body), expected, rtol=0, atol=1e-5)
    with pytest.raises(urllib.error.HTTPError) as refused:
        asked(server, {"inputs": ["/etc/passwd"]})
    assert refused.value.code == 400
    with refused.value as answer:
        assert "text that is no base64" in json.load(answer)["message"]
