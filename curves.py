"""Draws how the errors of runs fall: curves by epoch, and a dot for each seed's last error.

Which runs belong together and what they are called, report.py says. Pictures are drawn in
memory and then written whole.
"""
import io
import statistics
from itertools import chain, cycle
from pathlib import Path
from typing import Any

from report import (
    Group,
    TableRuns,
    data_of,
    error_name,
    error_of,
    groups_of,
    read_logs,
    shown,
    text_of,
)
from training.runs import write_whole
from utils import InputError

# A colour for each method, the same in every picture. Those of Okabe and Ito (without the
# yellow, which is pale on paper) and of Tol can be told apart by colour-blind people. The mapping
# functions of table 2 share colours with methods that it does not have.
COLOURS = {'student': '#000000', 'AT': '#0072B2', 'F-ActT': '#D55E00', 'KD': '#009E73',
           'AT+KD': '#CC79A7', 'teacher': '#56B4E9', 'gradient AT': '#E69F00',
           'symmetry norm': '#882255', 'min-l2': '#999933',
           'F_sum': '#E69F00', 'F_sum^2': '#0072B2', 'F_sum^4': '#CC79A7', 'F_max': '#D55E00'}
FURTHER = ('#332288', '#44AA99', '#AA4499', '#DDCC77', '#117733', '#661100', '#888888')
SHORT = 10   # epochs up to which the curves are shown from the first, with a mark at each
NARROW = 16  # characters of a label that stands beside its dots
# What savefig is given for each format, so that the same curves give the same file.
SUFFIXES = {'.png': {}, '.svg': {'metadata': {'Date': None}},
            '.pdf': {'metadata': {'CreationDate': None}}}


def colours_of(methods: list[str]) -> list[str]:
    """A colour for each: a known method's own, unless one before has it; else one of no method."""
    own = [COLOURS.get(method) for method in methods]
    palette = [*dict.fromkeys(COLOURS.values()), *FURTHER]
    others = cycle([colour for colour in palette if colour not in own])
    result: list[str] = []
    for colour in own:
        result.append(next(others) if colour is None or colour in result else colour)
    return result


def median_and_band(runs: list[list[dict]], top: int, part: str
                    ) -> tuple[list[int], list[float], list[float], list[float]]:
    """Epochs that all runs have, and the median, least and greatest error of the runs in each."""
    errors = [{r['epoch']: e for r in records if 0 <= r['epoch'] < 10 ** 9
               and (e := error_of(r, top, part)) is not None} for records in runs]
    errors = [by_epoch for by_epoch in errors if by_epoch] or [{}]
    epochs = sorted(set(errors[0]).intersection(*errors))
    columns = [[by_epoch[epoch] for by_epoch in errors] for epoch in epochs]
    return epochs, *([f(c) for c in columns] for f in (statistics.median, min, max))


def draw_curves(axis: Any, groups: list[Group], colours: list[str], top: int) -> None:
    """Test error by epoch with its band, and dashed the training error.

    The y axis of long runs spans their later half: the first epochs would flatten the rest.
    """
    late: list[float] = []
    for group, colour in zip(groups, colours, strict=True):
        runs = list(group.runs.values())
        for part, style, width in (('train', '--', 0.8), ('test', '-', 1.5)):
            epochs, median, low, high = median_and_band(runs, top, part)
            few = len(epochs) <= (SHORT if part == 'test' else 1)  # one point is no line
            axis.plot(epochs, median, style, color=colour, linewidth=width, markersize=3,
                      marker=('o' if part == 'test' else '_') if few else None)
            if part == 'test' and len(runs) > 1:
                axis.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
            later = slice(len(epochs) // 2 if len(epochs) > SHORT else 0, None)
            late += [*median[later], *(high[later] + low[later] if part == 'test' else ())]
    if late:
        margin = 0.05 * (max(late) - min(late)) or 1
        axis.set_ylim(max(0, min(late) - margin), max(late) + margin)
    axis.margins(x=0.02)
    axis.set(xlabel='epoch', ylabel=error_name(top).replace('test ', '') + ', %')
    low, high = axis.dataLim.intervalx if late else (1, 1)
    if high - low < SHORT:
        axis.set_xlim(low - 0.3, high + 0.3)
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def finished(records: list[dict]) -> bool:
    epochs = records[-1].get('epochs')
    return epochs is None or records[-1]['epoch'] >= epochs


def draw_finals(axis: Any, groups: list[Group], colours: list[str], top: int) -> None:
    """The last error of each run, a dot, hollow if it is not finished; their median, a bar."""
    for i, (group, colour) in enumerate(zip(groups, colours, strict=True)):
        errors = [(e, finished(r)) for r in group.runs.values()
                  if (e := error_of(r[-1], top)) is not None]
        for error, done in errors:
            axis.plot(error, i, 'o', markersize=5, markeredgecolor=colour, alpha=0.8,
                      markerfacecolor=colour if done else 'none')
        if len(errors) > 1:
            median = statistics.median([e for e, done in errors if done] or [e for e, _ in errors])
            axis.plot(median, i, '|', color=colour, markersize=15, markeredgewidth=2, zorder=1.5)
    names, blank = [group.label for group in groups], [''] * len(groups)
    axis.set_yticks(range(len(groups)), names if max(map(len, names)) <= NARROW else blank)
    axis.set_ylim(len(groups) - 0.4, -0.6)
    axis.yaxis.tick_right()
    axis.tick_params(axis='y', length=0)
    axis.set(xlabel=f'{error_name(top)}, last epoch, %')


def title_of(row: str, groups: list[Group]) -> str:
    """A panel's title: the row of the table, the data, epochs and seeds."""
    def span(values: list[Any]) -> str:
        low, high = (shown(text_of(f(values)), 12) for f in (min, max))
        return low if low == high else f'{low}–{high}'

    def count(number: str, unit: str) -> str:
        return f'{number} {unit}{"" if number == "1" else "s"}'

    last = [records[-1] for group in groups for records in group.runs.values()]
    data = shown(', '.join(dict.fromkeys(map(data_of, last))))
    planned = [r['epochs'] for r in last if r.get('epochs') is not None]
    epochs = span([r['epoch'] for r in last])
    if planned and max(planned) > max(r['epoch'] for r in last):
        epochs += f' of {span(planned)}'
    seeds = span([len(group.runs) for group in groups])
    about = f'{data}, {count(epochs, "epoch")}, {count(seeds, "seed")}'
    return f'{shown(row)} — {about}' if row else about


def explanations(runs: list[Any], top: int) -> dict[str, Any]:
    """What lines, bands and dots are, with a grey one of each; `runs` has those of each group."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    grey = '#666666'
    banded = ', median over seeds' if any(len(of_one) > 1 for of_one in runs) else ''
    records = list(chain(*runs))
    keys = {f'test error{banded}': Line2D([], [], color=grey, linewidth=1.5)}
    if any(error_of(r[-1], top, 'train') is not None for r in records):
        keys[f'training error{banded}'] = Line2D([], [], color=grey, linewidth=0.8, linestyle='--')
    if banded:
        keys['least to greatest test error'] = Patch(color=grey, alpha=0.3, linewidth=0)
    dot = {'color': grey, 'marker': 'o', 'markersize': 4, 'linestyle': ''}
    keys['last epoch of a run' + (' (bar: median)' if banded else '')] = Line2D([], [], **dot)
    if not all(map(finished, records)):
        keys['last epoch so far'] = Line2D([], [], **dot, markerfacecolor='none')
    return keys


def add_legend(figure: Any, colours: dict[str, str], keys: dict[str, Any]) -> None:
    """Below the panels: columns of labels with their colours, and one that explains the signs."""
    from matplotlib.lines import Line2D
    names = [(label, Line2D([], [], color=colour, linewidth=2))
             for label, colour in colours.items()]
    half = -(-len(names) // 2) if max(map(len, colours)) <= NARROW else len(names)
    columns = [column for column in (names[:half], names[half:], list(keys.items())) if column]
    blank = [('', Line2D([], [], linestyle=''))]  # columns of equal length begin side by side
    longest = max(map(len, columns))
    labels, handles = zip(*chain(*(c + blank * (longest - len(c)) for c in columns)), strict=True)
    figure.legend(handles, labels, loc='outside lower center', ncols=len(columns), frameon=False,
                  fontsize=7)


def draw_panels(figure: Any, axes: Any, panels: dict[str, list[Group]], top: int) -> None:
    """A row of two axes for each panel, and the legend."""
    labels: dict[str, str] = {}
    for (left, right), (row, groups) in zip(axes, panels.items(), strict=True):
        colours = colours_of([group.method for group in groups])
        draw_curves(left, groups, colours, top)
        draw_finals(right, groups, colours, top)
        left.set_title(title_of(row, groups), loc='left')
        labels |= dict(zip((group.label for group in groups), colours, strict=True))
    runs = [list(group.runs.values()) for group in chain(*panels.values())]
    add_legend(figure, labels, explanations(runs, top))


def draw(panels: dict[str, list[Group]], top: int, suffixes: list[str]) -> dict[str, bytes]:
    """A picture in each of these formats, with a panel for each of these titles."""
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    # A name from a log is no formula. The text of an .svg can be searched and edited.
    style = {'font.size': 8, 'axes.titlesize': 9, 'text.parse_math': False,
             'svg.hashsalt': 'curves', 'svg.fonttype': 'none', 'axes.grid': True,
             'grid.alpha': 0.3, 'axes.axisbelow': True}
    heights = [max(2.4, 0.17 * len(groups)) for groups in panels.values()]
    legend = 0.16 * max(5, len(max(panels.values(), key=len)))
    with plt.rc_context(style):
        figure, axes = plt.subplots(
            len(panels), 2, figsize=(7.2, sum(heights) + legend + 0.3), squeeze=False,
            height_ratios=heights, width_ratios=(2, 1), layout='constrained')
        try:
            draw_panels(figure, axes, panels, top)
            return {suffix: rendered(figure, suffix) for suffix in suffixes}
        finally:
            plt.close(figure)


def rendered(figure: Any, suffix: str) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format=suffix[1:], dpi=200, **SUFFIXES[suffix])
    return file.getvalue()


def plot_table(table: TableRuns, folder: Path) -> list[Path]:
    """Draws the runs of a table's chosen cells, if there are any, as table<n>.png and .svg."""
    panels: dict[str, list[Group]] = {}
    for cell in table.cells:
        runs = {str(seed): records for seed, records in enumerate(cell.logs) if records}
        if runs and cell.chosen and cell.top == 1:
            panels.setdefault(cell.row, []).append(Group(cell.method, cell.method, runs))
    pictures = draw(panels, 1, ['.png', '.svg']) if panels else {}
    files = {folder / f'table{table.number}{suffix}': content
             for suffix, content in pictures.items()}
    if files:
        write_whole(files)
    return list(files)


def plot_runs(folders: list[str], output: str, top: int = 1) -> None:
    """Draws any runs; those that differ by their seed alone are one. Raises InputError."""
    path = Path(output)
    if path.suffix not in SUFFIXES or not path.absolute().parent.is_dir():
        raise InputError(f'--output {shown(output)}: must be a .png, .svg or .pdf in a folder '
                         'that is there')
    logs = read_logs(folders)
    if missing := [folder for folder, records in logs.items() if not records]:
        raise InputError(f'{shown(missing[0])}: no log with an epoch in it')
    if all(error_of(records[-1], top) is None for records in logs.values()):
        raise InputError(f'--top {top}: no log has a {error_name(top)}')
    groups = groups_of(logs)
    write_whole({path: draw({'': groups}, top, [path.suffix])[path.suffix]})
    print(f'{path}: {len(logs)} runs')
