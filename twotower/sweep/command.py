"""A sweep from its options to the files of its report."""

from __future__ import annotations

from twotower.sweep.folder import SweepFolder
from twotower.sweep.plot import SVG, plot
from twotower.sweep.report import lines, markdown, write_report
from twotower.sweep.run import Progress, Sweep, SweepOptions, run_sweep


def sweep_to_folder(
    options: SweepOptions, progress: Progress | None = None, *, with_plot: bool = True
) -> str:
    """Measures what is missing, writes the report and perhaps its picture into the folder, and
    returns the table in markdown."""
    sweep = run_sweep(options, progress)
    write_report(sweep, SweepFolder(options.out, sweep.identity))
    if with_plot:
        plot(lines(sweep), options.out / SVG, _title(sweep))
    return markdown(sweep)


def _title(sweep: Sweep) -> str:
    of = sweep.identity
    model, prompts = str(of["model"]).split()[0], str(of["prompts"]).split()[0]
    return (
        f"{model}: {prompts} prompts, at most {of['max_tokens']} tokens, temperature "
        f"{of['temperature']:g}"
    )
