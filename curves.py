"""Draws the errors of runs: curves by epoch, and a dot for each run's last error.

report.py groups the runs and gives them their labels.
"""
import io
import statistics
from itertools import chain
from pathlib import Path
from zlib import crc32

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from paper import Cell
from report import Group, Log, data_of, error_name, error_of, groups_of, is_finished, read_logs
from training.errors import shortened
from training.log import LOG
from training.runs import write_atomically
from utils import InputError
from weights import check_not_an_input

# A colour for each method, the same in every picture. Those of Okabe and Ito (without the
# yellow, which is pale on paper) and of Tol can be told apart by colour-blind people. The mapping
# functions of table 2 share colours with methods that it does not have.
COLOURS = {'student': '#000000', 'AT': '#0072B2', 'F-ActT': '#D55E00', 'KD': '#009E73',
           'AT+KD': '#CC79A7', 'teacher': '#56B4E9', 'gradient AT': '#E69F00',
           'symmetry norm': '#882255', 'min-l2': '#999933',
           'F_sum': '#E69F00', 'F_sum^2': '#0072B2', 'F_sum^4': '#CC79A7', 'F_max': '#D55E00',
           'group 0 alone': '#009E73', 'group 1 alone': '#882255', 'group 2 alone': '#999933',
           'teacher of AT': '#332288'}
SPARE = ('#44AA99', '#AA4499', '#DDCC77', '#117733', '#661100', '#888888')    # for other methods
SHORT_RUN = 10    # runs of up to this many epochs are drawn in full, with a marker at each epoch
SHORT_LABEL = 16  # up to this many characters, labels are also written beside the dots
# Labels are not parsed as formulas, text is stored as text, and equal plots give equal files.
STYLE = ['default', {'text.parse_math': False, 'svg.fonttype': 'none', 'svg.hashsalt': 'picture',
                     'pdf.fonttype': 42, 'image.composite_image': False}]
METADATA = {'.png': {}, '.svg': {'Date': None}, '.pdf': {'CreationDate': None}}


def rendered(figure: Figure, suffix: str, dpi: int) -> bytes:
    """The picture as the content of a file."""
    file = io.BytesIO()
    figure.savefig(file, format=suffix[1:], dpi=dpi, metadata=METADATA[suffix])
    return file.getvalue()


def check_output(path: Path) -> None:
    """Raises InputError if no picture can be written to this path."""
    if path.suffix not in METADATA or not path.absolute().parent.is_dir():
        raise InputError(f'--output {path}: must be a .png, .svg or .pdf in an existing folder')


def colours_of(methods: list[str]) -> list[str]:
    """A colour for each method: from COLOURS, else one of SPARE that a hash of its name selects.

    If another method has it already: the next free colour.
    """
    known, result = {COLOURS.get(method) for method in methods}, []
    for method in methods:
        i = crc32(method.encode()) % len(SPARE)
        others = [c for c in (*SPARE[i:], *SPARE[:i], *COLOURS.values()) if c not in known]
        wanted = [COLOURS.get(method), *others]
        result.append(next((c for c in wanted if c and c not in result), others[0]))
    return result


def median_and_band(logs: list[Log], top: int, part: str
                    ) -> tuple[list[int], list[float], list[float], list[float]]:
    """Epochs that all runs have, and the median, least and greatest error of the runs in each."""
    errors = [{record['epoch']: e for record in log
               if (e := error_of(record, top, part)) is not None} for log in logs]
    errors = [by_epoch for by_epoch in errors if by_epoch] or [{}]
    epochs = sorted(set(errors[0]).intersection(*errors))
    columns = [[by_epoch[epoch] for by_epoch in errors] for epoch in epochs]
    return epochs, *([f(c) for c in columns] for f in (statistics.median, min, max))


def draw_curves(axis: Axes, groups: list[Group], colours: list[str], top: int) -> None:
    """Test error by epoch, with a band from min to max over seeds; dashed, the training error.

    The y axis of long runs fits their second half: the errors of the first epochs are too large.
    """
    late: list[float] = []
    for group, colour in zip(groups, colours, strict=True):
        logs = [*group.runs.values()]
        epochs, training, *_ = median_and_band(logs, top, 'train')
        axis.plot(epochs, training, '--', color=colour, linewidth=0.8,
                  marker='_' if len(epochs) == 1 else None)
        epochs, test, low, high = median_and_band(logs, top, 'test')
        axis.plot(epochs, test, color=colour, linewidth=1.5, markersize=3,
                  marker='o' if len(epochs) <= SHORT_RUN else None)
        axis.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
        for errors in (training, low, high):
            late += errors[len(errors) // 2 if len(errors) > SHORT_RUN else 0:]
    if late:
        margin = 0.05 * (max(late) - min(late)) or 1
        axis.set_ylim(max(0, min(late) - margin), max(late) + margin)
    axis.set(xlabel='epoch', ylabel=error_name(top).replace('test ', '') + ', %')
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def draw_finals(axis: Axes, groups: list[Group], colours: list[str], top: int) -> None:
    """A dot for the last error of each run (hollow: not finished), and a bar for their median."""
    for i, (group, colour) in enumerate(zip(groups, colours, strict=True)):
        logs = [log for log in group.runs.values() if error_of(log[-1], top) is not None]
        errors = [error_of(log[-1], top) for log in logs]
        for log, error in zip(logs, errors, strict=True):
            axis.plot(error, i, 'o', markersize=5, markeredgecolor=colour, alpha=0.8,
                      markerfacecolor=colour if is_finished(log) else 'none')
        if len(errors) > 1:
            axis.plot(statistics.median(errors), i, '|', color=colour, markersize=15,
                      markeredgewidth=2, zorder=1.5)
    narrow = all(len(group.label) <= SHORT_LABEL for group in groups)
    axis.set_yticks(range(len(groups)), [group.label if narrow else '' for group in groups])
    axis.set_ylim(len(groups) - 0.4, -0.6)
    axis.yaxis.tick_right()
    axis.tick_params(axis='y', length=0)
    axis.set(xlabel=f'{error_name(top)}, last epoch, %')


def title_of(row: str, groups: list[Group]) -> str:
    """A panel's title: the row of the table, the data, and the numbers of epochs and seeds."""
    def span(values: list[int], unit: str) -> str:
        low, high = min(values), max(values)
        return f'{low}–{high} {unit}s' if low < high else f'{low} {unit}{"s" * (low != 1)}'

    last = [log[-1] for group in groups for log in group.runs.values()]
    epochs, planned = [r['epoch'] for r in last], max(r.get('epochs') or 0 for r in last)
    parts = [shortened(', '.join(dict.fromkeys(map(data_of, last)))),
             span(epochs, 'epoch') + (f' of {planned}' if planned > max(epochs) else ''),
             span([len(group.runs) for group in groups], 'seed')]
    return f'{row} — ' * bool(row) + ', '.join(parts)


def add_legend(figure: Figure, colours: dict[str, str], groups: list[Group]) -> None:
    """Adds a legend below the panels: the labels' colours, and the meaning of lines and dots."""
    several = any(len(group.runs) > 1 for group in groups)
    going_on = any(not is_finished(log) for group in groups for log in group.runs.values())
    grey = {'color': '#666666', 'linewidth': 1.5}
    dot = {**grey, 'marker': 'o', 'markersize': 4, 'linestyle': '', 'markeredgewidth': 1}
    labels = [Line2D([], [], color=colours[label], label=label, linewidth=2) for label in colours]
    keys = [Line2D([], [], **grey, label='test error, median over seeds'),
            Line2D([], [], **grey | {'linewidth': 0.8}, linestyle='--',
                   label='training error, median over seeds'),
            *[Patch(color='#d2d2d2', label='least to greatest test error')] * several,
            Line2D([], [], **dot, label='last epoch of a run' + ' (bar: median)' * several),
            *[Line2D([], [], **dot, markerfacecolor='none', label='last epoch so far')] * going_on]
    blank = [Line2D([], [], linestyle='', label=' ')]
    rows = max(len(labels), len(keys))
    handles = [h for column in (labels, keys) for h in column + blank * (rows - len(column))]
    figure.legend(handles=handles, loc='outside lower center', ncols=2, frameon=False, fontsize=7)


def draw(panels: dict[str, list[Group]], top: int, suffixes: list[str]) -> dict[str, bytes]:
    """The plot in each of these formats: one panel, of curves and last errors, per table row."""
    heights = [max(2.4, 0.17 * len(groups)) for groups in panels.values()]
    legend = 0.16 * max(5, len(max(panels.values(), key=len)))
    own = {'font.size': 8, 'axes.titlesize': 9, 'axes.grid': True, 'grid.alpha': 0.3,
           'axes.axisbelow': True}
    with matplotlib.style.context([*STYLE, own]):
        figure = Figure(figsize=(7.2, sum(heights) + legend + 0.3), layout='constrained')
        axes = figure.subplots(len(panels), 2, squeeze=False, height_ratios=heights,
                               width_ratios=(2, 1))
        labels: dict[str, str] = {}
        for (left, right), (row, groups) in zip(axes, panels.items(), strict=True):
            colours = colours_of([group.method for group in groups])
            draw_curves(left, groups, colours, top)
            draw_finals(right, groups, colours, top)
            left.set_title(title_of(row, groups), loc='left')
            labels |= dict(zip((group.label for group in groups), colours, strict=True))
        add_legend(figure, labels, [*chain(*panels.values())])
        return {suffix: rendered(figure, suffix, 200) for suffix in suffixes}


def draw_table(logs: dict[Cell, list[Log]]) -> dict[str, bytes]:
    """A picture of the runs of a table's cells, a panel for each row, as .png and .svg."""
    panels: dict[str, list[Group]] = {}
    for cell, of_seeds in logs.items():
        runs = {str(seed): log for seed, log in enumerate(of_seeds) if log}
        if runs and cell.top == 1:
            panels.setdefault(cell.row, []).append(Group(cell.method, cell.method, runs))
    return draw(panels, 1, ['.png', '.svg']) if panels else {}


def plot_runs(folders: list[str], path: Path, top: int = 1) -> None:
    """Draws runs; those that differ only by seed share a curve. Raises InputError."""
    check_output(path)
    check_not_an_input('--output', path, (), [Path(folder, LOG) for folder in folders])
    logs = read_logs(folders)
    if all(error_of(log[-1], top) is None for log in logs.values()):
        raise InputError(f'--top {top}: no log has a {error_name(top)}')
    write_atomically({path: draw({'': groups_of(logs)}, top, [path.suffix])[path.suffix]})
    print(f'{path}: {len(logs)} runs')
