"""Results on the Hugging Face Hub: may we push there, push these files, describe them with a card.

Knows lm-eval's result files and huggingface_hub; nothing of models, torch or lm-eval itself. Every call goes
through the caller's `HfApi`, so its endpoint and its token are the ones used, whatever the environment says.
"""

from __future__ import annotations

import io
import json
import logging
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lm_eval_sparse import masking
from lm_eval_sparse.errors import UserError
from lm_eval_sparse.hub.card_text import MOST_BYTES, decoded, merge_cards
from lm_eval_sparse.hub.cards import results_card

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """A dataset repository that results are to be pushed to."""

    repo_id: str
    private: bool
    gated: bool = False


# -- before a run: may we push there? Nothing is written.


def check_token(api: HfApi) -> dict[str, Any]:
    """Return who the token belongs to; raise `UserError` when the Hub cannot be reached or rejects the token."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return api.whoami()
    except OfflineModeIsEnabled:
        raise UserError(
            "cannot push to the Hub while HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set; unset it or leave the push out"
        ) from None
    except HfHubHTTPError as error:
        if _status(error) in (401, 403):
            raise UserError(
                f"the Hub at {api.endpoint} rejects the token ({reason(error)}); "
                "set HF_TOKEN to a token with write access"
            ) from None
        raise UserError(f"cannot push: the Hub at {api.endpoint} does not answer ({reason(error)})") from None
    except Exception as error:
        raise UserError(f"cannot push: the Hub at {api.endpoint} cannot be reached ({reason(error)})") from None


def check_target(api: HfApi, identity: Mapping[str, Any], target: Target) -> None:
    """Raise `UserError` unless `identity` (of `check_token`) can push to `target`, or create it if it is missing."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    repo_id = target.repo_id
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise UserError(
            f"{repo_id!r} is not a repository name on the Hub; give the user or organisation as hub_results_org and "
            "the name alone (letters, digits, '-', '_', '.') as details_repo_name, results_repo_name or hub_repo_name"
        ) from None
    try:
        private = api.repo_info(repo_id, repo_type="dataset").private
    except RepositoryNotFoundError:
        _check_namespace(identity, repo_id)
        return
    except HfHubHTTPError as error:
        raise UserError(f"cannot push to {repo_id}: {reason(error)}") from None
    if target.private and not private:
        raise UserError(
            f"the results are to be private, but {repo_id} is a public repository; make it private in its settings, "
            "choose another repository, or add public_repo=True to --hf_hub_log_args"
        )
    if not target.private and private:
        _log.warning("%s is a private repository, so what is pushed there is not public.", repo_id)
    try:
        api.auth_check(repo_id, repo_type="dataset", write=True)
    except HfHubHTTPError as error:
        if _status(error) in (401, 403):
            raise UserError(f"the token may not write to {repo_id} ({reason(error)}); use one that may") from None
        _check_namespace(identity, repo_id)  # a server without this check
    except TypeError:
        _check_namespace(identity, repo_id)  # huggingface_hub from before `write=`


def _check_namespace(identity: Mapping[str, Any], repo_id: str) -> None:
    """Raise `UserError` when what the Hub says of the token shows that it may not create or change `repo_id`."""
    owner = repo_id.split("/")[0]
    access = (identity.get("auth") or {}).get("accessToken") or {}
    role = access.get("role")
    if role == "read":
        raise UserError(
            f"the token is read-only, so it cannot push to {repo_id}; set HF_TOKEN to one with write access"
        )
    scopes = access.get("fineGrained")
    if role == "fineGrained" and isinstance(scopes, Mapping):
        writes = "repo.write" in (scopes.get("global") or ())
        for scope in scopes.get("scoped") or ():
            covered = (scope.get("entity") or {}).get("name") in (owner, repo_id)
            writes = writes or (covered and "repo.write" in (scope.get("permissions") or ()))
        if not writes:
            raise UserError(
                f"the fine-grained token has no write permission for the repositories of {owner!r}; "
                "add it in the token's settings or choose another hub_results_org"
            )
        return
    orgs = {org.get("name"): org.get("roleInOrg") for org in identity.get("orgs") or ()}
    if owner != identity.get("name") and orgs.get(owner, "read") == "read":
        accepted = [identity.get("name"), *(name for name, org_role in orgs.items() if org_role != "read")]
        raise UserError(
            f"the token may not push to {repo_id}: it can write to {', '.join(map(str, accepted))}, not to {owner!r}; "
            "change hub_results_org or HF_TOKEN"
        )


# -- after a run: push


def push(
    api: HfApi, target: Target, files: Mapping[str, Path | bytes], message: str, secrets: Iterable[str] = ()
) -> None:
    """Create `target` if needed, gate it if asked, and add `files` (path in the repository: content), one commit.

    Raises:
        UserError: a file holds one of `secrets`, the token, or a secret of the environment. Nothing is pushed then.
    """
    check_no_secrets(files, masking.values_in({"token": api.token}) | frozenset(secrets))
    from huggingface_hub import CommitOperationAdd

    repo_id = target.repo_id
    _patiently(lambda: api.create_repo(repo_id, repo_type="dataset", private=target.private, exist_ok=True))
    # Before anything is uploaded, and never over a stricter gate that somebody has set by hand.
    if target.gated and not getattr(_patiently(lambda: api.repo_info(repo_id, repo_type="dataset")), "gated", False):
        _patiently(lambda: api.update_repo_settings(repo_id, repo_type="dataset", gated="auto"))
    _patiently(
        lambda: api.create_commit(
            repo_id,
            repo_type="dataset",
            # Made anew for every attempt: an operation remembers that it was uploaded.
            operations=[CommitOperationAdd(path, blob) for path, blob in files.items()],
            commit_message=message,
        )
    )


def push_card(
    api: HfApi, target: Target, results: Mapping[str, Any], secrets: Iterable[str] = (), **about: str | None
) -> None:
    """Write the card of `target` from `results`, the files that are there by now, and what `results_card` accepts."""
    repo_id = target.repo_id
    files = _patiently(lambda: api.list_repo_files(repo_id, repo_type="dataset"))
    previous, where = "", f"README.md of {repo_id}"
    if "README.md" in files:
        with tempfile.TemporaryDirectory() as folder:
            path = api.hf_hub_download(repo_id, "README.md", repo_type="dataset", cache_dir=folder)
            with open(path, "rb") as stream:
                previous = decoded(stream.read(MOST_BYTES + 1), where)
    ours = results_card(results, repo_id=repo_id, files=files, **about)
    if masking.left_in(ours):
        raise UserError("README.md, as it would be written, holds what looks like a secret, so it is not pushed")
    card = merge_cards(previous, ours, where)
    push(api, target, {"README.md": card.encode()}, "Update the results card", secrets)


#: Files are searched in pieces of so many bytes, each of which begins with the end of the one before.
_PIECE, _OVERLAP = 1 << 20, 1 << 12


def check_no_secrets(files: Mapping[str, Path | bytes], secrets: Iterable[str]) -> None:
    """Raise `UserError` when a secret is left in one of `files`: what is public once is known for ever.

    What only has the shape of a secret does not count in a card: it may be what people have written there.
    """
    spellings = {spelling for secret in secrets for spelling in (secret, *_in_json(secret))}
    for name, content in files.items():
        if _holds(content, spellings, shapes=not name.endswith(".md")):
            place = content if isinstance(content, Path) else name
            raise UserError(f"{place} holds a secret, a token or a password, so nothing is pushed; take it out there")


def _in_json(secret: str) -> set[str]:
    return {json.dumps(secret, ensure_ascii=ascii)[1:-1] for ascii in (True, False)}


def _holds(content: Path | bytes, secrets: Iterable[str], shapes: bool) -> bool:
    """Whether one of `secrets`, or what has a secret's shape, stands in `content`. Takes little memory for any size."""
    overlap = max([_OVERLAP, *(4 * len(secret) for secret in secrets)])
    end = b""
    with content.open("rb") if isinstance(content, Path) else io.BytesIO(content) as stream:
        while block := stream.read(_PIECE):
            text = (end + block).decode("utf-8", "replace")
            if any(secret in text for secret in secrets):
                return True
            # The middle of a word is not its beginning; the piece before had all of it.
            if shapes and masking.left_in(re.sub(r"\A[A-Za-z0-9]+", "", text) if end else text):
                return True
            end = (end + block)[-overlap:]
    return False


def _patiently(call: Callable[[], T], attempts: int = 4) -> T:
    """Repeat `call` when the Hub is busy, when the network drops, or when another run pushed at the same moment."""
    from huggingface_hub.errors import HfHubHTTPError

    # The base of the HTTP client's own errors; which client that is depends on the version of huggingface_hub.
    client_error = HfHubHTTPError.__bases__[0]
    for attempt in range(1, attempts):
        try:
            return call()
        except client_error as error:
            if _status(error) not in (None, 412, 429, 500, 502, 503, 504):
                raise
            _log.warning("The Hub: %s; trying again.", reason(error))
            _sleep(2**attempt)
    return call()


_sleep = time.sleep


def reason(error: BaseException) -> str:
    """An exception of huggingface_hub on one line, without secrets: status and the server's own words, if any."""
    status, words = _status(error), getattr(error, "server_message", None)
    text = f"{status} {words}" if status and words else str(error) or type(error).__name__
    return masking.mask(" ".join(text.split()), masking.values_in())


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)
