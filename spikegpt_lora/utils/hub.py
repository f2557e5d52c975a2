"""Files from the Hugging Face hub; fails within seconds where it cannot be reached."""

import logging
import re
import threading
from pathlib import Path

PROBE_SECONDS = 3.0

logger = logging.getLogger(__name__)


def hub_id(name: str | None) -> str | None:
    """`name` where it can only be a repository on the hub: OWNER/NAME, with no such file or folder here; else None."""
    found = name and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.endswith(".pth") and not Path(name).exists()
    return name if found else None


def fetch(filenames: list[str], repo_id: str, repo_type: str = "model", revision: str | None = None) -> list[Path]:
    """Paths of a repository's files in the local hub cache, downloaded if need be.

    Raises:
        ConnectionError: not cached, and HF_HUB_OFFLINE is set, the hub does not answer, or the download breaks off.
    """
    from huggingface_hub import hf_hub_download, hf_hub_url, try_to_load_from_cache

    place = {"repo_id": repo_id, "repo_type": repo_type, "revision": revision}
    cached = [try_to_load_from_cache(filename=name, **place) for name in filenames]  # opens no connection
    if all(isinstance(path, str) for path in cached):
        return [Path(path) for path in cached]
    require_reachable(hf_hub_url(filename=filenames[0], **place))
    logger.info("downloading %s from the Hugging Face hub", repo_id)
    try:
        return [Path(hf_hub_download(filename=name, **place)) for name in filenames]
    except Exception as error:  # the HTTP library's own kinds are no OSError
        raise ConnectionError(f"the download broke off: {type(error).__name__}: {error}") from error


def require_reachable(url: str) -> None:
    """Return if `url` answers within PROBE_SECONDS; measured from outside, because a name lookup has no time limit.

    Raises:
        ConnectionError: HF_HUB_OFFLINE is set, no answer, or an error status; the message says which.
    """
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        raise ConnectionError("HF_HUB_OFFLINE is set and the local hub cache does not hold it")
    problem = [f"no answer within {PROBE_SECONDS:g} s"]

    def ask() -> None:
        try:
            status = get_session().head(url, timeout=PROBE_SECONDS).status_code
            problem[:] = [f"HTTP status {status}"] if status >= 400 else []
        except Exception as error:  # whatever the HTTP library of the day raises: it is reported, not swallowed
            problem[:] = [f"{type(error).__name__}: {error}"]

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    if problem:
        raise ConnectionError(f"{problem[0]} ({url})")
