"""What can be known to be wrong without reading data is said before anything starts, all of it at once."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainer.data.config import Content, DataConfig, Source
from trainer.data.files import TEXT_SUFFIXES, find_files


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "a.jsonl").write_text('{"text": "some text"}\n')
    (tmp_path / "void.txt").touch()
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("pass")
    return tmp_path


FILE = {"source": Source.text, "path": "a.txt"}
HUB = {"source": Source.hf, "path": "owner/name"}

GOOD: list[dict[str, Any]] = [
    {}, FILE, HUB,
    {"source": Source.text, "path": "code/*.py, a.txt"},
    {"source": Source.jsonl, "path": "a.jsonl", "text_field": "body", "eval_path": "a.jsonl"},
    {"source": Source.chat, "path": "a.jsonl", "messages_field": "talk", "chat_template": "a.txt"},
    {"source": Source.chat, "path": "a.jsonl", "train_on_prompt": True},
    {**HUB, "name": "en", "split": "all", "eval_split": "test", "streaming": True, "shuffle_buffer": 0, "eval_rows": 0},
    {**HUB, "content": Content.chat, "messages_field": "talk"},
    {"tokenizer": "owner/name"},
]  # fmt: skip
BAD: list[tuple[dict[str, Any], str]] = [
    ({"sequence_length": 1}, r"data\.sequence_length=1: must be at least 2"),
    ({"eval_fraction": 0.0}, r"data\.eval_fraction=0\.0: must lie between 0 and 1.*data\.eval_path"),
    ({"eval_fraction": float("nan")}, r"data\.eval_fraction=nan: must lie between 0 and 1"),
    ({"eval_rows": -1}, r"data\.eval_rows=-1: must be at least 0"),
    ({**HUB, "streaming": True, "shuffle_buffer": -1}, r"data\.shuffle_buffer=-1: must be at least 0"),
    ({**HUB, "streaming": True, "eval_rows": 0}, r"data\.eval_rows=0 with data\.streaming=true.*data\.eval_split"),
    ({"source": Source.text}, r"data\.path is not set: data=text needs a file"),
    ({"source": Source.hf}, r"data\.path is not set: give a dataset's name"),
    ({"source": Source.text, "path": "b.txt"}, r"data\.path=b\.txt: no such file or folder; check the path"),
    ({"source": Source.text, "path": "a.txt,b.txt"}, r"data\.path=b\.txt: no such file"),
    ({"source": Source.text, "path": ","}, r"data\.path=',': names no file"),
    ({"source": Source.text, "path": "void.txt"}, r"data\.path=void\.txt: is empty \(1 file of 0 bytes\)"),
    ({"source": Source.text, "path": "*.rst"}, r"data\.path=\*\.rst: matches no file"),
    ({"source": Source.text, "path": "code"}, r"data\.path=code: the folder holds 1 \.py, none of \.txt.*a glob"),
    ({**FILE, "eval_path": "gone.txt"}, r"data\.eval_path=gone\.txt: no such file"),
    ({"source": Source.hf, "path": "/nowhere/set"}, r"data\.path=/nowhere/set: no such file or folder, and not a name"),
    ({"source": Source.hf, "path": "a/b/c"}, r"data\.path=a/b/c: no such file or folder, and not a name"),
    ({"source": Source.chat, "path": "a.jsonl", "chat_template": "t.jinja"}, r"data\.chat_template=t\.jinja: no such"),
    ({"tokenizer": "gone/tokenizer.json"}, r"data\.tokenizer=gone/tokenizer\.json: no such file"),
    ({"tokenizer": "void.txt"}, r"data\.tokenizer=void\.txt: is empty"),
    ({"source": Source.text, "path": "a" * 5000}, r"data\.path=a+: no such file"),
    ({"source": Source.text, "path": "a\0*"}, r"data\.path=a\x00\*: matches no file"),
    ({"source": Source.text, "path": "~nobody-of-this-name/a.txt"}, r"data\.path=~nobody-of-this-name/a\.txt: no such"),
    ({"tokenizer": "a" * 5000 + "/b/c"}, r"data\.tokenizer=a+/b/c: no such file"),
    ({"tokenizer": "~nobody-of-this-name/t"}, r"data\.tokenizer=~nobody-of-this-name/t: no such file"),
    ({"tokenizer": ""}, r"data\.tokenizer is not set"),
    ({"path": "a.txt"}, r"data\.path=a\.txt has no effect with data=stdlib: .*use data=text, or leave it out"),
    ({"eval_path": "a.txt"}, r"data\.eval_path=a\.txt has no effect with data=stdlib"),
    ({**FILE, "eval_path": "a.txt", "eval_fraction": 0.5}, r"data\.eval_fraction=0\.5 has no effect.*drop one"),
    ({**FILE, "text_field": "body"}, r"data\.text_field=body has no effect with data=text"),
    ({**FILE, "messages_field": "talk"}, r"data\.messages_field=talk has no effect"),
    ({**FILE, "chat_template": "a.txt"}, r"data\.chat_template=a\.txt has no effect"),
    ({**FILE, "train_on_prompt": True}, r"data\.train_on_prompt=true has no effect"),
    ({**FILE, "content": Content.chat}, r"data\.content=chat has no effect"),
    ({**FILE, "name": "en"}, r"data\.name=en has no effect"),
    ({**FILE, "split": "all"}, r"data\.split=all has no effect"),
    ({**FILE, "eval_split": "test"}, r"data\.eval_split=test has no effect.*give data\.eval_path"),
    ({**FILE, "streaming": True}, r"data\.streaming=true has no effect with data=text"),
    ({**HUB, "shuffle_buffer": 5}, r"data\.shuffle_buffer=5 has no effect.*data\.streaming=true"),
    ({**HUB, "content": Content.chat, "text_field": "body"}, r"data\.text_field=body has no effect"),
]


@pytest.mark.parametrize("options", GOOD, ids=str)
def test_sound_options_have_no_problems(here: Path, options: dict[str, Any]) -> None:
    assert DataConfig(**options).problems() == []


@pytest.mark.parametrize("options, message", BAD, ids=[message[:60] for _, message in BAD])
def test_each_mistake_is_named_with_its_remedy(here: Path, options: dict[str, Any], message: str) -> None:
    import re

    problems = DataConfig(**options).problems()
    assert any(re.search(message, problem) for problem in problems), problems


def test_all_mistakes_are_named_at_once(here: Path) -> None:
    cfg = DataConfig(source=Source.text, path="gone.txt", sequence_length=0, eval_fraction=2, tokenizer="./gone")
    assert len(cfg.problems()) == 4


def test_files_come_in_a_fixed_order_and_once(here: Path) -> None:
    for name in ("z.txt", "m.md", "b.txt.gz", ".hidden.txt"):
        (here / "code" / name).write_text("x")
    names = [file.name for file in find_files("code/*.py,code,code/z.txt", TEXT_SUFFIXES)]
    assert names == ["a.py", "b.txt.gz", "m.md", "z.txt"]


def test_a_name_with_a_comma_or_brackets_is_a_file(here: Path) -> None:
    for name in ("a,b.txt", "a[1].txt"):
        (here / name).write_text("x")
        assert [file.name for file in find_files(name, TEXT_SUFFIXES)] == [name]


def test_the_configuration_imports_nothing_slow() -> None:
    code = "import sys, trainer.data.config; print({'torch', 'numpy', 'datasets', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
