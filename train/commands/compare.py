"""Write the report of one or several evaluated models as one HTML file."""

from pathlib import Path

from ldm.errors import UserError
from train.commands.main import require_at_least
from train.config.reports import CompareOptions
from train.evaluation.report import read_model, write_report


def compare(o: CompareOptions) -> None:
    """Write the report to `o.out`."""
    if not o.reports:
        raise UserError(
            "--reports is missing: give the folders that evaluate.py wrote, e.g. --reports report-a report-b"
        )
    if o.names and len(o.names) != len(o.reports):
        raise UserError(f"--names: has {len(o.names)} names for {len(o.reports)} reports; give one for each")
    require_at_least(0, o, "samples")
    out = Path(o.out)
    if out.is_dir():
        raise UserError(f"--out {o.out!r}: is a folder; give the name of a file, e.g. {out / 'report.html'}")
    models = [read_model(folder, name) for folder, name in zip(o.reports, o.names or o.reports, strict=True)]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_report(models, out, most=o.samples)
