"""What goes with the weights of every stage when others are to use them: training.json, the card and the licence."""

from pathlib import Path

from train.engine.model_card import state_license, write_card
from train.engine.open_data import Inputs
from train.engine.run import Run
from train.engine.stage import Publish, Stage


def publisher(run: Run, stage: Stage, inputs: Inputs) -> Publish:
    """What writes all of it into the folder of a stage's weights; in one that is published, the licence alone."""
    license = run.config.license

    def publish(folder: Path, step: int, *, final: bool) -> None:
        if (folder / "training.json").is_file():
            if license:
                state_license(folder, license)
            return
        run.write_provenance(folder, step=step, final=final)
        write_card(folder, run, inputs, stage.ema.module, step=step, final=final)
        if final and not license:
            run.say(
                f"{run.out / 'model/README.md'} states no licence, so nobody may assume any: the same command with, for "
                "one, --license apache-2.0 adds it"
            )

    return publish
