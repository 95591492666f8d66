"""Shows what the logs of runs say: which are alike, their errors, tables beside the paper's.

The command for it is tables.py; curves.py draws the pictures. A run's log is the log.txt in its
folder: a record, as a line of JSON, for each epoch. Errors are 100 minus the accuracy, in %. Text
from a log is shown escaped and cut, as a log may hold anything.
"""
import csv
import io
import json
import re
import shlex
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import cifar
import imagenet
from training.options import DATA, NETWORK, TRAINING, TRANSFER
from training.runs import LOG, read_log, write_whole
from utils import LOSSES, InputError

# Options that are settings of a run and not places, and that `settings` does not read by itself.
SETTINGS = set().union(*(script.make_parser().options_in(NETWORK, DATA, TRAINING, TRANSFER)
                         for script in (cifar, imagenet))) - {
    'seed', 'compile', 'deterministic', 'lr', 'net', 'depth', 'width', 'mapping', 'power',
    'dataset', 'train_fraction', 'student_params'}
NAMED = ('network', 'method', 'data', 'teacher')  # the settings that a label has
RECALLED = '"?": a figure of the paper that is recalled, with no source at hand.'


# ------------------------------------------------------------------------ text and files

def escaped(text: str) -> str:
    """The text with control characters, lone surrogates and the like as escapes, such as \\n."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)


def shown(text: object, limit: int = 60) -> str:
    """Any text in one short line: escaped, and cut in its middle where it is too long."""
    text = escaped(str(text))
    half = (limit - 1) // 2
    return text if len(text) <= limit else f'{text[:half]}…{text[-half:]}'


def text_of(value: Any) -> str:
    """A value of a log as text, the same for 1 and 1.0; lists within lists are only hinted at."""
    if isinstance(value, list | dict):
        values = value if isinstance(value, list) else ()
        return f'[{",".join("…" if isinstance(v, list | dict) else text_of(v) for v in values)}]'
    if isinstance(value, bool):
        return 'yes' if value else 'no'
    return f'{value:.12g}' if isinstance(value, float) else escaped(str(value))


def markdown(rows: list[tuple[str, ...]]) -> str:
    """A Markdown table whose first row is the head."""
    rows = [tuple(text.replace('|', r'\|') for text in row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], tuple('-' * w for w in widths), *rows[1:]]
    return '\n'.join(f'| {" | ".join(map(str.ljust, row, widths))} |' for row in rows)


# ------------------------------------------------------------------------ what a log says

def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def error_of(record: dict, top: int = 1, part: str = 'test') -> float | None:
    """The error in a record, of the test or the training set; None where there is no sound one."""
    accuracy = record.get(f'{part}_acc{"" if top == 1 else top}')
    return 100 - accuracy if is_number(accuracy) and 0 <= accuracy <= 100 else None


def network_of(record: dict) -> str:
    """The network's name, as WRN-16-1: from the log, or for old logs from the options."""
    if isinstance(record.get('network'), str):
        return escaped(record['network'])
    depth, width = (text_of(record.get(name) or '') for name in ('depth', 'width'))
    if 'imagenetpath' in record:
        return '-'.join(filter(None, ['ResNet', depth, width if width != '1' else '']))
    if record.get('net') == 'nin':
        return f'NIN-{width or 1}'
    return f'WRN-{depth}-{width or 1}' if depth else 'WRN'


def method_of(record: dict) -> str:
    """The names of the losses beside the cross-entropy; or 'alone'. F_sum^2 is not mentioned."""
    mapping, power = record.get('mapping') or 'sum', text_of(record.get('power') or 2)
    special = '' if (mapping, power) == ('sum', '2') else f' {escaped(mapping)}^{power}'
    names = [loss.label + (special if loss.flag == 'beta' else '')
             for loss in LOSSES if record.get(loss.flag)]
    return '+'.join(names) or 'alone'


def data_of(record: dict) -> str:
    """The data set's name, and which part of its training images was used."""
    name = record.get('dataset') or ('imagenet' if 'imagenetpath' in record else 'unknown data')
    name += f' {Path(str(record.get("dataroot"))).name}' if name == 'folder' else ''
    part = record.get('train_fraction')
    whole = not is_number(part) or not 0 < part < 1
    return escaped(name if whole else f'{100 * part:g} % of {name}')


def teacher_of(record: dict) -> str | None:
    """The teacher's path below logs/ and without its seed, where a loss needs one."""
    teacher = record.get('teacher_id') or record.get('teacher_params')
    needed = any(record.get(loss.flag) for loss in LOSSES if loss.taught)
    if not teacher or not needed:
        return None
    return re.sub(r'_seed\d+/*$', '', escaped(teacher)).removeprefix('logs/')


def settings(records: list[dict]) -> dict[str, str]:
    """What a run trained and how, by name: all that is logged but results, the seed and places."""
    first, last = records[0], records[-1]
    found = {'network': network_of(last), 'method': method_of(last), 'data': data_of(last),
             'teacher': teacher_of(last)}
    if first['epoch'] == 1:  # later learning rates follow from the schedule
        found['lr'] = first.get('lr')
    weights = {loss.flag for loss in LOSSES}
    for name, value in last.items():
        off = name in weights and not value  # like one that an older log does not know
        if name in SETTINGS and not off and (name, value) != ('beta_decay', 'none'):
            found[escaped(name)] = value
    return {name: text_of(value) for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Group:
    """Runs that differ by their seed alone: their label, their method, their records by folder."""
    label: str
    method: str
    runs: dict[str, list[dict]]


def differing(kinds: list[dict[str, str]]) -> list[str]:
    """The names of the settings that are not the same in all of these."""
    names = dict.fromkeys(chain(*kinds))
    return [name for name in names if len({kind.get(name) for kind in kinds}) > 1]


def labels(kinds: list[dict[str, str]]) -> list[str]:
    """A short name for each of these: network, method, teacher, and what tells it apart."""
    teachers = Counter(Path(path).name for path in {kind.get('teacher', '') for kind in kinds})
    data = 'data' in differing(kinds)
    names = []
    for kind in kinds:
        alike = [k for k in kinds if all(k.get(name) == kind.get(name) for name in NAMED)]
        own = [f'{name}={kind.get(name, "none")}' for name in differing(alike)]
        words = [kind['network'], kind['method'], *own]
        if path := kind.get('teacher'):
            words += ['from', path if teachers[Path(path).name] > 1 else Path(path).name]
        names.append(shown(' '.join([*words, 'on', kind['data']] if data else words)))
    # Names may be alike where they were cut.
    return [name if names.count(name) == 1 else f'{name} #{names[:i].count(name) + 1}'
            for i, name in enumerate(names)]


def groups_of(logs: dict[str, list[dict]]) -> list[Group]:
    """The runs by what they are, in the order given."""
    kinds: dict[tuple, tuple[dict, dict]] = {}
    for folder, records in logs.items():
        kind = settings(records)
        kinds.setdefault(tuple(sorted(kind.items())), (kind, {}))[1][folder] = records
    names = labels([kind for kind, _ in kinds.values()])
    return [Group(name, kind['method'].replace('alone', 'student'), runs)
            for name, (kind, runs) in zip(names, kinds.values(), strict=True)]


def read_logs(folders: Iterable[str]) -> dict[str, list[dict]]:
    """The records of each folder, maybe none. Raises InputError where no folder has any."""
    logs = {folder: read_log(Path(folder, LOG)) for folder in folders}
    if not any(logs.values()):
        raise InputError(f'{next(iter(logs))}: no {LOG} with an epoch in it')
    return logs


# ------------------------------------------------------------------------ runs

def spread(values: list[float]) -> dict[str, float | None]:
    """Median, least, greatest, mean and sample standard deviation; None of too few values."""
    figures = {'median': statistics.median, 'min': min, 'max': max, 'mean': statistics.fmean,
               'deviation': statistics.stdev}
    return {name: f(values) if len(values) > (name == 'deviation') else None
            for name, f in figures.items()}


def figure(value: float | None, form: str = '.2f') -> str:
    return '–' if value is None else format(value, form)


def median_and_range(c: dict[str, Any]) -> str:
    """Of `spread`, or of a cell as `summarise` has it."""
    several = c['deviation'] is not None
    return figure(c['median']) + (f' ({c["min"]:.2f}–{c["max"]:.2f})' if several else '')


def mean_and_deviation(c: dict[str, Any]) -> str:
    return figure(c['mean']) + ('' if c['deviation'] is None else f' ± {c["deviation"]:.2f}')


def error_name(top: int) -> str:
    return 'test error' if top == 1 else f'top-{top} test error'


def print_runs(folders: list[str], top: int = 1) -> None:
    """A line a run, with its last test error, and one for all that differ by their seed alone."""
    logs = read_logs(folders)
    rows = [('run', 'network and method', 'epochs', f'{error_name(top)}, %', 'training, s')]
    summary = [('network and method', 'runs', 'median (min–max)', 'mean ± deviation')]
    for group in groups_of({folder: records for folder, records in logs.items() if records}):
        for folder, records in group.runs.items():
            last, times = records[-1], [r.get('train_time') for r in records]
            seconds = sum(t for t in times if is_number(t) and 0 <= t < 1e9)
            epochs = [shown(text_of(last.get(name, '–')), 20) for name in ('epoch', 'epochs')]
            rows.append((shown(folder, 200), group.label, '/'.join(epochs),
                         figure(error_of(last, top)), f'{seconds:.0f}'))
        errors = [error_of(records[-1], top) for records in group.runs.values()]
        errors = [e for e in errors if e is not None]
        if len(errors) > 1:
            figures = spread(errors)
            summary.append((group.label, str(len(errors)), median_and_range(figures),
                            mean_and_deviation(figures)))
    print(markdown(rows) + ('\n\n' + markdown(summary) if summary[1:] else ''))
    if without := [shown(folder, 200) for folder, records in logs.items() if not records]:
        print(f'No runs: {", ".join(without)}')


# ------------------------------------------------------------------------ tables

@dataclass(frozen=True)
class CellRuns:
    """A cell of a table of the paper, and the records of its runs, one for each seed from 0."""
    row: str                # student and teacher, as WRN-16-1:WRN-16-2
    method: str
    top: int
    paper: float | None     # the paper's error, %, where it has one
    confirmed: bool         # whether that figure is confirmed by a source at hand, or recalled
    command: str            # of the first seed
    logs: list[list[dict]]
    chosen: bool = True     # whether to show it; the others serve to compare with


@dataclass(frozen=True)
class TableRuns:
    """A table of the paper, and the runs of its cells."""
    number: int
    title: str
    options: list[str]      # that all runs were given
    dataset: str
    epochs: int
    comparable: bool        # whether the data set is the paper's
    cells: list[CellRuns]


def difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def summarise(cell: CellRuns, epochs: int) -> dict[str, Any]:
    """A cell's figures: the last errors of the runs that are finished, and their `spread`."""
    errors = {seed: error_of(log[-1], cell.top) for seed, log in enumerate(cell.logs)
              if log and len(log) >= epochs}
    values = [e for e in errors.values() if e is not None]
    return {'row': cell.row, 'method': cell.method, 'top': cell.top, 'paper': cell.paper,
            'confirmed': cell.confirmed, 'errors': errors, **spread(values),
            'finished': len(errors), 'seeds': len(cell.logs), 'command': cell.command}


def make_report(table: TableRuns) -> dict[str, Any]:
    """The chosen cells' figures, and differences from the paper and from the student alone."""
    entries = [summarise(cell, table.epochs) for cell in table.cells]
    alone = {(c['row'], c['top']): c['median'] for c in entries if c['method'] == 'student'}
    for c in entries:
        c['minus_paper'] = difference(c['median'], c['paper'] if table.comparable else None)
        c['minus_student'] = None if c['method'] in ('student', 'teacher') else difference(
            c['median'], alone.get((c['row'], c['top'])))
    chosen = [c for c, cell in zip(entries, table.cells, strict=True) if cell.chosen]
    return {'table': table.number, 'title': table.title, 'options': table.options,
            'dataset': table.dataset, 'epochs': table.epochs, 'cells': chosen}


def name_of(text: str, top: int) -> str:
    return text if top == 1 else f'{text}, top-{top}'


def paper_text(c: dict[str, Any]) -> str:
    return '–' if c['paper'] is None else f'{c["paper"]:g}' + ' ?' * (not c['confirmed'])


def headline(report: dict[str, Any]) -> str:
    """Which table this is, and what was run for it."""
    options = ', ' + escaped(shlex.join(report['options'])) if report['options'] else ''
    return (f'Table {report["table"]}: {report["title"]}. Test error of the last epoch, %.\n'
            f'Ours: {report["dataset"]}, {report["epochs"]} epochs{options}.')


def footnotes(report: dict[str, Any]) -> list[str]:
    recalled = any(c['paper'] is not None and not c['confirmed'] for c in report['cells'])
    several = any(c['deviation'] is not None for c in report['cells'])
    return ['±: sample standard deviation over seeds.'] * several + [RECALLED] * recalled


def report_text(report: dict[str, Any]) -> str:
    """The table in Markdown: a line for each cell, and once more in the paper's layout."""
    rows = [('student:teacher', 'method', 'paper', 'median (min–max)', 'mean ± deviation', 'seeds',
             '− paper', '− student')]
    for c in report['cells']:
        differences = [figure(c[name], '+.2f') for name in ('minus_paper', 'minus_student')]
        rows.append((c['row'], name_of(c['method'], c['top']), paper_text(c), median_and_range(c),
                     mean_and_deviation(c), f'{c["finished"]}/{c["seeds"]}', *differences))
    layout = grid(report, lambda c: f'{figure(c["median"])} ({paper_text(c)})')
    parts = [headline(report), markdown(rows), 'Our median (the paper):', markdown(layout)]
    return '\n\n'.join([*parts, *footnotes(report)]) + '\n'


def grid(report: dict[str, Any], text: Callable[[dict[str, Any]], str]) -> list[tuple[str, ...]]:
    """The paper's layout: a row for each student and teacher, a column for each method."""
    cells = {(name_of(c['row'], c['top']), c['method']): c for c in report['cells']}
    methods = list(dict.fromkeys(method for _, method in cells))
    rows = [(row, *(text(cells[row, m]) if (row, m) in cells else '' for m in methods))
            for row in dict.fromkeys(row for row, _ in cells)]
    return [('student:teacher', *methods), *rows]


def latex_escaped(text: str) -> str:
    words = {'\\': r'\textbackslash{}', '^': r'\textasciicircum{}', '~': r'\textasciitilde{}',
             '–': '--', '±': r'$\pm$'}
    return re.sub(r'[\\^~–±{}$&#_%]', lambda m: words.get(m[0], '\\' + m[0]), text)


def latex_text(report: dict[str, Any]) -> str:
    """The table in LaTeX, in the paper's layout: median; mean ± deviation; (the paper's figure)."""
    def cell(c: dict[str, Any]) -> str:
        lines = [figure(c['median'])] + [mean_and_deviation(c)] * (c['deviation'] is not None)
        lines += [f'({paper_text(c)})'] * (c['paper'] is not None)
        stack = r' \\ \scriptsize '.join(map(latex_escaped, lines))
        return rf'\shortstack{{{stack}}}'

    head, *rows = grid(report, cell)
    comments = [*headline(report).splitlines(), *footnotes(report),
                'Our median; mean ± deviation; (the paper).']
    lines = [' & '.join([latex_escaped(row[0]), *row[1:]]) + r' \\[1ex]' for row in rows]
    return '\n'.join([*(f'% {line}' for line in comments),
                      rf'\begin{{tabular}}{{l{"c" * (len(head) - 1)}}}', r'\hline',
                      ' & '.join(map(latex_escaped, head)) + r' \\ \hline', *lines,
                      r'\hline', r'\end{tabular}', ''])


def csv_text(report: dict[str, Any]) -> str:
    """The table as CSV: a line for each cell, the errors of each seed in columns of their own."""
    names = ('median', 'min', 'max', 'mean', 'deviation', 'minus_paper', 'minus_student')
    seeds = range(max((c['seeds'] for c in report['cells']), default=0))
    file = io.StringIO()
    write = csv.writer(file, lineterminator='\n').writerow
    write(['row', 'method', 'top', 'paper', 'source', *(f'seed{seed}' for seed in seeds), *names,
           'finished', 'seeds'])
    for c in report['cells']:
        source = '' if c['paper'] is None else 'confirmed' if c['confirmed'] else 'recalled'
        figures = [*(c['errors'].get(seed) for seed in seeds), *(c[name] for name in names)]
        write([c['row'], c['method'], c['top'], c['paper'], source,
               *('' if value is None else f'{value:.6g}' for value in figures),
               c['finished'], c['seeds']])
    return file.getvalue()


def save_report(table: TableRuns, folder: Path) -> str:
    """Writes table<n>.md, .json, .csv and .tex; the text of the first."""
    report = make_report(table)
    text = report_text(report)
    folder.mkdir(parents=True, exist_ok=True)
    contents = {'md': text, 'json': json.dumps(report, indent=1), 'csv': csv_text(report),
                'tex': latex_text(report)}
    write_whole({folder / f'table{table.number}.{suffix}': content.encode()
                 for suffix, content in contents.items()})
    return text
