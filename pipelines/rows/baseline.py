"""What tells an experiment from its baseline: settings that differ from the params.yaml of the last commit."""

from collections.abc import Mapping
from typing import Any

from pipelines import params, paths
from pipelines.rows import origin, row

SECTIONS = ("data", "pretrain")  # what makes another training; other settings of evaluation are a row below its row


def differences(settings: Mapping[str, Any]) -> dict[str, str]:
    """`{"pretrain.epochs": "5"}`; empty where nothing differs, or where no commit tells.

    Args:
        settings: those of this experiment, by section; a section that is not there differs in nothing.
    """
    found: dict[str, str] = {}
    for section, before in _committed().items():
        now = settings.get(section) or {}
        found |= row.flat_params(
            section, {name: now[name] for name in now if name in before and now[name] != before[name]}
        )
    return found


def _committed() -> dict[str, dict[str, Any]]:
    text = origin.git("show", f"HEAD:./{paths.PARAMS}") or b""
    try:
        content = params.value(text.decode(errors="replace"))
        settings = params.check(content if isinstance(content, dict) else {}, paths.PARAMS)
    except ValueError:  # no commit, or a params.yaml of another version
        return {}
    return {section: row.plain(settings)[section] for section in SECTIONS}
