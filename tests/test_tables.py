"""tables.py: plans, real runs through kills, failures and a second driver, reports and curves."""
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import ROOT, load, same

import tables
from training import Parser, log_text, owner, read_log

ROW = 'WRN-16-1:WRN-16-2'
FLAGS = ['--dataset', 'folder', '--dataroot', 'images', '--epochs', '2', '--batch_size', '16']
PART = ['1', '--row', ROW, '--method', 'student', '--method', 'AT', *FLAGS]


def options(*argv):
    opt, extra = tables.make_parser().parse_known_args([str(a) for a in argv])
    opt.seeds = opt.seeds or tables.TABLES[opt.table].seeds
    return opt, extra


# ------------------------------------------------------------------------------------------- plans

@pytest.mark.parametrize('number, runs, seeds', [(1, 22, 5), (2, 6, 5), (3, 7, 1), (4, 8, 1), (5, 3, 1)])
def test_every_cell_has_its_command_and_teachers_come_first(number, runs, seeds):
    opt, extra = options(number)
    jobs = tables.make_plan(opt, extra)
    assert opt.seeds == seeds and len(jobs) == runs * seeds == len({job.folder for job in jobs})
    folders = [job.folder for job in jobs]
    for seed in range(seeds):
        for cell in tables.TABLES[number].cells:
            job = jobs[folders.index(Path(f'logs/tables/{cell.run}_seed{seed}'))]
            words = shlex.split(job.command())
            parsed = tables.SCRIPTS[words[1]].make_parser().parse_args(words[2:])
            assert parsed.save == str(job.folder) and parsed.seed == seed
            teacher = vars(parsed).get('teacher_id') or vars(parsed).get('teacher_params')
            assert (teacher is None) == (cell.teacher is None)
            if teacher:
                assert teacher == f'logs/tables/{cell.teacher}_seed{seed}'
                assert folders.index(Path(teacher)) < folders.index(job.folder)
            assert (teacher is not None) == any((parsed.alpha, parsed.beta, parsed.factt, parsed.grad_at))


def test_the_papers_figures():
    def row(number, name, top=1):
        return [cell.paper for cell in tables.TABLES[number].cells if cell.row == name and cell.top == top]
    assert row(1, 'NIN-thin:NIN-wide') == [9.38, 8.93, 9.05, 8.55, 8.33, 7.28]
    assert row(1, 'WRN-16-1:WRN-16-2') == [8.77, 7.93, 8.51, 7.41, 7.51, 6.31]
    assert row(1, 'WRN-16-1:WRN-40-1') == [8.77, 8.25, 8.62, 8.39, 8.01, 6.58]
    assert row(1, 'WRN-16-2:WRN-40-2') == [6.31, 5.85, 6.24, 6.08, 5.71, 5.23]
    assert row(2, 'WRN-16-1:WRN-16-2') == [8.77, 7.99, 7.93, 8.09, 8.08, 6.31]
    assert row(3, 'NIN-thin:NIN-wide') == [None, 13.5, 12.5, 12.1, 12.1, 11.8, 11.2]
    assert row(4, 'cub') == [28.5, 27.0, 27.0, 26.5] and row(4, 'scenes') == [28.2, 28.1, 27.1, 26.0]
    assert row(5, 'ResNet-18:ResNet-34') == [30.4, 29.3, 26.1] and row(5, 'ResNet-18:ResNet-34', 5) == [10.8, 10.0, 8.3]
    confirmed = {(c.row[9:], c.method) for c in tables.TABLES[1].cells if c.confirmed and c.row.startswith('WRN-16-1')}
    assert confirmed == {('WRN-16-2', 'student'), ('WRN-16-2', 'AT'), ('WRN-16-2', 'teacher'), ('WRN-40-1', 'student'),
                         ('WRN-40-1', 'AT'), ('WRN-40-1', 'KD'), ('WRN-40-1', 'teacher')}


@pytest.mark.parametrize('argv, text', [
    (['6'], 'argument table'), ([], 'name one table'), (['1', '--runs', 'x'], 'name one table'),
    (['1', '--row', 'x'], '--row x: table 1 has NIN-thin:NIN-wide'),
    (['2', '--method', 'KD'], '--method KD: table 2 has'), (['1', '--lr', 'x'], 'argument --lr'),
    (['1', '--depht', '3'], 'cifar.py: error: unrecognized arguments: --depht 3'),
    (['1', '--seed', '3'], '--seed: each run of a table has its own'), (['1', '--overwrite'], '--overwrite: each run'),
    (['1', '--alpha', '0.9'], '--alpha: each run'), (['1', '--width=2'], '--width: each run'),
    (['1', '--no-batch_norm'], '--batch_norm: each run'), (['4', '--dataset', 'cub'], '--dataset: each run'),
    (['--epochs', '3', '1'], 'name one table first'), (['--epochs', '5'], 'name one table first'),
    (['1', '--folder', 'images/test/0/0000.png'], '--folder images/test/0/0000.png: '),
    (['--plot', 'x', '--flip'], 'take no --flip'), (['--plot', 'x', '--seeds', '2'], 'take no --seeds'),
    (['--plot', 'x'], 'x: no log.txt'),
    (['1', '--gpu_id', '7'], '--gpu_id 7: there are'), (['1', '--jobs', '0'], '--jobs')])
def test_bad_input(work, refused, argv, text):
    refused(tables.main, argv if {'--gpu_id', '--plot', '--folder'} & {*argv} else [*argv, '--dry_run'], text)
    assert not Path('logs').exists()


def test_gpus_take_turns(monkeypatch):
    monkeypatch.setattr(tables.torch.cuda, 'device_count', lambda: 4)
    assert tables.slots(options(1, '--gpu_id', '1,3', '--jobs', 2)[0]) == [1, 3, 1, 3]
    assert tables.slots(options(1)[0]) == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------------- reports

def fake(folder, errors, epochs=2, **options):
    """A log whose last epoch has this test error; other options as given."""
    folder.mkdir(parents=True)
    records = [{**options, 'epoch': e + 1, 'epochs': epochs, 'lr': 0.1, 'test_acc': 100 - error, 'train_acc': 90.0,
                'train_time': 3, 'test_time': 1} for e, error in enumerate(errors)]
    (folder / 'log.txt').write_bytes(log_text(records))


def test_report_has_numpys_medians(work, capsys):
    rng = np.random.default_rng(0)
    errors = {'WRN-16-1': rng.uniform(8, 9, 5), 'WRN-16-1_AT_WRN-16-2': rng.uniform(7, 8, 4)}
    for run, values in errors.items():
        for seed, error in enumerate(values):
            fake(Path('logs/tables', f'{run}_seed{seed}'), [50, error])
    fake(Path('logs/tables/WRN-16-1_AT_WRN-16-2_seed4'), [50])  # not finished
    tables.main(['1', '--row', ROW, '--epochs', '2', '--report'])
    text = capsys.readouterr().out
    lines = {cells[2].strip(): [c.strip() for c in cells[3:-1]]
             for cells in (line.split('|') for line in text.splitlines() if line.startswith('| WRN'))}
    base, ours = (np.median(v) for v in errors.values())
    low, high = errors['WRN-16-1_AT_WRN-16-2'].min(), errors['WRN-16-1_AT_WRN-16-2'].max()
    assert lines['AT'] == ['7.93', f'{ours:.2f} ({low:.2f}–{high:.2f})', '4/5', f'{ours - 7.93:+.2f}',
                           f'{ours - base:+.2f}']
    assert lines['student'][3:] == [f'{base - 8.77:+.2f}', '–'] and lines['KD'] == ['7.41 ?', '–', '0/5', '–', '–']
    tables.main(['1', '--row', ROW, '--method', 'AT', '--epochs', '2', '--dataset', 'CIFAR100', '--report'])
    assert re.search(r'\| 4/5 +\| – +\| -', capsys.readouterr().out)  # the paper's data are others


def test_plan_says_what_is_there_and_how_long_the_rest_takes(work, capsys, refused):
    argv = ['2', '--method', 'F_max', '--seeds', '2', '--epochs', '100', '--dry_run']
    fake(Path('logs/tables/WRN-16-2_seed0'), [50] * 100, epochs=100, dataset='CIFAR10')
    fake(Path('logs/tables/WRN-16-1_AT-max1_WRN-16-2_seed0'), [50] * 10, epochs=100)
    tables.main(argv)
    out = capsys.readouterr().out.splitlines()
    assert [line.split('  ')[-2].strip() for line in out[:4]] == ['finished', '10/100 epochs', 'to do', 'to do']
    assert out[4] == f'4 runs, 290 epochs to train: about 0 h {round(290 * 4 / 60)} min'  # 3 + 1 s an epoch
    refused(tables.main, [*argv, '--dataset', 'CIFAR100'], 'WRN-16-2_seed0: that run has --dataset CIFAR10')
    for epochs in ('50', '200'):  # to train a teacher longer would leave its students without it
        refused(tables.main, [*argv, '--epochs', epochs], 'that run has --epochs 100')
    fake(Path('other/WRN-16-2_seed0'), [50], epochs=1, at_groups=[2], flip=False, dataset='folder', dataroot='a')
    argv = ['2', '--method', 'teacher', '--seeds', '1', '--epochs', '1', '--folder', 'other', '--report']
    data = ['--dataset', 'folder', '--dataroot', 'a']
    for flags, text in (([], '--dataset folder, this'), (data[:2], '--dataroot a'), (data, '--flip False'),
                        ([*data, '--no-flip'], '--at_groups [2], this table [0, 1, 2]')):
        refused(tables.main, [*argv, *flags], text)
    tables.main([*argv, *data, '--no-flip', '--at_groups', '2'])


# ------------------------------------------------------------------------------------------- real runs

def start(*argv):
    return subprocess.Popen([sys.executable, str(ROOT / 'tables.py'), *map(str, argv)], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True)


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
    """What the last line of each log says, but for what differs between runs that were and were not stopped."""
    return {path.parent.name: {k: v for k, v in read_log(path)[-1].items() if k in ('epoch', 'train_loss', 'test_loss')}
            for path in sorted(Path(folder).glob('*/log.txt'))}


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
    """The logs of a table whose runs nobody disturbed."""
    return tmp_path_factory.mktemp('reference')


def test_a_table_from_start_to_end(work, reference, capsys):
    with pytest.raises(SystemExit) as e:
        tables.main([*PART, '--seeds', '2', '--jobs', '2', '--folder', 'tables'])
    assert e.value.code == 0
    out = capsys.readouterr().out
    assert out.count('to do  python cifar.py --save tables/WRN-16-') == 6 and '| 2/2 ' in out
    found = figures('tables')
    assert len(found) == 6 and all(f['epoch'] == 2 for f in found.values())
    report = json.loads(Path('tables/table1.json').read_text())
    errors = [100 - read_log(Path(f'tables/WRN-16-1_AT_WRN-16-2_seed{s}/log.txt'))[-1]['test_acc'] for s in range(2)]
    at = next(c for c in report['cells'] if c['method'] == 'AT')
    assert list(at['errors'].values()) == errors and at['median'] == np.median(errors) and at['minus_paper'] is None
    assert Path('tables/table1.md').read_text() in out
    assert cv2.imread('tables/table1.png').shape[1] > 1000 and '</svg>' in Path('tables/table1.svg').read_text()
    before = {p: p.stat().st_mtime_ns for p in Path('tables').glob('*_seed*/*')}
    with pytest.raises(SystemExit):
        tables.main([*PART, '--seeds', '2', '--folder', 'tables'])  # there is nothing left to do
    assert {p: p.stat().st_mtime_ns for p in Path('tables').glob('*_seed*/*')} == before
    (reference / 'figures.json').write_text(json.dumps(found))


def test_killed_at_random_moments_and_started_again(work, reference):
    """The driver dies by SIGKILL and its children live on; then a child dies too; at last all goes on to the end."""
    rng = random.Random(0)
    for kill_child in (False, True, False):
        driver = start(*PART, '--seeds', '2', '--folder', 'tables')
        time.sleep(rng.uniform(6, 12))
        driver.kill()
        driver.communicate()
        owners = [o for p in Path('tables').glob('*_seed*') if (o := owner(p))]
        if kill_child and owners:
            os.kill(int(owners[0].split()[1]), signal.SIGKILL)
    driver = start(*PART, '--seeds', '2', '--folder', 'tables')
    out = finish(driver)
    assert driver.returncode == 0, out
    assert figures('tables') == json.loads((reference / 'figures.json').read_text())


def test_two_drivers_share_the_work(work, reference):
    drivers = [start(*PART, '--seeds', '2', '--folder', 'tables') for _ in range(2)]
    outs = [finish(driver) for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], outs
    assert figures('tables') == json.loads((reference / 'figures.json').read_text())
    assert all('failed' not in out and '| 2/2 ' in out for out in outs)


def test_a_signal_ends_the_children_with_a_checkpoint(work):
    driver = start('1', '--row', ROW, '--method', 'student', '--seeds', '1', *FLAGS, '--epochs', '5000', '--folder',
                   'tables')
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
    assert driver.returncode == 143 and 'stopped: the same command goes on' in out
    assert owner(folder) is None and 'stopped: go on with --resume' in Path('tables/WRN-16-1_seed0.out').read_text()


def test_a_failed_run_is_shown_and_the_others_go_on(work, capsys):
    Path('tables/WRN-16-2_seed0/.lock').mkdir(parents=True)  # in the way of the teacher
    with pytest.raises(SystemExit) as e:
        tables.main([*PART, '--seeds', '1', '--folder', 'tables'])
    assert e.value.code == 1
    out, err = capsys.readouterr()
    assert 'tables/WRN-16-2_seed0 failed: exit status 2' in err and '.lock is in the way' in err
    assert 'tables/WRN-16-1_AT_WRN-16-2_seed0 failed: not run: its teacher failed' in err
    assert len(read_log(Path('tables/WRN-16-1_seed0/log.txt'))) == 2 and '| 1/1 ' in out


def test_a_run_whose_log_lost_a_line_is_not_started_for_ever(work, capsys):
    argv = ['1', '--row', ROW, '--method', 'student', '--seeds', '1', *FLAGS, '--folder', 'tables']
    with pytest.raises(SystemExit, match='0'):
        tables.main(argv)
    path = Path('tables/WRN-16-1_seed0/log.txt')
    path.write_text(path.read_text().splitlines()[0] + '\njson_stats: {"epo')
    with pytest.raises(SystemExit, match='1'):
        tables.main(argv)
    assert 'WRN-16-1_seed0 failed: exit status 0' in capsys.readouterr().err


@pytest.mark.parametrize('record', [
    {'test_acc': 'x'}, {'test_acc': [1]}, {'train_time': 'x', 'test_time': 1}, {'epochs': 'a'}, {'width': 'abc'},
    {'teacher_id': 3}, {'epoch': True}, {'power': True}])
def test_records_of_the_wrong_type_are_left_out(work, capsys, record):
    good = {'epoch': 2, 'epochs': 2, 'test_acc': 50.0, 'train_time': float('inf')}
    folder = Path('logs/tables/WRN-16-1_seed0')
    folder.mkdir(parents=True)
    lines = [json.dumps({'epoch': 1, **record}), json.dumps(good).replace('Infinity', '1e400'), '[1]']
    (folder / 'log.txt').write_text(''.join(f'json_stats: {line}\n' for line in lines))
    assert [r['epoch'] for r in read_log(folder / 'log.txt')] == [2]
    tables.main(['--runs', str(folder)])
    for flag in ('--report', '--dry_run'):
        tables.main(['1', '--row', ROW, '--method', 'student', '--epochs', '2', flag])
    assert 'none timed yet' in capsys.readouterr().out


def test_a_kill_between_log_and_checkpoint_is_mended(work):
    """The last epoch is in the log, and the checkpoint is that of the one before."""
    argv = ['1', '--row', ROW, '--method', 'student', '--seeds', '1', *FLAGS, '--folder', 'tables']
    folder = Path('tables/WRN-16-1_seed0')
    with pytest.raises(SystemExit, match='0'):
        tables.main([*argv, '--epochs', '1'])
    first = (folder / 'model.pt7').read_bytes()
    cifar_argv = [*FLAGS, '--depth', '16', '--epochs', '2', '--save', 'whole']
    tables.cifar.main(cifar_argv)
    (folder / 'log.txt').write_bytes(Path('whole/log.txt').read_bytes())
    (folder / 'model.pt7').write_bytes(first)
    with pytest.raises(SystemExit, match='0'):
        tables.main([*argv, '--epochs', '2'])
    assert load(folder / 'model.pt7')['epoch'] == 2 and same(load(folder / 'model.pt7'), load('whole/model.pt7'))


def test_runs_beside_other_files(work, capsys, refused):
    fake(Path('a'), [50, 10])
    Path('b.png').write_bytes(b'')
    Path('c').mkdir()
    tables.main(['--runs', 'a', 'b.png', 'c'])
    assert capsys.readouterr().out.splitlines()[-2:] == ['The logs are a/log.txt', 'No runs: b.png, c']
    refused(tables.main, ['--runs', 'b.png', 'c'], 'b.png: no log.txt')


@pytest.mark.parametrize('flags, text', [
    (['--dataroot', 'nowhere'], 'nowhere must hold train'), (['--at_groups', '7'], '--at_groups 7'),
    (['--cuda'], '--cuda: there is no GPU')])
def test_what_all_runs_would_fail_for_is_said_once_and_first(work, refused, flags, text):
    refused(tables.main, ['1', '--folder', 'bad', '--dataset', 'folder', '--dataroot', 'images', *flags], text)
    assert not Path('bad').exists()


def test_owner(work):
    from training import locked
    assert owner(Path('x')) is None
    with locked(Path('x')):
        assert owner(Path('x')).split()[1] == str(os.getpid())
    assert owner(Path('x')) is None
    for text, someone in ((f'elsewhere {os.getpid()}\n', True), ('no owner at all\n', False), ('elsewhere x', True)):
        Path('x/.lock').write_text(text)
        assert (owner(Path('x')) is not None) == someone
    os.utime('x/.lock', (0, 0))
    assert owner(Path('x')) is None


# ------------------------------------------------------------------------------------------- curves

def test_median_and_band():
    runs = [[{'epoch': e, 'test_acc': 100 - v} for e, v in enumerate(values, 1)]
            for values in ((9, 5, 4), (8, 6), (4, 7, 3))]
    epochs, median, low, high = tables.median_and_band(runs, 'test_acc')
    assert (epochs, median, low, high) == ([1, 2], [8, 6], [4, 5], [9, 7])  # in epochs that all have


def test_curves_show_what_the_logs_say(work, monkeypatch):
    """Colours and lines as matplotlib gets them, and a picture with them in it."""
    import matplotlib.axes
    drawn = []
    real = matplotlib.axes.Axes.plot
    monkeypatch.setattr(matplotlib.axes.Axes, 'plot', lambda self, x, y, *a, **k: (
        drawn.append((list(x), list(y), a[0], k['color'], k['label'])), real(self, x, y, *a, **k))[1])
    for seed, errors in enumerate(([40, 30], [44, 20], [42, 31])):
        fake(Path(f'a{seed}'), errors, depth=16, width=1, seed=seed)
    fake(Path('b'), [50, 10], depth=16, width=1, seed=0, alpha=0.9, teacher_id='logs/t_seed0')
    tables.main(['--plot', 'a0', 'a1', 'a2', 'b', '--output', 'curves.png'])
    black, blue = tables.COLOURS[:2]
    assert drawn == [([1, 2], [42, 30], '-', black, 'WRN-16-1 alone'), ([1, 2], [10, 10], '--', black, None),
                     ([1, 2], [50, 10], '-', blue, 'WRN-16-1 KD from t'), ([1, 2], [10, 10], '--', blue, None)]
    picture = cv2.imread('curves.png').reshape(-1, 3)
    for colour in (black, blue):
        bgr = [int(colour[i:i + 2], 16) for i in (5, 3, 1)]
        assert (picture == bgr).all(1).sum() > 100
    assert all(text in Path('curves.svg').read_text() for text in ('KD from t', 'error, %', 'epoch'))


@pytest.mark.parametrize('names', [('AT', 'KD', 'F-ActT', 'AT+KD', 'student', 'teacher'), ('one of some length ' * 4,),
                                   ('WRN-16-1 AT + KD from a', 'WRN-16-1 F-ActT from that', 'NIN-0.5 symmetry norm')])
def test_the_legend_fits_the_page(work, monkeypatch, names):
    import matplotlib.figure
    figures = []
    real = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(matplotlib.figure.Figure, 'savefig',
                        lambda self, *a, **k: (real(self, *a, **k), figures.append(self))[0])
    records = [{'epoch': e, 'test_acc': 50.0 + e, 'train_acc': 60.0 + e} for e in range(1, 9)]
    tables.plot({'WRN-16-1:WRN-16-2': {name: [records] for name in names}}, Path('x.png'))
    box = figures[0].legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figures[0].bbox.x1 and box.y0 >= 0


def test_other_formats_are_refused(work, refused):
    fake(Path('a'), [50, 10])
    refused(tables.main, ['--plot', 'a', '--output', 'x.jpg'], '--output x.jpg')
    refused(tables.main, ['--plot', 'a', '--output', 'nowhere/x.png'], '--output nowhere/x.png')


@pytest.mark.parametrize('record, text', [
    ({'depth': 16, 'width': 1}, 'WRN-16-1 alone'), ({'depth': 40, 'width': 0.5, 'teacher_id': 't'}, 'WRN-40-0.5 alone'),
    ({'depth': 16, 'width': 1, 'beta': 1000, 'alpha': 0.9, 'teacher_id': 'logs/t'}, 'WRN-16-1 AT + KD from t'),
    ({'depth': 10, 'width': None, 'power': None, 'beta': 1, 'mapping': 'max'}, 'WRN-10-1 AT max^2'),
    ({'net': 'nin', 'width': 0.5, 'min_l2': 1, 'symmetry': 2}, 'NIN-0.5 symmetry norm + min-l2'),
    ({'depth': 16, 'width': 1, 'beta': 1, 'mapping': 'max', 'power': 1, 'teacher_id': 't'}, 'WRN-16-1 AT max^1 from t'),
    ({'depth': 18, 'imagenetpath': 'x', 'factt': 1, 'teacher_params': 'r.hkl'}, 'ResNet-18-1 F-ActT from r.hkl')])
def test_settings(record, text):
    assert tables.settings(record) == text


def test_help_says_that_others_go_to_the_script(capsys):
    assert isinstance(tables.make_parser(), Parser)
    with pytest.raises(SystemExit):
        tables.main(['--help'])
    assert 'Other options go to the script' in capsys.readouterr().out
