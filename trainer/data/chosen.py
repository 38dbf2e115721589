"""Which source the options mean."""

from trainer.data.config import DataConfig
from trainer.data.config import Source as Kind
from trainer.data.sources import Source, file_source, files_identity, stdlib_files, stdlib_texts


def open_source(cfg: DataConfig) -> Source:
    """Return the source that is trained on (and, without another, held out from)."""
    if cfg.source is Kind.stdlib:
        files = stdlib_files()
        return Source("data=stdlib", files_identity(files), lambda: stdlib_texts(files))
    if cfg.source is Kind.hf:
        return hub_split(cfg, cfg.split)
    assert cfg.path is not None, "DataConfig.problems() refuses this"
    return file_source(cfg, "data.path", cfg.path)


def open_eval_source(cfg: DataConfig) -> Source | None:
    """Return the source that is only held out, if the user names one."""
    if cfg.eval_split is not None:
        return hub_split(cfg, cfg.eval_split)
    return file_source(cfg, "data.eval_path", cfg.eval_path) if cfg.eval_path else None


def hub_split(cfg: DataConfig, split: str) -> Source:
    from trainer.data.hf import hub_source  # takes a second to import

    return hub_source(cfg, split)
