"""params.yaml -> frozen, validated settings; every problem in one error, with place, cure and "did you mean".

The one home of YAML and pydantic. What a value does stands in params.yaml's comments.
"""

from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from dino.config import PretrainConfig
from pipelines import paths

STRICT = ConfigDict(extra="forbid", frozen=True)
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A section whose keys are all required and no others allowed."""

    model_config = STRICT


class Data(Section):
    """Stages fetch and prepare."""

    folder: str
    val_fraction: Annotated[float, Field(gt=0, lt=1)]
    test_fraction: Annotated[float, Field(gt=0, lt=1)]
    max_short_px: Count
    seed: Annotated[int, Field(ge=0)]


@dataclass(config=ConfigDict(extra="forbid"), frozen=True, kw_only=True)
class Pretrain(PretrainConfig):
    """Stage pretrain; the checks are `dino`'s own."""


class Embed(Section):
    """Stage embed."""

    resize_px: Count
    crop_px: Count
    pixels_px: Count

    @model_validator(mode="after")
    def _crop_fits(self) -> "Embed":
        if self.crop_px > self.resize_px:
            raise ValueError(
                f"crop_px ({self.crop_px}) is larger than resize_px ({self.resize_px}): choose at most that"
            )
        return self


class Knn(Section):
    """Stage knn."""

    neighbours: Annotated[list[Count], Field(min_length=1)]
    temperature: Annotated[float, Field(gt=0)]


class Linear(Section):
    """Stage linear."""

    seed: Annotated[int, Field(ge=0)]
    epochs: Count
    batch: Count
    lrs: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]
    dampings: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]
    momentum: Share


class Report(Section):
    """Stage report."""

    nearest_queries: Count
    nearest_neighbours: Count


class Tracking(Section):
    """How results are shown in MLflow."""

    enabled: bool
    experiment: Annotated[str, Field(min_length=1)]
    uri: str | None


class RuntimePretrain(Section):
    """How pretraining runs."""

    save_minutes: Annotated[float, Field(gt=0)]


class RuntimeEmbed(Section):
    """How features are extracted."""

    batch: Count


class Runtime(Section):
    """What changes speed, safety or display only."""

    tracking: Tracking
    pretrain: RuntimePretrain
    embed: RuntimeEmbed


class Params(Section):
    """All of params.yaml."""

    data: Data
    pretrain: Pretrain
    embed: Embed
    knn: Knn
    linear: Linear
    report: Report
    runtime: Runtime


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, which also refuses a key written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands here twice; keep one", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def load(path: Path = paths.PARAMS) -> Params:
    """Read and check the params.yaml of the current directory.

    Raises:
        ValueError: No such file, no YAML, or every wrong value with its place and cure.
    """
    if not path.is_file():
        raise ValueError(f"no {path} in {Path.cwd()}; run from the repository's root")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no sections; restore it with `git checkout {path}`")
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        found = [line for problem in error.errors() for line in _explain(problem, content)]
        count = f"{len(found)} problem{'s' * (len(found) > 1)}"
        raise ValueError(f"{path} has {count}:\n" + "\n".join(f"  {line}" for line in found)) from None


def _explain(problem: Any, content: dict[str, Any]) -> list[str]:
    """A pydantic problem as lines of place, what is wrong, and cure."""
    *section, key = problem["loc"] or ("",)
    place = ".".join(map(str, problem["loc"]))
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return [f"{place}: no such parameter{_did_you_mean(section, str(key))}"]
    if problem["type"] == "missing":
        return [f"{place}: missing; add it (the defaults stand in the repository's {paths.PARAMS})"]
    if problem["type"] == "value_error":
        return [f"{place}.{line}" for line in str(problem["ctx"]["error"]).splitlines()]
    return [f"{place} is {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"]


def _did_you_mean(section: list[Any], key: str) -> str:
    known: Any = Params
    for name in section:
        known = known.model_fields[name].annotation
    fields = known.model_fields if hasattr(known, "model_fields") else known.__dataclass_fields__
    close = get_close_matches(key, list(fields), n=1)
    return f"; did you mean {'.'.join([*map(str, section), close[0]])}?" if close else "; remove it"
