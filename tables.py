"""Runs the paper's tables and prints them with ours beside them.

    python tables.py 1                                          # every run of table 1, five seeds
    python tables.py 1 --row WRN-16-1:WRN-16-2 --method AT      # a part of it
    python tables.py 2 --seeds 3 --epochs 100 --dtype bfloat16  # other options go to the script
    python tables.py 1 --gpu_id 0,1,2,3 --jobs 2                # two runs at a time on each GPU
    python tables.py 1 --dry_run                                # only the commands, for a cluster
    python tables.py 1 --report                                 # only the table, from the logs
    python tables.py --plot logs/a logs/b                       # curves of any runs
    python tables.py --runs logs/demo/*                         # their test errors

Each run is one command of cifar.py or imagenet.py, in a folder of its own under --folder. Finished
runs are not repeated, others are resumed. tables.py can be killed and started again at any time, or
on several machines that share the folder.
"""
import argparse
import os
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import torch
from tqdm import tqdm

import cifar
import imagenet
from curves import plot_runs, plot_table
from paper import TABLES, Cell
from report import CellRuns, TableRuns, make_report, print_runs, report_text, save_report
from training.distributed import choose_devices
from training.loop import check
from training.options import (
    DEVICES,
    PLACES,
    RUN,
    Parser,
    indices,
    input_errors,
    number,
    path_or_none,
)
from training.runs import LOG, STOP_SIGNALS, check_writable, is_locked, read_log
from weights import CHECKPOINT, InputError

SCRIPTS = {'cifar.py': cifar, 'imagenet.py': imagenet}
POLL = 0.5  # seconds between two looks at the runs
TAIL = 6    # lines of a failed run's output to show
# What tables.py gives each run. Beside it, what the table's own cells say may not be given either.
OURS = {'save', 'resume', 'overwrite', 'evaluate', 'export', 'gpu_id', 'ngpu', 'seed', 'teacher_id',
        'teacher_params', 'student_params'}


# ---------------------------------------------------------------------------- the plan

@dataclass(frozen=True)
class Job:
    """One run: a command that a person could give as well."""
    folder: Path
    script: str
    argv: tuple[str, ...]
    teacher: Path | None

    def arguments(self) -> list[str]:
        """Of the script: to start the run, or to continue it."""
        how = '--resume' if (self.folder / CHECKPOINT).exists() else '--save'
        return [how, str(self.folder), *self.argv]

    def command(self) -> str:
        return shlex.join(['python', self.script, *self.arguments()])

    @property
    def epochs(self) -> int:
        return parsed(self.script, self.argv).epochs

    def records(self) -> list[dict]:
        try:
            written = (self.folder / LOG).stat()
        except OSError:
            return []
        return log_as_of(self.folder / LOG, written.st_mtime_ns, written.st_ino)

    def finished(self) -> bool:
        """The log is written after the checkpoint, so that a whole log means a whole run."""
        return len(self.records()) >= self.epochs

    def can_teach(self) -> bool:
        return self.finished() and (self.folder / CHECKPOINT).exists()


@lru_cache(1024)
def log_as_of(path: Path, written: int, inode: int) -> list[dict]:
    """A run's log, parsed once each time it was written: runs are looked at twice a second."""
    return read_log(path)


@cache
def parsed(script: str, argv: tuple[str, ...]) -> argparse.Namespace:
    """The options of a command, as its log will have them."""
    opt = SCRIPTS[script].make_parser().parse_args(argv)
    SCRIPTS[script].fill_defaults(opt)
    return opt


def chosen_cells(opt: argparse.Namespace) -> list[Cell]:
    """The cells that --row and --method leave. Raises InputError if there are none."""
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
    if opt.table == '4':
        argv += ['--dataroot', getattr(opt, cell.row) or cell.row]
    teacher = cell.teacher and Path(opt.folder, f'{cell.teacher}_seed{seed}')
    if teacher:
        option = '--teacher_id' if script == 'cifar.py' else '--teacher_params'
        argv += [option, str(teacher)]
    folder = Path(opt.folder, f'{cell.run}_seed{seed}')
    return Job(folder, script, (*argv, '--seed', str(seed), *extra), teacher)


def names_in(words: Iterable[str]) -> list[str]:
    """The options in a command line, without dashes, 'no-' and values."""
    return [word.partition('=')[0].removeprefix('--no-').removeprefix('--')
            for word in words if word.startswith('--')]


def make_plan(opt: argparse.Namespace, extra: list[str]) -> list[Job]:
    """The runs that the chosen cells need, seed by seed, teachers before their students.

    Raises InputError for options that a run of this table has already, or runs with other options
    in the folder.
    """
    table = TABLES[opt.table]
    own = OURS.union(*(names_in(cell.options.split()) for cell in table.cells))
    if taken := [name for name in names_in(extra) if name in own]:
        raise InputError(f'--{taken[0]}: each run of this table has its own')
    everything, jobs = {cell.run: cell for cell in table.cells}, {}
    for seed in range(opt.seeds):
        for cell in chosen_cells(opt):
            for each in ([everything[cell.teacher]] if cell.teacher else []) + [cell]:
                job = job_of(each, seed, opt, extra)
                jobs.setdefault(job.folder, job)
    for job in jobs.values():
        check_same(job)
    return list(jobs.values())


def check_same(job: Job) -> None:
    """Raises InputError if the job's folder has a run with other options."""
    records, options = job.records(), vars(parsed(job.script, job.argv))
    ignored = SCRIPTS[job.script].make_parser().options_in(RUN, DEVICES, PLACES)
    if options['dataset'] == 'folder':  # only there does the place decide what the data are
        ignored -= {'dataroot'}
    for name in [name for name in options if name not in ignored] if records else ():
        there = (records[-1] if name == 'epochs' else records[0]).get(name, options[name])
        if there != options[name]:
            raise InputError(f'{job.folder}: that run has --{name} {there}, this table '
                             f'{options[name]}: take another --folder')


def check_all(jobs: list[Job], opt: argparse.Namespace) -> None:
    """Raises InputError for what would make runs fail: folder, data, GPUs, options that clash."""
    check_writable('--folder', Path(opt.folder))
    slots(opt)
    for job in jobs:
        options = argparse.Namespace(**vars(parsed(job.script, job.argv)))
        choose_devices(options)
        check(options, SCRIPTS[job.script].setup(options))


def print_plan(jobs: list[Job], opt: argparse.Namespace) -> None:
    """The commands, in two waves, so that teachers are there for their students."""
    for wave in (1, 2):
        print(f'# wave {wave}: ' + ('students, with their teachers' if wave == 2 else
                                    'teachers, and students alone'))
        for job in (job for job in jobs if (job.teacher is None) == (wave == 1)):
            done = len(job.records())
            state = 'finished' if job.finished() else f'{done}/{job.epochs} epochs' if done else ''
            skipped = '# ' if job.finished() or is_locked(job.folder) else ''
            state += ', in training' if is_locked(job.folder) else ''
            print(skipped + job.command() + (f'  # {state.removeprefix(", ")}' if state else ''))
    print(estimate(jobs, opt))


def seconds_an_epoch(job: Job) -> float | None:
    """The median: the first epoch compiles."""
    times = [r['train_time'] + r['test_time'] for r in job.records()
             if None not in (r.get('train_time'), r.get('test_time'))]
    return statistics.median(times) if times else None


def estimate(jobs: list[Job], opt: argparse.Namespace) -> str:
    """How long the rest will take, from the epochs of the same run with any seed, or of all."""
    timed = {job: seconds for job in jobs if (seconds := seconds_an_epoch(job))}
    left = {job: max(0, job.epochs - len(job.records())) for job in jobs}
    text = f'# {len(jobs)} runs, {sum(left.values())} epochs to train'
    if not any(left.values()) or not timed:
        return text + (', none timed yet' if any(left.values()) else '')

    def kind(job: Job) -> str:
        return job.folder.name.rpartition('_seed')[0]
    seconds = 0
    for job in jobs:
        same = [s for other, s in timed.items() if kind(other) == kind(job)]
        seconds += left[job] * statistics.mean(same or timed.values())
    minutes = round(seconds / len(slots(opt)) / 60)
    return f'{text}: about {minutes // 60} h {minutes % 60} min'


# ---------------------------------------------------------------------------- running it

def slots(opt: argparse.Namespace) -> list[int | None]:
    """A GPU, or None for the CPU, for each run at a time. Raises InputError for a missing GPU."""
    there = torch.cuda.device_count()
    if opt.gpu_id and max(opt.gpu_id) >= there:
        raise InputError(f'--gpu_id {max(opt.gpu_id)}: there are {there} GPUs, counted from 0')
    return (opt.gpu_id or list(range(there)) or [None]) * opt.jobs


class Runner:
    """Threads that take jobs, one after another, and run each in a child process."""

    def __init__(self, jobs: list[Job], opt: argparse.Namespace, refresh: Callable[[], None]
                 ) -> None:
        self.jobs, self.opt, self.refresh = jobs, opt, refresh
        self.todo = list(jobs)
        self.children: dict[Job, subprocess.Popen] = {}
        self.failed: dict[Job, str] = {}    # and why
        self.stopped = 0                    # the signal to stop, if one came
        self.lock = threading.Lock()

    def take(self) -> Job | None:
        """The next job that can run: its teacher is there, and no other process trains it.

        Waits for one; None if there will be none.
        """
        teachers = {job.folder: job for job in self.jobs}
        while not self.stopped:
            with self.lock:
                needed = {job.teacher for job in self.todo}
                self.todo = [job for job in self.todo if not (
                    job.can_teach() if job.folder in needed else job.finished())]
                failed = {job.folder for job in self.failed}
                for job in [job for job in self.todo if job.teacher in failed]:
                    self.failed[job] = 'not run: its teacher failed'
                    self.todo.remove(job)
                if not self.todo:
                    return None
                for job in self.todo:
                    ready = job.teacher is None or teachers[job.teacher].can_teach()
                    if ready and not is_locked(job.folder):
                        self.todo.remove(job)
                        return job
            time.sleep(POLL)
        return None

    def work(self, gpu: int | None) -> None:
        """A thread: jobs on one GPU, or on the CPU, until none is left."""
        while (job := self.take()) is not None:
            status = self.run(job, gpu)
            with self.lock:
                del self.children[job]
                if job.finished():
                    with suppress(OSError):  # a full disk must not end the thread
                        self.refresh()
                elif is_locked(job.folder):  # another driver was faster
                    self.todo.append(job)
                elif not self.stopped:
                    self.failed[job] = f'exit status {status}{self.tail(job)}'

    def run(self, job: Job, gpu: int | None) -> int:
        """A child for the job; its exit status."""
        where = [] if gpu is None else ['--gpu_id', str(gpu)]
        script = Path(__file__).resolve().with_name(job.script)
        environment = dict(os.environ)
        if gpu is None and self.opt.jobs > 1:
            threads = max(1, (os.cpu_count() or 1) // self.opt.jobs)
            environment.setdefault('OMP_NUM_THREADS', str(threads))
        with open(self.output(job), 'a') as file, self.lock:
            # It has a session of its own: signals come from here alone.
            child = self.children[job] = subprocess.Popen(
                [sys.executable, str(script), *job.arguments(), *where], stdout=file, stderr=file,
                stdin=subprocess.DEVNULL, env=environment, start_new_session=True)
            if self.stopped:
                child.terminate()
        return child.wait()

    def output(self, job: Job) -> Path:
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        return job.folder.with_name(job.folder.name + '.out')

    def tail(self, job: Job) -> str:
        lines = self.output(job).read_text(errors='replace').splitlines()[-TAIL:]
        return ''.join(f'\n    {line}' for line in lines)

    def stop(self, signum: int, frame: object) -> None:
        self.stopped = signum

    def end_children(self) -> None:
        """Tells the children to stop, once; each saves a checkpoint first."""
        with self.lock:
            for child in self.children.values():
                child.terminate()


def run_jobs(jobs: list[Job], opt: argparse.Namespace, refresh: Callable[[], None]
             ) -> dict[Job, str]:
    """Runs what is not finished; `refresh` is called as runs end. Gives those that failed, and why.

    A signal to stop is passed on to the children, which save a checkpoint; then this exits.
    """
    runner, told = Runner(jobs, opt, refresh), False
    old = [signal.signal(s, runner.stop) for s in STOP_SIGNALS]
    threads = [threading.Thread(target=runner.work, args=(gpu,), daemon=True) for gpu in slots(opt)]
    total = sum(job.epochs for job in jobs)
    try:
        with tqdm(total=total, desc=f'table {opt.table}', unit='epoch', smoothing=0,
                  disable=None) as bar:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                if runner.stopped and not told:
                    runner.end_children()
                    told = True
                bar.update(sum(len(job.records()) for job in jobs) - bar.n)
                bar.set_postfix_str(', '.join(j.folder.name for j in [*runner.children])[:80])
                time.sleep(POLL)
    finally:
        for s, handler in zip(STOP_SIGNALS, old, strict=True):
            signal.signal(s, handler)
    if runner.stopped:
        print('stopped: the same command goes on', file=sys.stderr)
        raise SystemExit(128 + runner.stopped)
    return runner.failed


# ---------------------------------------------------------------------------- showing it

def table_runs(opt: argparse.Namespace, extra: list[str]) -> TableRuns:
    """The table with the logs of its runs. Raises InputError if they are of different lengths."""
    table, chosen, cells = TABLES[opt.table], chosen_cells(opt), []
    for cell in table.cells:
        jobs = [job_of(cell, seed, opt, extra) for seed in range(opt.seeds)]
        cells.append(CellRuns(cell.row, cell.method, cell.top, cell.paper, cell.confirmed,
                              jobs[0].command(), [job.records() for job in jobs], cell in chosen))
    last = [log[-1] for cell in cells if cell.chosen for log in cell.logs if log]
    epochs = sorted({record.get('epochs') or 0 for record in last})
    if len(epochs) > 1:
        raise InputError(f'--folder {opt.folder}: runs of {", ".join(map(str, epochs))} epochs')
    datasets = sorted({str(record.get('dataset')) for record in last})
    return TableRuns(opt.table, table.title, extra, ', '.join(datasets) or 'no run',
                     epochs[0] if epochs else 0,
                     table.dataset is None or datasets == [table.dataset], cells)


def make_parser() -> Parser:
    parser = Parser(prog='tables.py', description=__doc__.splitlines()[0],
                    epilog='Other options go to the script.')
    add = parser.adder('tables')
    add('table', nargs='?', choices=TABLES, help='of the paper')
    add('--row', action='append', help='only this row, as WRN-16-1:WRN-16-2; may be repeated')
    add('--method', action='append', help='only this method, as AT; may be repeated')
    add('--seeds', type=number(1, 1000, whole=True),
        help='runs of each kind, seeds from 0 (default: 5; tables 3 to 5: 1)')
    add('--folder', default='logs/tables', type=path_or_none, help='of the runs and the table')
    add('--dry_run', action='store_true', help='only print the commands')
    add('--report', action='store_true', help='only print the table, from the logs')
    add('--gpu_id', type=indices, help='GPUs to spread the runs over, as 0,1 (default: all)')
    add('--jobs', default=1, type=number(1, 1000, whole=True),
        help='runs at a time on each GPU, or on the CPU')
    add('--cub', type=path_or_none, metavar='DIR', help='CUB-200-2011 (default: cub)')
    add('--scenes', type=path_or_none, metavar='DIR', help='MIT Indoor 67 (default: scenes)')
    add = parser.adder('any runs')
    add('--runs', nargs='+', metavar='FOLDER', help='print the test errors of these runs')
    add('--plot', nargs='+', metavar='FOLDER', help='draw their errors by epoch')
    add('--output', default='curves.png', type=path_or_none, metavar='FILE',
        help='of --plot: a .png, .svg or .pdf')
    add('--top', default=1, type=int, choices=(1, 5), help='5: --runs and --plot show top-5 errors')
    return parser


def check_idle(parser: Parser, opt: argparse.Namespace, extra: list[str]) -> None:
    """Raises InputError for an option that would do nothing."""
    if opt.table is None:
        allowed, what = {'runs', 'plot', 'top'}, '--runs or --plot'
        allowed |= {'output'} if opt.plot else set()
    elif opt.report:
        allowed, what = {'table', 'row', 'method', 'seeds', 'folder', 'report'}, '--report'
    else:
        allowed, what = parser.options_in('tables') - {'report'}, f'table {opt.table}'
        allowed -= set() if opt.table == '4' else {'cub', 'scenes'}
    given = [name for name, value in vars(opt).items() if value != parser.get_default(name)]
    idle = [f'--{name}' for name in given if name not in allowed]
    if what.startswith('--'):
        idle += extra
    if idle:
        raise InputError(f'{idle[0]} does nothing with {what}')


def run_table(opt: argparse.Namespace, extra: list[str]) -> None:
    if opt.report:
        table = table_runs(opt, extra)
        if not any(log for cell in table.cells for log in cell.logs):
            raise InputError(f'--folder {opt.folder}: no run of table {opt.table}')
        print(report_text(make_report(table)), end='')
        return
    jobs, folder = make_plan(opt, extra), Path(opt.folder)
    if opt.dry_run:
        print_plan(jobs, opt)
        return
    check_all(jobs, opt)
    print_plan(jobs, opt)
    failed = run_jobs(jobs, opt, lambda: save_report(table_runs(opt, extra), folder))
    if len(failed) < len(jobs):
        table = table_runs(opt, extra)
        print('\n' + save_report(table, folder), end='')
        for path in plot_table(table, folder):
            print(path)
    for job, reason in failed.items():
        print(f'{job.folder} failed: {reason}\n    {job.command()}', file=sys.stderr)
    raise SystemExit(1 if failed else 0)


def main(argv: list[str] | None = None) -> None:
    with input_errors():
        parser = make_parser()
        argv = sys.argv[1:] if argv is None else argv
        opt, extra = parser.parse_known_args(argv)
        others = bool(opt.runs or opt.plot)
        if (opt.table is None) != others or (opt.table and argv[0] != opt.table):
            raise InputError(f'name one table first, of {", ".join(TABLES)}, or give --runs or '
                             '--plot')
        check_idle(parser, opt, extra)
        if opt.table:
            opt.seeds = opt.seeds or TABLES[opt.table].seeds
            run_table(opt, extra)
        if opt.runs:
            print_runs(opt.runs, opt.top)
        if opt.plot:
            plot_runs(opt.plot, opt.output, opt.top)


if __name__ == '__main__':
    main()
