"""Save and find checkpoints such that a crash at any moment leaves a good one.

A save, on all ranks (the names are explained in `folder.py`):

1. into `step_00000100.tmp-<id>`: each rank writes its file through torch.distributed.checkpoint, hashing on the way;
   every file is synced before it is closed, then read back from the disk and compared;
2. digests are gathered; rank 0 writes and syncs `manifest.json`, then the folder's entries;
3. rank 0 sets aside what the run left behind if it went on from an older checkpoint: the same step with other
   content, and later steps;
4. rank 0 renames the folder to `step_00000100` and syncs the parent: this one rename publishes;
5. rank 0 points `latest` at it (nothing here reads it) and prunes older ones.

A load takes the newest that verifies. Damaged ones are renamed, never deleted.

Digests tell accidents, not attacks: who can write the folder can write a fitting manifest. Against that, `.metadata`
(a pickle) may only name the classes of a checkpoint, and tensors load with `weights_only=True`.
"""

import errno
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from offload.snapshot import Snapshot
from trainer.checkpoint import files, folder
from trainer.checkpoint.checkpoint import Checkpoint, alone_without_warning, flatten
from trainer.checkpoint.digest import FileDigest
from trainer.checkpoint.manifest import MANIFEST, Manifest, library_versions, require_json
from trainer.checkpoint.ranks import Ranks
from trainer.checkpoint.staged import SmallFirstPlanner, StagedPlanner
from trainer.checkpoint.storage import DurableWriter
from trainer.checkpoint.verify import Finding, check_files, read_manifest
from trainer.errors import UserError

_LOGGER = logging.getLogger(__name__)
_LOCK_SECONDS = 60.0
"""How long a save waits for another process that is just saving or cleaning in the folder."""


class CheckpointSaveError(OSError):
    """A save failed; older checkpoints are as they were. The message says where, why, and what to do."""

    def __str__(self) -> str:
        return str(self.strerror)


class CheckpointStore:
    """The checkpoints of a run. Every method is called by all ranks together, and returns or raises on all.

    Args:
        folder: holds the checkpoints; must be the same folder, on a shared file system, for all ranks.
        keep: newest checkpoints that survive a save; 0 keeps all.
        verify: compare every byte with its digest when loading, and after writing. False compares sizes only
            (torch's `.metadata` and the manifest are always compared).
        group: gloo process group; None for a single process.
        warn: told, on rank 0, what was refused or went wrong without harm.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        verify: bool,
        group: dist.ProcessGroup | None = None,
        warn: Callable[[str], None] = _LOGGER.warning,
    ) -> None:
        self.folder = Path(folder)
        self.keep = keep
        self.verify = verify
        self._ranks = Ranks(group)
        self._warn = warn

    def check_writable(self) -> None:
        """Make the folder, try to write in it from every rank, and delete what killed saves left.

        Raises:
            UserError: a rank can't write there, or the ranks don't see the same folder.
        """
        try:
            probe = self.folder / self._ranks.first(self._write_probe)
            self._ranks.all(partial(self._rewrite_probe, probe))
            self._ranks.first(partial(files.unlink, probe))
        except OSError as e:
            at = f" ({e.filename})" if e.filename else ""
            raise UserError(
                f"Checkpoints can't be written to {self.folder}: {e.strerror or e}{at}. Choose a folder that every "
                "process may write to with run.dir=PATH, or change the permissions of this one."
            ) from e

    def save(
        self, step: int, tensors: Mapping[str, Any], meta: dict[str, Any], snapshot: Snapshot | None = None
    ) -> Path:
        """Publish a checkpoint; return its folder once it would survive a power cut.

        Saving a step again leaves the published one untouched if it holds the same, else sets it aside.

        Args:
            step: optimizer steps done.
            tensors: dict, nested or flat, of tensors. Plain tensors are taken to be equal on all ranks that have the
                name, DTensors are saved whole; what differs per rank needs a name of its own (`rng/<rank>/cpu`).
            meta: numbers, strings, lists and dicts; rank 0's are kept.
            snapshot: takes copies of what this rank writes as soon as that is known; files are written from these. The
                caller ends it. `tensors` must then be a dict, and is emptied, as it would keep alive what the
                optimizer replaces meanwhile.

        Raises:
            CheckpointSaveError: the disk refused. Nothing was published, nothing older was touched.
        """
        self._ranks.all(partial(_require_savable, tensors, meta))
        size = sum(tensor.nbytes for tensor in flatten(tensors).values())
        part: Path | None = None
        with ExitStack() as lock:
            try:
                part = self._ranks.first(partial(self._begin, step, lock))
                written = self._ranks.all(partial(self._write, part, tensors, snapshot))
                digests = tuple(sorted((d for own in written for d in own), key=lambda d: d.name))
                manifest = Manifest(step, self._ranks.size, digests, meta, library_versions())
                return self._ranks.first(partial(self._publish, part, manifest))
            except BaseException as e:
                if part is not None and self._ranks.rank == 0:
                    self._try("delete the unfinished checkpoint", partial(files.remove_tree, part))
                if isinstance(e, OSError):
                    raise CheckpointSaveError(e.errno, self._save_failed(step, e, size)) from e
                raise

    def agree(self, look: Callable[[], None]) -> None:
        """Have rank 0 look at the folder; what it raises is raised on all ranks."""
        self._ranks.first(look)

    def newest(self) -> Checkpoint | None:
        """Open the newest checkpoint that verifies; set damaged ones aside, and tell which and why."""
        tried = self._ranks.first(lambda: folder.candidates(self.folder))
        for path in tried:
            found = self._examine(path)
            if isinstance(found, Checkpoint):
                return found
            self._ranks.first(partial(self._refuse, path, found))
        if tried and self._ranks.rank == 0:
            self._warn(f"{self.folder}: none of {len(tried)} checkpoints can be used.")
        return None

    def open(self, path: Path) -> Checkpoint:
        """Open exactly this checkpoint.

        Raises:
            UserError: there is none, or it doesn't verify; nothing is renamed.
        """
        path = Path(path)
        found = self._examine(path)
        if isinstance(found, Checkpoint):
            return found
        raise UserError(self._ranks.first(partial(self._cannot_open, path, found)))

    def _examine(self, path: Path) -> Checkpoint | list[Finding]:
        manifest = self._ranks.first(partial(read_manifest, path))
        if isinstance(manifest, Finding):
            return [manifest]
        mine = manifest.files[self._ranks.rank :: self._ranks.size]  # the reading is shared out
        findings = self._ranks.all(partial(check_files, path, mine, digests=self.verify))
        return [f for found in findings for f in found] or Checkpoint(path, manifest, self._ranks)

    def _refuse(self, path: Path, findings: list[Finding]) -> None:
        why = "; ".join(str(finding) for finding in findings)
        where = "It was left where it is"
        if any(finding.damaged for finding in findings):
            try:
                with files.locked(self.folder, 0):
                    where = f"It was renamed to {folder.move_aside(path, 'bad').name}"
            except OSError as e:
                where = f"It couldn't be renamed ({e.strerror})"
        self._warn(f"Checkpoint {path} is refused: {why}. {where}; the one before is tried.")

    def _cannot_open(self, path: Path, findings: list[Finding]) -> str:
        why = "; ".join(str(finding) for finding in findings)
        there = folder.candidates(path) or folder.candidates(path.parent)
        known = f"There are: {', '.join(str(p) for p in there[:5])}. " if there else ""
        return f"{path} can't be used as a checkpoint: {why}. {known}Give the folder of one, or use train.resume=auto."

    def _write_probe(self) -> str:
        files.make_folders(self.folder)
        try:
            with files.locked(self.folder, 0) as alone:
                if alone:
                    folder.remove_leftovers(self.folder)
        except BlockingIOError:
            self._warn(f"{self.folder}: another process is saving checkpoints here.")
        probe = self.folder / f".probe-{uuid.uuid4().hex}"
        files.write_file(probe, b"0")
        return probe.name

    def _rewrite_probe(self, probe: Path) -> None:
        if not probe.exists():
            raise FileNotFoundError(errno.ENOENT, f"what rank 0 writes there isn't seen by rank {self._ranks.rank}")
        own = probe.with_name(f".probe-{uuid.uuid4().hex}")
        files.write_file(own, b"1")
        files.unlink(own)

    def _begin(self, step: int, lock: ExitStack) -> Path:
        files.make_folders(self.folder)
        try:
            alone = lock.enter_context(files.locked(self.folder, _LOCK_SECONDS))
        except BlockingIOError as e:
            raise BlockingIOError(e.errno, "another process is saving there", str(self.folder)) from e
        if alone:
            folder.remove_leftovers(self.folder)
        part = self.folder / folder.part_name(step)
        files.make_folder(part)
        return part

    def _write(self, part: Path, tensors: Mapping[str, Any], snapshot: Snapshot | None) -> list[FileDigest]:
        group, flat = self._ranks.group, flatten(tensors)
        owned = [tensors, flat] if isinstance(tensors, dict) else [flat]
        planner = SmallFirstPlanner() if snapshot is None else StagedPlanner(snapshot, owned)
        # A thread beside training must leave the filters of warnings alone: they are the whole process's.
        quiet = alone_without_warning() if snapshot is None else nullcontext()
        with ThreadPoolExecutor(2) as pool, quiet:
            writer = DurableWriter(part, pool, in_order=snapshot is not None)
            dcp_save(flat, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)
        digests = list(writer.fs.digests.values())
        if found := check_files(part, digests, digests=self.verify, from_disk=True):
            raise OSError(errno.EIO, f"the disk gives back other bytes than were written ({found[0]})", str(part))
        return digests

    def _publish(self, part: Path, manifest: Manifest) -> Path:
        files.write_file(part / MANIFEST, manifest.to_bytes())
        files.sync_folder(part)
        final = self.folder / folder.step_name(manifest.step)
        if self._is_published(final, manifest):
            files.remove_tree(part)
            moved = folder.set_aside_from(self.folder, manifest.step + 1)
        else:
            moved = folder.set_aside_from(self.folder, manifest.step)
            try:
                files.rename(part, final)
            except OSError:
                folder.undo(moved)
                raise
        files.sync_folder(self.folder)
        for path, now in moved:
            self._warn(f"{path.name} was of a run that went on differently; it is now {now.name}.")
        self._try("update latest", partial(files.replace_file, self.folder / folder.LATEST, f"{final.name}\n".encode()))
        self._try("delete older checkpoints", partial(folder.prune, self.folder, manifest.step, self.keep))
        return final

    def _is_published(self, final: Path, manifest: Manifest) -> bool:
        there = read_manifest(final)
        same = isinstance(there, Manifest) and there.holds_the_same(manifest)
        return same and not check_files(final, manifest.files, digests=self.verify)

    def _try(self, what: str, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as e:
            self._warn(f"{self.folder}: could not {what} ({e.strerror}: {e.filename}).")

    def _save_failed(self, step: int, error: OSError, size: int) -> str:
        at = f" at {error.filename}" if error.filename else ""
        text = f"The checkpoint of step {step} was not saved: {error.strerror or error}{at}."
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(self.folder).free if os.path.isdir(self.folder) else 0
            text += f" It takes about {size / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free."
            text += " Free some space, lower checkpoint.keep, or choose another disk with run.dir=PATH."
        elif error.errno == errno.ENOMEM:
            text += " Copy through less with checkpoint.host_gib=N, or use checkpoint.mode=sync, which copies nothing."
        else:
            text += " See that the disk is well and the folder writable, or choose another with run.dir=PATH."
        return f"{text} Older checkpoints are as they were."


def _require_savable(tensors: Mapping[str, Any], meta: dict[str, Any]) -> None:
    flatten(tensors)
    require_json(meta)
