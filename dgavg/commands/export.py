"""`dgavg export`: a model as a folder of its own, or records as DomainBed's."""

from __future__ import annotations

from pathlib import Path

from dgavg.commands.say import Parser, tell
from dgavg.deploy.export import FORMATS
from dgavg.deploy.export import export as write
from dgavg.deploy.saved import load_run
from dgavg.errors import require

USE = (
    "dgavg export RUN --out DIR [--candidate NAME] [--format auto|timm|torchvision] [--onnx] "
    "[--torch-export], or dgavg export [FOLDER ...] --domainbed OUT"
)


def export(arguments: list[str]) -> None:
    """Write the model of a run into a folder that plain timm, torchvision or torch loads."""
    parser = Parser("export", export.__doc__, f"write {USE}")
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="runs/NAME/HELD-OUT/SEED")
    parser.add_argument("--out", type=Path, help="a new folder")
    parser.add_argument(
        "--candidate", help="which weights (default: what the rule picks over all of them)"
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="auto",
        help="whose names the weights have (default: the library that the backbone is of)",
    )
    parser.add_argument("--onnx", action="store_true", help="model.onnx, too")
    parser.add_argument("--torch-export", action="store_true", help="model.pt2, too")
    parser.add_argument(
        "--domainbed", type=Path, metavar="OUT", help="write records of runs in DomainBed's form"
    )
    options = parser.parse_intermixed_args(arguments)
    if options.domainbed is not None:
        model = (options.out, options.candidate, options.onnx or None, options.torch_export or None)
        if any(value is not None for value in model) or options.format != "auto":
            parser.error("--domainbed writes records and takes no other option")
        from dgavg.commands.export_domainbed import export_domainbed

        export_domainbed(options.runs or [Path("runs")], options.domainbed)
        return
    if len(options.runs) != 1:
        parser.error(f"one RUN is exported at a time, here are {len(options.runs)}")
    require(options.out is not None, f"where to? Write {USE}")
    run = load_run(options.runs[0], options.candidate)
    tell(run.checkpoint)
    out = write(
        run,
        options.out,
        form=options.format,
        torch_export=options.torch_export,
        onnx=options.onnx,
        note=tell,
    )
    print(out)
