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
import engine
import imagenet
import tables
from tables import TABLES

ROW = 'WRN-16-1:WRN-16-2'
AT = 'WRN-16-1_AT_WRN-16-2'
# cifar.py takes the last of options that are given twice: a small network, and few images.
SMALL = ['--dataset', 'Digits', '--depth', '10', '--width', '0.25', '--train_fraction', '0.05',
         '--test_fraction', '0.1', '--batch_size', '16', '--epochs', '2', '--no-check_teacher']
PART = ['1', '--row', ROW, '--seeds', '1', '--folder', 't', *SMALL]
STUDENT_AND_AT = ['--method', 'student', '--method', 'AT']


def plan(*argv):
    opt, extra = tables.make_parser().parse_known_args(list(map(str, argv)))
    opt.seeds = opt.seeds or TABLES[opt.table].seeds
    return tables.make_plan(opt, extra)


def parsed(job):
    """The options of a job's command, checked as the script checks them."""
    words = shlex.split(job.command())
    script, teacher = {'cifar.py': (cifar, 'teacher_id'),
                       'imagenet.py': (imagenet, 'teacher_params')}[words[1]]
    return engine.parse(script.make_parser(), words[2:], teacher)


# ------------------------------------------------------------------ figures and commands

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
    cells = [cell for cell in TABLES[number].cells if cell.row == row and cell.paper]
    assert [cell.paper for cell in cells] == figures.split()
    assert {cell.top for cell in cells} == {5 if row.endswith('5') else 1}


@pytest.mark.parametrize('number, runs, seeds', [
    ('demo', 3, 3), ('imagenette', 4, 1), ('1', 22, 5), ('2', 9, 5), ('3', 8, 1), ('4', 8, 1),
    ('5', 3, 1)])
def test_every_run_is_a_valid_command_after_its_teachers(work, number, runs, seeds):
    jobs = plan(number)
    assert len(jobs) == runs * seeds == len({job.folders for job in jobs})
    trained = set()
    for job in jobs:
        opt = parsed(job)
        folder, teacher = Path(opt.save), getattr(opt, 'teacher_id', '') or \
            getattr(opt, 'teacher_params', '')
        assert job.folders == (folder,) and folder.name.endswith(f'_seed{opt.seed[0]}')
        assert [Path(teacher)] * bool(teacher) == list(job.teachers) and {*job.teachers} <= trained
        assert folder.name in {f'{cell.run}_seed{opt.seed[0]}' for cell in TABLES[number].cells}
        trained.add(folder)


@pytest.mark.parametrize('number, run, expected', [
    ('1', 'NIN-thin_AT+KD_NIN-wide', {'net': 'nin', 'width': .5, 'alpha': .9, 'beta': 1000,
                                      'beta_decay': 'step', 'epochs': 200, 'batch_norm': True}),
    ('1', 'WRN-16-2_F-ActT_WRN-40-2', {'width': 2, 'factt': 1000, 'beta_decay': 'cosine'}),
    ('1', 'WRN-40-1', {'net': 'wrn', 'depth': 40, 'width': 1, 'beta': 0, 'teacher_id': ''}),
    ('2', 'WRN-16-1_F_max_WRN-16-2', {'mapping': 'max', 'power': 1, 'beta': 1000}),
    ('2', 'WRN-16-1_AT-group2_WRN-16-2', {'at_groups': [2], 'mapping': 'sum', 'power': 2}),
    ('3', 'NIN-thin-nobn_gradient-AT', {
        'batch_norm': False, 'pool_relu': False, 'weight_decay': 0, 'randomcrop_pad': 0,
        'teacher_id': 'logs/tables/NIN-wide_seed0', 'grad_at': 10, 'beta': 0}),
    ('3', 'NIN-thin-nobn_AT', {'teacher_id': 'logs/tables/NIN-wide-nopoolrelu_seed0'}),
    ('4', 'scenes_ResNet-18_AT_scenes_ResNet-34', {'student_params': 'torchvision-18', 'dataset': 'scenes',
                                  'dataroot': 'scenes', 'beta': 1000, 'at_groups': [2, 3]}),
    ('5', 'ResNet-18_AT_ResNet-34', {'depth': 18, 'beta': 1000, 'at_epochs': [60, 100]})])
def test_what_sets_the_runs_apart(work, number, run, expected):
    opt, = (vars(parsed(job)) for job in plan(number, '--seeds', 1)
            if job.folders[0].name == f'{run}_seed0')
    assert {name: opt[name] for name in expected} == expected


def test_on_gpus_the_seeds_of_a_cell_are_one_command(work, monkeypatch):
    monkeypatch.setattr(tables.torch.cuda, 'device_count', lambda: 2)
    jobs = plan('1', '--row', ROW, '--method', 'AT', '--seeds', 3)
    assert [job.argv[:2] for job in jobs] == [
        ('--save', f'logs/tables/{run}_seed{{seed}}') for run in ('WRN-16-2', AT)]
    assert all(parsed(job).seed == [0, 1, 2] and len(job.folders) == 3 for job in jobs)
    assert parsed(jobs[1]).teacher_id == 'logs/tables/WRN-16-2_seed{seed}'
    assert jobs[1].teachers == jobs[0].folders
    opt = tables.make_parser().parse_args(['1', '--jobs', '2'])
    assert tables.slots(opt) == [0, 1, 0, 1]
    for job in plan('imagenette', '--seeds', 2):  # imagenet.py takes one seed
        assert len(parsed(job).seed) == len(job.folders) == 1


def test_a_row_method_or_table_that_is_not_there(work, refused):
    refused(tables.main, ['1', '--row', 'WRN-16-1'], 'WRN-16-1:WRN-40-1')
    refused(tables.main, ['1', '--method', 'at'], 'student, AT, F-ActT')
    for argv in ([], ['7'], ['1', '--runs', 't'], ['--runs', 't', '--width', '2']):
        refused(tables.main, argv)


# ------------------------------------------------------------------ what is left to train

def test_finished_runs_are_left_out_until_more_epochs_are_asked_for(work):
    fake_log('logs/tables/WRN-16-1_seed0', [50, 40])
    fake_log('logs/tables/WRN-16-1_seed1', [50], epochs=2)
    argv = ['1', '--row', ROW, '--method', 'student', '--seeds', 3]

    def left(*more):
        return [job.folders[0].name[-1] for job in plan(*argv, *more)]
    assert left() == left('--epochs', 2) == ['1', '2']
    assert left('--epochs', 1) == ['2']
    assert left('--epochs', 2, '--epochs', 3) == ['0', '1', '2']


def test_a_teacher_whose_weights_are_gone_is_trained_again_for_its_students(work):
    """As in a fresh clone, which has the logs alone."""
    fake_log('logs/tables/WRN-16-2_seed0', [50, 40])
    argv = ['1', '--row', ROW, *STUDENT_AND_AT, '--seeds', 1]
    names = [[str(job.folders[0])[len('logs/tables/'):] for job in plan(*argv)]]
    Path('logs/tables/WRN-16-2_seed0/model.pt7').touch()
    names += [[str(job.folders[0])[len('logs/tables/'):] for job in plan(*argv)]]
    assert names == [['WRN-16-1_seed0', 'WRN-16-2_seed0', f'{AT}_seed0'],
                     ['WRN-16-1_seed0', f'{AT}_seed0']]


# ------------------------------------------------------------------ real runs

def test_a_table_is_trained_once_and_written(work, capsys):
    argv = [*PART, '--method', 'AT']
    tables.main(argv)
    out = capsys.readouterr().out
    assert out.index('--save t/WRN-16-2_seed0') < out.index(f'--save t/{AT}_seed0')
    error = 100 - log_of(f't/{AT}_seed0')[1]['test_acc']
    assert 'at_losses' in log_of(f't/{AT}_seed0')[1] and f'| {error:.2f} ' in out
    assert Path('t/table1.md').read_text() in out
    assert pd.read_csv('t/table1.csv').error.tolist() == [pytest.approx(error)]
    assert f'{error:.2f} (7.93)' in Path('t/table1.tex').read_text()
    before = files('t')
    tables.main(argv)
    assert files('t') == before and 'python cifar.py' not in capsys.readouterr().out


def test_a_failed_run_is_shown_and_the_others_go_on(work, capsys):
    Path('t').mkdir()
    Path('t/WRN-16-2_seed0').touch()  # in the way of the teacher
    with pytest.raises(SystemExit, match='1'):
        tables.main([*PART, *STUDENT_AND_AT, '--jobs', '2'])
    out, err = capsys.readouterr()
    assert 'failed: python cifar.py --save t/WRN-16-2_seed0' in err
    assert 'error: --save t/WRN-16-2_seed0: ' in err and 'its teacher failed' in err
    assert f'failed: python cifar.py --save t/{AT}_seed0' in err
    assert not Path(f't/{AT}_seed0.out').exists()
    assert len(log_of('t/WRN-16-1_seed0')) == 2 and '| student ' in out


@pytest.mark.slow
def test_a_killed_table_ends_its_runs_and_goes_on(work):
    argv = [*PART, '--method', 'student', '--epochs', '120']
    driver = subprocess.Popen([sys.executable, str(ROOT / 'tables.py'), *argv],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = Path('t/WRN-16-1_seed0')
    for _ in range(1200):
        if (folder / 'log.txt').exists():
            break
        time.sleep(0.05)
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(30) == 143
    FileLock(folder / '.lock', timeout=0).acquire().lock.release()
    assert 'stopped' in Path(f'{folder}.out').read_text()
    first = log_of(folder)
    assert 0 < len(first) < 120
    tables.main(argv)
    log = log_of(folder)
    assert len(log) == 120 and log[:len(first)] == first


# ------------------------------------------------------------------ reports

def test_report(work, capsys):
    """Of 8, 8.5, 7: median 8, mean 7.83, deviation 0.76. Less the student's: −1, 0.5, −1.2."""
    for seed, (alone, at) in enumerate([(9, 8), (8, 8.5), (8.2, 7)]):
        fake_log(f't/WRN-16-1_seed{seed}', [50, alone])
        fake_log(f't/{AT}_seed{seed}', [50, at])
    fake_log(f't/{AT}_seed3', [50], epochs=2)  # goes on
    tables.main(['1', '--row', ROW, *STUDENT_AND_AT, '--method', 'KD', '--report', '--folder', 't'])
    out = capsys.readouterr().out
    rows = {cells[2].strip(): [cell.strip() for cell in cells[3:-1]] for cells in
            (line.split('|') for line in out.splitlines()) if len(cells) > 7}
    assert rows['AT'] == ['7.93', '8.00 (7.00–8.50), 7.83 ± 0.76', '3', '-1.00 (below in 2/3)']
    assert rows['student'] == ['8.77', '8.20 (8.00–9.00), 8.40 ± 0.53', '3', '']
    assert rows['KD'] == ['7.41†', '–', '0', '']
    assert 'Ours: 2 epochs on CIFAR10.' in out and '†: recalled, with no source at hand.' in out
    assert '8.20 (8.77) | 8.00 (7.93) | – (7.41†) |' in ' '.join(out.split())
    csv = pd.read_csv('t/table1.csv')
    assert csv[csv.method == 'AT'].error.tolist() == pytest.approx([8, 8.5, 7])
    assert csv[csv.method == 'student'].seed.tolist() == [0, 1, 2]


def test_top_5_errors_have_their_own_row(work, capsys):
    fake_log('t/ResNet-18_seed0', [30.24], test_acc5=89.08)
    tables.main(['5', '--report', '--folder', 't', '--method', 'student'])
    out = ' '.join(capsys.readouterr().out.split())
    assert '30.24 (30.4)' in out and '10.92 (10.8)' in out


def test_a_report_without_runs(work, refused):
    refused(tables.main, ['1', '--report', '--folder', 't'], 'no finished run of table 1')
    refused(tables.main, ['--runs', 't'], 't: no log.txt')


def test_a_method_needs_its_options_alone(work, capsys, monkeypatch):
    monkeypatch.setitem(tables.METHODS, 'late', '--beta 5 --at_epochs 1,2')
    monkeypatch.setitem(TABLES, '1', TABLES['1']._replace(cells=tuple(
        cell for student, teacher, figures in tables.TABLE_1
        for cell in tables.row_of(student, teacher, tables.METHODS, figures))))
    job = plan(*PART, '--method', 'late')[-1]
    assert (parsed(job).beta, parsed(job).at_epochs) == (5, [1, 2])
    fake_log(job.folders[0], [50, 40], dataset='Digits')
    tables.main([*PART, '--report'])
    out = ' '.join(capsys.readouterr().out.split())
    assert '| late | | 40.00 | 1 |' in out and '| AT+KD | 7.51† |' in out and '| 6.31 |' in out


def test_runs(work, capsys):
    more = {'at_losses': [1.], 'kd_loss': 1.}
    for seed, error in enumerate((10, 14, 12)):
        fake_log(f'a_seed{seed}', [50, error], **more)
    fake_log('b', [50, 45, None], epochs=4, mapping='max', power=1, at_losses=[1.])
    fake_log('c', [50], new_loss=1., test_acc5=75)
    tables.main(['--runs', 'a_seed0', 'a_seed1', 'b', 'a_seed2', 'c', 'not there'])
    lines = [[cell.strip() for cell in line.split('|')[1:-1]]
             for line in capsys.readouterr().out.splitlines()]
    assert lines[2][:5] == ['a_seed0', 'WRN-16-1', 'AT+KD', '2/2', '10.00'] and lines[2][6] == '6'
    assert lines[4][:4] == ['b', 'WRN-16-1', 'AT max^1', '3/4'] and lines[4][6] == '9'
    assert lines[6][:6] == ['c', 'WRN-16-1', 'new', '1/1', '50.00', '25.00']
    assert lines[10:] == [['a', '3', '12.00 (10.00–14.00), 12.00 ± 2.00']]


def test_an_unknown_table_is_one_line_from_the_script(work):
    done = subprocess.run([sys.executable, str(ROOT / 'tables.py'), '1', '--report'],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith('error: --folder logs/tables: no ')
    assert done.stderr.count('\n') == 1
