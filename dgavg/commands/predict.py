"""`dgavg predict`: score new images with what runs left."""

from __future__ import annotations

from pathlib import Path

from dgavg.benchmark.checks import find_device
from dgavg.commands.say import Parser, tell
from dgavg.deploy.predict import Predicted
from dgavg.deploy.predict import predict as score
from dgavg.deploy.saved import load_run

USE = (
    "dgavg predict RUN [RUN ...] FOLDER [--candidate NAME] [--out predictions.csv] [--device auto] "
    "[--batch-size 64] [--on-bad-image skip|error]"
)


def predict(arguments: list[str]) -> None:
    """Score new images with a run, or the mean of several, and write their classes into a CSV."""
    parser = Parser("predict", predict.__doc__, f"write {USE}")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="runs/NAME/HELD-OUT/SEED")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="images, or one image")
    parser.add_argument(
        "--candidate", help="which weights (default: what the rule picks over all of them)"
    )
    parser.add_argument("--out", type=Path, default=Path("predictions.csv"))
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--on-bad-image",
        choices=("skip", "error"),
        default="skip",
        help="skip leaves images out that can't be read, and lists them",
    )
    options = parser.parse_intermixed_args(arguments)
    device = find_device(options.device)
    runs = [load_run(folder, options.candidate) for folder in options.runs]
    tell(*(run.checkpoint for run in runs))
    dependent = next((run for run in runs if run.support is not None), None)
    if dependent is not None:
        tell(
            "predictions depend on the images beside: they are read "
            f"{dependent.support} at a time, in the order of the files"
        )
    found = score(
        runs,
        options.folder,
        options.out,
        device=device,
        batch_size=options.batch_size,
        on_bad_image=options.on_bad_image,
        title="predicting",
    )
    for file, why in found.bad:
        tell(f"left out {file}: {why}")
    print(f"{options.out}: {_summary(found)}")


def _summary(found: Predicted) -> str:
    text = f"{found.scored} image" + "s" * (found.scored != 1)
    if found.bad:
        text += f", {len(found.bad)} left out"
    if found.labelled:
        whose = "" if found.labelled == found.scored else f"{found.labelled} "
        text += (
            f", accuracy {100 * found.right / found.labelled:.2f} % on the {whose}"
            "images in folders named like classes"
        )
    return text
