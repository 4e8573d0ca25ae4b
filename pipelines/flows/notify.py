"""Tell a webhook: one POST of JSON with a `text`, as Slack, Mattermost and their like take it. Off unless asked for."""

import json
import os
import re
import urllib.error
import urllib.request
from http.client import HTTPException
from urllib.parse import urlsplit

WAIT_SECONDS = 10.0
MAX_CHARACTERS = 4000


def tell(webhook: str, text: str) -> str:
    """POST the text; a line that says whether it arrived. The address may hold secrets, so only its host is named.

    Args:
        webhook: Its address; $NAME and ${NAME} are filled in from the environment.
        text: For people; what is too long is cut.
    """
    if unset := [name for name in re.findall(r"\$\{?(\w+)", webhook) if name not in os.environ]:
        return f"nobody is told: runtime.webhook names ${unset[0]}, which the environment does not set"
    address = os.path.expandvars(webhook)
    host = urlsplit(address).hostname or "the webhook"
    body = json.dumps({"text": text[:MAX_CHARACTERS]}).encode()
    try:
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=WAIT_SECONDS):
            return f"{host} was told"
    except urllib.error.HTTPError as error:
        return f"{host} was not told: it answered {error.code} {error.reason}"
    except urllib.error.URLError as error:
        return f"{host} was not told: {error.reason}"
    except (OSError, HTTPException, ValueError) as error:  # a timeout; an address that is none: the error repeats it
        return f"{host} was not told: {type(error).__name__}"
