"""The Hugging Face hub, when there may be no network.

The libraries retry an unreachable hub for 20 to 50 seconds a file. One look first, and a machine without network
uses what it has cached, or says at once that it has nothing.
"""

from functools import lru_cache

from trainer.errors import UserError, first_line


@lru_cache(maxsize=1)
def is_reachable() -> bool:
    """Whether the hub answers; where it doesn't, this process's libraries read their caches only from now on."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.HfApi().model_info("gpt2", timeout=5)
    except HfHubHTTPError:
        return True  # it answered, if only to refuse
    except Exception:  # the client's own exception types changed between its versions
        go_offline()
        return False
    return True


def go_offline() -> None:
    """Do what HF_HUB_OFFLINE=1 does when it is set before the libraries are imported."""
    import datasets
    import huggingface_hub

    huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True


def not_found(option: str, name: str, error: Exception) -> UserError:
    """Return the error of a name that the hub, or the cache where there is no hub, does not have."""
    if is_reachable():
        return UserError(
            f"{option}={name}: {first_line(error)}. Check the name, and log in with `hf auth login` "
            "if it is private or gated."
        )
    return UserError(
        f"{option}={name}: there is no such local path, the Hugging Face hub cannot be reached, and its cache "
        "does not hold it. Give a local path, or connect once to fill the cache."
    )
