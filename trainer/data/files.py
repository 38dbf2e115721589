"""Which files a path option means: a file, a folder, a glob, or several of them separated by commas."""

import glob
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
"""Files of a folder that data=text takes; a glob or a named file may have any suffix."""
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
"""Files of a folder that data=jsonl and data=chat take."""


def find_files(path: str, suffixes: Sequence[str]) -> list[Path]:
    """Return the files that `path` means, in a fixed order, each once.

    Parts of a comma list keep their order; the files of a folder or glob are sorted by name. A folder contributes
    its files with one of `suffixes` (or that and .gz), at any depth, hidden ones left out.
    """
    found: dict[Path, None] = {}
    for part in path_parts(path):
        found.update(dict.fromkeys(files_of_part(part, suffixes)))
    return list(found)


def path_parts(path: str) -> list[Path]:
    """Split a comma list; a path that exists as it stands is one part."""
    whole = local_path(path)
    if "," not in path or os.path.exists(whole):
        return [whole]
    return [local_path(part.strip()) for part in path.split(",") if part.strip()]


def local_path(name: str) -> Path:
    """Return a path with `~` replaced, if there is such a user; unlike Path.expanduser it never raises."""
    return Path(os.path.expanduser(name))


def files_of_part(part: Path, suffixes: Sequence[str]) -> list[Path]:
    if os.path.isdir(part):
        return [file for file in sorted(part.rglob("*")) if is_visible_file(file, part) and has_suffix(file, suffixes)]
    if os.path.exists(part):
        return [part]
    if "\0" in str(part):
        return []  # no file has one in its name, and glob would raise
    return sorted(file for file in map(Path, glob.glob(str(part), recursive=True)) if file.is_file())


def is_visible_file(file: Path, folder: Path) -> bool:
    return file.is_file() and not any(name.startswith(".") for name in file.relative_to(folder).parts)


def has_suffix(file: Path, suffixes: Sequence[str]) -> bool:
    return file.name.lower().removesuffix(".gz").endswith(tuple(suffixes))


def file_problems(option: str, path: str, suffixes: Sequence[str]) -> list[str]:
    """Say what is wrong with the files that `option` names, without reading them."""
    parts = path_parts(path)
    if not parts:
        return [f"{option}={path!r}: names no file; give a file, a folder or a glob"]
    return [problem for part in parts for problem in part_problems(option, part, suffixes)]


def part_problems(option: str, part: Path, suffixes: Sequence[str]) -> list[str]:
    files = files_of_part(part, suffixes)
    if not files:
        if os.path.isdir(part):
            return [
                f"{option}={part}: {what_folder_holds(part)}, none of {', '.join(suffixes)} (or .gz); "
                f"name the files with a glob, such as '{part}/**/*.py'"
            ]
        if glob.has_magic(str(part)):
            return [f"{option}={part}: matches no file; check the pattern and the working directory {Path.cwd()}"]
        return [f"{option}={part}: no such file or folder; check the path and the working directory {Path.cwd()}"]
    if not any(file.stat().st_size for file in files):
        return [
            f"{option}={part}: is empty ({len(files)} file{'s' * (len(files) > 1)} of 0 bytes); give a file with text"
        ]
    return []


def what_folder_holds(folder: Path) -> str:
    """Return the suffixes of a folder's files with their counts, commonest first."""
    counts = Counter(file.suffix or "(no suffix)" for file in folder.rglob("*") if is_visible_file(file, folder))
    held = ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common(4))
    return f"the folder holds {held or 'no files'}"
