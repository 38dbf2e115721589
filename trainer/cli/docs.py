"""What the configuration's dataclasses and YAML files say about themselves, for `--help`."""

import ast
import functools
import inspect
from dataclasses import fields
from pathlib import Path

from trainer import recipes
from trainer.cli import store
from trainer.errors import UserError


@functools.cache
def module_docs(path: str) -> dict[str, dict[str, str]]:
    """Return class name -> option -> text, from the strings that follow the options in a source file."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.walk(ast.parse(Path(path).read_text())):
        if isinstance(node, ast.ClassDef):
            found[node.name] = {}
            for option, after in zip(node.body, node.body[1:], strict=False):
                if isinstance(option, ast.AnnAssign) and isinstance(option.target, ast.Name) and is_text(after):
                    found[node.name][option.target.id] = inspect.cleandoc(ast.literal_eval(after.value))  # type: ignore[attr-defined]
    return found


def is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def option_docs(kind: type) -> dict[str, str]:
    """Return what each option of a dataclass means; an option set anew by a subclass keeps its parent's text."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        source = inspect.getsourcefile(base) if base is not object else None
        if source is not None:
            texts |= module_docs(source).get(base.__name__, {})
    return {entry.name: " ".join(texts.get(entry.name, "").split()) for entry in fields(kind)}  # type: ignore[arg-type]


def choice_docs(group: str) -> dict[str, str]:
    """Return what each choice of a group means: the first line of its YAML, or a recipe's claim."""
    choices = store.groups()[group]
    return {choice: recipe_doc(choice) if group == "recipe" else yaml_doc(group, choice) for choice in choices}


def yaml_doc(group: str, choice: str) -> str:
    """Return the text after `# configs/group/choice.yaml:`."""
    lines = (store.CONFIGS / group / f"{choice}.yaml").read_text().splitlines()
    first = lines[0] if lines and lines[0].startswith("#") else ""
    return first.lstrip("# ").removeprefix(f"configs/{group}/{choice}.yaml:").strip().rstrip(".")


def recipe_doc(name: str) -> str:
    try:
        return recipes.read(name).claim.claim
    except UserError:  # an overlay without a claim
        return ""
