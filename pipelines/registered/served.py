"""The registered model, as code only: images in, features out; its weights come by DVC's md5 and are checked by it.

MLflow copies this file and `dino/` into each version of the model. `mlflow.pyfunc.load_model("models:/dino@champion")`
and `mlflow models serve` run the copy. What a version knows is its `model_config`: `md5` of the weights, `repository`
that they were made in. `device` may be given when it is loaded.

Legend: N images, D features.
"""

import base64
import binascii
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from dvc.config import NoRemoteError
from dvc.exceptions import DvcException, FileTransferError
from dvc.repo import Repo
from dvc_data.hashfile.hash_info import HashInfo
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

import dino

COLUMN = "image"  # of a table of several


class Features(PythonModel):
    """A trained backbone."""

    def load_context(self, context: Any) -> None:
        """Fetch and check the weights."""
        config = context.model_config
        path = weights(config["md5"], repository_with_weights(config["repository"]))
        self.model = dino.load(path, device=config.get("device", "cpu"))

    # The hint is one for which MLflow infers no signature: it would refuse the other forms.
    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> np.ndarray:
        """Features float32 [N, D], as `dino.load(FILE)` gives them.

        Args:
            context: Not used.
            model_input: One image or several (a list, an array of four axes, a table's column `image`), each a uint8
                array [H, W] or [H, W, C], a file's bytes (PNG, JPEG, ...), or these in base64.
            params: None are known.

        Raises:
            MlflowException: What is no image; a server answers with status 400.
        """
        try:
            return self.model([picture(image) for image in several(model_input)]).numpy()
        except (ValueError, TypeError) as problem:
            raise MlflowException.invalid_parameter_value(str(problem)) from problem


def several(given: Any) -> Iterable[Any]:
    """Images one by one, out of whatever form they came in.

    Raises:
        ValueError: a table without a column of images.
    """
    if isinstance(given, pd.DataFrame | Mapping):
        if COLUMN not in given:
            raise ValueError(f"columns {[*map(str, given)]}; give one with the name {COLUMN!r}")
        given = given[COLUMN]
    if isinstance(given, str | bytes) or (isinstance(given, np.ndarray) and given.ndim in (0, 2, 3)):
        return [given]
    return list(given)


def picture(image: Any) -> bytes | np.ndarray:
    """One image as `dino` takes it. Text is base64 and never a path: it may come from a stranger.

    Raises:
        ValueError: text that is no base64, or numbers that are none of 0..255.
    """
    if isinstance(image, np.ndarray) and image.ndim == 0:
        image = image.item()
    if isinstance(image, str):
        try:
            return base64.b64decode(image.partition(",")[2] if image.startswith("data:") else image, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError("text that is no base64; give an image file's bytes in base64") from error
    if isinstance(image, bytes):
        return image
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 and np.issubdtype(pixels.dtype, np.integer):  # JSON knows no uint8
        if pixels.size and not 0 <= pixels.min() <= pixels.max() <= 255:
            raise ValueError(f"pixels from {pixels.min()} to {pixels.max()}; give 0 to 255")
        return pixels.astype(np.uint8)
    return pixels


def repository_with_weights(made_in: str) -> str:
    """The DVC repository to ask: DINO_ROOT's, else the working directory's, else where the weights were made.

    Raises:
        ValueError: none of them is one.
    """
    if chosen := os.environ.get("DINO_ROOT"):
        return chosen
    here = Path.cwd()
    for place in (here, *here.parents, Path(made_in)):
        if (place / ".dvc").is_dir():
            return str(place)
    raise ValueError(f"no DVC repository at {here} or {made_in}; name a checkout of the project: DINO_ROOT=FOLDER")


def weights(md5: str, repository: str) -> Path:
    """The file of this md5, from DVC's cache; fetched into it from the remote if it is not there.

    Raises:
        ValueError: it is in neither, or another content lies there.
    """
    with Repo(repository) as repo:
        path = Path(repo.cache.local.oid_to_path(md5))
        if not path.is_file():
            try:
                repo.cloud.pull([HashInfo("md5", md5)])
            except NoRemoteError as error:
                raise ValueError(_missing(md5, repository, "and it has no remote")) from error
            except (DvcException, FileTransferError, OSError) as error:
                raise ValueError(_missing(md5, repository, f"and its remote failed: {error}")) from error
        if not path.is_file():
            raise ValueError(_missing(md5, repository, "nor in its remote"))
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != md5:
        raise ValueError(f"{path} is damaged (its md5 is {found}): remove it and load again, which fetches it anew")
    return path


def _missing(md5: str, repository: str, where: str) -> str:
    return (
        f"weights with md5 {md5} lie not in the DVC cache of {repository}, {where}; whoever trained them: `dvc push`; "
        "or name a checkout that has them: DINO_ROOT=FOLDER"
    )


set_model(Features())
