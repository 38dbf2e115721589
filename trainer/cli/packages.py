"""Our packages have plain names; another distribution's `optim` in front of ours would be imported in its place."""

import importlib.metadata
import importlib.util
import tomllib
from pathlib import Path

from trainer.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
BESIDE_TRAINER = ("offload", "optim", "parallel")


def check_packages(root: Path = ROOT) -> None:
    """Make sure that every package of ours comes from the folder this file is in.

    Raises:
        UserError: another one shadows it, or it is missing.
    """
    found = []
    for name in BESIDE_TRAINER:
        spec = importlib.util.find_spec(name)
        where = Path(spec.origin).resolve().parent if spec is not None and spec.origin else None
        if where is None:
            found.append(f"package {name}: not found beside {root / 'trainer'}; install stowage again")
        elif where != root / name:
            found.append(
                f"package {name}: Python finds {where}, stowage's own is {root / name}. "
                "Run from another folder, take it out of PYTHONPATH, or use an environment of its own for stowage"
            )
    if found:
        raise UserError("\n".join(found))


def version() -> str:
    """Return the installed version, or the checkout's."""
    try:
        return importlib.metadata.version("stowage")
    except importlib.metadata.PackageNotFoundError:
        return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])
