"""params.yaml -> frozen, validated settings; every problem in one error, with place, cure and "did you mean".

The one home of YAML and pydantic. What a value does stands in params.yaml's comments.
"""

import re
from collections.abc import Hashable, Mapping
from difflib import get_close_matches
from pathlib import Path
from reprlib import repr as short_repr
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from dino.config import PretrainConfig
from pipelines import paths

STRICT = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
MAX_BYTES = 1_000_000  # of params.yaml; the repository's own has some thousand
PILLOWS_MAX_PIXELS = 178_956_970  # beyond it Pillow itself refuses an image
PASSWORD_IN_ADDRESS = re.compile(r"://[^/@\s]*:[^/@\s]*@")
CHECKPOINTS = ("last", "best")


class Section(BaseModel):
    """A section whose keys are all required and no others allowed."""

    model_config = STRICT


class Data(Section):
    """Stages fetch and prepare."""

    folder: str
    val_fraction: Annotated[float, Field(gt=0, lt=1)]
    test_fraction: Annotated[float, Field(gt=0, lt=1)]
    max_short_px: Count
    max_pixels: Annotated[int, Field(ge=1, le=PILLOWS_MAX_PIXELS)]
    max_aspect: Annotated[float, Field(ge=1)]
    seed: Annotated[int, Field(ge=0)]


@dataclass(config=ConfigDict(extra="forbid", allow_inf_nan=False), frozen=True, kw_only=True)
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


class Select(Section):
    """Stage select."""

    checkpoint: int | str
    bank_images: Count
    val_images: Count
    seed: Annotated[int, Field(ge=0)]
    neighbours: Count
    temperature: Annotated[float, Field(gt=0)]

    @model_validator(mode="after")
    def _checkpoint_is_named(self) -> "Select":
        named = isinstance(self.checkpoint, str)
        if named and self.checkpoint not in CHECKPOINTS:
            close = get_close_matches(str(self.checkpoint), CHECKPOINTS, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ValueError(f"checkpoint is {self.checkpoint!r}: {hint}choose last, best or the number of an epoch")
        if not named and int(self.checkpoint) < 1:
            raise ValueError(f"checkpoint is {self.checkpoint}: the first epoch is 1")
        return self


class Knn(Section):
    """Stage knn."""

    neighbours: Annotated[list[Count], Field(min_length=1)]
    temperature: Annotated[float, Field(gt=0)]


class Probe(Section):
    """Stage probe."""

    seed: Annotated[int, Field(ge=0)]
    epochs: Count
    batch: Count
    lrs: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]
    dampings: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]
    momentum: Share


class Linear(Section):
    """Stage linear."""

    seed: Annotated[int, Field(ge=0)]
    epochs: Count
    batch: Count
    lrs_at_256: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]
    momentum: Share
    blocks: Count
    patch_average: bool
    scale: tuple[Positive, Positive]
    ratio: tuple[Positive, Positive]
    flip: Annotated[float, Field(ge=0, le=1)]

    @model_validator(mode="after")
    def _ranges_rise(self) -> "Linear":
        found = [
            f"{name} is [{low:g}, {high:g}]: the first must not be larger than the second"
            for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio))
            if low > high
        ]
        if self.scale[1] > 1:
            found.append(f"scale ends at {self.scale[1]:g}: a crop is at most the whole image, 1")
        if found:
            raise ValueError("\n".join(found))
        return self


class Report(Section):
    """Stage report."""

    nearest_queries: Count
    nearest_neighbours: Count


class Tracking(Section):
    """How results are shown in MLflow."""

    enabled: bool
    experiment: Annotated[str, Field(min_length=1)]
    uri: str | None

    @model_validator(mode="after")
    def _no_password(self) -> "Tracking":
        if self.uri and PASSWORD_IN_ADDRESS.search(self.uri):
            raise ValueError(
                "uri holds a password, which git would keep: leave it out of the address, and set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment"
            )
        return self


class Promote(Section):
    """When a checkpoint becomes the champion of MLflow's model registry."""

    enabled: bool
    model: Annotated[str, Field(pattern=r"^[^/:.%\"']+$")]  # what MLflow takes as a name
    score: Literal["knn", "probe", "linear"]
    margin: Share


class StageRules(Section):
    """How the Prefect flow runs one stage."""

    retries: Annotated[int, Field(ge=0)]
    delay_seconds: Annotated[float, Field(ge=0)]
    limit_minutes: Positive | None
    gpu: bool


class Stages(Section):
    """The rules of each stage of dvc.yaml."""

    fetch: StageRules
    prepare: StageRules
    pretrain: StageRules
    select: StageRules
    embed: StageRules
    knn: StageRules
    probe: StageRules
    linear: StageRules
    report: StageRules

    def of(self, stage: str) -> StageRules:
        """A stage's rules; plain ones for a stage that params.yaml does not know (a data source of DVC's)."""
        plain = StageRules(retries=0, delay_seconds=0.0, limit_minutes=None, gpu=False)
        return getattr(self, stage, plain)


class RuntimePretrain(Section):
    """How pretraining runs."""

    save_minutes: Annotated[float, Field(gt=0)] | None
    save_steps: Count | None

    @model_validator(mode="after")
    def _saves(self) -> "RuntimePretrain":
        if self.save_minutes is None and self.save_steps is None:
            raise ValueError("save_minutes and save_steps are both null: set one, else a killed training starts anew")
        return self


class RuntimeEmbed(Section):
    """How features are extracted."""

    batch: Count


class Runtime(Section):
    """What changes speed, safety or display only."""

    wait_for_lock_minutes: Annotated[float, Field(ge=0)]
    tracking: Tracking
    promote: Promote
    webhook: str | None
    stages: Stages
    pretrain: RuntimePretrain
    embed: RuntimeEmbed

    @model_validator(mode="after")
    def _webhook_is_an_address(self) -> "Runtime":
        if self.webhook is not None and not self.webhook.startswith(("https://", "http://", "$")):
            raise ValueError("webhook: choose an address that begins with https:// or http://, or $NAME, or null")
        return self


class Params(Section):
    """All of params.yaml."""

    data: Data
    pretrain: Pretrain
    select: Select
    embed: Embed
    knn: Knn
    probe: Probe
    linear: Linear
    report: Report
    runtime: Runtime


class _PlainLoader(yaml.SafeLoader):
    """YAML's safe loader, which also refuses a key written twice, and anchors of more than one value.

    Nine lines of anchors upon anchors can stand for a billion values.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Build the next node."""
        alias = self.peek_event() if self.check_event(yaml.AliasEvent) else None
        node: yaml.Node | None = super().compose_node(parent, index)
        if alias is not None and not isinstance(node, yaml.ScalarNode):
            problem = f"*{alias.anchor} stands for a list or a section; write it out"
            raise yaml.composer.ComposerError(None, None, problem, alias.start_mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node)
            problem = None if isinstance(key, Hashable) else "a key must be one word"
            if problem is None and key in seen:
                problem = f"the key {key!r} stands here twice; keep one"
            if problem:
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def load(path: Path = paths.PARAMS) -> Params:
    """Read and check the params.yaml of the current directory.

    Raises:
        ValueError: No such file, no YAML, or every wrong value with its place and cure.
    """
    return check(read(path), path)


def read(path: Path) -> dict[str, Any]:
    """A file of settings as it is.

    Raises:
        ValueError: No such file, no YAML, or no sections in it.
    """
    if not path.is_file():
        raise ValueError(f"no {path} in {Path.cwd()}; run from the repository's root")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{path} has {size:,} bytes: no file of settings; restore it with `git checkout {path}`")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {_yaml_problem(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no sections; restore it with `git checkout {path}`")
    return content


def check(content: dict[str, Any], path: Path | str) -> Params:
    """Settings read from somewhere (`path`, for people), checked.

    Raises:
        ValueError: Every wrong value with its place and cure.
    """
    try:
        params = Params.model_validate(content)
        found = _truth_as_number(content, params)
    except ValidationError as error:
        found = [line for problem in error.errors() for line in _explain(problem)]
        found += _behind_wrong_types(error, content)
    if found:
        count = f"{len(found)} problem{'s' * (len(found) > 1)}"
        raise ValueError(f"{path} has {count}:\n" + "\n".join(f"  {line}" for line in found))
    return params


def value(text: str) -> Any:
    """One value as YAML writes it: 3, 0.5, [1, 2], null, a word.

    Raises:
        ValueError: It is no YAML.
    """
    try:
        return yaml.load(text, _PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{text!r} is no value: {_yaml_problem(error)}") from error


def _yaml_problem(error: Exception) -> str:
    """What is wrong on which line."""
    mark = getattr(error, "problem_mark", None)
    if not isinstance(error, yaml.MarkedYAMLError) or mark is None:
        return f"{error}; mend it, or restore it with `git checkout {paths.PARAMS}`"
    cure = "; indent with spaces, not with a tab" if "\\t" in str(error.problem) else ""
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}{cure}"


def _truth_as_number(content: Any, found: Any, *place: str) -> list[str]:
    """Where YAML's true or false (also yes, on, no, off) came through as the 1 or 0 that Python takes it for."""
    if isinstance(content, dict):
        pairs = [(key, value, getattr(found, key)) for key, value in content.items()]
    elif isinstance(content, list):
        pairs = [(str(index), *pair) for index, pair in enumerate(zip(content, found, strict=True))]
    else:
        wrong = isinstance(content, bool) and not isinstance(found, bool)
        return [f"{'.'.join(place)} is {content}: choose a number"] if wrong else []
    return [line for key, value, now in pairs for line in _truth_as_number(value, now, *place, key)]


def _behind_wrong_types(error: ValidationError, content: dict[str, Any]) -> list[str]:
    """Problems of `pretrain` that pydantic does not come to while other keys of it have a wrong type."""
    places = [problem["loc"] for problem in error.errors()]
    wrong = {str(place[1]) for place in places if place[:1] == ("pretrain",) and len(place) > 1}
    section = content.get("pretrain")
    if not wrong or not isinstance(section, dict):
        return []
    rest = {key: value for key, value in section.items() if str(key) not in wrong}
    try:
        Params.model_validate({**content, "pretrain": rest})
    except ValidationError as second:
        behind = [p for p in second.errors() if p["loc"] == ("pretrain",) and p["type"] == "value_error"]
        lines = [line for problem in behind for line in _explain(problem)]
        return [line for line in lines if not wrong & set(re.findall(r"\w+", line))]  # of a default in its place
    return []


def _explain(problem: Any) -> list[str]:
    """A pydantic problem as lines of place, what is wrong, and cure."""
    *section, key = problem["loc"] or ("",)
    place = ".".join(name if name.isprintable() else repr(name) for name in map(str, problem["loc"]))
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return [f"{place}: no such parameter{_did_you_mean(section, str(key))}"]
    if problem["type"] == "missing":
        return [f"{place}: missing; add it (the defaults stand in the repository's {paths.PARAMS})"]
    if problem["type"] == "value_error":
        return [f"{place}.{line}" for line in str(problem["ctx"]["error"]).splitlines()]
    return [f"{place} is {short_repr(problem['input'])}: {problem['msg'][0].lower()}{problem['msg'][1:]}"]


def _did_you_mean(section: list[Any], key: str) -> str:
    known: Any = Params
    for name in section:
        known = known.model_fields[name].annotation
    fields = known.model_fields if hasattr(known, "model_fields") else known.__dataclass_fields__
    close = get_close_matches(key, list(fields), n=1)
    return f"; did you mean {'.'.join([*map(str, section), close[0]])}?" if close else "; remove it"


def rewrite(path: Path, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Change values of a params.yaml in place, section by section, sections within sections too; comments are lost."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    for section, changes in settings.items():
        for name, value in changes.items():
            inner = content[section].get(name)
            content[section][name] = {**inner, **value} if isinstance(inner, dict) else value
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
