"""Summarises logs as text: groups runs that differ only by seed, and fills the paper's tables.

Used by tables.py; curves.py draws the plots. A run's log is the log.txt in its folder, with one
record per epoch. Errors are 100 minus the accuracy, in %.
"""
import csv
import io
import json
import re
import shlex
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from textwrap import indent
from typing import Any

import cifar
import imagenet
from paper import TABLES, Cell
from resnet import NETWORKS
from training.errors import shortened
from training.log import LOG, read_log
from training.options import AUGMENT, DATA, NETWORK, TRAINING, TRANSFER
from utils import LOSSES, InputError

Log = list[dict]  # the records of a run, one an epoch
# Options that distinguish runs; `settings` adds others under names of its own (network, data, …).
SETTINGS = set().union(*(script.make_parser().options_in(NETWORK, DATA, AUGMENT, TRAINING, TRANSFER)
                         for script in (cifar, imagenet))) - {
    'seed', 'compile', 'deterministic', 'lr', 'net', 'depth', 'width', 'mapping', 'power',
    'dataset', 'train_fraction', 'test_fraction', 'student_params'}
NAMED = ('network', 'method', 'data', 'teacher')  # the settings that are in every label
NOTES = {'±': '±: sample standard deviation over seeds.',
         ' ?': '"?": a number of the paper that is recalled, with no source at hand.'}


# ------------------------------------------------------------------------ text

def text_of(value: Any) -> str:
    """A value of a log as text, the same for 1 and 1.0."""
    if isinstance(value, float):
        return f'{value:.12g}'
    return value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))


def markdown(rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; the first row is the header."""
    rows = [tuple(text.replace('|', r'\|') for text in row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], tuple('-' * w for w in widths), *rows[1:]]
    return '\n'.join(f'| {" | ".join(map(str.ljust, row, widths))} |' for row in rows)


def latex_escaped(text: str) -> str:
    words = {'\\': r'\textbackslash{}', '^': r'\textasciicircum{}', '~': r'\textasciitilde{}',
             '–': '--', '−': '$-$', '±': r'$\pm$'}
    return re.sub(r'[\\^~–−±{}$&#_%]', lambda m: words.get(m[0], '\\' + m[0]), text)


def latex(rows: list[tuple[str, ...]]) -> str:
    """A LaTeX table; the first row is the head."""
    head, *body = (' & '.join(map(latex_escaped, row)) + r' \\' for row in rows)
    columns = 'l' + 'c' * (len(rows[0]) - 1)
    return '\n'.join([rf'\begin{{tabular}}{{{columns}}}', r'\hline', head, r'\hline', *body,
                      r'\hline', r'\end{tabular}'])


# ------------------------------------------------------------------------ what a log says

def error_of(record: dict, top: int = 1, part: str = 'test') -> float | None:
    """The error in a record, of the test or the training set; None if missing or invalid."""
    accuracy = record.get(f'{part}_acc{"" if top == 1 else top}')
    return round(100 - accuracy, 9) if accuracy is not None and 0 <= accuracy <= 100 else None


def is_finished(log: Log) -> bool:
    """Whether the log has all epochs that the run was started for."""
    return bool(log) and len(log) >= (log[-1].get('epochs') or 0)


def network_of(record: dict) -> str:
    """The network's name, such as WRN-16-1; old logs do not have it: there from the options."""
    net = record.get('net') or ('resnet' if 'imagenetpath' in record else 'wrn')
    if record.get('network') or net not in NETWORKS:
        return record.get('network') or net
    return NETWORKS[net].label(**NETWORKS[net].settings(record))


def method_of(record: dict) -> str:
    """The labels of the losses, or 'alone'; with the mapping function unless it is F_sum^2."""
    mapping, power = record.get('mapping') or 'sum', text_of(record.get('power') or 2)
    special = '' if (mapping, power) == ('sum', '2') else f' {mapping}^{power}'
    names = [loss.label + (special if 'maps' in loss.needs else '')
             for loss in LOSSES if record.get(loss.flag)]
    return '+'.join(names) or 'alone'


def data_of(record: dict) -> str:
    """The data set's name, and the fractions of it that were used, if less than 1."""
    name = record.get('dataset') or ('imagenet' if 'imagenetpath' in record else 'unknown data')
    name += f' {Path(str(record.get("dataroot"))).name}' if name == 'folder' else ''
    train, test = record.get('train_fraction') or 1, record.get('test_fraction') or 1
    name = name if train == 1 else f'{100 * train:g} % of {name}'
    return name if test == 1 else f'{name}, tested on {100 * test:g} %'


def teacher_of(record: dict) -> str | None:
    """The teacher's `run_name`, if a loss needs one."""
    teacher = record.get('teacher_id') or record.get('teacher_params')
    if not teacher or not any(record.get(loss.flag) for loss in LOSSES if loss.needs_teacher):
        return None
    return run_name(teacher)


def run_name(folder: str) -> str:
    """A run's path, without a leading logs/ and without the seed."""
    return re.sub(r'_seed\d+/*$', '', folder).removeprefix('logs/')


def settings(log: Log) -> dict[str, str]:
    """{name: value} of what defines a run: its options without seed, paths and devices."""
    first, last = log[0], log[-1]
    found = {'network': network_of(last), 'method': method_of(last), 'data': data_of(last),
             'teacher': teacher_of(last)}
    if first['epoch'] == 1:  # later learning rates follow from the schedule
        found['lr'] = first.get('lr')
    weights = {loss.flag for loss in LOSSES}
    for name, value in last.items():
        off = name in weights and not value  # the same as missing, as in logs of older versions
        if name in SETTINGS and not off and (name, value) != ('beta_decay', 'none'):
            found[name] = value
    return {name: text_of(value) for name, value in found.items() if value is not None}


# ------------------------------------------------------------------------ groups of runs

@dataclass(frozen=True)
class Group:
    """Runs that differ only by seed: their label, their method, and {folder: log}."""
    label: str
    method: str
    runs: dict[str, Log]


def labels(kinds: list[dict[str, str]]) -> list[str]:
    """A short label for each kind of run: network, method, teacher, and differing settings."""
    teachers = Counter(Path(path).name for path in {kind.get('teacher', '') for kind in kinds})
    several_data = len({kind['data'] for kind in kinds}) > 1
    names = []
    for kind in kinds:
        alike = [k for k in kinds if all(k.get(name) == kind.get(name) for name in NAMED)]
        common = set.intersection(*(set(k.items()) for k in alike))
        own = [f'{name}={value}' for name, value in kind.items() if (name, value) not in common]
        words = [kind['network'], kind['method'], *own]
        if path := kind.get('teacher'):
            words += ['from', path if teachers[Path(path).name] > 1 else Path(path).name]
        words += ['on', kind['data']] if several_data else []
        names.append(shortened(' '.join(words)))
    # Shortened names may be equal: number them.
    return [name if names.count(name) == 1 else f'{name} #{names[:i].count(name) + 1}'
            for i, name in enumerate(names)]


def groups_of(logs: dict[str, Log]) -> list[Group]:
    """The runs, grouped by equal settings, in the given order."""
    runs: dict[tuple, dict[str, Log]] = {}
    for folder, log in logs.items():
        runs.setdefault(tuple(sorted(settings(log).items())), {})[folder] = log
    kinds = [dict(kind) for kind in runs]
    teachers = {kind.get('teacher') for kind in kinds}
    groups = []
    for label, kind, same in zip(labels(kinds), kinds, runs.values(), strict=True):
        teaches = any(run_name(folder) in teachers for folder in same)
        alone = 'teacher' if teaches else 'student'
        groups.append(Group(label, kind['method'].replace('alone', alone), same))
    return groups


def read_logs(folders: list[str]) -> dict[str, Log]:
    """{folder: log} of folders with a finished epoch; prints the others. InputError if none has."""
    logs = {folder: read_log(Path(folder, LOG)) for folder in folders}
    without = ', '.join(shortened(folder, 200) for folder, log in logs.items() if not log)
    if not any(logs.values()):
        raise InputError(f'{without}: no {LOG} with an epoch in it')
    if without:
        print(f'no log with a finished epoch: {without}', file=sys.stderr)
    return {folder: log for folder, log in logs.items() if log}


# ------------------------------------------------------------------------ figures

def spread(values: list[float]) -> dict[str, float | None]:
    """Median, min, max, mean and sample standard deviation; None where there are too few values."""
    figures = {'median': statistics.median, 'min': min, 'max': max, 'mean': statistics.fmean,
               'deviation': statistics.stdev}
    return {name: round(f(values), 9) if len(values) > (name == 'deviation') else None
            for name, f in figures.items()}


def figure(value: float | None, form: str = '.2f') -> str:
    return '–' if value is None else format(value, form)


def median_and_mean(c: dict[str, Any]) -> tuple[str, str]:
    """Figures of `spread` as text: the median (least–greatest), and the mean ± deviation."""
    if c['deviation'] is None:
        return figure(c['median']), figure(c['mean'])
    return (f'{c["median"]:.2f} ({c["min"]:.2f}–{c["max"]:.2f})',
            f'{c["mean"]:.2f} ± {c["deviation"]:.2f}')


def error_name(top: int) -> str:
    return 'test error' if top == 1 else f'top-{top} test error'


def print_runs(folders: list[str], top: int = 1) -> None:
    """Prints a line per run, with its last test error, and a line per group of runs over seeds."""
    rows = [('run', 'network and method', 'epochs', f'{error_name(top)}, %', 'training, s')]
    summary = [('network and method', 'runs', 'median (min–max)', 'mean ± deviation')]
    for group in groups_of(read_logs(folders)):
        errors = {folder: error_of(log[-1], top) for folder, log in group.runs.items()}
        for folder, log in group.runs.items():
            epochs = f'{log[-1]["epoch"]}/{log[-1].get("epochs") or "–"}'
            seconds = sum(record.get('train_time') or 0 for record in log)
            rows.append((shortened(folder, 200), group.label, epochs, figure(errors[folder]),
                         f'{seconds:.0f}'))
        values = [e for e in errors.values() if e is not None]
        if len(values) > 1:
            summary.append((group.label, str(len(values)), *median_and_mean(spread(values))))
    print(markdown(rows) + ('\n\n' + markdown(summary) if summary[1:] else ''))


# ------------------------------------------------------------------------ tables

def figures_of(cell: Cell, logs: list[Log]) -> dict[str, Any]:
    """A cell's fields, the last errors of its finished runs by seed, and their `spread`."""
    errors = {seed: error_of(log[-1], cell.top) for seed, log in enumerate(logs)
              if is_finished(log)}
    return {**asdict(cell), 'errors': errors, 'finished': len(errors), 'seeds': len(logs),
            **spread([e for e in errors.values() if e is not None])}


def difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else round(a - b, 9)


def paired(errors: dict[int, float | None], alone: dict[int, float | None]) -> dict[str, Any]:
    """The median over seeds of the difference to the student alone, and how many are negative."""
    differences = [difference(e, alone.get(seed)) for seed, e in errors.items()]
    known = [d for d in differences if d is not None]
    return {'minus_student': statistics.median(known) if known else None,
            'below_student': sum(d < 0 for d in known), 'pairs': len(known)}


def make_report(number: str, logs: dict[Cell, list[Log]], chosen: list[Cell], options: list[str]
                ) -> dict[str, Any]:
    """The numbers of the chosen cells of a table, and the text above it.

    `logs` has the logs of each cell by seed; a log may be empty. `options` were given to all runs.
    Raises InputError if the chosen runs differ in --epochs.
    """
    table, last = TABLES[number], [log[-1] for cell in chosen for log in logs[cell] if log]
    epochs, *others = sorted({record.get('epochs') or 0 for record in last}) or [0]
    if others:
        raise InputError(f'table {number}: runs of {epochs}, {", ".join(map(str, others))} epochs')
    data = sorted({str(record.get('dataset')) for record in last})
    cells = {cell: figures_of(cell, logs[cell]) for cell in logs}
    alone = {cell.row: c['errors'] for cell, c in cells.items() if cell.method == 'student'}
    for cell, c in cells.items():
        paper = cell.paper if table.dataset is None or data == [table.dataset] else None
        c['minus_paper'] = difference(c['median'], paper)
        student = {} if cell.method in ('student', 'teacher') else alone.get(cell.row, {})
        c |= paired(c['errors'], student)
    given = f', {shortened(shlex.join(options), 1000)}' if options else ''
    head = (f'Table {number}: {table.title}. Test error of the last epoch, %.\n'
            f'Ours: {shortened(", ".join(data)) or "no run"}, {epochs} epochs{given}.')
    return {'head': head, 'cells': [cells[cell] for cell in chosen]}


def paper_text(c: dict[str, Any]) -> str:
    return figure(c['paper'], 'g') + ('' if c['confirmed'] or c['paper'] is None else ' ?')


def paired_text(c: dict[str, Any]) -> str:
    text = figure(c['minus_student'], '+.2f')
    return f'{text} (below in {c["below_student"]}/{c["pairs"]})' if c['pairs'] else text


def by_line(cells: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The rows of a table with a line for each cell."""
    head = ('student:teacher', 'method', 'paper', 'median (min–max)', 'mean ± deviation', 'seeds',
            '− paper', '− student, seed by seed')
    return [head, *((c['row'], c['method'], paper_text(c), *median_and_mean(c),
                     f'{c["finished"]}/{c["seeds"]}', figure(c['minus_paper'], '+.2f'),
                     paired_text(c)) for c in cells)]


def in_layout(cells: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The rows in the paper's layout: one per student and teacher, with a column per method."""
    texts = {}
    for c in cells:
        mean = '' if c['deviation'] is None else f', {median_and_mean(c)[1]}'
        texts[c['row'], c['method']] = f'{figure(c["median"])}{mean} ({paper_text(c)})'
    rows, methods = (dict.fromkeys(names) for names in zip(*texts, strict=True))
    return [('student:teacher', *methods),
            *((row, *(texts.get((row, method), '') for method in methods)) for row in rows)]


def report_text(report: dict[str, Any], table: Callable = markdown, comment: str = '') -> str:
    """The table with a line per cell, and in the paper's layout; `comment` starts lines of text."""
    rows = by_line(report['cells'])
    parts = [indent(report['head'], comment), table(rows),
             f'{comment}Our median, mean ± deviation (the paper):',
             table(in_layout(report['cells'])),
             *(comment + note for sign, note in NOTES.items() if sign in str(rows[1:]))]
    return '\n\n'.join(parts) + '\n'


def csv_text(report: dict[str, Any]) -> str:
    """The table as CSV: a line per cell, with a column for the error of each seed."""
    lines = [{**c, **{f'seed{seed}': e for seed, e in c['errors'].items()}}
             for c in report['cells']]
    names = [name for name in dict.fromkeys(chain(*lines)) if name != 'errors']
    file = io.StringIO()
    writer = csv.DictWriter(file, names, extrasaction='ignore', lineterminator='\n')
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def report_files(report: dict[str, Any]) -> dict[str, bytes]:
    """The table in each of its formats, by suffix."""
    texts = {'.md': report_text(report), '.json': json.dumps(report, indent=1),
             '.csv': csv_text(report), '.tex': report_text(report, latex, '% ')}
    layout = io.StringIO()
    csv.writer(layout, lineterminator='\n').writerows(in_layout(report['cells']))
    texts['_layout.csv'] = layout.getvalue()
    return {suffix: text.encode() for suffix, text in texts.items()}
