"""The checkpoints of a training run, by step."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from segjax.checkpoints import orbax_folder
from segjax.checkpoints.checkpoint import CheckpointError
from segjax.checkpoints.orbax_folder import DamagedError
from segjax.models.functional import params_sha256
from segjax.runtime import distributed

if TYPE_CHECKING:
    import orbax.checkpoint as ocp


class Restored(NamedTuple):
    """A saved checkpoint: flat dicts of numpy arrays, and the metadata read from JSON."""

    step: int
    weights: dict[str, np.ndarray]
    training: dict[str, np.ndarray]
    metadata: dict[str, Any]


class RunCheckpoints:
    """The checkpoints of one training run, by step. A save runs in the background; leaving the context waits for it.

    Several processes all hold the same arrays. Only the first process reads and writes files; it sends the arrays that
    it reads to the others.
    """

    def __init__(self, folder: Path, *, keep: int):
        self._folder = folder.absolute()
        self._manager = None
        if distributed.is_lead():
            import orbax.checkpoint as ocp

            # With several processes, orbax does not create the folder.
            self._folder.mkdir(parents=True, exist_ok=True)
            # Temporary folders of a save that was killed. With its own option, orbax removes them in a thread for which
            # nothing waits, and which may remove those of another manager's save in this process.
            for path in self._folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                shutil.rmtree(path, ignore_errors=True)
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                create=False,
                multiprocessing_options=orbax_folder.this_process_alone(),
            )
            orbax_folder.report_errors_once()
            self._manager = ocp.CheckpointManager(self._folder, options=options)

    def steps(self) -> list[int]:
        """The steps of the checkpoints, in order."""
        return distributed.from_lead(lambda: sorted(self._of_lead().all_steps()))

    def _of_lead(self) -> ocp.CheckpointManager:
        assert self._manager is not None, "only the first process reads"
        return self._manager

    def restore(
        self, weights: Mapping, training: Mapping, *, refuse: Callable[[dict], None], say: Callable[[str], None]
    ) -> Restored | None:
        """Reads the newest undamaged checkpoint, or None if there is no checkpoint. Moves damaged ones to damaged/.

        Args:
          weights: Templates of the expected arrays of the weights.
          training: Templates of the other expected arrays.
          refuse: Function of the metadata, called before arrays are read; it raises if the checkpoint belongs to
            another run.
          say: Function of a message, called for every damaged checkpoint.

        Raises:
          CheckpointError: Names, shapes or dtypes differ from the templates, all of them listed; or every checkpoint is
            damaged.
        """
        return distributed.from_lead(lambda: self._restore(weights, training, refuse, say))

    def _restore(
        self, weights: Mapping, training: Mapping, refuse: Callable[[dict], None], say: Callable[[str], None]
    ) -> Restored | None:
        manager, damaged = self._of_lead(), list[Path]()
        for step in sorted(manager.all_steps(), reverse=True):
            folder = self._folder / str(step)
            try:
                found = self._read_whole(step, folder, weights, training, refuse)
            except DamagedError as error:
                say(f"{error}")
                damaged.append(folder)
                continue
            for folder in damaged:
                moved = folder.parent.with_name("damaged") / folder.name
                moved.parent.mkdir(exist_ok=True)
                shutil.rmtree(moved, ignore_errors=True)
                folder.rename(moved)
                say(f"  moved to {moved}")
            manager.reload()
            return found
        if damaged:
            listed = ", ".join(str(folder) for folder in damaged)
            raise CheckpointError(f"every checkpoint of this run is damaged: {listed}. Remove them to start over")
        return None

    @staticmethod
    def _read_whole(
        step: int, folder: Path, weights: Mapping, training: Mapping, refuse: Callable[[dict], None]
    ) -> Restored:
        metadata = orbax_folder.read_metadata(folder)
        # Called before the arrays are read: those of another model would fail with a less useful message.
        refuse(metadata)
        if orbax_folder.METADATA_HASH not in metadata:
            raise DamagedError(f"{folder}: a damaged checkpoint (its metadata have no hash)")
        found_weights, found_training = orbax_folder.read_items(folder, orbax_folder.WEIGHTS, orbax_folder.TRAINING)
        found = Restored(step, found_weights, found_training, metadata)
        orbax_folder.refuse_changed(folder, metadata, found.weights, found.training)
        problems = []
        for template, arrays in ((weights, found.weights), (training, found.training)):
            expected = {name: _kind(array) for name, array in template.items()}
            problems += orbax_folder.differences(expected, {name: _kind(array) for name, array in arrays.items()})
        if problems:
            raise CheckpointError(f"{folder} does not fit this run:\n" + "\n".join(problems))
        return found

    def save(self, step: int, weights: Mapping, training: Mapping, metadata: Mapping[str, object]) -> None:
        """Saves flat dicts of arrays and JSON metadata in the background; the arguments may change after it returns.

        Raises:
          CheckpointError: This save, or the one before it, could not be written.
        """
        if self._manager is None or step == self._manager.latest_step():
            return
        from orbax.checkpoint import args

        items = {
            orbax_folder.WEIGHTS: args.StandardSave(dict(weights)),
            orbax_folder.TRAINING: args.StandardSave(dict(training)),
            orbax_folder.METADATA: args.JsonSave(
                orbax_folder.signed(
                    {
                        **metadata,
                        orbax_folder.HASH: params_sha256(dict(weights)),
                        orbax_folder.TRAINING_HASH: params_sha256(dict(training)),
                    }
                )
            ),
        }
        with orbax_folder.failure(self._folder):
            self._manager.save(step, args=args.Composite(**items))

    def wait(self) -> None:
        """Waits until the last save is complete; raises CheckpointError if it could not be written."""
        if self._manager is not None:
            with orbax_folder.failure(self._folder):
                self._manager.wait_until_finished()

    def __enter__(self) -> RunCheckpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        # The last save is completed after any end of the run, except after a second Ctrl-C, which stops at once.
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            return
        self.wait()
        if self._manager is not None:
            self._manager.close()


def _kind(array: jax.Array | np.ndarray) -> tuple[int | str, ...]:
    return (*array.shape, str(array.dtype))
