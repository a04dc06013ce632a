"""Find out whether a repository on the Hub can be written to, and explain what to do if not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils._validators import validate_repo_id

_TOKENS = "https://huggingface.co/settings/tokens"
_LOG_IN = f"log in with `hf auth login`, or set HF_TOKEN to a token with write permission ({_TOKENS})"
_HINTS = {
    401: f"the token is not valid: {_LOG_IN}",
    403: f"the token has no write permission there: {_LOG_IN}, or name a repository of your own (--hub_model_id)",
    404: "there is no such repository, or the token may not see it",
    409: "the repository was changed at the same time; push again",
    429: "the Hub's rate limit is reached; wait a few minutes",
}


class HubError(RuntimeError):
    """Tell why the Hub cannot be pushed to, what is still there and what to do."""


def hub_api(token: str | None) -> HfApi:
    """Return the Hub's client."""
    return HfApi(token=token, library_name="amp_plugin")


def require_write_access(repo_id: str, *, token: str | None = None, private: bool | None = None) -> str:
    """Make sure that a model repository can be pushed to, before there is something to push; make it if need be.

    Args:
        repo_id: ``OWNER/NAME``, or ``NAME`` for the token's owner.
        token: token with write permission, default the one that is logged in.
        private: whether a repository that has to be made is private.

    Returns:
        ``OWNER/NAME``.

    Raises:
        HubError: there is no network or no token, the token may not write, or the name is that of a data set or Space.
    """
    with explained(f"cannot push to {repo_id!r} on the Hub"):
        validate_repo_id(repo_id)
        api, token = hub_api(token), token or get_token()
        if token is None:
            raise HubError(f"there is no token: {_LOG_IN}")
        who = api.whoami(token)
        # A fine-grained token says nothing of one repository here; `auth_check` below asks for that.
        if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise HubError(f"the token of {who['name']!r} may only read: {_LOG_IN}")
        full = repo_id if "/" in repo_id else f"{who['name']}/{repo_id}"
        if not api.repo_exists(full):
            for kind in ("dataset", "space"):  # the Hub would let a model share the name, but that is mostly a slip
                if api.repo_exists(full, repo_type=kind):
                    raise HubError(
                        f"it is a {kind}; give the model a name of its own (--hub_model_id), or, if it shall share that"
                        f" one, make the repository first: hf repo create {full}"
                    )
            full = api.create_repo(full, private=private, exist_ok=True).repo_id
        api.auth_check(full, write=True)
        return full


@contextmanager
def explained(what: str, then: str = "") -> Iterator[None]:
    """Turn whatever the Hub's client raises into a `HubError` that tells what failed, why, and what to do."""
    try:
        yield
    except Exception as error:  # the client, its HTTP library and the server's JSON may raise anything
        raise HubError(f"{what}: {reason(error)}{then}") from error


def reason(error: Exception) -> str:
    """Tell why the client failed, in one line, with what to do about it where that is known."""
    if isinstance(error, HubError):
        return str(error)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, which forbids the network; unset it"
    response = getattr(error, "response", None)
    if response is not None:
        status = int(response.status_code)
        failed = "the Hub failed, which is not your fault; push again later" if status >= 500 else "the Hub refused"
        said = getattr(error, "server_message", None)
        return f"{_HINTS.get(status, failed)} (status {status}{f': {said}' if said else ''})"
    if type(error).__module__.partition(".")[0].startswith("httpx"):
        return f"no connection to {constants.ENDPOINT} ({type(error).__name__}: {error}); is there a network?"
    if isinstance(error.__cause__, Exception):  # the client says which file, and its cause why
        return reason(error.__cause__)
    return str(error).strip().replace("\n", " ") or type(error).__name__
