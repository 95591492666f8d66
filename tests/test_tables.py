"""tables.py: plans, real runs through kills, failures and a second driver, reports and curves."""
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import ROOT, fake

import tables
from paper import TABLES
from training.log import read_log
from training.runs import is_locked
from utils import teacher_losses

ROW = 'WRN-16-1:WRN-16-2'
FLAGS = ['--dataset', 'folder', '--dataroot', 'images', '--epochs', '2', '--batch_size', '16']
PART = ['1', '--row', ROW, '--method', 'student', '--method', 'AT', *FLAGS]


def options(*argv):
    opt, extra = tables.make_parser().parse_known_args([str(a) for a in argv])
    opt.seeds = opt.seeds or TABLES[opt.table].seeds
    return opt, extra


# ---------------------------------------------------------------------------- plans

@pytest.mark.parametrize('number, runs, seeds', [
    ('demo', 3, 3), ('1', 22, 5), ('2', 9, 5), ('3', 8, 1), ('4', 8, 1), ('5', 3, 1)])
def test_every_cell_has_its_command_and_teachers_come_first(number, runs, seeds):
    opt, extra = options(number)
    jobs = tables.make_plan(opt, extra)
    assert opt.seeds == seeds and len(jobs) == runs * seeds == len({job.folder for job in jobs})
    folders = [job.folder for job in jobs]
    for seed in range(seeds):
        for cell in TABLES[number].cells:
            job = jobs[folders.index(Path(f'logs/tables/{cell.run}_seed{seed}'))]
            words = shlex.split(job.command())
            parsed = tables.SCRIPTS[words[1]].make_parser().parse_args(words[2:])
            assert parsed.save == str(job.folder) and parsed.seed == seed
            teacher = vars(parsed).get('teacher_id') or vars(parsed).get('teacher_params')
            assert (teacher is None) == (cell.teacher is None)
            if teacher:
                assert teacher == f'logs/tables/{cell.teacher}_seed{seed}'
                assert folders.index(Path(teacher)) < folders.index(job.folder)
            assert (teacher is not None) == bool(teacher_losses(parsed))


def test_the_papers_figures():
    def row(number, name, top=1):
        return [cell.paper for cell in TABLES[number].cells if cell.row == name and cell.top == top]
    assert row('1', 'NIN-thin:NIN-wide') == [9.38, 8.93, 9.05, 8.55, 8.33, 7.28]
    assert row('1', 'WRN-16-1:WRN-16-2') == [8.77, 7.93, 8.51, 7.41, 7.51, 6.31]
    assert row('1', 'WRN-16-1:WRN-40-1') == [8.77, 8.25, 8.62, 8.39, 8.01, 6.58]
    assert row('1', 'WRN-16-2:WRN-40-2') == [6.31, 5.85, 6.24, 6.08, 5.71, 5.23]
    assert row('2', 'WRN-16-1:WRN-16-2') == [
        8.77, 7.99, 7.93, 8.09, 8.08, 8.11, 7.96, 7.97, 6.31]
    assert row('3', 'NIN-thin:NIN-wide') == [
        None, None, 13.5, 12.5, 12.1, 12.1, 11.8, 11.2]
    assert row('4', 'cub') == [28.5, 27.0, 27.0, 26.5]
    assert row('4', 'scenes') == [28.2, 28.1, 27.1, 26.0]
    assert row('5', 'ResNet-18:ResNet-34') == [30.4, 29.3, 26.1]
    assert row('5', 'ResNet-18:ResNet-34, top-5', 5) == [10.8, 10.0, 8.3]
    confirmed = {(c.row[9:], c.method) for c in TABLES['1'].cells
                 if c.confirmed and c.row.startswith('WRN-16-1')}
    assert all(c.confirmed for c in TABLES['5'].cells)
    assert confirmed == {('WRN-16-2', 'student'), ('WRN-16-2', 'AT'), ('WRN-16-2', 'teacher'),
                         ('WRN-40-1', 'student'), ('WRN-40-1', 'AT'), ('WRN-40-1', 'KD'),
                         ('WRN-40-1', 'teacher')}


def test_what_sets_the_cells_apart():
    def options_of(number):
        return {cell.method: cell.options for cell in TABLES[number].cells}

    teachers = {cell.method: cell.teacher for cell in TABLES['3'].cells if cell.teacher}
    linear = 'NIN-wide-nopoolrelu'
    assert teachers == {'gradient AT': 'NIN-wide', 'KD': 'NIN-wide', 'AT': linear}
    assert {cell.run for cell in TABLES['3'].cells if '--no-pool_relu' not in cell.options} == {
        'NIN-wide'}
    groups = [options.partition('--at_groups ')[2] for options in options_of('2').values()]
    assert [group for group in groups if group] == ['0', '1', '2']
    assert '--at_epochs 60,100' in options_of('5')['AT']


def test_gpus_take_turns(monkeypatch):
    monkeypatch.setattr(tables.torch.cuda, 'device_count', lambda: 4)
    assert tables.slots(options(1, '--gpu_id', '1,3', '--jobs', 2)[0]) == [1, 3, 1, 3]
    assert tables.slots(options(1)[0]) == [0, 1, 2, 3]


def test_plan_is_commands_in_two_waves_with_what_is_there(work, capsys, refused):
    argv = ['2', '--method', 'F_max', '--seeds', '2', '--epochs', '100', '--dry_run']
    fake(Path('logs/tables/WRN-16-2_seed0'), [50] * 100, epochs=100, dataset='CIFAR10')
    fake(Path('logs/tables/WRN-16-1_AT-max1_WRN-16-2_seed0'), [50] * 10, epochs=100)
    tables.main(argv)
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith('# wave 1') and out[3].startswith('# wave 2')
    assert out[1].startswith('# python cifar.py') and out[1].endswith('# 100/100 epochs')
    assert out[2].startswith('python cifar.py --save logs/tables/WRN-16-2_seed1 ')
    assert out[4].endswith('  # 10/100 epochs') and out[5].endswith('--epochs 100')
    assert out[6] == '# 4 runs, 290 epochs to train: about 0.3 h'
    refused(tables.main, [*argv, '--dataset', 'CIFAR100'],
            'WRN-16-2_seed0: that run has --dataset CIFAR10')
    for epochs in ('50', '200'):  # to train a teacher longer would leave its students without it
        refused(tables.main, [*argv, '--epochs', epochs], 'that run has --epochs 100')


def test_a_folder_with_runs_of_other_options_is_refused_but_reported(work, capsys, refused):
    fake(Path('other/WRN-16-2_seed0'), [50], epochs=1, epoch_step=[2], flip=False, dataset='folder',
         dataroot='a')
    argv = ['1', '--row', ROW, '--method', 'teacher', '--seeds', '1', '--folder', 'other']
    data = ['--dataset', 'folder', '--dataroot', 'a', '--epochs', '1']
    rest = [*data[:2], '--epochs', '1', '--no-flip', '--epoch_step', '[2]']
    for flags, text in ((data[4:], '--dataset folder, this'), (rest, '--dataroot a'),
                        (data, '--flip False'),
                        ([*data, '--no-flip'], '--epoch_step [2], this table [60, 120, 160]')):
        refused(tables.main, [*argv, *flags, '--dry_run'], text)
    tables.main([*argv, *data, '--no-flip', '--epoch_step', '[2]', '--dry_run'])
    tables.main([*argv, '--report'])
    assert 'Ours: folder, 1 epochs' in capsys.readouterr().out


# ---------------------------------------------------------------------------- real runs

def start(*argv):
    return subprocess.Popen([sys.executable, str(ROOT / 'tables.py'), *map(str, argv)],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True)


def finish(process, timeout=240):
    try:
        out = process.communicate(timeout=timeout)[0]
    finally:
        with_children_ended(process)
    return out


def with_children_ended(process):
    process.kill()
    process.wait()


def figures(folder):
    """What the last line of each log says, without what depends on when it was stopped."""
    names = ('epoch', 'train_loss', 'test_loss')
    return {path.parent.name: {name: read_log(path)[-1][name] for name in names}
            for path in sorted(Path(folder).glob('*/log.txt'))}


def undisturbed():
    """The last figures of a table whose runs nobody disturbed."""
    finish(start(*PART, '--seeds', '2', '--jobs', '2', '--folder', 'reference'))
    return figures('reference')


@pytest.mark.slow
def test_a_table_from_start_to_end(work, capsys):
    with pytest.raises(SystemExit) as e:
        tables.main([*PART, '--seeds', '2', '--jobs', '2', '--folder', 'tables'])
    assert e.value.code == 0
    out = capsys.readouterr().out
    assert out.count('\npython cifar.py --save tables/WRN-16-') == 6 and '| 2/2 ' in out
    found = figures('tables')
    assert len(found) == 6 and all(f['epoch'] == 2 for f in found.values())
    report = json.loads(Path('tables/table1.json').read_text())
    logs = [read_log(Path(f'tables/WRN-16-1_AT_WRN-16-2_seed{s}/log.txt')) for s in range(2)]
    errors = [round(100 - log[-1]['test_acc'], 9) for log in logs]
    at = next(c for c in report['cells'] if c['method'] == 'AT')
    assert list(at['errors'].values()) == errors
    assert at['median'] == pytest.approx(np.median(errors))
    assert at['minus_paper'] is None
    assert Path('tables/table1.md').read_text() in out
    assert cv2.imread('tables/table1.png').shape[1] > 1000
    assert '</svg>' in Path('tables/table1.svg').read_text()
    before = {p: p.stat().st_mtime_ns for p in Path('tables').glob('*_seed*/*')}
    with pytest.raises(SystemExit):
        tables.main([*PART, '--seeds', '2', '--folder', 'tables'])  # there is nothing left to do
    assert {p: p.stat().st_mtime_ns for p in Path('tables').glob('*_seed*/*')} == before


@pytest.mark.slow
def test_two_drivers_share_the_work(work):
    drivers = [start(*PART, '--seeds', '2', '--folder', 'tables') for _ in range(2)]
    outs = [finish(driver) for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], outs
    assert figures('tables') == undisturbed()
    assert all('failed' not in out and '| 2/2 ' in out for out in outs)


def test_a_signal_ends_the_children_with_a_checkpoint(work):
    driver = start('1', '--row', ROW, '--method', 'student', '--seeds', '1', *FLAGS, '--epochs',
                   '5000', '--folder', 'tables')
    folder = Path('tables/WRN-16-1_seed0')
    try:
        for _ in range(600):
            if (folder / 'model.pt7').exists():
                break
            time.sleep(0.1)
        driver.send_signal(signal.SIGTERM)
        out = driver.communicate(timeout=60)[0]
    finally:
        with_children_ended(driver)
    assert driver.returncode == 143 and 'stopped: run the same command again to continue' in out
    assert not is_locked(folder)
    assert 'stopped: continue with --resume' in Path('tables/WRN-16-1_seed0.out').read_text()


def test_a_failed_run_is_shown_and_the_others_go_on(work, capsys):
    Path('tables/WRN-16-2_seed0/.lock').mkdir(parents=True)  # in the way of the teacher
    with pytest.raises(SystemExit) as e:
        tables.main([*PART, '--seeds', '1', '--folder', 'tables'])
    assert e.value.code == 1
    out, err = capsys.readouterr()
    assert 'tables/WRN-16-2_seed0 failed: exit status 2' in err
    assert '.lock exists and is not a file' in err
    assert 'tables/WRN-16-1_AT_WRN-16-2_seed0 failed: not run: its teacher failed' in err
    assert len(read_log(Path('tables/WRN-16-1_seed0/log.txt'))) == 2 and '| 1/1 ' in out
    tables.main(['1', '--report', '--row', ROW, '--folder', 'tables'])
    assert capsys.readouterr().out.splitlines()[-1].startswith(
        'tables/WRN-16-2_seed0: 0 epochs, error: --save tables/WRN-16-2_seed0: ')


@pytest.mark.slow
@pytest.mark.parametrize('rest', [0, 1], ids=['all lines lost', 'the last line torn'])
def test_a_log_that_a_kill_left_behind_its_checkpoint_is_mended(work, rest):
    argv = ['1', '--row', ROW, '--method', 'student', '--seeds', '1', *FLAGS, '--folder', 'tables']
    with pytest.raises(SystemExit, match='0'):
        tables.main(argv)
    path = Path('tables/WRN-16-1_seed0/log.txt')
    whole = path.read_text()
    path.write_text('\n'.join([*whole.splitlines()[:rest], 'json_stats: {"epo']))
    with pytest.raises(SystemExit, match='0'):
        tables.main(argv)
    assert path.read_text() == whole


@pytest.mark.parametrize('record', [
    {'test_acc': 'x'}, {'test_acc': [1]}, {'train_time': 'x', 'test_time': 1}, {'epochs': 'a'},
    {'width': 'abc'}, {'teacher_id': 3}, {'epoch': True}, {'power': True},
    {'train_time': float('inf')}])
def test_records_of_the_wrong_type_are_left_out(work, capsys, record):
    good = {'epoch': 2, 'epochs': 2, 'test_acc': 50.0, 'train_loss': float('inf')}
    folder = Path('logs/tables/WRN-16-1_seed0')
    folder.mkdir(parents=True)
    lines = [*(json.dumps(r).replace('Infinity', '1e400') for r in ({'epoch': 1, **record}, good)),
             '[1]']
    (folder / 'log.txt').write_text(''.join(f'json_stats: {line}\n' for line in lines))
    assert [r['epoch'] for r in read_log(folder / 'log.txt')] == [2]
    tables.main(['--runs', str(folder)])
    for flags in (['--report'], ['--dry_run', '--epochs', '2']):
        tables.main(['1', '--row', ROW, '--method', 'student', *flags])
    out = capsys.readouterr().out
    assert out.count('50.00') == 1 and '# 5 runs, 9 epochs to train' in out


@pytest.mark.slow
def test_a_teacher_whose_weights_are_gone_is_trained_again_for_its_students(work, capsys):
    """As in a fresh clone, which has the logs alone."""
    argv = ['1', '--row', ROW, '--method', 'AT', '--seeds', '1', *FLAGS, '--folder', 'tables']
    with pytest.raises(SystemExit, match='0'):
        tables.main([*argv[:3], '--method', 'teacher', *argv[5:]])
    Path('tables/WRN-16-2_seed0/model.pt7').unlink()
    with pytest.raises(SystemExit, match='0'):
        tables.main(argv)
    assert Path('tables/WRN-16-2_seed0/model.pt7').exists() and '| 1/1 ' in capsys.readouterr().out


def test_help_says_that_others_go_to_the_script(capsys):
    with pytest.raises(SystemExit):
        tables.main(['--help'])
    assert 'All other options go to cifar.py or imagenet.py' in capsys.readouterr().out
