"""Runs the experiments of the paper's tables, and prints our results beside the paper's.

    python tables.py 1                                          # every run of table 1, five seeds
    python tables.py 1 --row WRN-16-1:WRN-16-2 --method AT      # only AT and its teacher
    python tables.py 2 --seeds 3 --epochs 100 --dtype bfloat16  # options of cifar.py are passed on
    python tables.py 1 --report                                 # only the table, from the logs
    python tables.py --plot logs/a logs/b                       # curves of any runs
    python tables.py --runs logs/demo/WRN*                      # their test errors

Each run is one command of cifar.py or imagenet.py, with its own subfolder of --folder. Finished
runs are skipped, others are resumed. tables.py can be killed and restarted at any time, and can run
on several machines that share the folder.
"""
import os
import signal

if __name__ == '__main__':  # Ctrl-C during the imports below, which take seconds: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import chain, product
from pathlib import Path

import torch
from tqdm import tqdm

import cifar
import imagenet
from curves import draw_table, plot_runs
from paper import TABLES, Cell
from report import Log, is_finished, make_report, print_runs, report_files, report_text
from training.distributed import choose_devices
from training.errors import one_line_errors, shortened
from training.log import LOG, read_log
from training.loop import check_options
from training.options import DEVICES, PLACES, RUN, Parser, indices, number
from training.runs import Stop, check_writable, is_locked, write_atomically
from utils import LOSSES, losses_needing
from weights import CHECKPOINT, InputError

SCRIPTS = {'cifar.py': cifar, 'imagenet.py': imagenet}
POLL_SECONDS = 0.5  # seconds between checks of the runs
TAIL_LINES = 6      # number of output lines shown of a failed run
OPTION = re.compile(r'(?<!\S)--(?:no-)?(\w+)')  # finds the names of options in a command line
Running = tuple[subprocess.Popen, int | None]  # a run's process, and its GPU
# Options that tables.py sets for each run: they may not be given. Nor may those in the cells of the
# table, except --at_epochs, which a shortened table 5 must change.
RESERVED = {'save', 'resume', 'overwrite', 'evaluate', 'export', 'gpu_id', 'ngpu', 'seed',
            'teacher_id', 'teacher_params', 'student_params', *(loss.flag for loss in LOSSES)}


# ---------------------------------------------------------------------------- the plan

@dataclass(frozen=True)
class Job:
    """One run: a command of cifar.py or imagenet.py, which can also be typed by hand."""
    folder: Path
    script: str
    argv: tuple[str, ...]
    teacher: 'Job | None'

    def arguments(self) -> list[str]:
        """The arguments of the script that start the run, or continue it."""
        how = '--resume' if (self.folder / CHECKPOINT).exists() else '--save'
        return [how, str(self.folder), *self.argv]

    def command(self) -> str:
        return shlex.join(['python', self.script, *self.arguments()])

    @property
    def epochs(self) -> int:
        return parsed(self.script, self.argv).epochs

    @property
    def output(self) -> Path:
        return self.folder.with_name(self.folder.name + '.out')

    def last_output(self, n: int) -> list[str]:
        """The last n lines that the run's process printed."""
        exists = self.output.is_file()
        lines = self.output.read_text(errors='replace').splitlines() if exists else []
        return [shortened(line, 200) for line in lines[-n:]]

    def log(self) -> Log:
        path = self.folder / LOG
        return log_as_of(path, path.stat().st_mtime_ns) if path.is_file() else []

    def finished(self) -> bool:
        """Whether all epochs are in the log, which is written after the checkpoint."""
        return len(self.log()) >= self.epochs

    def can_teach(self) -> bool:
        return self.finished() and (self.folder / CHECKPOINT).exists()


@lru_cache(1024)
def log_as_of(path: Path, written: int) -> Log:
    """A run's log, cached until the file changes, because it is read twice a second."""
    return read_log(path)


@cache
def parsed(script: str, argv: tuple[str, ...]) -> argparse.Namespace:
    """All options of a command, with the defaults that its log will have."""
    opt = SCRIPTS[script].make_parser().parse_args(argv)
    SCRIPTS[script].fill_defaults(opt)
    return opt


def chosen_cells(opt: argparse.Namespace) -> list[Cell]:
    """The cells that --row and --method select. Raises InputError for an unknown row or method."""
    cells = TABLES[opt.table].cells
    for name in ('row', 'method'):
        known = list(dict.fromkeys(getattr(cell, name) for cell in cells))
        chosen = getattr(opt, name) or known
        if unknown := [value for value in chosen if value not in known]:
            raise InputError(f'--{name} {unknown[0]}: table {opt.table} has {", ".join(known)}')
        cells = [cell for cell in cells if getattr(cell, name) in chosen]
    return cells


def job_of(cell: Cell, seed: int, opt: argparse.Namespace, extra: list[str]) -> Job:
    table = TABLES[opt.table]
    argv = cell.options.split()
    if opt.table == '4':
        argv += ['--dataroot', getattr(opt, cell.row)]
    teacher = next((job_of(other, seed, opt, extra) for other in table.cells
                    if other.run == cell.teacher), None)
    if teacher:
        option = '--teacher_id' if table.script == 'cifar.py' else '--teacher_params'
        argv += [option, str(teacher.folder)]
    argv += ['--seed', str(seed)]
    return Job(opt.folder / f'{cell.run}_seed{seed}', table.script,
               (*argv, *with_effect(table.script, argv, extra)), teacher)


def with_effect(script: str, argv: list[str], extra: list[str]) -> list[str]:
    """`extra` without options that do nothing in this run: --temperature in a run without KD."""
    parser, keep, words = SCRIPTS[script].make_parser(), True, []
    given = parser.given([*argv, *extra])
    idle = parser.without_effect(parser.with_defaults(given), given)
    for word in extra:
        keep = ''.join(OPTION.findall(word)) not in idle if word.startswith('--') else keep
        words += [word] * keep
    return words


def make_plan(opt: argparse.Namespace, extra: list[str]) -> list[Job]:
    """The runs that the chosen cells need, seed by seed, teachers before their students.

    Raises InputError for extra options that this table sets itself or that do nothing in its runs,
    and if the folder has runs with other options.
    """
    own = {*OPTION.findall(' '.join(cell.options for cell in TABLES[opt.table].cells))}
    own = own - {'at_epochs'} | RESERVED
    if taken := [name for name in OPTION.findall(' '.join(extra)) if name in own]:
        raise InputError(f'--{taken[0]}: cannot be given, because the table sets it for each run')
    jobs = [job_of(cell, seed, opt, extra) for seed in range(opt.seeds)
            for cell in chosen_cells(opt)]
    jobs = list(dict.fromkeys(each for job in jobs for each in (job.teacher, job) if each))
    for name in OPTION.findall(' '.join(extra)):
        if not any(name in OPTION.findall(' '.join(job.argv)) for job in jobs):
            raise InputError(f'--{name} does nothing in these runs')
    for job in jobs:
        check_same_options(job)
    return jobs


def check_same_options(job: Job) -> None:
    """Raises InputError if the job's folder holds a run with other options."""
    log, options = job.log(), vars(parsed(job.script, job.argv))
    ignored = SCRIPTS[job.script].make_parser().options_in(RUN, DEVICES, PLACES)
    if options['dataset'] == 'folder':  # here the path decides which images are used
        ignored -= {'dataroot'}
    for name in [name for name in options if name not in ignored] if log else ():
        logged = (log[-1] if name == 'epochs' else log[0]).get(name, options[name])
        if logged != options[name]:
            raise InputError(f'{job.folder}: that run has --{name} {logged}, this table '
                             f'{options[name]}: choose another --folder')


def check_all(jobs: list[Job], opt: argparse.Namespace) -> None:
    """Raises InputError if a folder, data, GPUs or conflicting options would make runs fail."""
    check_writable('--folder', opt.folder)
    for job in jobs:
        options = argparse.Namespace(**vars(parsed(job.script, job.argv)) | {'gpu_id': opt.gpu_id})
        choose_devices(options)
        check_options(options, SCRIPTS[job.script].setup(options))
    if TABLES[opt.table].script == 'cifar.py' and unfinished(jobs):
        cifar.fetch(options)


def print_plan(jobs: list[Job], opt: argparse.Namespace) -> None:
    """Prints the commands in two waves, teachers before their students, and the estimated time."""
    for wave, what in ((1, 'teachers, and students alone'), (2, 'students, with their teachers')):
        print(f'# wave {wave}: {what}')
        for job in (job for job in jobs if (job.teacher is None) == (wave == 1)):
            done, training = len(job.log()), is_locked(job.folder)
            state = [f'{done}/{job.epochs} epochs'] * (done > 0) + ['in training'] * training
            print(('# ' if training or job.finished() else '') + job.command()
                  + ('  # ' + ', '.join(state) if state else ''))
    print(f'# {len(jobs)} runs, {time_left(jobs, len(slots(opt)))}')


def time_left(jobs: list[Job], at_once: int) -> str:
    """The number of remaining epochs, and their time, by the median epoch of the same cell."""
    left, seconds = {job: max(0, job.epochs - len(job.log())) for job in jobs}, {}
    for job in jobs:
        of_kind = seconds.setdefault(job.folder.name.rpartition('_seed')[0], [])
        of_kind += [r['train_time'] + (r.get('test_time') or 0)
                    for r in job.log() if r.get('train_time')]
    text, every = f'{sum(left.values())} epochs to train', [*chain(*seconds.values())]
    if not every:
        return text
    total = sum(n * statistics.median(seconds[job.folder.name.rpartition('_seed')[0]] or every)
                for job, n in left.items())
    return f'{text}: about {total / at_once / 3600:.1f} h'


def faster_in_bfloat16(jobs: list[Job]) -> bool:
    """Whether this CPU has bfloat16 instructions, and no loss on gradients forbids --compile."""
    cpu = Path('/proc/cpuinfo')
    return (cpu.is_file() and 'avx512_bf16' in cpu.read_text()
            and not any(losses_needing(parsed(job.script, job.argv), 'gradient') for job in jobs))


# ---------------------------------------------------------------------------- running the plan

def slots(opt: argparse.Namespace) -> list[int | None]:
    """For each run that can train at the same time, its GPU, or None for the CPU."""
    return (opt.gpu_id or list(range(torch.cuda.device_count())) or [None]) * opt.jobs


def start(job: Job, gpu: int | None, n_jobs: int) -> subprocess.Popen:
    """Starts a run's process in a new session, so that Ctrl-C does not reach it directly."""
    where = [] if gpu is None else ['--gpu_id', str(gpu)]
    script = Path(__file__).resolve().with_name(job.script)
    environment = dict(os.environ)
    if gpu is None and n_jobs > 1:
        threads = max(1, (os.cpu_count() or 1) // n_jobs)
        environment.setdefault('OMP_NUM_THREADS', str(threads))
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    with open(job.output, 'a') as file:
        return subprocess.Popen(
            [sys.executable, str(script), *job.arguments(), *where], stdout=file, stderr=file,
            stdin=subprocess.DEVNULL, env=environment, start_new_session=True)


def unfinished(jobs: list[Job]) -> list[Job]:
    """The jobs still to run. Includes finished teachers whose weights are needed but missing."""
    needed = {job.teacher for job in jobs if not job.finished()}
    return [job for job in jobs if not (job.can_teach() if job in needed else job.finished())]


def ready(job: Job) -> bool:
    """Whether a run can start: its teacher is finished, and no other process trains the run."""
    return (job.teacher is None or job.teacher.can_teach()) and not is_locked(job.folder)


@contextmanager
def stopping(running: dict[Job, Running]) -> Iterator[Stop]:
    """Records signals to stop. On exit, terminates the runs in `running`.

    They save a checkpoint before they end. If there was a signal, this process then exits, too.
    """
    with Stop() as stop:
        try:
            yield stop
        finally:
            for child, _ in running.values():
                child.terminate()
            for child, _ in running.values():
                child.wait()
    if stop.signum:
        print('stopped: run the same command again to continue', file=sys.stderr)
        raise SystemExit(128 + stop.signum)


def run_jobs(jobs: list[Job], opt: argparse.Namespace) -> dict[Job, str]:
    """Runs the unfinished jobs. Returns {failed job: reason}."""
    todo, free, failed, running = unfinished(jobs), slots(opt), {}, {}
    bar = tqdm(initial=sum(len(job.log()) for job in jobs), total=sum(job.epochs for job in jobs),
               desc=f'table {opt.table}', unit='epoch', smoothing=0, disable=None)
    with bar, stopping(running) as stop:
        while (todo or running) and not stop.signum:
            while free and (job := next(filter(ready, todo), None)):
                todo.remove(job)
                gpu = free.pop(0)
                running[job] = start(job, gpu, opt.jobs), gpu
            time.sleep(POLL_SECONDS)
            for job in [job for job in running if running[job][0].poll() is not None]:
                child, gpu = running.pop(job)
                free.append(gpu)
                if is_locked(job.folder):  # another tables.py started it first
                    todo.append(job)
                elif not job.finished():
                    failed[job] = '\n    '.join([f'exit status {child.returncode}',
                                                 *job.last_output(TAIL_LINES)])
            failed |= {job: 'not run: its teacher failed' for job in todo if job.teacher in failed}
            todo = unfinished([job for job in todo if job not in failed])
            bar.update(sum(len(job.log()) for job in jobs) - bar.n)
    return failed


# ---------------------------------------------------------------------------- the command

def make_parser() -> Parser:
    parser = Parser(prog='tables.py', description=__doc__.splitlines()[0],
                    epilog='All other options go to cifar.py or imagenet.py.')
    add = parser.adder('tables')
    add('table', nargs='?', choices=TABLES, help='a table of the paper, or demo (see make demo)')
    add('--row', action='append',
        help='only this row, for example WRN-16-1:WRN-16-2; may be repeated')
    add('--method', action='append', help='only this method, for example AT; may be repeated')
    add('--seeds', type=number(1, 1000, whole=True),
        help='number of random seeds, from 0 on (default: 5; tables 3 to 5: 1, demo: 3)')
    add('--folder', default=Path('logs/tables'), type=Path, help='folder of the runs and the table')
    add('--dry_run', action='store_true', help='only print the commands')
    add('--report', action='store_true', help='only print the table, from the logs')
    add('--gpu_id', type=indices, help='GPUs for the runs, for example 0,1 (default: all)')
    add('--jobs', default=1, type=number(1, 1000, whole=True),
        help='number of simultaneous runs on each GPU, or on the CPU')
    for name, what in (('cub', 'CUB-200-2011'), ('scenes', 'MIT Indoor 67')):
        add(f'--{name}', default=name, metavar='DIR', help=f'{what}, for table 4')
    add = parser.adder('any runs')
    add('--runs', nargs='+', metavar='FOLDER', help='print the test errors of these runs')
    add('--plot', nargs='+', metavar='FOLDER', help='draw the errors of these runs by epoch')
    add('--output', default=Path('curves.png'), type=Path, metavar='FILE',
        help='file for --plot: .png, .svg or .pdf')
    add('--top', default=1, type=int, choices=(1, 5), help='5: --runs and --plot show top-5 errors')
    return parser


def check_effect(parser: Parser, opt: argparse.Namespace, extra: list[str]) -> None:
    """Raises InputError for an option that would do nothing."""
    if opt.table is None:
        allowed, what = {'runs', 'plot', 'top'}, '--runs or --plot'
        allowed |= {'output'} if opt.plot else set()
    elif opt.report:
        allowed, what = {'table', 'row', 'method', 'seeds', 'folder', 'report'}, '--report'
    else:
        allowed, what = parser.options_in('tables'), f'table {opt.table}'
        allowed -= set() if opt.table == '4' else {'cub', 'scenes'}
    given = [name for name, value in vars(opt).items() if value != parser.get_default(name)]
    idle = [f'--{name}' for name in given if name not in allowed]
    if idle := idle + (extra if opt.report or opt.table is None else []):
        raise InputError(f'{idle[0]} does nothing with {what}')


def logs_of(opt: argparse.Namespace) -> dict[Cell, list[Log]]:
    """The logs of the runs of all cells of a table, seed by seed."""
    return {cell: [job_of(cell, seed, opt, []).log() for seed in range(opt.seeds)]
            for cell in TABLES[opt.table].cells}


def describe_unfinished(opt: argparse.Namespace) -> list[str]:
    """A line for each chosen run that has begun and is not finished: epochs, last output line."""
    lines = {}
    for cell, seed in product(chosen_cells(opt), range(opt.seeds)):
        job = job_of(cell, seed, opt, [])
        log, last_line = job.log(), job.last_output(1)
        if (log or last_line) and not is_finished(log):
            lines[job] = ', '.join([f'{job.folder}: {len(log)} epochs', *last_line])
    return [*lines.values()]


def save_table(opt: argparse.Namespace, extra: list[str]) -> str:
    """Writes the table in all formats, and its curves, into --folder. Returns its text."""
    logs, chosen = logs_of(opt), chosen_cells(opt)
    report = make_report(opt.table, logs, chosen, extra)
    files = report_files(report) | draw_table({cell: logs[cell] for cell in chosen})
    write_atomically({opt.folder / f'table{opt.table}{suffix}': files[suffix] for suffix in files})
    return report_text(report)


def run_table(opt: argparse.Namespace, extra: list[str]) -> None:
    if opt.report:
        logs = logs_of(opt)
        if not any(chain(*logs.values())):
            raise InputError(f'--folder {opt.folder}: no run of table {opt.table}')
        print(report_text(make_report(opt.table, logs, chosen_cells(opt), extra)), end='')
        for line in describe_unfinished(opt):
            print(line)
        return
    jobs = make_plan(opt, extra)
    if not opt.dry_run:
        check_all(jobs, opt)
    print_plan(jobs, opt)
    given = 'dtype' in OPTION.findall(' '.join(extra))
    if slots(opt)[0] is None and not given and faster_in_bfloat16(jobs):
        print('# this CPU is faster with --dtype bfloat16 --compile')
    if opt.dry_run:
        return
    failed = run_jobs(jobs, opt)
    if len(failed) < len(jobs):
        print('\n' + save_table(opt, extra), end='')
    for job, reason in failed.items():
        print(f'{job.folder} failed: {reason}\n    {job.command()}', file=sys.stderr)
    raise SystemExit(1 if failed else 0)


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        parser = make_parser()
        argv = sys.argv[1:] if argv is None else argv
        opt, extra = parser.parse_known_args(argv)
        others = bool(opt.runs or opt.plot)
        if (opt.table is None) != others or (opt.table and argv[0] != opt.table):
            raise InputError(f'name one table first, of {", ".join(TABLES)}, or give --runs or '
                             '--plot')
        check_effect(parser, opt, extra)
        if opt.table:
            opt.seeds = opt.seeds or TABLES[opt.table].seeds
            run_table(opt, extra)
        if opt.runs:
            print_runs(opt.runs, opt.top)
        if opt.plot:
            plot_runs(opt.plot, opt.output, opt.top)


if __name__ == '__main__':
    main()
