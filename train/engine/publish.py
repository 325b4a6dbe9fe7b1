"""The files that accompany every stage's exported weights: training.json, the model card and the licence."""

from pathlib import Path
from typing import Protocol

from train.data.batches.images import Inputs
from train.engine.changes import Saved
from train.engine.model_card import About, state_license, write_card
from train.engine.provenance import is_result, write_provenance
from train.engine.run import AnyRun
from train.engine.stage import Publish


class DescribedStage(Protocol):
    """A stage that can describe its model."""

    inputs: Inputs

    def about(self) -> About: ...


def publisher(run: AnyRun, stage: DescribedStage) -> Publish:
    """Return the function that writes these files beside a stage's weights; in a finished model/, only the licence."""
    license = run.config.license

    def publish(folder: Path, step: int, *, final: bool, best: bool = False) -> None:
        if is_result(folder, step):
            if license:
                state_license(folder, license)
            return
        saved = Saved.read(run.folder.settings)
        write_provenance(folder, run.config, saved.published(), step=step, final=final, best=best)
        measured_at, metrics = run.metrics.last_validation(step)
        write_card(
            folder,
            stage.about(),
            run.config,
            stage.inputs,
            name=run.folder.name,
            fingerprint=run.inputs["data"],
            earlier=saved.earlier_data,
            changes=saved.published(),
            samples=run.folder.samples,
            step=step,
            final=final,
            best=best,
            measured_at=measured_at,
            metrics=metrics,
        )
        if final and not license:
            run.print(
                f"{run.folder.model / 'README.md'} states no licence, so others may not use or share the model: to add "
                "one, run the same command with e.g. --license apache-2.0"
            )

    return publish
