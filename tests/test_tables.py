"""tables.py: the paper's figures, the commands, real runs of them, and what the logs say."""
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from filelock import FileLock
from helpers import ROOT, fake_log, files, log_of

import cifar
import imagenet
import tables
from resnet import InputError
from tables import TABLES

ROW, AT = 'WRN-16-1:WRN-16-2', 'WRN-16-1_AT_WRN-16-2'
# cifar.py takes the last of options that are given twice: a small network, and few images.
PART = ['1', '--row', ROW, '--seeds', '1', '--folder', 't', '--dataset', 'ClutteredDigits',
        '--depth', '10', '--width', '0.25', '--train_fraction', '0.02', '--test_fraction', '0.1',
        '--batch_size', '16', '--no-check_teacher', '--epochs', '2', '--epoch_step', '[1]']
STUDENT_AND_AT = ['--method', 'student', '--method', 'AT']


def plan(*argv):
    opt, extra = tables.make_parser().parse_known_args(list(map(str, argv)))
    opt.seeds = opt.seeds or TABLES[opt.table].seeds
    opt.folder = opt.folder or Path('logs/tables')
    extra += {'5': ['--imagenetpath', 'x'], 'imagenette': ['--dataroot', 'x']}.get(opt.table, [])
    return tables.make_plan(opt, extra)


def parsed(job):
    """The options of a job's command, and its teacher, checked as the script checks them."""
    _, script, *argv = shlex.split(job.command())
    script, name = {'cifar.py': (cifar, 'teacher_id'),
                    'imagenet.py': (imagenet, 'teacher_params')}[script]
    _, opt = script.parse(argv)
    opt.teacher = getattr(opt, name)
    return opt


COLUMNS = {'1': 'student AT F-ActT KD AT+KD teacher',
           '2': 'student F_sum AT F_sum^4 F_max AT-group0 AT-group1 AT-group2 teacher',
           '3': 'student min-l2 gradient-AT KD symmetry-norm AT',
           '4': 'student KD AT teacher', '5': 'student AT teacher'}


@pytest.mark.parametrize('number, row, figures', [
    ('1', 'NIN-thin:NIN-wide', '9.38† 8.93† 9.05† 8.55† 8.33† 7.28†'),
    ('1', 'WRN-16-1:WRN-16-2', '8.77 7.93 8.51† 7.41† 7.51† 6.31'),
    ('1', 'WRN-16-1:WRN-40-1', '8.77 8.25 8.62† 8.39 8.01† 6.58'),
    ('1', 'WRN-16-2:WRN-40-2', '6.31 5.85 6.24† 6.08 5.71† 5.23'),
    ('2', 'WRN-16-1:WRN-16-2', '8.77 7.99† 7.93 8.09† 8.08† 8.11† 7.96† 7.97† 6.31'),
    ('3', 'NIN-thin:NIN-wide', '13.5† 12.5† 12.1† 12.1† 11.8† 11.2†'),
    ('4', 'cub_ResNet-18:cub_ResNet-34', '28.5† 27.0† 27.0† 26.5†'),
    ('4', 'scenes_ResNet-18:scenes_ResNet-34', '28.2† 28.1† 27.1† 26.0†'),
    ('5', 'ResNet-18:ResNet-34', '30.4 29.3 26.1'),
    ('5', 'ResNet-18:ResNet-34, top-5', '10.8 10.0 8.3')])
def test_the_papers_figures(number, row, figures):
    cells = {cell.method.replace(' ', '-'): cell.paper for cell in TABLES[number].cells
             if cell.row == row and cell.paper}
    assert cells == dict(zip(COLUMNS[number].split(), figures.split(), strict=True))


@pytest.mark.parametrize('number, runs, seeds', [
    ('1', 22, 5), ('2', 9, 5), ('3', 8, 1), ('4', 8, 1), ('5', 3, 1), ('demo', 3, 3),
    ('imagenette', 7, 1)])
def test_every_run_is_a_valid_command_after_its_teacher(work, number, runs, seeds):
    jobs, added = plan(number), 4 * (len(tables.METHODS) - 5) if number == '1' else 0
    assert len(jobs) == (runs + added) * seeds == len({job.folders for job in jobs})
    trained = set()
    for job in jobs:
        opt = parsed(job)
        assert job.folders == (Path(opt.save),) and opt.save.endswith(f'_seed{opt.seed[0]}')
        assert [Path(opt.teacher)] * bool(opt.teacher) == list(job.teachers)
        assert trained.issuperset(job.teachers)
        trained.update(job.folders)


@pytest.mark.parametrize('number, run, expected', [
    ('1', 'NIN-thin_AT+KD_NIN-wide', {'net': 'nin', 'width': .5, 'alpha': .9, 'beta': 1000,
                                      'beta_decay': 'step', 'epochs': 200, 'batch_norm': True}),
    ('1', 'WRN-16-2_F-ActT_WRN-40-2', {'width': 2, 'factt': 1000, 'beta_decay': 'cosine'}),
    ('2', 'WRN-16-1_F_max_WRN-16-2', {'mapping': 'max', 'power': 1, 'beta': 1000}),
    ('3', 'NIN-thin-nobn_gradient-AT', {
        'batch_norm': False, 'pool_relu': False, 'weight_decay': 0, 'randomcrop_pad': 0,
        'teacher': 'logs/tables/NIN-wide_seed0', 'grad_at': 10, 'beta': 0}),
    ('3', 'NIN-thin-nobn_AT', {'teacher': 'logs/tables/NIN-wide-nopoolrelu_seed0'}),
    ('4', 'scenes_ResNet-18_AT_scenes_ResNet-34', {
        'dataset': 'scenes', 'dataroot': 'scenes', 'beta': 1000, 'at_groups': [2, 3]}),
    ('5', 'ResNet-18_AT_ResNet-34', {'depth': 18, 'beta': 1000, 'at_epochs': [60, 100]})])
def test_what_sets_the_runs_apart(work, number, run, expected):
    opt, = (vars(parsed(job)) for job in plan(number, '--seeds', 1)
            if job.folders[0].name == f'{run}_seed0')
    assert {name: opt[name] for name in expected} == expected


def test_on_gpus_the_seeds_of_a_cell_are_one_command(work, monkeypatch):
    monkeypatch.setattr(tables, 'slots', lambda opt: [0, 1])
    teacher, at = plan('1', '--row', ROW, '--method', 'AT', '--seeds', 3)
    assert parsed(teacher).save == parsed(at).teacher == 'logs/tables/WRN-16-2_seed{seed}'
    assert parsed(at).seed == [0, 1, 2] and len(at.folders) == 3 and at.teachers == teacher.folders
    fake_log('logs/tables/WRN-16-2_seed0', [50], width=2)
    fake_log('logs/tables/WRN-16-2_seed2', [50], width=2)
    fake_log(f'logs/tables/{AT}_seed1', [50], beta=1000)
    teacher, at = plan('1', '--row', ROW, '--method', 'AT', '--seeds', 3, '--epochs', 1)
    assert parsed(teacher).seed == [1] and parsed(at).seed == [0, 2]  # the others are finished
    assert parsed(teacher).save == 'logs/tables/WRN-16-2_seed1' and len(at.teachers) == 2


def test_imagenet_trains_one_seed_in_a_process_also_on_gpus(work, monkeypatch):
    monkeypatch.setattr(tables, 'slots', lambda opt: [0, 1])
    assert [len(parsed(job).seed) for job in plan('imagenette', '--seeds', 2)] == [1] * 14


def test_what_is_left_to_train(work):
    """Runs that are not finished."""
    fake_log('logs/tables/WRN-16-1_seed0', [50, 40])
    fake_log('logs/tables/WRN-16-1_seed1', [50], epochs=2)
    fake_log('logs/tables/WRN-16-2_seed0', [50, 40], width=2)

    def left(*argv):
        return [job.folders[0].name for job in plan('1', '--row', ROW, *argv)]
    for epochs, seeds in ('', '012'), ('2', '12'), ('2 --epochs 3', '012'):
        more = f'--epochs {epochs}'.split() if epochs else []
        names = left('--method', 'student', '--seeds', 3, *more)
        assert names == [f'WRN-16-1_seed{seed}' for seed in seeds]
    assert left(*STUDENT_AND_AT, '--seeds', 1, '--epochs', 2) == [f'{AT}_seed0']
    for other in '--epochs 1', '--epochs 2 --dataset ClutteredDigits', '--epochs 2 --at_groups 1':
        with pytest.raises(InputError, match=r'WRN-16-1_seed0.*another --folder'):
            left('--method', 'student', *other.split())


def test_a_table_is_trained_once_and_written(work, capsys):
    tables.main([*PART, '--method', 'AT', '--jobs', '2'])  # AT waits for its teacher
    out, log = capsys.readouterr().out, log_of(f't/{AT}_seed0')
    error = 100 - log[-1]['test_acc']
    assert len(log) == 2 and 'at_losses' in log[0] and 'WRN-16-1:WRN-16-2 | AT       | 7.93' in out
    csv = pd.read_csv('t/table1.csv')  # the teacher's run is in two rows
    assert csv[csv.method == 'AT'].error.tolist() == [pytest.approx(error)] and len(csv) == 3
    assert all(f'{error:.2f} (7.93)' in text for text in (out, Path('t/table1.tex').read_text()))
    before = files('t')
    tables.main([*PART, '--method', 'AT'])
    assert files('t') == before


def test_a_failed_run_is_shown_and_the_others_go_on(work, capsys):
    Path('t').mkdir()
    Path('t/WRN-16-2_seed0').touch()  # in the way of the teacher
    Path(f't/{AT}_seed0.out').write_text('of an earlier attempt')
    with pytest.raises(SystemExit, match='1'):
        tables.main([*PART, *STUDENT_AND_AT, '--jobs', '2'])
    out, err = capsys.readouterr()
    assert 'failed: python cifar.py --save t/WRN-16-2_seed0' in err
    assert 'error: --save t/WRN-16-2_seed0: ' in err
    assert f'failed: python cifar.py --save t/{AT}_seed0' in err
    assert 'its teacher failed' in err and 'of an earlier attempt' not in err
    assert '| student ' in out and not Path(f't/{AT}_seed0').exists()


@pytest.mark.slow
def test_a_killed_table_ends_its_runs_and_goes_on(work):
    argv, folder = [*PART, '--method', 'student', '--epochs', '120'], Path('t/WRN-16-1_seed0')
    driver = subprocess.Popen([sys.executable, str(ROOT / 'tables.py'), *argv])
    while not (folder / 'log.txt').exists() and driver.poll() is None:
        time.sleep(0.05)
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(30) == 143
    FileLock(folder / '.lock', timeout=0).acquire().lock.release()
    first = log_of(folder)
    assert 0 < len(first) < 120
    tables.main(argv)
    assert len(log_of(folder)) == 120 and log_of(folder)[:len(first)] == first


def test_report(work, capsys):
    """Of 8, 8.5, 7: median 8, mean 7.83, deviation 0.76. Less the student's: −1, 0.5, −1.2."""
    for seed, (alone, at) in enumerate([(9, 8), (8, 8.5), (8.2, 7)]):
        fake_log(f't/WRN-16-1_seed{seed}', [50, alone])
        fake_log(f't/{AT}_seed{seed}', [50, at])
    fake_log(f't/{AT}_seed3', [50], epochs=2)  # goes on
    tables.main(['1', '--row', ROW, *STUDENT_AND_AT, '--method', 'KD', '--report', '--folder', 't'])
    out = ' '.join(capsys.readouterr().out.split())
    assert '| AT | 7.93 | 8.00 (7.00–8.50), 7.83 ± 0.76 | 3 | -1.00 (below in 2/3) |' in out
    assert '| student | 8.77 | 8.20 (8.00–9.00), 8.40 ± 0.53 | 3 | |' in out
    assert '| KD | 7.41† |' not in out and '†: from memory, not checked.' in out
    assert '8.20 (8.77) | 8.00 (7.93) | – (7.41†) |' in out and 'Ours: 2 epochs on CIFAR10.' in out
    whole = Path('t/table1.md').read_text()  # what is chosen only matters to what is printed
    assert '| 9.38† |' not in out and '– (9.38†)' in whole and '8.00 (7.93)' in whole
    csv = pd.read_csv('t/table1.csv')
    assert csv[csv.method == 'AT'].error.tolist() == pytest.approx([8, 8.5, 7])
    fake_log('t/ResNet-18_seed0', [30.24], test_acc5=89.08)
    tables.main(['5', '--report', '--folder', 't', '--method', 'student'])
    out = ' '.join(capsys.readouterr().out.split())
    assert '30.24 (30.4)' in out and '10.92 (10.8)' in out
    fake_log('d/NIN-thin-nobn_seed0', [14], test_fraction=0.1, train_fraction=0.5)
    fake_log('d/NIN-wide-nopoolrelu_seed0', [7])
    tables.main(['3', '--report', '--folder', 'd'])
    out = ' '.join(capsys.readouterr().out.split())
    assert 'on CIFAR10, --train_fraction 0.5, --test_fraction 0.1.' in out
    assert '| teacher of AT | | 7.00 | 1 | |' in out


def test_a_new_method_needs_its_options_alone(work, capsys, monkeypatch):
    methods = tables.METHODS | {'late': '--beta 5 --at_epochs 1,2'}
    monkeypatch.setitem(TABLES, '1', TABLES['1']._replace(cells=tuple(
        cell for row in tables.TABLE_1 for cell in tables.row_of(*row[:2], methods, row[2]))))
    job = plan(*PART, '--method', 'late')[-1]
    assert (parsed(job).beta, parsed(job).at_epochs) == (5, [1, 2])
    fake_log(job.folders[0], [50, 40], dataset='ClutteredDigits')
    tables.main([*PART, '--report'])
    out = ' '.join(capsys.readouterr().out.split())
    assert '| late | | 40.00 | 1 |' in out and '| – (7.51†) | 40.00 | – (6.31) |' in out


def test_runs(work, capsys):
    for seed, error in enumerate((10, 14, 12)):
        fake_log(f'a_seed{seed}', [50, error], at_losses=[1.], kd_loss=1.)
    fake_log('b', [50, 45, None], epochs=4, mapping='max', power=1, at_losses=[1.])
    fake_log('c', [50], new_loss=1., test_acc5=75)
    fake_log('a_seed3', [80], epochs=2)  # not finished
    tables.main(['--runs', *(f'a_seed{seed}' for seed in range(4)), 'b', 'c', 'not there'])
    out = ' '.join(capsys.readouterr().out.split())
    assert '| a_seed0 | WRN-16-1 | AT+KD | 2/2 | 10.00 | nan | 6 |' in out.replace('| |', '| nan |')
    assert '| b | WRN-16-1 | AT max^1 | 3/4 |' in out
    assert '| c | WRN-16-1 | new | 1/1 | 50.00 | 25.00 |' in out
    assert out.endswith('| a | 3 | 12.00 (10.00–14.00), 12.00 ± 2.00 |')


def test_wrong_use(work, refused):
    refused(tables.main, ['1', '--row', 'WRN-16-1'], 'WRN-16-1:WRN-40-1')
    refused(tables.main, ['1', '--method', 'at'], 'student, AT, F-ActT')
    refused(tables.main, ['1', '--report', '--folder', 't'], 'no finished run of table 1')
    refused(tables.main, ['--runs', 't'], 't: no log.txt')
    refused(tables.main, ['5', '--dry_run'], '--imagenetpath must name its folder')
    refused(tables.main, ['1', '--seed', '3'], '--seed: not with tables.py')
    refused(tables.main, ['1', '--save=x'], '--save=x: not with tables.py')
    refused(tables.main, ['5', '--ngpu', '2'], '--ngpu: not with tables.py')
    refused(tables.main, ['1', '--seeds', '0'], '--jobs and --seeds must be 1 or more')
    refused(tables.main, ['--epochs', '3', '1'], 'name a table, before all options')
    for argv in ([], ['7'], ['1', '--runs', 't'], ['--runs', 't', '--width', '2']):
        refused(tables.main, argv)


@pytest.mark.parametrize('logged, given', [
    ({'at_groups': [2]}, ''), ({'at_epochs': [0, 1]}, ''), ({}, '--at_epochs 0,1'),
    ({'flip': False}, ''), ({'dtype': 'bfloat16'}, ''), ({'image_size': 64}, ''),
    ({'beta_decay': 'cosine', 'epochs': 1}, '--beta_decay cosine')])
def test_a_run_with_other_options_is_not_taken(work, logged, given):
    fake_log('logs/tables/WRN-16-1_seed0', [50, 40], **logged)
    with pytest.raises(InputError, match=r'WRN-16-1_seed0.*another --folder'):
        plan('1', '--method', 'student', '--row', ROW, '--epochs', 2, *given.split())


def test_what_the_script_chooses_and_earlier_logs_are_taken(work):
    fake_log('logs/tables/WRN-16-1_seed0', [50, 40], flip=True, compile=True, deterministic=False,
             at_groups=[0, 1, 2], image_size=None, batch_norm=None)
    argv = '1', '--method', 'student', '--row', ROW, '--epochs', 2, '--seeds', 1
    assert plan(*argv) == []
    fake_log('logs/tables/WRN-16-2_seed0', [50, 40], width=2, at_groups=[0, 1, 2])
    assert plan('1', '--row', ROW, '--epochs', 2, '--at_groups', '0,1,2', '--method', 'teacher',
                '--seeds', 1) == []
