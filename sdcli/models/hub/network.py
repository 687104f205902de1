"""The network and the hub's refusals: what the libraries may do, and what their exceptions mean for the user."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Any

from sdcli.errors import BadWeights, CannotWrite, NotFound, Offline, first_line
from sdcli.models.hub.cache import cache_folder
from sdcli.models.sources import HubSource


class NoAccess(NotFound):
    """The repository is there, and the hub does not give it to this user."""


def use_offline(offline: bool) -> None:
    """Set the libraries' environment: no telemetry and no remote code ever, no network if `offline`.

    huggingface_hub and diffusers read it when they are imported, so this comes first. A user's own
    HF_HUB_OFFLINE=1 stays in force.
    """
    os.environ |= {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "DIFFUSERS_DISABLE_REMOTE_CODE": "1",
        # Xet downloads cannot be resumed by another process; plain HTTP can, by Range.
        "HF_HUB_DISABLE_XET": "1",
    }
    if offline:
        os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def offline_by_environment() -> bool:
    """Whether HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids the network."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in {"1", "ON", "YES", "TRUE"}


@contextlib.contextmanager
def explained(source: HubSource) -> Iterator[None]:
    """Turn what huggingface_hub raises into our own errors, each with its sentence."""
    from huggingface_hub import errors as hub

    repo, host = source.repo, _host()
    try:
        yield
    except hub.GatedRepoError:
        raise NoAccess(
            f"{repo} is gated: accept its licence on {host}/{repo} and set HF_TOKEN to a token of that account"
        ) from None
    except hub.RepositoryNotFoundError:
        raise NotFound(f"no repository {repo} on {host} (or it is private: then set HF_TOKEN)") from None
    except hub.RevisionNotFoundError:
        raise NotFound(f"{repo} has no revision {source.revision!r}") from None
    except hub.LocalEntryNotFoundError as error:
        raise Offline(f"cannot reach {host} for {repo}: {first_line(error.__cause__ or error)}") from None
    except hub.EntryNotFoundError as error:
        raise BadWeights(f"{repo}: the hub lists a file that it does not have: {first_line(error)}") from None
    except hub.DisabledRepoError:
        raise NoAccess(f"{repo} has been disabled by {host}") from None
    except hub.HfHubHTTPError as error:
        raise _refused(error, repo, host) from None
    except (hub.HTTPError, hub.OfflineModeIsEnabled) as error:
        raise Offline(f"cannot reach {host} for {repo}: {first_line(error)}; what came so far is kept") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CannotWrite(f"the disk of {cache_folder()} is full; what came so far is kept") from None
        if error.errno is not None:
            raise CannotWrite(f"cannot write to {cache_folder()}: {error.strerror}") from None
        raise BadWeights(f"{repo}: {first_line(error)}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise BadWeights(f"{host} answered something else than the hub does: {first_line(error)}") from error


def _refused(error: Any, repo: str, host: str) -> Exception:
    status, reason = error.response.status_code, error.response.headers.get("X-Error-Message", "")
    if status == 403 or "credentials" in reason:
        return NoAccess(f"{host} refuses {repo} ({status}): check that HF_TOKEN is valid and may read it")
    if status == 429:
        return Offline(f"{host} refuses for now: too many requests (429); try again later, or set HF_TOKEN")
    if status in (401, 404):  # the hub answers 401 also for what does not exist
        return NotFound(f"no repository {repo} on {host} (or it is private: then set HF_TOKEN)")
    return Offline(f"{host} answers with an error ({status}) for {repo}; try again later")


def _host() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
