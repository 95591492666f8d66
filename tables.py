"""Runs the paper's tables and prints them with ours beside them; plots how runs converge.

    python tables.py 1                                          # every run of table 1, five seeds; also 2, 3, 4, 5
    python tables.py 1 --row WRN-16-1:WRN-16-2 --method AT      # a part of it
    python tables.py 2 --seeds 3 --epochs 100 --dtype bfloat16  # what tables.py does not know goes to the script
    python tables.py 1 --gpu_id 0,1,2,3 --jobs 2                # two runs at a time on each of four GPUs
    python tables.py 1 --dry_run                                # the plan: each command, and what is there
    python tables.py 1 --report                                 # the table from the logs
    python tables.py --plot logs/a logs/b                       # curves of any runs
    python tables.py --runs logs/demo/*                         # their test errors

Each run is one printed command of cifar.py or imagenet.py in a folder of its own under --folder. What is finished is
not run again, what is not is resumed; tables.py can be killed, and started again, or twice, on several machines too.
"""
import argparse
import itertools
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import cifar
import imagenet
from training import (
    DATA_OPTIONS,
    LOG,
    PLACE_OPTIONS,
    STOP_SIGNALS,
    Parser,
    check_gradients,
    check_groups,
    check_writable,
    choose_devices,
    folder_name,
    indices,
    input_errors,
    number,
    owner,
    read_log,
    settle_gradients,
)
from utils import CHECKPOINT, InputError, read_checkpoint

SCRIPTS = {'cifar.py': cifar, 'imagenet.py': imagenet}
POLL = 0.5  # seconds between two looks at the runs
TAIL = 6    # lines of a failed run's output to show
# Options that each run has from here: where it is, and what makes it the cell that it is.
OURS = ('save', 'resume', 'overwrite', 'evaluate', 'export', 'gpu_id', 'ngpu', 'seed', 'teacher_id', 'teacher_params',
        'student_params', 'net', 'depth', 'width', 'batch_norm', 'pool_relu', 'alpha', 'beta', 'factt', 'beta_decay',
        'mapping', 'power', 'grad_at', 'symmetry', 'min_l2')


# ------------------------------------------------------------------------------------------- the paper's tables

@dataclass(frozen=True)
class Cell:
    """A figure of the paper, and the run that gives ours."""
    row: str
    method: str
    run: str                    # its name, to which that of the seed is added
    options: str
    paper: float | None         # test error, %
    confirmed: bool = False     # by a second source
    teacher: str | None = None  # the run that it learns from
    top: int = 1

    @property
    def label(self) -> str:
        return self.method if self.top == 1 else f'{self.method}, top-{self.top}'


@dataclass(frozen=True)
class Table:
    title: str
    script: str
    seeds: int          # by default, as in the paper
    dataset: str | None  # the paper's, where it is one
    cells: tuple[Cell, ...]


NETWORKS = {'NIN-thin': '--net nin --width 0.5', 'NIN-wide': '--net nin --width 1',
            **{f'WRN-{d}-{w}': f'--depth {d} --width {w}' for d, w in ((16, 1), (16, 2), (40, 1), (40, 2))}}
METHODS = {'student': '', 'AT': '--beta 1e+3', 'F-ActT': '--factt 1e+3 --beta_decay cosine', 'KD': '--alpha 0.9',
           'AT+KD': '--alpha 0.9 --beta 1e+3 --beta_decay step'}
# Student and teacher, and the errors by METHODS and of the teacher; those with * are confirmed by a second source.
TABLE_1 = (('NIN-thin', 'NIN-wide', '9.38 8.93 9.05 8.55 8.33 7.28'),
           ('WRN-16-1', 'WRN-16-2', '8.77* 7.93* 8.51 7.41 7.51 6.31*'),
           ('WRN-16-1', 'WRN-40-1', '8.77* 8.25* 8.62 8.39* 8.01 6.58*'),
           ('WRN-16-2', 'WRN-40-2', '6.31* 5.85* 6.24 6.08* 5.71 5.23*'))


def table_1() -> Iterable[Cell]:
    for student, teacher, figures in TABLE_1:
        row = f'{student}:{teacher}'
        errors = [(float(f.rstrip('*')), f.endswith('*')) for f in figures.split()]
        for (method, options), error in zip(METHODS.items(), errors, strict=False):
            run = student if method == 'student' else f'{student}_{method}_{teacher}'
            yield Cell(row, method, run, f'{NETWORKS[student]} {options}'.strip(), *error,
                       teacher=None if method == 'student' else teacher)
        yield Cell(row, 'teacher', teacher, NETWORKS[teacher], *errors[-1])


def table_2() -> Iterable[Cell]:
    student, teacher, row = 'WRN-16-1', 'WRN-16-2', 'WRN-16-1:WRN-16-2'
    yield Cell(row, 'student', student, NETWORKS[student], 8.77, True)
    for method, name, mapping, paper in (('F_sum', 'AT-sum1', '--power 1', (7.99, False)),
                                         ('F_sum^2', 'AT', '', (7.93, True)),
                                         ('F_sum^4', 'AT-sum4', '--power 4', (8.09, False)),
                                         ('F_max', 'AT-max1', '--mapping max --power 1', (8.08, False))):
        yield Cell(row, method, f'{student}_{name}_{teacher}', f'{NETWORKS[student]} --beta 1e+3 {mapping}'.strip(),
                   *paper, teacher=teacher)
    yield Cell(row, 'teacher', teacher, NETWORKS[teacher], 6.31, True)


def table_3() -> Iterable[Cell]:
    # No batch norm, no ReLU before poolings, flips alone, no weight decay. Without batch norm an lr of 0.1 is too high.
    thin = '--net nin --width 0.5 --no-batch_norm --no-pool_relu --randomcrop_pad 0 --weight_decay 0 --lr 0.01'
    teacher, row = 'NIN-wide-nopoolrelu', 'NIN-thin:NIN-wide'
    yield Cell(row, 'teacher', teacher, '--net nin --no-pool_relu', None)
    for method, options, paper, taught in (
            ('student', '', 13.5, False), ('min-l2', '--min_l2 1', 12.5, False),
            ('gradient AT', '--grad_at 1', 12.1, True), ('KD', '--alpha 0.9', 12.1, True),
            ('symmetry norm', '--symmetry 1', 11.8, False), ('AT', '--beta 1e+3', 11.2, True)):
        run = 'NIN-thin-nobn' + ('' if method == 'student' else f'_{method.replace(" ", "-")}')
        yield Cell(row, method, run, f'{thin} {options}'.strip(), paper, teacher=teacher if taught else None)


def table_4() -> Iterable[Cell]:
    for dataset, errors in (('cub', (28.5, 27.0, 27.0, 26.5)), ('scenes', (28.2, 28.1, 27.1, 26.0))):
        student, teacher = f'{dataset}_ResNet-18', f'{dataset}_ResNet-34'
        options = f'--dataset {dataset} --student_params torchvision-18'
        yield Cell(dataset, 'student', student, options, errors[0])
        for method, error in zip(('KD', 'AT'), errors[1:], strict=False):
            yield Cell(dataset, method, f'{student}_{method}', f'{options} {METHODS[method]}', error, teacher=teacher)
        yield Cell(dataset, 'teacher', teacher, f'--dataset {dataset} --student_params torchvision', errors[-1])


def table_5() -> Iterable[Cell]:
    teacher = 'imagenet_ResNet-34'
    row, student = 'ResNet-18:ResNet-34', 'imagenet_ResNet-18'
    for top, (alone, at, taught_by) in ((1, (30.4, 29.3, 26.1)), (5, (10.8, 10.0, 8.3))):
        yield Cell(row, 'student', student, '--depth 18', alone, True, top=top)
        yield Cell(row, 'AT', f'{student}_AT', '--depth 18 --beta 1e+3', at, True, teacher, top)
        yield Cell(row, 'teacher', teacher, '--depth 34', taught_by, top=top)


TABLES = {
    1: Table('CIFAR-10, activation-based transfer', 'cifar.py', 5, 'CIFAR10', tuple(table_1())),
    2: Table('CIFAR-10, mapping functions', 'cifar.py', 5, 'CIFAR10', tuple(table_2())),
    3: Table('CIFAR-10, gradient-based transfer', 'cifar.py', 1, 'CIFAR10', tuple(table_3())),
    4: Table('fine-tuning on CUB and Scenes', 'imagenet.py', 1, None, tuple(table_4())),
    5: Table('ImageNet, single crop', 'imagenet.py', 1, None, tuple(table_5()))}


# ------------------------------------------------------------------------------------------- the plan

@dataclass(frozen=True)
class Job:
    """One run: a command that a person could give as well."""
    folder: Path
    script: str
    argv: tuple[str, ...]
    teacher: Path | None

    @property
    def save(self) -> tuple[str, ...]:
        return ('--save', str(self.folder))

    def command(self) -> str:
        return shlex.join(['python', self.script, *self.save, *self.argv])

    @property
    def epochs(self) -> int:
        return parsed(self.script, self.argv).epochs

    def records(self) -> list[dict]:
        return log_of(self.folder)

    def finished(self) -> bool:
        return len(self.records()) >= self.epochs

    def saved(self) -> bool:
        """Whether it is finished and its checkpoint, if it is there, is, too: a kill may fall between the two."""
        path = self.folder / CHECKPOINT
        return self.finished() and (not path.exists() or epoch_of(path, path.stat().st_mtime_ns) >= self.epochs)


@cache
def epoch_of(path: Path, written: int) -> int:
    """The completed epochs of a checkpoint, -1 for a damaged one; read once for each time that it was written."""
    try:
        return int(read_checkpoint(path)['epoch'])
    except (InputError, KeyError, TypeError, ValueError):
        return -1


def log_of(folder: Path) -> list[dict]:
    """The records of a run's log, read anew when it has changed."""
    try:
        stamp = (folder / LOG).stat()
    except OSError:
        return []
    if LOGS.get(folder, (None,))[0] != (stamp.st_mtime_ns, stamp.st_ino):
        LOGS[folder] = (stamp.st_mtime_ns, stamp.st_ino), read_log(folder / LOG)
    return LOGS[folder][1]


LOGS: dict[Path, tuple[tuple[int, int], list[dict]]] = {}


@cache
def parsed(script: str, argv: tuple[str, ...]) -> argparse.Namespace:
    """The options of a command as its log will have them; what is wrong with them ends this with the script's line."""
    parser = imagenet.parser_for(list(argv)) if script == 'imagenet.py' else cifar.make_parser()
    opt = parser.parse_args(argv)
    SCRIPTS[script].settle(opt)
    settle_gradients(opt)
    return opt


def chosen_cells(opt: argparse.Namespace) -> list[Cell]:
    """The cells of the table that --row and --method leave. Raises InputError where there is none such."""
    cells = TABLES[opt.table].cells
    for name in ('row', 'method'):
        there = list(dict.fromkeys(getattr(cell, name) for cell in cells))
        if unknown := [value for value in getattr(opt, name) or [] if value not in there]:
            raise InputError(f'--{name} {unknown[0]}: table {opt.table} has {", ".join(there)}')
        cells = [cell for cell in cells if getattr(cell, name) in (getattr(opt, name) or there)]
    if not cells:
        raise InputError(f'--row, --method: table {opt.table} has no such cell')
    return cells


def job_of(cell: Cell, seed: int, opt: argparse.Namespace, extra: list[str]) -> Job:
    script = TABLES[opt.table].script
    argv = shlex.split(cell.options)
    if opt.table == 4:
        argv += ['--dataroot', getattr(opt, cell.row) or cell.row]
    teacher = cell.teacher and Path(opt.folder, f'{cell.teacher}_seed{seed}')
    if teacher:
        argv += ['--teacher_id' if script == 'cifar.py' else '--teacher_params', str(teacher)]
    return Job(Path(opt.folder, f'{cell.run}_seed{seed}'), script, (*argv, '--seed', str(seed), *extra), teacher)


def make_plan(opt: argparse.Namespace, extra: list[str]) -> list[Job]:
    """The runs that the chosen cells need, seed by seed, teachers before their students.

    Raises InputError for options that are not to be given, or another table's folder.
    """
    names = [word.partition('=')[0].removeprefix('--no-').removeprefix('--') for word in extra if word[:2] == '--']
    if ours := [name for name in names if name in OURS or (name == 'dataset' and opt.table == 4)]:
        raise InputError(f'--{ours[0]}: each run of a table has its own')
    cells, everything = chosen_cells(opt), {cell.run: cell for cell in TABLES[opt.table].cells}
    jobs = {}
    for seed in range(opt.seeds):
        for cell in cells:
            needed = [everything[cell.teacher]] if cell.teacher else []
            for each in (*needed, cell):
                job = job_of(each, seed, opt, extra)
                jobs.setdefault(job.folder, job)
    for job in jobs.values():
        check_same(job)
    return list(jobs.values())


def check_same(job: Job) -> None:
    """Raises InputError where the job's folder has a run with other options."""
    records, options = job.records(), vars(parsed(job.script, job.argv))
    data = ('dataroot',) if options['dataset'] == 'folder' else ()  # elsewhere they are the same wherever they are
    for name, value in options.items() if records else ():
        there = (records[-1] if name == 'epochs' else records[0]).get(name, value)
        if there != value and (name in data or name not in (*PLACE_OPTIONS, *DATA_OPTIONS)):
            raise InputError(f'{job.folder}: that run has --{name} {there}, this table {value}: take another --folder')


def check_all(jobs: list[Job], opt: argparse.Namespace) -> None:
    """Raises InputError for what would make every run fail: the folder, the data, a GPU, options that do not fit."""
    check_writable('--folder', Path(opt.folder))
    slots(opt)
    seen = set()
    for job in jobs:
        options = parsed(job.script, job.argv)
        check_gradients(options)
        check_groups(options, 3 if job.script == 'cifar.py' else 4)
        choose_devices(options)
        if (data := (options.dataset, options.dataroot)) not in seen:
            SCRIPTS[job.script].count_classes(options)
        seen.add(data)


def print_plan(jobs: list[Job], opt: argparse.Namespace) -> None:
    for job in jobs:
        done, at_work = len(job.records()), owner(job.folder)
        state = 'finished' if job.finished() else f'{done}/{job.epochs} epochs' if done else 'to do'
        print(f'{state + (f", {at_work} trains" if at_work else ""):>14}  {job.command()}')
    print(estimate(jobs, opt))


def seconds_an_epoch(job: Job) -> float | None:
    times = [(r.get('train_time') or math.nan) + (r.get('test_time') or math.nan) for r in job.records()]
    times = [t for t in times if math.isfinite(t)]
    return statistics.mean(times) if times else None


def estimate(jobs: list[Job], opt: argparse.Namespace) -> str:
    """How long the rest will take, from the epochs timed so far: of the same run with another seed, or of all."""
    timed = {job: seconds for job in jobs if (seconds := seconds_an_epoch(job))}
    same = {job: [s for other, s in timed.items() if other.folder.name.rpartition('_')[0] ==
                  job.folder.name.rpartition('_')[0]] for job in jobs}
    left = sum(job.epochs - len(job.records()) for job in jobs)
    if not left or not timed:
        return f'{len(jobs)} runs, {left} epochs to train' + (', none timed yet' if left else '')
    seconds = sum((job.epochs - len(job.records())) * statistics.mean(same[job] or timed.values()) for job in jobs)
    minutes = round(seconds / len(slots(opt)) / 60)
    return f'{len(jobs)} runs, {left} epochs to train: about {minutes // 60} h {minutes % 60} min'


# ------------------------------------------------------------------------------------------- running it

def slots(opt: argparse.Namespace) -> list[int | None]:
    """A GPU, or None for the CPU, for each run that there may be at a time. Raises InputError for a GPU not there."""
    there = torch.cuda.device_count()
    if opt.gpu_id and max(opt.gpu_id) >= there:
        raise InputError(f'--gpu_id {max(opt.gpu_id)}: there are {there} GPUs, counted from 0')
    return (opt.gpu_id or list(range(there)) or [None]) * opt.jobs


@dataclass
class Driver:
    """The children at work, and what has become of the others."""
    opt: argparse.Namespace
    jobs: list[Job]
    free: list[int | None]
    running: dict[Job, tuple[subprocess.Popen, int | None]] = field(default_factory=dict)
    failed: dict[Job, str] = field(default_factory=dict)  # and why
    finished: set[Job] = field(default_factory=set)
    stopped: int = 0                              # the signal that said so
    told: set[Job] = field(default_factory=set)   # those that were told to stop

    def output(self, job: Job) -> Path:
        return job.folder.with_name(job.folder.name + '.out')

    def start(self, job: Job, gpu: int | None) -> None:
        """A child for the job: from its start, or from its checkpoint."""
        goes_on = (job.folder / CHECKPOINT).exists()
        where = ('--resume', str(job.folder)) if goes_on else job.save
        argv = [*where, *job.argv, *([] if gpu is None else ['--gpu_id', str(gpu)])]
        script = Path(__file__).resolve().with_name(job.script)
        threads = {} if 'OMP_NUM_THREADS' in os.environ or gpu is not None or self.opt.jobs == 1 else {
            'OMP_NUM_THREADS': str(max(1, (os.cpu_count() or 1) // self.opt.jobs))}
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        with open(self.output(job), 'a') as file:  # a session of its own: signals come from here alone
            process = subprocess.Popen([sys.executable, str(script), *argv], stdout=file, stderr=file,
                                       stdin=subprocess.DEVNULL, env=os.environ | threads, start_new_session=True)
        self.running[job] = process, gpu

    def collect(self) -> None:
        """Takes note of children that ended; tells them to, once, where this was told to stop."""
        for job in self.running.keys() - self.told if self.stopped else ():
            self.told.add(job)
            self.running[job][0].send_signal(signal.SIGTERM)
        ended = [job for job, (process, _) in self.running.items() if process.poll() is not None]
        for job in ended:
            process, gpu = self.running.pop(job)
            self.free.append(gpu)
            if job.saved():
                self.finished.add(job)
            elif not self.stopped:
                time.sleep(POLL)  # if another driver was faster, its child's name is in the lock by now
                if not owner(job.folder) and not job.saved():
                    lines = self.output(job).read_text(errors='replace').splitlines()[-TAIL:]
                    self.failed[job] = '\n    '.join([f'exit status {process.returncode}', *lines])

    def next(self) -> Job | None:
        """The first job that can be started."""
        finished = {job.folder for job in self.finished}
        for job in self.jobs:
            ready = job.teacher is None or job.teacher in finished
            if ready and job not in self.running and job not in self.finished and job not in self.failed \
                    and not owner(job.folder):
                return job
        return None

    def look_around(self) -> None:
        """Takes note of what others have finished, and of students whose teacher failed."""
        others = (job for job in self.jobs if job not in self.running and job not in self.finished)
        self.finished |= {job for job in others if job.saved() and not owner(job.folder)}
        failed = {job.folder for job in self.failed}
        for job in self.jobs:
            if job.teacher in failed and job not in self.failed and job not in self.finished:
                self.failed[job] = 'not run: its teacher failed'

    def stop(self, signum: int, frame: object) -> None:
        self.stopped = signum


def run_jobs(jobs: list[Job], opt: argparse.Namespace, refresh: Any) -> dict[Job, str]:
    """Runs what is not finished, and calls `refresh` as runs end; those that failed, and why.

    A signal to stop is passed on to the children, which save a checkpoint; then this exits.
    """
    driver = Driver(opt, jobs, slots(opt))
    old = [signal.signal(s, driver.stop) for s in STOP_SIGNALS]
    label = f'table {opt.table}'
    try:
        with tqdm(total=sum(job.epochs for job in jobs), desc=label, unit='epoch', smoothing=0, disable=None) as bar:
            while True:
                before = len(driver.finished)
                driver.collect()
                driver.look_around()
                while driver.free and not driver.stopped and (job := driver.next()):
                    driver.start(job, driver.free.pop(0))
                bar.update(sum(len(job.records()) for job in jobs) - bar.n)
                bar.set_postfix_str(', '.join(job.folder.name for job in driver.running)[:80])
                if len(driver.finished) > before:
                    refresh()
                if len(driver.finished) + len(driver.failed) == len(jobs) or (driver.stopped and not driver.running):
                    break
                time.sleep(POLL)
    finally:
        for s, handler in zip(STOP_SIGNALS, old, strict=True):
            signal.signal(s, handler)
    if driver.stopped:
        print('stopped: the same command goes on', file=sys.stderr)
        raise SystemExit(128 + driver.stopped)
    return driver.failed


# ------------------------------------------------------------------------------------------- the report

def error_of(record: dict, top: int) -> float | None:
    accuracy = record.get('test_acc' if top == 1 else f'test_acc{top}')
    return None if accuracy is None else 100 - accuracy


def summarise(cell: Cell, opt: argparse.Namespace, extra: list[str]) -> dict[str, Any]:
    """A cell's figures: the errors of the finished seeds, in the last epoch, their median and spread."""
    jobs = [job_of(cell, seed, opt, extra) for seed in range(opt.seeds)]
    errors = {seed: error_of(job.records()[-1], cell.top) for seed, job in enumerate(jobs) if job.finished()}
    values = [e for e in errors.values() if e is not None]
    median, low, high = (f(values) for f in (statistics.median, min, max)) if values else (None,) * 3
    return {'row': cell.row, 'method': cell.label, 'paper': cell.paper, 'confirmed': cell.confirmed, 'errors': errors,
            'median': median, 'min': low, 'max': high, 'finished': len(errors), 'seeds': opt.seeds,
            'command': jobs[0].command()}


def make_report(opt: argparse.Namespace, extra: list[str]) -> dict[str, Any]:
    """The table's cells as `summarise` has them, with differences from the paper and from the student alone."""
    table = TABLES[opt.table]
    options = parsed(table.script, job_of(table.cells[0], 0, opt, extra).argv)
    entries = {cell: summarise(cell, opt, extra) for cell in table.cells}
    alone = {(cell.row, cell.top): entry['median'] for cell, entry in entries.items() if cell.method == 'student'}
    same_data = table.dataset in (None, options.dataset)
    for cell, entry in entries.items():
        base = None if cell.method in ('student', 'teacher') else alone.get((cell.row, cell.top))
        entry['minus_paper'] = difference(entry['median'], cell.paper if same_data else None)
        entry['minus_student'] = difference(entry['median'], base)
    return {'table': opt.table, 'title': table.title, 'options': extra, 'dataset': options.dataset,
            'epochs': options.epochs, 'cells': [entries[cell] for cell in chosen_cells(opt)]}


def difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def report_text(report: dict[str, Any]) -> str:
    """The table in Markdown."""
    def figure(value: float | None, form: str = '.2f') -> str:
        return '–' if value is None else format(value, form)

    rows = [('student:teacher', 'method', 'paper', 'ours (min–max)', 'seeds', '− paper', '− student')]
    for c in report['cells']:
        spread = f' ({c["min"]:.2f}–{c["max"]:.2f})' if c['finished'] > 1 else ''
        paper = '–' if c['paper'] is None else f'{c["paper"]:g}' + ' ?' * (not c['confirmed'])
        rows.append((c['row'], c['method'], paper,
                     figure(c['median']) + spread, f'{c["finished"]}/{c["seeds"]}', figure(c['minus_paper'], '+.2f'),
                     figure(c['minus_student'], '+.2f')))
    options = ' '.join(shlex.quote(word) for word in report['options'])
    return (f'Table {report["table"]}: {report["title"]}. Test error of the last epoch, %, median over seeds.\n'
            f'Ours: {report["dataset"]}, {report["epochs"]} epochs{", " + options if options else ""}.\n\n'
            + markdown(rows) + '\n\n"?": a figure of the paper that we have from one source only.\n')


def markdown(rows: list[tuple[str, ...]]) -> str:
    """A Markdown table whose first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], tuple('-' * w for w in widths), *rows[1:]]
    return '\n'.join(f'| {" | ".join(map(str.ljust, row, widths))} |' for row in rows)


def write(path: Path, content: bytes) -> None:
    """Replaces a file at once, whoever else does the same."""
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix='.tmp', delete=False) as file:
        file.write(content)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def save_report(opt: argparse.Namespace, extra: list[str]) -> str:
    """Writes table<n>.md and .json into --folder; the text of the first."""
    report = make_report(opt, extra)
    text = report_text(report)
    path = Path(opt.folder, f'table{opt.table}')
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path.with_suffix('.json'), json.dumps(report, indent=1, ensure_ascii=False).encode())
    write(path.with_suffix('.md'), text.encode())
    return text


# ------------------------------------------------------------------------------------------- curves

# Okabe and Ito's colours, which people who are colour-blind can tell apart.
COLOURS = ('#000000', '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#56B4E9', '#E69F00')
Curves = dict[str, list[list[dict]]]  # the records of the runs, seed by seed, of each method


def median_and_band(runs: list[list[dict]], key: str) -> tuple[list[int], list[float], list[float], list[float]]:
    """Epochs, and median, least and greatest error in them over the runs, in those epochs that all have."""
    epochs, columns = [], []
    for records in zip(*runs, strict=False):
        values = [100 - r[key] for r in records if r.get(key) is not None]
        if len(values) == len(runs):
            epochs.append(records[0]['epoch'])
            columns.append(values)
    return epochs, *([f(c) for c in columns] for f in (statistics.median, min, max))


def draw_curves(axis: Any, curves: Curves, methods: list[str]) -> None:
    """Test error by epoch, with its band, and thin and dashed training error, in the colour of each method."""
    for method, runs in curves.items():
        colour = COLOURS[methods.index(method) % len(COLOURS)]
        epochs, median, low, high = median_and_band(runs, 'test_acc')
        marker = 'o' if len(epochs) < 6 else None  # a line of one point is none
        axis.plot(epochs, median, '-', color=colour, linewidth=1.6, label=method, marker=marker, markersize=3)
        axis.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
        epochs, median, _, _ = median_and_band(runs, 'train_acc')
        axis.plot(epochs, median, '--', color=colour, linewidth=0.9, label=None)
    axis.set(xlabel='epoch', ylabel='error, %')
    axis.grid(alpha=0.3)
    axis.xaxis.get_major_locator().set_params(integer=True)


def plot(panels: dict[str, Curves], path: Path) -> None:
    """Curves, a panel a row of a table, as <path>.png and .svg."""
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    plt.rcParams.update({'font.size': 9, 'svg.hashsalt': 'tables', 'svg.fonttype': 'none'})
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(7.2, 0.6 + 3.4 * rows), squeeze=False, layout='constrained')
    methods = list(dict.fromkeys(itertools.chain(*panels.values())))
    labels = {}
    for axis, (title, curves) in zip(axes.flat, panels.items(), strict=False):
        draw_curves(axis, curves, methods)
        axis.set_title(title)
        handles, names = axis.get_legend_handles_labels()
        labels |= dict(zip(names, handles, strict=True))
    for axis in axes.flat[len(panels):]:
        axis.remove()
    ncols = max(1, min(len(labels), 110 // (max(map(len, labels)) + 10)))  # as many as the page is wide
    figure.legend(labels.values(), labels, loc='outside lower center', ncols=ncols,
                  title='test error (dashed: training)')
    figure.savefig(path.with_suffix('.png'), dpi=150)
    figure.savefig(path.with_suffix('.svg'), metadata={'Date': None})
    plt.close(figure)


def plot_table(opt: argparse.Namespace, extra: list[str]) -> Path | None:
    """The curves of the table's runs, as far as they are; none where there are no logs."""
    panels: dict[str, Curves] = {}
    for cell in chosen_cells(opt):
        runs = [job_of(cell, seed, opt, extra).records() for seed in range(opt.seeds)]
        if any(runs) and cell.top == 1:
            panels.setdefault(cell.row, {})[cell.method] = [records for records in runs if records]
    path = Path(opt.folder, f'table{opt.table}.png')
    if panels:
        plot(panels, path)
    return path if panels else None


def plot_runs(folders: list[str], output: str) -> None:
    """The curves of any runs; those that differ by their seed alone are one."""
    curves: Curves = {}
    for folder in folders:
        records = records_of(folder)
        curves.setdefault(settings(records[0]), []).append(records)
    path = Path(output)
    if path.suffix not in ('.png', '.svg') or not path.absolute().parent.is_dir():
        raise InputError(f'--output {output}: must be a .png (an .svg comes with it) in a folder that is there')
    plot({'': curves}, path)
    print(f'{path.with_suffix(".png")}, {path.with_suffix(".svg")}: {len(folders)} runs')


# ------------------------------------------------------------------------------------------- any runs

def records_of(folder: str) -> list[dict]:
    """A run's log. Raises InputError for a folder without one."""
    records = log_of(Path(folder))
    if not records:
        raise InputError(f'{folder}: no {LOG} with an epoch in it')
    return records


def settings(record: dict) -> str:
    """A run's network and losses in a few words."""
    depth = f'-{record["depth"]}' if record.get('depth') else ''
    network = 'NIN' if record.get('net') == 'nin' else f'ResNet{depth}' if 'imagenetpath' in record else f'WRN{depth}'
    kind, power = record.get('mapping') or 'sum', record.get('power') or 2
    mapping = '' if (kind, power) == ('sum', 2) else f' {kind}^{power:g}'
    losses = {'beta': 'AT' + mapping, 'factt': 'F-ActT', 'alpha': 'KD', 'grad_at': 'gradient AT',
              'symmetry': 'symmetry norm', 'min_l2': 'min-l2'}
    method = ' + '.join(name for option, name in losses.items() if record.get(option))
    teacher = record.get('teacher_id') or record.get('teacher_params')
    taught = teacher and any(record.get(option) for option in ('beta', 'factt', 'alpha', 'grad_at'))
    name = f'{network}-{record.get("width") or 1:g} {method or "alone"}'
    seed = f'_seed{record.get("seed")}'  # of the teacher, too, in a table
    return f'{name} from {Path(teacher).name.removesuffix(seed)}' if taught else name


def print_runs(folders: list[str]) -> None:
    """One line a run: the test error of its last epoch. Raises InputError where none of the folders has a log."""
    rows = [('run', 'network and method', 'epochs', 'test error, %', 'training, s')]
    with_log = [folder for folder in folders if log_of(Path(folder))]
    if not with_log:
        records_of(folders[0])
    for folder in with_log:
        records = records_of(folder)
        last = records[-1]
        seconds = sum(r.get('train_time') or 0 for r in records)
        error = error_of(last, 1)
        rows.append((folder, settings(last), f'{last["epoch"]}/{last.get("epochs")}',
                     '-' if error is None else f'{error:.2f}', f'{seconds:.0f}'))
    print(markdown(rows))
    print(f'The logs are {", ".join(str(Path(f) / LOG) for f in with_log)}')
    if without := [folder for folder in folders if folder not in with_log]:
        print(f'No runs: {", ".join(without)}')


# ------------------------------------------------------------------------------------------- main

def make_parser() -> Parser:
    parser = Parser(prog='tables.py', description=__doc__.splitlines()[0], epilog='Other options go to the script.')
    add = parser.add_argument
    add('table', nargs='?', type=int, choices=TABLES, help='of the paper')
    add('--row', action='append', help='only this row, as WRN-16-1:WRN-16-2; may be given again')
    add('--method', action='append', help='only this method, as AT; may be given again')
    add('--seeds', type=number(1, whole=True), help='runs of each kind, seeds from 0 (default: 5; tables 3 to 5: 1)')
    add('--folder', default='logs/tables', type=folder_name, help='where the runs and the table are')
    add('--dry_run', action='store_true', help='only print the plan')
    add('--report', action='store_true', help='only print the table from the logs')
    add('--gpu_id', type=indices, help='GPUs to spread the runs over, as 0,1 (default: all there are)')
    add('--jobs', default=1, type=number(1, whole=True), help='runs at a time on each GPU, or on the CPU')
    add('--cub', type=folder_name, metavar='DIR', help='CUB-200-2011, for table 4 (default: cub)')
    add('--scenes', type=folder_name, metavar='DIR', help='MIT Indoor 67, for table 4 (default: scenes)')
    add('--runs', nargs='+', metavar='FOLDER', help='print the test errors of these runs')
    add('--plot', nargs='+', metavar='FOLDER', help='plot the errors of these runs by epoch')
    add('--output', default='curves.png', type=folder_name, metavar='FILE', help='of --plot')
    return parser


def run_table(opt: argparse.Namespace, extra: list[str]) -> None:
    opt.seeds = opt.seeds or TABLES[opt.table].seeds
    jobs = make_plan(opt, extra)
    if opt.report:
        print(report_text(make_report(opt, extra)), end='')
        return
    if not opt.dry_run:
        check_all(jobs, opt)
    print_plan(jobs, opt)
    if opt.dry_run:
        return
    failed = run_jobs(jobs, opt, lambda: save_report(opt, extra))
    print('\n' + save_report(opt, extra), end='')
    if path := plot_table(opt, extra):
        print(f'The curves are {path} and .svg')
    for job, reason in failed.items():
        print(f'{job.folder} failed: {reason}\n    {job.command()}', file=sys.stderr)
    raise SystemExit(1 if failed else 0)


def main(argv: list[str] | None = None) -> None:
    with input_errors():
        parser = make_parser()
        argv = sys.argv[1:] if argv is None else argv
        opt, extra = parser.parse_known_args(argv)
        others = opt.runs is not None or opt.plot is not None
        if (opt.table is None) != others or (opt.table and argv[0] != str(opt.table)):
            raise InputError('name one table first, 1 to 5, or give --runs or --plot')
        given = [name for name in ('row', 'method', 'seeds', 'dry_run', 'report', 'gpu_id') if getattr(opt, name)]
        if opt.table is None and (extra or given):
            parser.error(f'--runs and --plot take no {" ".join([f"--{name}" for name in given] + extra)}')
        if opt.table:
            run_table(opt, extra)
        if opt.runs:
            print_runs(opt.runs)
        if opt.plot:
            plot_runs(opt.plot, opt.output)


if __name__ == '__main__':
    main()
