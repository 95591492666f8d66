"""A run's folder: checkpoints, logs and locks, through interruptions of all kinds."""
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    ROOT,
    SMALL,
    as_before_records,
    files,
    load,
    momenta,
    same,
    stop_at_step,
    stopped_after,
    teach,
)

import cifar as script
from training import loop, runs
from training.log import read_log


def log_of(run):
    return read_log(Path(run, 'log.txt'))


# ---------------------------------------------------------------------------- resuming

METHODS = {'alone': [], 'AT': ['--teacher_id', 't', '--beta', '1000'],
           'KD': ['--teacher_id', 't', '--alpha', '0.9'],
           'AT+KD': ['--teacher_id', 't', '--alpha', '0.9', '--beta', '1000', '--beta_decay',
                     'cosine']}


@pytest.mark.parametrize('method', METHODS)
def test_resume_is_bit_equal(cifar, work, method):
    teach(cifar)
    argv = [*METHODS[method], '--epochs', '3', '--epoch_step', '[2]']
    cifar('--save', 'whole', *argv)
    with stopped_after(2):
        cifar('--save', 'parts', *argv)
    assert len(log_of('parts')) == 2
    script.main(['--resume', 'parts'])  # with the options of its checkpoint
    whole, parts = load('whole/model.pt7'), load('parts/model.pt7')
    assert same(whole, parts) and parts['epoch'] == 3
    for a, b in zip(log_of('whole'), log_of('parts'), strict=True):
        changing = {'save', 'resume', 'train_time', 'test_time'}
        assert a.keys() == b.keys() and all(a[k] == b[k] for k in a.keys() - changing)


def test_a_checkpoint_of_the_format_before_records(cifar, work, capsys):
    """It has neither records nor network: the log beside it and the shapes tell."""
    cifar('--save', 'whole', '--epochs', '3')
    with stopped_after(2):
        cifar('--save', 'logs/old', '--epochs', '3')
    as_before_records('logs/old/model.pt7')
    script.main(['--evaluate', 'logs/old'])
    error = 100 - log_of('logs/old')[-1]['test_acc']
    assert f'old: WRN-10-0.25, 5,891 parameters, test error {error:.2f}%' in capsys.readouterr().out
    cifar('--save', 's', '--teacher_id', 'old', '--beta', '1', '--epochs', '1')
    assert log_of('s')[0]['at_losses'][0] > 0
    script.main(['--resume', 'logs/old'])
    new = load('logs/old/model.pt7')
    assert same(load('whole/model.pt7'), new)
    assert log_of('logs/old') == new['records']
    assert [r['epoch'] for r in new['records']] == [1, 2, 3]


def test_the_log_is_mended_from_the_checkpoint(cifar, work):
    """A kill between checkpoint and log, or someone's editor, leaves them apart."""
    cifar('--save', 'a')
    log = Path('a/log.txt')
    whole = log.read_text()
    first, second = whole.splitlines(keepends=True)
    beyond = second.replace('"epoch": 2', '"epoch": 3')
    for damaged in (None, '', first, whole[:-9], f'{whole}{beyond}json_stats: {{"epoch": 4, "lr"'):
        if damaged is None:
            log.unlink()
        else:
            log.write_text(damaged)
        script.main(['--resume', 'a'])
        assert log.read_text() == whole
    log.write_text(first)
    script.main(['--resume', 'a', '--epochs', '3'])
    assert log.read_text().startswith(whole)
    assert [r['epoch'] for r in log_of('a')] == [1, 2, 3]


def test_killed_between_checkpoint_and_log(cifar, work, monkeypatch):
    """The checkpoint is the first of the two to be replaced."""
    with stopped_after(1):
        cifar('--save', 'a')
    real = os.replace

    def replace_checkpoint_only(source, to):
        if Path(to).name == 'log.txt' and load('a/model.pt7')['epoch'] == 2:
            raise KeyboardInterrupt
        real(source, to)
    monkeypatch.setattr(os, 'replace', replace_checkpoint_only)
    with pytest.raises(SystemExit, match='130'):
        script.main(['--resume', 'a'])
    monkeypatch.undo()
    monkeypatch.chdir(work)
    assert load('a/model.pt7')['epoch'] == 2 and len(log_of('a')) == 1
    script.main(['--resume', 'a'])
    assert [r['epoch'] for r in log_of('a')] == [1, 2]


def test_a_log_without_a_checkpoint_is_no_run(cifar, work):
    cifar('--save', 'a')
    os.remove('a/model.pt7')
    cifar('--save', 'a', '--epochs', '1', '--seed', '1')
    assert [r['seed'] for r in log_of('a')] == [1]


def test_more_epochs_continue_as_if_planned_from_the_start(cifar, work):
    cifar('--save', 'a', '--epochs', '2', '--epoch_step', '[1,2]')
    script.main(['--resume', 'a', '--epochs', '3'])
    cifar('--save', 'b', '--epochs', '3', '--epoch_step', '[1,2]')
    assert same(load('a/model.pt7'), load('b/model.pt7'))
    assert [r['epoch'] for r in log_of('a')] == [1, 2, 3]


def test_resume_elsewhere_leaves_the_old_run_alone(cifar, work):
    cifar('--save', 'a', '--epochs', '1')
    before = files(work / 'a')
    script.main(['--resume', 'a/model.pt7', '--epochs', '2', '--save', 'b'])
    assert files(work / 'a') == before
    assert [r['epoch'] for r in log_of('b')] == [1, 2]


def test_options_that_may_not_change_on_resume(cifar, work, refused):
    cifar('--save', 'a')
    before = files(work)
    for argv, text in (('--width 0.5', '--width is 0.25'), ('--lr 0.2', '--lr is 0.1'),
                       ('--seed 1', '--seed is 0'), ('--epochs 1', '--epochs is 2'),
                       ('--no-flip', '--flip is True'), ('--dtype bfloat16', '--dtype is float'),
                       ('--batch_size 8', '--batch_size is 16'),
                       ('--epoch_step [1]', '--epoch_step is [60, 120, 160]')):
        refused(script.main, ['--resume', 'a', *argv.split()], text)
    assert files(work) == before


def test_a_schedule_that_depends_on_the_epochs_keeps_them(cifar, work, refused):
    teach(cifar)
    cifar('--save', 'a', '--teacher_id', 't', '--beta', '10', '--beta_decay', 'linear')
    refused(script.main, ['--resume', 'a', '--epochs', '9'], '--epochs is 2')


def test_resume_of_a_finished_run_changes_nothing(cifar, work, capsys):
    cifar('--save', 'a')
    before = files(work)
    script.main(['--resume', 'a'])
    assert 'all 2 epochs are done' in capsys.readouterr().out
    assert files(work) == before


def test_resume_refuses_what_it_cannot_go_on_from(cifar, work, refused):
    cifar('--save', 'a')
    state = load('a/model.pt7')
    given, damaged = state['options'], 'not a complete checkpoint'
    # Of another shape: fused SGD would write beyond it.
    momentum = state['optimizer']['state'] | {0: {'momentum_buffer': torch.zeros(3)}}
    for change, text in (
            ({'options': None}, 'no state to resume from'),
            ({'options': {'foo': 1}}, 'there is no --foo'),
            ({'options': {**given, 'depth': 'x'}}, 'b.pt7: --depth'),
            ({'options': {**given, 'beta': 1.0}}, '--beta needs a teacher'),
            ({'options': {**given, 'at_groups': torch.tensor(3)}}, '--at_groups'),
            ({'options': {**given, 'at_groups': 5}}, '--at_groups'),
            ({'options': {**given, 'at_groups': [5]}}, 'has 3 groups'),
            ({'optimizer': {}}, damaged), ({'params': {}}, damaged),
            ({'optimizer': state['optimizer'] | {'state': momentum}}, damaged),
            ({'records': 5}, damaged), ({'records': None}, damaged), ({'rng': {}}, damaged),
            ({'step': 1, 'sums': {'count': 'x'}}, damaged), ({'epoch': 'x'}, damaged),
            ({'step': 1, 'sums': 5}, damaged), ({'epoch': 2 ** 62}, 'more epochs than'),
            ({'step': 1, 'sums': {'count': -9, 'loss': 1.0}}, 'negative counts'),
            ({'params': state['params'] | {'x': torch.zeros(3)}}, 'x is only in one of'),
            ({'epoch': float('inf')}, damaged), ({'epoch': -3}, 'negative counts'),
            ({'step': 2 ** 62, 'sums': {'count': 0, 'loss': 1.0}}, 'which has 45 images'),
            ({'step': 1, 'sums': {'count': 10 ** 6, 'loss': 1.0}}, '1,000,000 images in 1 steps'),
            ({'params': torch.zeros(3)}, damaged),
            ({'records': [{'epoch': 1, 'x': torch.zeros(3)}]}, damaged)):
        torch.save(state | change, 'b.pt7')
        refused(script.main, ['--resume', 'b.pt7', '--save', 'c'], text)
    assert not Path('c').exists()
    torch.save(state | {'epoch': 0, 'step': 1, 'sums': {'count': 1, 'x': 1.0}}, 'b.pt7')
    refused(script.main, ['--resume', 'b.pt7', '--save', 'c'], 'sums of other losses')


def test_only_momenta_are_taken_from_the_optimizer_of_a_file(cifar, work):
    cifar('--save', 'whole', '--epochs', '3')
    with stopped_after(2):
        cifar('--save', 'a', '--epochs', '3')
    state = load('a/model.pt7')
    state['optimizer']['param_groups'][0] |= {
        'momentum': float('nan'), 'maximize': True, 'weight_decay': 100, 'lr': 1e9,
        'nesterov': True, 'dampening': 1, 'params': []}
    torch.save(state, 'a/model.pt7')
    script.main(['--resume', 'a'])
    whole, resumed = load('whole/model.pt7'), load('a/model.pt7')
    assert same(whole, resumed)
    assert whole['optimizer']['param_groups'] == resumed['optimizer']['param_groups']


def test_a_checkpoint_beside_another_run_does_not_replace_it(cifar, work, refused):
    cifar('--save', 'a', '--epochs', '1')
    cifar('--save', 'b', '--epochs', '1', '--seed', '1')
    shutil.copy('b/model.pt7', 'a/other.pt7')
    before = files(work)
    refused(script.main, ['--resume', 'a/other.pt7', '--epochs', '2'], 'a already holds a run')
    assert files(work) == before
    script.main(['--resume', 'a/other.pt7', '--epochs', '2', '--save', 'c'])
    assert [r['seed'] for r in log_of('c')] == [1, 1]  # nothing of the run beside it


def test_a_finished_run_resumed_elsewhere_is_there(cifar, work):
    cifar('--save', 'a')
    script.main(['--resume', 'a', '--save', 'b'])
    assert same(load('a/model.pt7'), load('b/model.pt7')) and log_of('b') == log_of('a')


def test_a_teacher_may_move_but_not_change(cifar, work, refused):
    teach(cifar)
    cifar('--save', 'a', '--teacher_id', 't', '--beta', '10', '--epochs', '1')
    os.rename('logs/t', 'logs/moved')
    refused(script.main, ['--resume', 'a', '--epochs', '2'], 'logs/t/model.pt7')
    script.main(['--resume', 'a', '--epochs', '2', '--teacher_id', 'moved'])
    cifar('--save', 'logs/t', '--width', '0.5', '--seed', '9', '--epochs', '1')
    before = files(work / 'a')
    refused(script.main, ['--resume', 'a', '--epochs', '3', '--teacher_id', 't'],
            'not the one that the run began with')
    assert files(work / 'a') == before
    argv = ['--save', 'logs/t', '--overwrite', '--teacher_id', 't', '--beta', '1']
    refused(lambda a: cifar(*a), argv, 'is one of the inputs')


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(cifar, work, capsys):
    def diverging(*argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            cifar('--save', 'a', '--lr', '1e30', *argv)
        assert e.value.code == 1
        err = capsys.readouterr().err
        assert err.startswith('a: diverged in epoch ') and err.count('\n') == 1
        return err

    assert 'epoch 1: ' in (err := diverging()) and 'nothing is saved' in err
    assert files(work / 'a').keys() == {Path('.lock')}
    # A rate that is harmless for two epochs and absurd from the third on.
    argv = ['--epochs', '4', '--epoch_step', '[1,2]']
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, 'learning_rate', lambda opt, epoch: opt.lr if epoch > 1 else 0.1)
        patch.setattr(runs, 'SAVE_SECONDS', 0)
        err = diverging(*argv)
        assert 'epoch 3: ' in err and 'the last checkpoint is kept' in err
        good = files(work / 'a')
        state = load('a/model.pt7')
        assert state['epoch'] == 2 and [r['epoch'] for r in log_of('a')] == [1, 2]
        assert all(t.isfinite().all() for t in [*state['params'].values(), *momenta(state)])
        with pytest.raises(SystemExit, match='1'):
            script.main(['--resume', 'a'])
    assert files(work / 'a') == good


def test_what_is_not_finite_is_not_saved_in_an_epoch_either(cifar, work, capsys):
    """The loss of the first step is finite, its parameters are not."""
    with pytest.raises(SystemExit, match='1'):
        cifar('--save', 'a', '--lr', '1e39', '--save_every', '1')
    assert 'diverged' in capsys.readouterr().err and not Path('a/model.pt7').exists()


def test_a_folder_with_a_run_is_refused(cifar, work, refused):
    cifar('--save', 'a')
    before = files(work)
    refused(lambda a: cifar(*a), ['--save', 'a'], 'already holds a run')
    cifar('--save', 'b')
    refused(script.main, ['--resume', 'a', '--save', 'b'], 'b already holds a run')
    assert {k: v for k, v in files(work).items() if k.parts[0] != 'b'} == before


def test_overwrite_keeps_the_old_run_until_the_first_new_checkpoint(cifar, work, monkeypatch):
    cifar('--save', 'a')
    old = files(work / 'a')
    def interrupted(run, record):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match='130'):
        patch.setattr(runs.Run, 'after_epoch', interrupted)
        cifar('--save', 'a', '--overwrite', '--seed', '1')
    assert files(work / 'a') == old
    cifar('--save', 'a', '--overwrite', '--seed', '1', '--epochs', '1')
    assert [r['seed'] for r in log_of('a')] == [1] and load('a/model.pt7')['epoch'] == 1


def test_files_are_whole_when_writing_fails(cifar, work, monkeypatch):
    cifar('--save', 'a', '--epochs', '1')
    before = files(work / 'a')

    def full(fd):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(SystemExit):
        script.main(['--resume', 'a', '--epochs', '2'])
    assert files(work / 'a') == before


def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(cifar, work):
    cifar('--save', 'a', '--epochs', '1')
    for name in ('model.pt7.123.tmp', 'log.txt.123.tmp', 'notes.tmp'):
        Path('a', name).write_text('x')
    script.main(['--resume', 'a', '--epochs', '2'])
    assert {str(p) for p in files(work / 'a')} == {'.lock', 'log.txt', 'model.pt7', 'notes.tmp'}


@pytest.mark.parametrize('change', [
    {'scale': float('inf')}, {'scale': 0}, {'_growth_tracker': 2 ** 62}, {'scale': 'x'}])
def test_a_loss_scale_of_a_file_is_checked_and_its_settings_are_not_taken(change):
    scaler = torch.amp.GradScaler('cpu')
    own = scaler.state_dict()
    runs.restore_scaler(scaler, own | {'scale': 8.0, 'growth_factor': 1e9, 'backoff_factor': 2})
    assert scaler.state_dict() == own | {'scale': 8.0}
    with pytest.raises(ValueError):
        runs.restore_scaler(scaler, own | change)


@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGINT])
def test_stopped_in_an_epoch_and_resumed(cifar, work, monkeypatch, signum):
    """A signal within an epoch: its step is finished and saved, nothing repeated or skipped."""
    teach(cifar)
    argv = ['--epochs', '3', '--teacher_id', 't', '--beta', '10']
    cifar('--save', 'whole', *argv)
    stop_at_step(monkeypatch, 5, signum)  # the second of three steps of the second epoch
    with pytest.raises(SystemExit) as e:
        cifar('--save', 'parts', *argv)
    assert e.value.code == 128 + signum
    state = load('parts/model.pt7')
    assert (state['epoch'], state['step'], state['sums']['count']) == (1, 2, 32)
    assert len(state['sums']['at_losses']) == 3
    monkeypatch.undo()
    monkeypatch.chdir(work)
    shutil.copytree('parts', 'old')
    torch.save(state | {'sums': torch.ones(5)}, 'old/model.pt7')  # as before sums had names
    for run in ('parts', 'old'):
        script.main(['--resume', run])
        assert same(load('whole/model.pt7'), load(f'{run}/model.pt7'))
    assert 'step' not in load('parts/model.pt7') and 'sums' not in load('parts/model.pt7')
    for name in ('train_loss', 'train_acc', 'at_losses'):
        assert [r[name] for r in log_of('whole')] == [r[name] for r in log_of('parts')]


def test_short_epochs_are_saved_every_30_seconds(cifar, work, monkeypatch):
    """By a clock that goes on by 11 seconds an epoch, and last, or where it is told to stop."""
    saved, real, clock = [], runs.Run.after_epoch, SimpleNamespace(now=0)
    monkeypatch.setattr(runs, 'time', SimpleNamespace(monotonic=lambda: clock.now))

    def after_epoch(run, record):
        clock.now += 11
        real(run, record)
        saved.append((load('a/model.pt7')['epoch'], len(log_of('a'))))
    monkeypatch.setattr(runs.Run, 'after_epoch', after_epoch)
    cifar('--save', 'a', '--epochs', '6')
    assert saved == [(e, e) for e in (1, 1, 1, 4, 4, 6)]
    with stopped_after(8):
        script.main(['--resume', 'a', '--epochs', '9'])
    assert saved[6:] == [(7, 7)] * 2 and load('a/model.pt7')['epoch'] == len(log_of('a')) == 8


def test_save_every(cifar, work, monkeypatch):
    cifar('--save', 'whole')
    saved, real = [], runs.write_atomically

    def write_atomically(files):
        real(files)
        state = load('parts/model.pt7')
        saved.append((state['epoch'], state.get('step', 0)))
        shutil.copytree('parts', f'at{len(saved)}')
    monkeypatch.setattr(runs, 'write_atomically', write_atomically)
    monkeypatch.setattr(runs, 'SAVE_SECONDS', 0)
    cifar('--save', 'parts', '--save_every', '2')
    assert saved == [(0, 2), (1, 0), (1, 2), (2, 0)]
    monkeypatch.setattr(runs, 'write_atomically', real)
    for run in ('at1', 'at3'):
        script.main(['--resume', run])
        assert same(load('whole/model.pt7'), load(f'{run}/model.pt7'))


# ---------------------------------------------------------------------------- processes

def start(work, *argv):
    command = [sys.executable, str(ROOT / 'cifar.py'), *SMALL, '--dataroot', 'images', *argv]
    return subprocess.Popen(command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)


def wait_for(condition):
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError('it did not come')


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed():
    """Of each script one run; the folder is always whole, and the end that of a run left alone."""
    command = [sys.executable, str(ROOT / 'tests' / 'stress.py'), '--kills', '5']
    subprocess.run(command, check=True)


def test_two_processes_cannot_train_in_one_folder_and_a_killed_one_is_resumed(cifar, work, refused):
    argv = ['--epochs', '9999']
    process = start(work, *argv, '--save', 'a')
    try:
        wait_for((work / 'a' / 'model.pt7').exists)
        assert runs.is_locked(work / 'a')
        refused(lambda a: cifar(*a), [*argv, '--save', 'a', '--overwrite'],
                'another process is training in this folder')
    finally:
        process.kill()
        process.communicate()
    assert not runs.is_locked(work / 'a')  # the dead process's lock holds nobody up
    epoch = load('a/model.pt7')['epoch']
    assert len(log_of('a')) in (epoch - 1, epoch)
    with stopped_after(epoch + 2):
        script.main(['--resume', 'a'])
    with stopped_after(epoch + 2):
        cifar('--save', 'whole', *argv)
    assert same(load('whole/model.pt7'), load('a/model.pt7'))
    assert [r['epoch'] for r in log_of('a')] == list(range(1, epoch + 3))
