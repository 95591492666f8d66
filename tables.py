"""Runs the experiments of the paper's tables, and prints our results beside the paper's.

    python tables.py 1                                          # every run of table 1, five seeds
    python tables.py 1 --row WRN-16-1:WRN-16-2 --method AT      # only AT and its teacher
    python tables.py 2 --seeds 3 --epochs 100 --dtype bfloat16  # options of cifar.py are passed on
    python tables.py 1 --report --folder logs/cifar10           # only the table, from the logs
    python tables.py --runs logs/demo/WRN*                      # the test errors of any runs

Each run is a command of cifar.py or imagenet.py, with its own folder in --folder. Finished runs are
skipped, others go on. On a GPU cifar.py trains the seeds of a cell in one process.
"""
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from tqdm import tqdm

import cifar
import engine
import imagenet
import utils
from resnet import InputError

SCRIPTS = {'cifar.py': cifar, 'imagenet.py': imagenet}
# Options of the scripts that tables.py sets, or does not take.
OWN = {'save', 'seed', 'teacher_id', 'teacher_params', 'resume', 'evaluate', 'overwrite', 'ngpu'}


class Cell(NamedTuple):
    """A figure of the paper, and the run that reproduces it."""
    row: str                    # student:teacher, such as WRN-16-1:WRN-16-2
    method: str
    run: str                    # name of its folder, without _seed0
    options: str
    paper: str = ''             # test error, %; †: from memory, not checked
    teacher: str | None = None  # the run that it learns from
    top: int = 1                # 5: top-5 error


class Table(NamedTuple):
    title: str
    script: str
    seeds: int                  # default of --seeds; the paper's in tables 1 and 2
    cells: tuple[Cell, ...]


# Add new methods at the end: TABLE_1 lists the paper's figures in this order.
METHODS = {'student': '', 'AT': '--beta 1e+3', 'F-ActT': '--factt 1e+3 --beta_decay cosine',
           'KD': '--alpha 0.9', 'AT+KD': '--alpha 0.9 --beta 1e+3 --beta_decay step'}
NETWORKS = {'NIN-thin': '--net nin --width 0.5', 'NIN-wide': '--net nin --width 1',
            **{f'WRN-{d}-{w}': f'--depth {d} --width {w}'
               for d, w in ((16, 1), (16, 2), (40, 1), (40, 2))},
            'ResNet-18': '--depth 18', 'ResNet-18-0.25': '--depth 18 --width 0.25',
            'ResNet-34': '--depth 34',
            **{f'{data}_ResNet-{d}': f'--dataset {data} --student_params {start}'
               for data in ('cub', 'scenes')
               for d, start in ((18, 'torchvision-18'), (34, 'torchvision'))}}


def row_of(student: str, teacher: str, methods: dict[str, str], figures: str = '',
           common: str = '', top: int = 1) -> tuple[Cell, ...]:
    """A student alone and by other methods, then its teacher; `figures`: the paper's, in order."""
    row, (*errors, of_teacher) = f'{student}:{teacher}', figures.split() or ['']
    row += f', top-{top}' * (top != 1)
    cells = []
    for i, (method, options) in enumerate(methods.items()):
        alone = method == 'student'
        run = student if alone else f'{student}_{method.replace(" ", "-")}_{teacher}'
        cells.append(Cell(row, method, run, f'{NETWORKS[student]} {common} {options}',
                          errors[i] if i < len(errors) else '', None if alone else teacher, top))
    return *cells, Cell(row, 'teacher', teacher, f'{NETWORKS[teacher]} {common}', of_teacher,
                        top=top)


# Student, teacher, and the errors of METHODS and of the teacher.
TABLE_1 = (('NIN-thin', 'NIN-wide', '9.38† 8.93† 9.05† 8.55† 8.33† 7.28†'),
           ('WRN-16-1', 'WRN-16-2', '8.77 7.93 8.51† 7.41† 7.51† 6.31'),
           ('WRN-16-1', 'WRN-40-1', '8.77 8.25 8.62† 8.39 8.01† 6.58'),
           ('WRN-16-2', 'WRN-40-2', '6.31 5.85 6.24† 6.08 5.71† 5.23'))
AT = METHODS['AT']
MAPS = {'student': '', 'F_sum': f'{AT} --power 1', 'AT': AT, 'F_sum^4': f'{AT} --power 4',
        'F_max': f'{AT} --mapping max --power 1',
        **{f'AT-group{g}': f'{AT} --at_groups {g}' for g in range(3)}}


def table_3() -> Iterable[Cell]:
    # Students: no batch norm, flips but no crops, no weight decay; lr 0.1 would be too high then.
    # The weights of the losses on gradients are ours: benchmarks/README.md.
    thin = ('--net nin --width 0.5 --no-batch_norm --randomcrop_pad 0 --weight_decay 0 --lr 0.01 '
            '--no-pool_relu')
    row, wide, linear = 'NIN-thin:NIN-wide', 'NIN-wide', 'NIN-wide-nopoolrelu'
    yield Cell(row, 'teacher', wide, NETWORKS[wide])
    yield Cell(row, 'teacher of AT', linear, f'{NETWORKS[wide]} --no-pool_relu')
    for method, options, paper, teacher in (
            ('student', '', '13.5†', None), ('min-l2', '--min_l2 1', '12.5†', None),
            ('gradient AT', '--grad_at 10', '12.1†', wide), ('KD', '--alpha 0.9', '12.1†', wide),
            ('symmetry norm', '--symmetry 1', '11.8†', None), ('AT', AT, '11.2†', linear)):
        run = 'NIN-thin-nobn' + ('' if method == 'student' else f'_{method.replace(" ", "-")}')
        yield Cell(row, method, run, f'{thin} {options}', paper, teacher)


TABLES = {
    '1': Table('CIFAR-10, activation-based transfer', 'cifar.py', 5, tuple(
        cell for student, teacher, figures in TABLE_1
        for cell in row_of(student, teacher, METHODS, figures))),
    '2': Table('CIFAR-10, maps and groups; AT is F_sum^2 on all', 'cifar.py', 5, row_of(
        'WRN-16-1', 'WRN-16-2', MAPS, '8.77 7.99† 7.93 8.09† 8.08† 8.11† 7.96† 7.97† 6.31')),
    '3': Table('CIFAR-10, gradient-based transfer', 'cifar.py', 1, tuple(table_3())),
    '4': Table('fine-tuning on CUB and Scenes', 'imagenet.py', 1, tuple(
        cell for data, figures in (('cub', '28.5† 27.0† 27.0† 26.5†'),
                                   ('scenes', '28.2† 28.1† 27.1† 26.0†'))
        for cell in row_of(f'{data}_ResNet-18', f'{data}_ResNet-34',
                           {'student': '', 'KD': METHODS['KD'], 'AT': AT}, figures))),
    '5': Table('ImageNet, single crop', 'imagenet.py', 1, tuple(
        cell for top, figures in ((1, '30.4 29.3 26.1'), (5, '10.8 10.0 8.3'))
        for cell in row_of('ResNet-18', 'ResNet-34',
                           {'student': '', 'AT': f'{AT} --at_epochs 60,100'}, figures, top=top))),
    # With only 315 steps the paper's β of 10³ is too large.
    'demo': Table('cluttered digits, ours, not of the paper', 'cifar.py', 3, row_of(
        'WRN-16-1', 'WRN-16-2', {'student': '', 'AT': '--beta 100'},
        common='--dataset ClutteredDigits --epochs 7 --epoch_step [4,5,6] --batch_size 64 '
               '--test_every 7')),
    # 9,469 images make only 37 batches of 256 an epoch: so batch 64, and the lr with it. AT's mean
    # runs over positions: at half the paper's resolution 250 is the counterpart of β = 10³.
    'imagenette': Table('Imagenette, ours, not of the paper', 'imagenet.py', 1, tuple(
        cell for student in ('ResNet-18', 'ResNet-18-0.25')
        for cell in row_of(student, 'ResNet-34',
                           {'student': '', 'AT': '--beta 250', 'KD': METHODS['KD']},
                           common='--dataset folder --image_size 112 --batch_size 64 --lr 0.025 '
                                  '--epochs 30 --epoch_step [9,18,27] --test_every 2')))}


class Job(NamedTuple):
    """One command, which trains one run, or with cifar.py on a GPU all seeds of a cell."""
    folders: tuple[Path, ...]
    script: str
    argv: tuple[str, ...]
    teachers: tuple[Path, ...]

    def command(self) -> str:
        return shlex.join(['python', self.script, *self.argv])

    def left(self) -> list[Path]:
        """The folders that are not finished. Raises InputError for a run with other options."""
        parser, opt = SCRIPTS[self.script].parse(self.argv)
        logs = {folder: read_log(folder) for folder in self.folders}
        given = Namespace(**{k: v for k, v in vars(opt).items() if k not in OWN})
        for folder in [folder for folder, log in logs.items() if log]:
            old = logs[folder][-1] | {'lr': logs[folder][0].get('lr')}  # of its first epoch
            if not given.at_groups and old.get('at_groups') == [0, 1, 2]:
                old['at_groups'] = None  # logs of a3a9709 list all, and have None for defaults
            old = {k: parser.get_default(k) if old.get(k) is None else old[k] for k in vars(given)}
            if words := engine.difference(given, old):
                raise InputError(f'{folder}: {words}: choose another --folder')
        return [folder for folder, log in logs.items() if not finished(log, opt.epochs)]


def read_log(folder: Path) -> list[dict]:
    """The records of a run's log.txt, one an epoch; [] if there is none. Raises InputError."""
    path = Path(folder, 'log.txt')
    lines = path.read_text().splitlines() if path.is_file() else []
    try:
        return [json.loads(line.removeprefix('json_stats: ')) for line in lines]
    except ValueError as e:
        raise InputError(f'{path}: not the log of a run ({e})') from None


def read_logs(folders: list[str]) -> dict[str, list[dict]]:
    """{folder: records} of the folders that have any. Raises InputError if none has."""
    logs = {folder: log for folder in folders if (log := read_log(Path(folder)))}
    if not logs:
        raise InputError(f'{", ".join(folders)}: no log.txt with an epoch in it')
    return logs


def without_seed(folder: str) -> str:
    """What the folders of runs that differ only by the seed have in common."""
    return re.sub(r'_seed\d+/*$', '', folder)


def finished(log: list[dict], epochs: int = 0) -> bool:
    """Whether a log has this many epochs; by default those that its run was started for."""
    return bool(log) and log[-1]['epoch'] >= (epochs or log[-1]['epochs'])


def chosen_cells(opt: Namespace) -> list[Cell]:
    """The cells that --row and --method select. Raises InputError for an unknown row or method."""
    cells = TABLES[opt.table].cells
    for name in ('row', 'method'):
        known = list(dict.fromkeys(getattr(cell, name) for cell in cells))
        chosen = getattr(opt, name) or known
        if unknown := [value for value in chosen if value not in known]:
            raise InputError(f'--{name} {unknown[0]}: table {opt.table} has {", ".join(known)}')
        cells = [cell for cell in cells if getattr(cell, name) in chosen]
    return cells


def make_plan(opt: Namespace, extra: list[str]) -> list[Job]:
    """The unfinished jobs of the chosen cells, teachers before their students."""
    table, together = TABLES[opt.table], [[seed] for seed in range(opt.seeds)]
    if table.script == 'cifar.py' and slots(opt)[0] is not None:  # all seeds in one process
        together = [[*range(opt.seeds)]]
    cells = [c for cell in chosen_cells(opt)
             for c in (*[t for t in table.cells if t.run == cell.teacher][:1], cell)]
    left = ((cell, [seed for seed in seeds if job_of(cell, [seed], opt, extra).left()])
            for seeds in together for cell in cells)
    return [*dict.fromkeys(job_of(cell, seeds, opt, extra) for cell, seeds in left if seeds)]


def job_of(cell: Cell, seeds: list[int], opt: Namespace, extra: list[str]) -> Job:
    """The job of a cell. With several seeds their numbers stand as {seed} in the command."""
    table, mark = TABLES[opt.table], '{seed}' if len(seeds) > 1 else seeds[0]
    argv = ['--save', str(opt.folder / f'{cell.run}_seed{mark}'), *cell.options.split()]
    if cell.teacher:
        option = '--teacher_id' if table.script == 'cifar.py' else '--teacher_params'
        argv += [option, str(opt.folder / f'{cell.teacher}_seed{mark}')]
    if opt.table == '4':
        argv += ['--dataroot', getattr(opt, cell.run.partition('_')[0])]
    argv += ['--seed', ','.join(map(str, seeds)), *extra]
    folders, teachers = (tuple(opt.folder / f'{run}_seed{s}' for s in seeds if run)
                         for run in (cell.run, cell.teacher))
    return Job(folders, table.script, tuple(argv), teachers)


def slots(opt: Namespace) -> list[int | None]:
    """For each process that can run at the same time its GPU, or None for the CPU."""
    return (opt.gpu_id or list(range(torch.cuda.device_count())) or [None]) * opt.jobs


def start(job: Job, gpu: int | None, opt: Namespace) -> subprocess.Popen:
    """Starts a job's process; what it prints is appended to its first folder's name + .out."""
    if gpu is None and opt.jobs > 1:  # the processes share the cores
        os.environ.setdefault('OMP_NUM_THREADS', str(max(1, torch.get_num_threads() // opt.jobs)))
    opt.folder.mkdir(parents=True, exist_ok=True)
    where = [] if gpu is None else ['--gpu_id', str(gpu)]
    with open(f'{job.folders[0]}.out', 'a') as out:
        return subprocess.Popen([sys.executable, Path(__file__).with_name(job.script), *job.argv,
                                 *where], stdout=out, stderr=out)


def run_jobs(jobs: list[Job], opt: Namespace) -> list[Job]:
    """Runs the jobs, each after its teachers. Returns those that failed."""
    todo, free, running, failed = list(jobs), slots(opt), {}, []
    for s in (signal.SIGTERM, signal.SIGINT):  # SystemExit, so that `finally` ends the processes
        signal.signal(s, lambda signum, _: sys.exit(128 + signum))
    bar = tqdm(total=len(jobs), desc=f'table {opt.table}', unit='process', disable=None)
    try:
        while todo or running:
            unfinished = [*todo, *(job for job, _ in running.values())]
            pending = {folder for job in unfinished for folder in job.folders}
            for job in [job for job in todo if not pending & {*job.teachers}][:len(free)]:
                todo.remove(job)
                gpu = free.pop(0)
                running[start(job, gpu, opt)] = job, gpu
            time.sleep(0.5)
            for process in [p for p in running if p.poll() is not None]:
                job, gpu = running.pop(process)
                free.append(gpu)
                bar.update()
                if process.returncode or job.left():
                    lost = [j for j in todo if {*j.teachers} & {*job.folders}]
                    failed += [job, *lost]
                    todo = [j for j in todo if j not in lost]
    finally:
        for process in running:
            process.terminate()
            process.wait()
    return failed


def error(record: dict, top: int = 1) -> float | None:
    """The test error of a record, in %."""
    accuracy = record.get('test_acc' if top == 1 else 'test_acc5')
    return None if accuracy is None else 100 - accuracy


def spread(errors: pd.Series) -> str:
    """Median (least–greatest), mean ± sample standard deviation."""
    if len(errors) < 2:
        return f'{errors.iloc[0]:.2f}' if len(errors) else '–'
    return (f'{errors.median():.2f} ({errors.min():.2f}–{errors.max():.2f}), '
            f'{errors.mean():.2f} ± {errors.std():.2f}')


def results(opt: Namespace, cells: list[Cell]) -> tuple[pd.DataFrame, list[str]]:
    """The last test errors of all seeds that are finished, and what logs say of epochs and data."""
    rows, settings = [], []
    for cell in cells:
        for folder in sorted(opt.folder.glob(f'{cell.run}_seed*')):
            seed, log = folder.name.rpartition('_seed')[2], read_log(folder)
            if seed.isdigit() and finished(log):
                last = log[-1]
                rows.append((cell.row, cell.method, int(seed), error(last, cell.top)))
                data = last['dataset'] + f' {last["dataroot"]}' * (last['dataset'] == 'folder')
                part = ''.join(f', --{name} {last[name]:g}' for name in
                               ('train_fraction', 'test_fraction') if last.get(name, 1) != 1)
                settings.append(f'{last["epochs"]} epochs on {data}{part}')
    if not rows:
        raise InputError(f'--folder {opt.folder}: no finished run of table {opt.table}')
    return pd.DataFrame(rows, columns=['row', 'method', 'seed', 'error']), settings


def make_report(opt: Namespace, cells: Iterable[Cell]) -> dict[str, str]:
    """A table as text, by suffix: .md, .csv (an error a run), .tex (the paper's layout)."""
    errors, settings = results(opt, cells)
    lines, layout = [], pd.DataFrame()
    for cell in cells:
        row = errors[errors.row == cell.row].set_index('seed')
        own, alone = (row[row.method == name].error for name in (cell.method, 'student'))
        less, seeds = (own - alone).dropna(), ''
        if len(less) and cell.method != 'student' and not cell.method.startswith('teacher'):
            seeds = f'{less.median():+.2f} (below in {(less < 0).sum()}/{len(less)})'
        if len(own):
            lines.append((cell.row, cell.method, cell.paper, spread(own), len(own), seeds))
        ours = '–' if own.empty else f'{own.median():.2f}'
        layout.loc[cell.row, cell.method] = ours + (f' ({cell.paper})' if cell.paper else '')
    full = pd.DataFrame(lines, columns=['student:teacher', 'method', 'paper', 'ours', 'seeds',
                                        '− student, median of the seeds'])
    layout = layout.fillna('').rename_axis('student:teacher')
    head = f'Table {opt.table}: {TABLES[opt.table].title}. Test error of the last epoch, %.\n' \
           f'Ours: {"; ".join(dict.fromkeys(settings))}.'
    notes = ['†: from memory, not checked.'] * ('†' in layout.to_string())
    text = [head, full.to_markdown(index=False, disable_numparse=True),
            'Our median (the paper):', layout.to_markdown(disable_numparse=True), *notes]
    return {'.md': '\n\n'.join(text) + '\n', '.csv': errors.to_csv(index=False),
            '.tex': layout.reset_index().to_latex(index=False, escape=True)}


TERMS = {'at_losses': 'AT', 'act_losses': 'F-ActT', 'kd_loss': 'KD', 'grad_at_loss': 'gradient AT',
         'symmetry_loss': 'symmetry norm', 'min_l2_loss': 'min-l2'}


def method(log: list[dict]) -> str:
    """The losses of a run, by the terms in its log: AT+KD; other terms have their own names."""
    terms = dict.fromkeys(name for record in log for name in record
                          if name.endswith(('_loss', '_losses')))
    names = [TERMS.get(name, name.removesuffix('_loss').removesuffix('_losses'))
             for name in terms if name not in ('train_loss', 'test_loss', 'ce_loss')]
    maps = f'{log[-1].get("mapping", "sum")}^{log[-1].get("power", 2):g}'
    return '+'.join(names).replace('AT', 'AT' if maps == 'sum^2' else f'AT {maps}', 1) or 'alone'


def runs_text(folders: list[str]) -> str:
    """A line a run, and the spread over finished runs whose names differ only by the seed."""
    logs = read_logs(folders)
    rows = [(folder, log[-1].get('network'), method(log), f'{log[-1]["epoch"]}/{log[-1]["epochs"]}',
             error(log[-1]), error(log[-1], 5), sum(r['train_time'] for r in log))
            for folder, log in logs.items()]
    table = pd.DataFrame(rows, columns=['run', 'network', 'losses', 'epochs', 'test error, %',
                                        'top-5, %', 'training, s'])
    done = table[[finished(log) for log in logs.values()]]
    several = done.groupby(done.run.map(without_seed), sort=False)
    lines = [(name, len(group), spread(group['test error, %'].dropna()))
             for name, group in several if len(group) > 1]
    parts = [table.to_markdown(index=False, floatfmt=('', '', '', '', '.2f', '.2f', '.0f'))]
    if lines:
        parts.append(pd.DataFrame(lines, columns=['runs', 'seeds', 'test error, %']
                                  ).to_markdown(index=False))
    return '\n\n'.join(parts)


def make_parser() -> ArgumentParser:
    parser = engine.new_parser(__doc__, '%(prog)s TABLE [options, also of cifar.py, imagenet.py]')
    add = parser.add_argument
    add('table', nargs='?', choices=TABLES, help='comes first')
    add('--row', action='append', help='only this row, such as WRN-16-1:WRN-16-2; repeatable')
    add('--method', action='append', help='only this method, such as AT; repeatable')
    add('--seeds', type=utils.whole_number,
        help='how many, from 0 on (default: 5; tables 3 to 5 and imagenette: 1, demo: 3)')
    add('--folder', type=Path,
        help='of the runs and the table (default: logs/tables; of demo: logs/tables_demo)')
    add('--dry_run', action='store_true', help='only print the commands')
    add('--report', action='store_true', help='train nothing, only write and print the table')
    add('--gpu_id', type=utils.whole_numbers, help='GPUs, such as 0,1 (default: all)')
    add('--jobs', default=1, type=utils.whole_number, help='processes at a time on a device')
    add('--cub', default='cub', metavar='DIR', help='CUB-200-2011, for table 4')
    add('--scenes', default='scenes', metavar='DIR', help='MIT Indoor 67, for table 4')
    add('--runs', nargs='+', metavar='FOLDER', help='print the test errors of these runs')
    return parser


def run_table(opt: Namespace, extra: list[str]) -> None:
    """Runs what is left of a table and writes it, or prints the commands, or the table."""
    opt.seeds = TABLES[opt.table].seeds if opt.seeds is None else opt.seeds
    opt.folder = opt.folder or Path('logs/tables' + f'_{opt.table}' * (not opt.table.isdigit()))
    failed = []
    if not opt.report:
        jobs = make_plan(opt, extra)
        for students, what in ((False, 'teachers, and students alone'), (True, 'students')):
            print(f'# {what}')
            print(*(job.command() for job in jobs if bool(job.teachers) == students), sep='\n')
        if opt.dry_run:
            return
        failed = run_jobs(jobs, opt)
    lost = {folder for job in failed for folder in job.folders}
    for job in failed:
        out = Path(f'{job.folders[0]}.out')
        lines = out.read_text().splitlines()[-6:] if not lost & {*job.teachers} else \
            ['its teacher failed']
        print(f'failed: {job.command()}', *lines, sep='\n    ', file=sys.stderr)
    for suffix, text in make_report(opt, TABLES[opt.table].cells).items():
        opt.folder.joinpath(f'table{opt.table}{suffix}').write_text(text)
    print(make_report(opt, chosen_cells(opt))['.md'], end='')
    if failed:
        sys.exit(1)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    opt, extra = parser.parse_known_args(argv)
    first = (sys.argv[1:] if argv is None else argv)[:1]
    if (opt.table or extra) if opt.runs else first != [opt.table]:
        parser.error('name a table, before all options, or runs by --runs')
    if 0 in (opt.jobs, opt.seeds):
        parser.error('--jobs and --seeds must be 1 or more')
    if own := [arg for arg in extra if arg.partition('=')[0] in [f'--{name}' for name in OWN]]:
        parser.error(f'{own[0]}: not with tables.py, see --seeds, --folder, --gpu_id')
    if opt.runs:
        print(runs_text(opt.runs))
    else:
        run_table(opt, extra)


if __name__ == '__main__':
    with engine.one_line_errors():
        main()
