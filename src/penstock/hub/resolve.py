"""From what a user calls a model to where it lies, downloading it if need be.

Owns the order: the built-in names, then what is on the disk, then the hub; and when the network is
asked: not at all where HF_HUB_OFFLINE says so or a commit is pinned that is here whole, else once
for what the branch is now. Where the hub cannot be asked, what is here whole is taken, with a line.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from penstock import builtin
from penstock.errors import ConfigError, ModelLoadError
from penstock.hub.names import GRAMMAR, HubName, check_revision, is_commit, parse

_MAX_INDEX_BYTES = 64 << 20
_CONFIG = "config.json"
_TOKENIZERS = ("tokenizer.json", "*.model*", "vocab.*", "tekken.json", "*.tiktoken")


def resolve_model(name: str, revision: str | None = None) -> Path:
    """Where the model lies that `name` means: a directory, or a GGUF file.

    Args:
        name: a model that ships with penstock; a directory or a `.gguf` file; or a model of the
            hub, as `org/name`, `org/name@revision` or `org/name:Q4_K_M`.
        revision: of a model of the hub: branch, tag or commit; default: `main`.

    Raises:
        ConfigError: it is none of these, or the cache cannot hold it.
        ModelLoadError: the hub refuses it, or has nothing there that penstock reads.
    """
    if (found := _local(name)) is not None:
        if revision is not None:
            raise ConfigError(
                f"`revision` is `{revision}`, and `{name}` is not a model of a hub.",
                hint="leave it out",
            )
        return found
    model = hub_model(name, revision)
    if model is None:
        raise _nothing(name)
    return snapshot(model)


def resolve_config(name: str, revision: str | None = None) -> Path:
    """Where the config of the model lies that `name` means; of a hub nothing else is fetched.

    Raises:
        ConfigError: as `resolve_model`; or it is one GGUF file of the hub, which has its config in
            front of its weights, and is not here.
        ModelLoadError: as `resolve_model`; or the repository has no config.
    """
    model = None if _local(name) is not None else hub_model(name, revision)
    if model is None:
        return resolve_model(name, revision)
    from penstock.hub import settings
    from penstock.hub.cache import Repo

    repo = Repo(settings.cache_directory(), model.repo)
    here = _cached(repo, model)
    if here is not None:
        return here
    if model.variant is not None:
        raise ConfigError(
            f"`{model}` is a GGUF file, whose config is in front of its weights, and is not here.",
            hint=f"`penstock models pull {model}` downloads it",
        )
    if settings.is_offline():
        raise _not_here(repo, model)
    return _fetch_config(repo, model)


def _fetch_config(repo: Any, model: HubName) -> Path:
    from penstock.hub import settings
    from penstock.hub.client import Client
    from penstock.hub.download import download

    hub = Client(settings.endpoint(), model)
    listing = hub.listing(model.revision or "main")
    _check_model(model, set(listing.files))
    file = listing.files.get(_CONFIG)
    if file is None:
        raise ModelLoadError(
            f"`{model.repo}` has no `{_CONFIG}`: it holds models in other forms, such as GGUF.",
            hint=f"`penstock models pull {model.repo}:Q4_K_M` downloads one, if it is there",
        )
    asked = file if file.digest is not None else hub.announced(listing.commit, file.name)
    download(hub, repo, listing.commit, [asked])
    directory: Path = repo.snapshot(listing.commit)
    return directory


def hub_model(name: str, revision: str | None = None) -> HubName | None:
    """The model of a hub that `name` and `revision` mean together; None: it is no such name.

    Raises:
        ConfigError: the revision cannot be one, or name and `revision` say different ones.
    """
    model = parse(name)
    if model is None or revision is None:
        return model
    check_revision(revision)
    if model.revision not in (None, revision):
        raise ConfigError(
            f"`{name}` names a revision, and `revision` is `{revision}`.", hint="leave one out"
        )
    return HubName(model.repo, revision, model.variant)


def served_name(name: str) -> str:
    """What requests call a model: its directory's or file's name, or the hub's, no revision.

    Raises:
        ConfigError: the name means nothing.
    """
    found = _local(name)
    if found is not None:
        found = found.resolve()
        return (found.stem if found.is_file() else found.name) or name
    model = parse(name)
    if model is None:
        raise _nothing(name)
    return str(HubName(model.repo, None, model.variant))


def snapshot(model: HubName, *, is_cache_enough: bool = True) -> Path:
    """Where a model of the hub lies, after it was downloaded: its snapshot, or its GGUF file.

    Args:
        is_cache_enough: whether, where the hub cannot be asked, what is here whole will do.

    Raises:
        ConfigError: the cache cannot hold it.
        ModelLoadError: see `resolve_model`.
    """
    from penstock.hub import settings
    from penstock.hub.cache import Repo

    repo = Repo(settings.cache_directory(), model.repo)
    path = _found(repo, model, is_cache_enough=is_cache_enough)
    repo.touch(path)
    return path


def _found(repo: Any, model: HubName, *, is_cache_enough: bool) -> Path:
    # What speaks HTTP is imported for those who need it.
    from penstock.hub import settings
    from penstock.hub.client import Client, Unavailable
    from penstock.hub.progress import tell

    here = _cached(repo, model)
    if settings.is_offline():
        if here is None:
            raise _not_here(repo, model)
        return here
    is_spare = here is not None and is_cache_enough
    if here is not None and is_commit(model.revision or "") and _is_all(here, model):
        return here
    try:
        hub = Client(settings.endpoint(), model, **({"num_attempts": 1} if is_spare else {}))
        return _fetch(hub, repo, model)
    except Unavailable as error:
        if here is None or not is_spare:
            raise
        tell(f"taking {model} from the cache at {here}: {error.message}")
        return here


def _fetch(client: Any, repo: Any, model: HubName) -> Path:
    from penstock.hub import files
    from penstock.hub.download import download
    from penstock.hub.progress import tell

    revision = model.revision or "main"
    listing = client.listing(revision)
    directory: Path = repo.snapshot(listing.commit)

    def fetch(names: list[str]) -> None:
        wanted = [listing.files[name] for name in names]
        asked = [
            file if file.digest is not None else client.announced(listing.commit, file.name)
            for file in wanted
        ]
        download(client, repo, listing.commit, asked)

    # What says little comes first: weights that are here mean that all is.
    if model.variant is None:
        _check_model(model, set(listing.files))
        fetch(files.small_files(listing.files))
    weights = files.weight_files(
        model.repo, listing.files, model.variant, lambda name: read_object(directory / name)
    )
    fetch(weights)
    repo.write_ref(revision, listing.commit)
    tell(f"{model.repo} at {revision} is commit {listing.commit}")
    return directory / weights[0] if weights[0].endswith(".gguf") else directory


def _check_model(model: HubName, names: set[str]) -> None:
    """Refuse, before anything is fetched, what cannot be served with any weights."""
    if any(name.endswith(".gguf") for name in names) or names & {"config.json", "params.json"}:
        return
    if "adapter_config.json" in names:
        raise ModelLoadError(f"`{model.repo}` holds an adapter (LoRA), not a model.")
    raise ModelLoadError(f"`{model.repo}` has no `config.json`, so it is not a model for penstock.")


def _cached(repo: Any, model: HubName) -> Path | None:
    """The model as it lies in the cache, if all of it does."""
    from penstock.hub import files

    commit = repo.commit_of(model.revision or "main")
    if commit is None:
        return None
    directory: Path = repo.snapshot(commit)
    try:
        weights = files.weight_files(
            model.repo,
            repo.files(commit),
            model.variant,
            lambda name: read_object(directory / name),
        )
    except ModelLoadError:
        return None
    return directory / weights[0] if weights[0].endswith(".gguf") else directory


def _is_all(here: Path, model: HubName) -> bool:
    """Whether a pinned commit needs no question: other tools may have left out the tokenizer."""
    if here.suffix == ".gguf":
        return model.variant is not None
    return any(next(here.glob(like), None) is not None for like in _TOKENIZERS)


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a small file.

    Raises:
        ModelLoadError: there is none.
    """
    try:
        if file.stat().st_size > _MAX_INDEX_BYTES:
            raise ModelLoadError(f"`{file}` is over `{_MAX_INDEX_BYTES}` bytes.")
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise ModelLoadError(f"`{file}` cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"`{file}` is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"`{file}` does not hold a JSON object.")
    return content


def _local(name: str) -> Path | None:
    if name in builtin.NAMES:  # `./brook` is the directory of that name
        return builtin.path(name)
    try:
        path = Path(name).expanduser()
        is_directory = name != "" and path.is_dir()
        if is_directory or (path.suffix.lower() == ".gguf" and path.is_file()):
            return path
        if name != "" and path.is_file():  # a name on this machine is not told to a hub
            raise ConfigError(
                f"`model` is `{name}`, which is a file, and not a GGUF file.",
                hint="name the directory that holds the model",
            )
    except (OSError, ValueError, RuntimeError):  # what no file can be called
        pass
    return None


def _nothing(name: str) -> ConfigError:
    shown = ascii(name)[1:-1][:200] if not name.isprintable() else name[:200]
    return ConfigError(
        f"`model` is `{shown}`, which is neither a directory nor a built-in model, a GGUF file or "
        f"a model of the hub ({GRAMMAR}).",
        hint="built-in: " + ", ".join(f"`{known}`" for known in builtin.NAMES),
    )


def _not_here(repo: Any, model: HubName) -> ModelLoadError:
    commit = repo.commit_of(model.revision or "main")
    state = "is not" if commit is None else "is not whole"
    return ModelLoadError(
        f"`{model}` {state} in the cache `{repo.cache}`, and HF_HUB_OFFLINE forbids the network; "
        "there is no directory and no file of that name either.",
        hint=f"without HF_HUB_OFFLINE, `penstock models pull {model}` downloads it",
    )
