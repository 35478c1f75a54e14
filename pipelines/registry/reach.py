"""Whether an error says that files are out of reach, and not that they are missing or damaged.

An artifact store that does not answer, or refuses the keys of this process, says nothing about the
files in it: nobody should repair them or go back to other ones.
"""

import re

from partialhn.errors import error_chain

_REFUSED = (401, 403, 407, 408, 429)
"""Status codes of HTTP that say who asks, or that there is too much to do; so do 500 and above."""
_SIGNS = re.compile(
    r"ACCESS_DENIED|AccessDenied|INVALID_ACCESS_KEY_ID|InvalidAccessKeyId|SIGNATURE_DOES_NOT_MATCH"
    r"|SignatureDoesNotMatch|ExpiredToken|Unable to locate credentials|NETWORK_CONNECTION"
    r"|Could not connect|Connection (?:refused|reset|aborted|was closed)|Max retries exceeded"
    r"|timed out|Temporary failure in name resolution|Name or service not known"
    r"|Permission denied|\((?:401|403|429|5\d\d)\)"
    r"|(?:status|status code|error code):? (?:401|403|429|5\d\d)\b")
"""Texts of libraries that pass on the text of an error alone: Arrow, and MLflow's downloads."""


def out_of_reach(error: BaseException) -> str:
    """The reason in a line, where a store does not answer or denies access; otherwise empty."""
    return next((_line(cause) for cause in error_chain(error) if _says_so(cause)), "")


def _says_so(error: BaseException) -> bool:
    if isinstance(error, PermissionError | ConnectionError | TimeoutError):
        return True
    status = _status(error)
    if status is not None:
        return status in _REFUSED or status >= 500
    kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__}
    return "botocore.exceptions.BotoCoreError" in kinds or bool(_SIGNS.search(str(error)))


def _status(error: BaseException) -> int | None:
    """The status of the HTTP response of an error of boto3 or requests; None if it has none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return response if isinstance(response, int) else None
    status = getattr(response, "status_code", None)
    return status if isinstance(status, int) else None


def _line(error: BaseException) -> str:
    """The line of an error's text that says most: the first one with a sign, or the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if _SIGNS.search(line)]
    return next(iter(telling or lines), type(error).__name__)[:200]
