"""The loop against a plain one; checkpoints, logs and locks through interruptions of every kind."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SMALL, files, load, same
from torch.utils._python_dispatch import TorchDispatchMode

import cifar as script
import training
from resnet import trainable, wide_resnet
from training import Place, read_log, to_device
from utils import load_teacher

PLACE = Place(torch.device('cpu'))


def teach(cifar, folder='logs/t'):
    cifar('--save', folder, '--width', '0.5')


def test_the_loop_equals_a_plain_one(cifar, work):
    """SGD with momentum through an lr drop, weight decay on everything, AT + KD with a decaying β."""
    teach(cifar)
    cifar('--save', 's', '--teacher_id', 't', '--beta', '1000', '--alpha', '0.9', '--beta_decay', 'step',
          '--epochs', '4', '--epoch_step', '[1,3]', '--lr', '0.05')
    opt = script.make_parser().parse_args([*SMALL, '--dataroot', 'images'])
    opt.flip = True
    data = script.load_data(opt, PLACE)
    teacher, (f, params) = load_teacher('t'), wide_resnet(10, 0.25, 3, seed=0)
    velocity = {k: torch.zeros_like(p) for k, p in trainable(params).items()}
    losses = []
    for epoch, lr in enumerate([0.05, 0.01, 0.01, 0.002]):
        total = 0
        for x, y, n, _ in data.train_batches(epoch):
            (z, S), (t, T) = f(x.contiguous(), params, True), teacher.f(x, teacher.params, False)
            maps = [[F.normalize(A.pow(2).sum(1).flatten(1)) for A in groups] for groups in (S, T)]
            at = sum((a - b).pow(2).mean() for a, b in zip(*maps, strict=True))
            kd = F.kl_div(F.log_softmax(z / 4, 1), F.softmax(t / 4, 1), reduction='batchmean') * 16
            loss = 0.9 * kd + 0.1 * F.cross_entropy(z, y) + 1000 * lr / 0.05 * at
            gradients = torch.autograd.grad(loss, [params[k] for k in velocity])
            with torch.no_grad():
                for (k, v), g in zip(velocity.items(), gradients, strict=True):
                    v.mul_(0.9).add_(g + 5e-4 * params[k])
                    params[k] -= lr * v
            total += n * loss.item()
        losses.append(total / 45)
    saved = load('s/model.pt7')['params']
    for k, p in params.items():
        torch.testing.assert_close(saved[k], p.detach(), rtol=1e-3, atol=1e-4)
    records = read_log(Path('s/log.txt'))
    assert [r['train_loss'] for r in records] == pytest.approx(losses, rel=1e-3)
    assert [r['lr'] for r in records] == pytest.approx([0.05, 0.01, 0.01, 0.002])


def test_log(cifar, work):
    teach(cifar)
    cifar('--save', 'a/b/s', '--teacher_id', 't', '--beta', '1000', '--at_groups', '0,2')
    lines = Path('a/b/s/log.txt').read_text().splitlines()
    assert all(line.startswith('json_stats: {') for line in lines)
    records = read_log(Path('a/b/s/log.txt'))
    assert [r['epoch'] for r in records] == [1, 2] and len(lines) == 2
    last = records[-1]
    assert vars(script.make_parser().parse_args([])).keys() <= last.keys()
    assert len(last['at_losses']) == 2 and all(a > 0 for a in last['at_losses'])
    assert last['n_parameters'] == sum(p.numel() for p in trainable(wide_resnet(10, 0.25, 3)[1]).values())
    assert last['num_classes'] == 3 and 'test_acc5' not in last and last['train_time'] > 0 < last['test_time']
    f, data = wide_resnet(10, 0.25, 3)[0], script.load_data(argparse_of('--dataroot', 'images'), PLACE)
    params = load('a/b/s/model.pt7')['params']
    x, y = data.normalise(data.test[0]), data.test[1]
    logits = f(x, params, False)[0]
    assert last['test_acc'] == pytest.approx(100 * (logits.argmax(1) == y).float().mean().item())
    assert last['test_loss'] == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-4)  # plain, without AT


def argparse_of(*argv):
    opt = script.make_parser().parse_args([*SMALL, *argv])
    opt.flip = True
    return opt


def test_log_has_null_for_what_is_not_finite_and_reads_old_nan(work):
    text = training.log_text([{'epoch': 1, 'test_loss': float('nan'), 'at_losses': [1.5, float('inf')]}]).decode()
    assert json.loads(text.removeprefix('json_stats: ')) == {'epoch': 1, 'test_loss': None, 'at_losses': [1.5, None]}
    Path('log.txt').write_text(text + 'json_stats: {"epoch": 2, "test_loss": NaN}\nnoise\njson_stats: {"epoch": 3, "te')
    assert [r['epoch'] for r in read_log(Path('log.txt'))] == [1, 2]


def test_top5_is_logged_from_six_classes_on(work):
    script.main(['--dataset', 'Digits', '--depth', '10', '--width', '0.25', '--train_fraction', '0.1', '--epochs', '1',
                 '--save', 's'])
    record = read_log(Path('s/log.txt'))[0]
    assert record['test_acc'] <= record['test_acc5'] <= 100 and record['flip'] is False


def test_name_without_save(cifar, work, capsys):
    teach(cifar)
    cifar('--teacher_id', 't', '--beta', '1e3', '--alpha', '0.9', '--epochs', '1', '--seed', '3')
    name = 'logs/folder_WRN-10-0.25_AT1000_KD0.9_from_t_seed3'
    assert (work / name / 'model.pt7').exists() and name in capsys.readouterr().out


METHODS = {'alone': [], 'AT': ['--teacher_id', 't', '--beta', '1000'], 'KD': ['--teacher_id', 't', '--alpha', '0.9'],
           'AT+KD': ['--teacher_id', 't', '--alpha', '0.9', '--beta', '1000', '--beta_decay', 'cosine']}


@pytest.mark.parametrize('method', METHODS)
def test_resume_is_bit_equal(cifar, work, method):
    teach(cifar)
    argv = [*METHODS[method], '--epochs', '3', '--epoch_step', '[2]']
    cifar('--save', 'whole', *argv)
    with stopped_after(2):
        cifar('--save', 'parts', *argv)
    assert len(read_log(Path('parts/log.txt'))) == 2
    script.main(['--resume', 'parts'])  # with the options of its checkpoint
    whole, parts = load('whole/model.pt7'), load('parts/model.pt7')
    assert same(whole, parts) and parts['epoch'] == 3
    keys = ('epoch', 'lr', 'train_loss', 'train_acc', 'test_loss', 'test_acc', 'at_losses')
    for a, b in zip(read_log(Path('whole/log.txt')), read_log(Path('parts/log.txt')), strict=True):
        assert all(a[k] == b[k] for k in keys)


@contextmanager
def stopped_after(epochs):
    """In it, training ends at once when this many epochs are saved."""
    real = training.train_epoch

    def train_epoch(step, data, opt, place, progress, after_step):
        if progress.epoch == epochs:
            raise KeyboardInterrupt
        return real(step, data, opt, place, progress, after_step)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match='130'):
        patch.setattr(training, 'train_epoch', train_epoch)
        yield


def test_more_epochs_continue_as_if_planned_from_the_start(cifar, work):
    cifar('--save', 'a', '--epochs', '2', '--epoch_step', '[1,2]')
    script.main(['--resume', 'a', '--epochs', '3'])
    cifar('--save', 'b', '--epochs', '3', '--epoch_step', '[1,2]')
    assert same(load('a/model.pt7'), load('b/model.pt7'))
    assert [r['epoch'] for r in read_log(Path('a/log.txt'))] == [1, 2, 3]


def test_resume_elsewhere_leaves_the_old_run_alone(cifar, work):
    cifar('--save', 'a', '--epochs', '1')
    before = files(work / 'a')
    script.main(['--resume', 'a/model.pt7', '--epochs', '2', '--save', 'b'])
    assert files(work / 'a') == before
    assert [r['epoch'] for r in read_log(Path('b/log.txt'))] == [1, 2]


@pytest.mark.parametrize('argv, text', [
    ('--width 0.5', '--width is 0.25'), ('--lr 0.2', '--lr is 0.1'), ('--seed 1', '--seed is 0'),
    ('--epochs 1', '--epochs is 2'), ('--no-flip', '--flip is True'), ('--dtype bfloat16', '--dtype is float'),
    ('--batch_size 8', '--batch_size is 16'), ('--epoch_step [1]', '--epoch_step is [60, 120, 160]')])
def test_options_that_may_not_change_on_resume(cifar, work, refused, argv, text):
    cifar('--save', 'a')
    before = files(work)
    refused(script.main, ['--resume', 'a', *argv.split()], text)
    assert files(work) == before


def test_a_schedule_that_depends_on_the_epochs_keeps_them(cifar, work, refused):
    teach(cifar)
    cifar('--save', 'a', '--teacher_id', 't', '--beta', '10', '--beta_decay', 'linear')
    refused(script.main, ['--resume', 'a', '--epochs', '9'], '--epochs is 2')


def test_resume_of_a_finished_run_changes_nothing(cifar, work, capsys):
    cifar('--save', 'a')
    before = {k: v for k, v in files(work).items() if k.name != '.lock'}
    script.main(['--resume', 'a'])
    assert 'all 2 epochs are done' in capsys.readouterr().out
    assert {k: v for k, v in files(work).items() if k.name != '.lock'} == before


def test_resume_drops_what_the_log_has_beyond_the_checkpoint(cifar, work):
    cifar('--save', 'a')
    log = Path('a/log.txt')
    whole = log.read_text()
    beyond = whole.splitlines()[-1].replace('"epoch": 2', '"epoch": 3')
    log.write_text(f'{whole}{beyond}\njson_stats: {{"epoch": 4, "lr"')
    script.main(['--resume', 'a'])
    assert log.read_text() == whole


def test_resume_refuses_what_it_cannot_go_on_from(cifar, work, refused):
    cifar('--save', 'a')
    state = load('a/model.pt7')
    for change, text in (({'options': None}, 'no state to resume from'), ({'options': {'foo': 1}}, 'there is no --foo'),
                         ({'options': {**state['options'], 'depth': 'x'}}, '--depth'),
                         ({'options': {**state['options'], 'at_groups': torch.tensor(3)}}, 'no state to resume from'),
                         ({'options': {**state['options'], 'at_groups': 5}}, 'has 3 groups'),
                         ({'optimizer': {}}, 'not a whole checkpoint'), ({'params': {}}, 'not a whole checkpoint'),
                         ({'optimizer': wrong_momentum(state)}, 'not a whole checkpoint'),
                         ({'epoch': 'x'}, 'not a whole checkpoint'), ({'epoch': -3}, 'below 0')):
        torch.save(state | change, 'b.pt7')
        refused(script.main, ['--resume', 'b.pt7', '--save', 'c'], text)
    assert not Path('c').exists()


def wrong_momentum(state):
    """An optimizer's state whose first momentum is of another shape: fused SGD would write beyond it."""
    first = {'momentum_buffer': torch.zeros(3)}
    return state['optimizer'] | {'state': state['optimizer']['state'] | {0: first}}


def test_a_checkpoint_beside_another_run_does_not_replace_it(cifar, work, refused):
    cifar('--save', 'a', '--epochs', '1')
    cifar('--save', 'b', '--epochs', '1', '--seed', '1')
    shutil.copy('b/model.pt7', 'a/other.pt7')
    before = files(work)
    refused(script.main, ['--resume', 'a/other.pt7', '--epochs', '2'], 'a already holds a run')
    assert files(work) == before
    script.main(['--resume', 'a/other.pt7', '--epochs', '2', '--save', 'c'])
    assert [r['seed'] for r in read_log(Path('c/log.txt'))] == [1]  # nothing of the run beside it


def test_a_finished_run_resumed_elsewhere_is_there(cifar, work):
    cifar('--save', 'a')
    script.main(['--resume', 'a', '--save', 'b'])
    assert same(load('a/model.pt7'), load('b/model.pt7')) and len(read_log(Path('b/log.txt'))) == 2


def test_a_teacher_may_move_but_not_change(cifar, work, refused):
    teach(cifar)
    cifar('--save', 'a', '--teacher_id', 't', '--beta', '10', '--epochs', '1')
    os.rename('logs/t', 'logs/moved')
    refused(script.main, ['--resume', 'a', '--epochs', '2'], 'logs/t/model.pt7')
    script.main(['--resume', 'a', '--epochs', '2', '--teacher_id', 'moved'])
    cifar('--save', 'logs/t', '--width', '0.5', '--seed', '9')
    before = files(work / 'a')
    refused(script.main, ['--resume', 'a', '--epochs', '3', '--teacher_id', 't'], 'not the one that the run began with')
    assert {k: v for k, v in files(work / 'a').items() if k.name != '.lock'} == {
        k: v for k, v in before.items() if k.name != '.lock'}
    argv = ['--save', 'logs/t', '--overwrite', '--teacher_id', 't', '--beta', '1']
    refused(lambda a: cifar(*a), argv, 'is the teacher')


def test_a_run_that_diverges_says_so(cifar, work, capsys):
    cifar('--save', 'a', '--lr', '1e30', '--epochs', '1')
    assert 'diverged' in capsys.readouterr().out and read_log(Path('a/log.txt'))[0]['train_loss'] is None


def test_a_folder_with_a_run_is_refused(cifar, work, refused):
    cifar('--save', 'a')
    before = files(work)
    refused(lambda a: cifar(*a), ['--save', 'a'], 'already holds a run')
    cifar('--save', 'b')
    refused(script.main, ['--resume', 'a', '--save', 'b'], 'b already holds a run')
    assert {k: v for k, v in files(work).items() if k.parts[0] != 'b'} == before


def test_overwrite_keeps_the_old_run_until_the_first_new_checkpoint(cifar, work):
    cifar('--save', 'a')
    old = files(work / 'a')
    with stopped_after(0):
        cifar('--save', 'a', '--overwrite', '--seed', '1')
    assert {k: v for k, v in files(work / 'a').items() if k.name != '.lock'} == {
        k: v for k, v in old.items() if k.name != '.lock'}
    cifar('--save', 'a', '--overwrite', '--seed', '1', '--epochs', '1')
    assert [r['seed'] for r in read_log(Path('a/log.txt'))] == [1] and load('a/model.pt7')['epoch'] == 1


def test_files_are_whole_when_writing_fails(cifar, work, monkeypatch):
    cifar('--save', 'a', '--epochs', '1')
    before = files(work / 'a')
    monkeypatch.setattr(os, 'fsync', lambda fd: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
    with pytest.raises(SystemExit):
        script.main(['--resume', 'a', '--epochs', '2'])
    assert files(work / 'a') == before


# ------------------------------------------------------------------------------------------- processes

def start(work, *argv):
    return subprocess.Popen([sys.executable, str(ROOT / 'cifar.py'), *SMALL, '--dataroot', 'images', *argv], cwd=work,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path):
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f'{path} did not come')


def test_killed_at_random_moments_and_resumed(cifar, work):
    """kill -9 three times; every time the folder is whole, and the end is that of a run that was left alone."""
    argv = ['--epochs', '60', '--epoch_step', '[20,40]']
    cifar('--save', 'whole', *argv)
    rng, model = random.Random(0), work / 'parts' / 'model.pt7'
    epochs = []
    for attempt in range(4):
        resumed = ['--resume', 'parts'] if model.exists() else ['--save', 'parts']
        process = start(work, *argv, *resumed)
        if attempt == 3:
            assert process.wait(120) == 0, process.stderr.read()
            break
        wait_for(work / 'parts' / '.lock')
        time.sleep(rng.uniform(0.1, 0.9))
        process.kill()
        process.wait()
        if model.exists():
            epochs.append(load(model)['epoch'])
            assert len(read_log(work / 'parts' / 'log.txt')) >= epochs[-1]
    assert epochs and epochs == sorted(epochs) and epochs[0] < 60
    assert same(load('whole/model.pt7'), load('parts/model.pt7'))
    assert [r['epoch'] for r in read_log(Path('parts/log.txt'))] == list(range(1, 61))


def test_two_processes_cannot_train_in_one_folder(cifar, work, refused):
    process = start(work, '--save', 'a', '--epochs', '2000')
    try:
        wait_for(work / 'a' / 'model.pt7')
        refused(script.main, ['--resume', 'a', '--epochs', '3000'], 'another process trains there')
        refused(lambda a: cifar(*a), ['--save', 'a', '--overwrite'], f'{os.uname().nodename} {process.pid}')
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    shutil.copytree('a', 'b')  # the dead process's lock holds nobody up
    epoch = load('b/model.pt7')['epoch']
    stop = training.train_epoch
    try:
        training.train_epoch = lambda *a: (_ for _ in ()).throw(KeyboardInterrupt)
        with pytest.raises(SystemExit, match='130'):
            script.main(['--resume', 'a'])
    finally:
        training.train_epoch = stop
    assert load('a/model.pt7')['epoch'] == epoch


def test_lock_of_another_machine(cifar, work, refused):
    cifar('--save', 'a')
    lock = work / 'a' / '.lock'
    assert lock.read_text() == ''
    lock.write_text('elsewhere 123\n')
    refused(script.main, ['--resume', 'a'], 'elsewhere 123')
    os.utime(lock, (time.time() - 2 * training.LOCK_EXPIRES,) * 2)
    script.main(['--resume', 'a'])  # no sign of life for long
    assert lock.read_text() == ''


def test_heartbeat(work, monkeypatch):
    monkeypatch.setattr(training, 'HEARTBEAT', 0.02)
    with training.locked(work / 'a'):
        os.utime('a/.lock', (0, 0))
        time.sleep(0.3)
        assert time.time() - os.stat('a/.lock').st_mtime < 5


# ------------------------------------------------------------------------------------------- the step

class NoWaiting(TorchDispatchMode):
    """Counts what would make a process wait for its GPU: reading a number, or copying a tensor to the CPU."""
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += str(func).startswith(('aten._local_scalar_dense', 'aten.equal', 'aten.nonzero'))
        return func(*args, **(kwargs or {}))


def test_no_step_waits_for_the_gpu(cifar, work):
    teach(cifar)
    opt = argparse_of('--dataroot', 'images', '--beta', '1e3', '--alpha', '0.9')
    opt.at_groups = [0, 1, 2]
    data, (f, params), teacher = script.load_data(opt, PLACE), wide_resnet(10, 0.25, 3), load_teacher('t')
    params = to_device(params, PLACE.device)
    optimizer, scaler = training.make_optimizer(opt, params), torch.amp.GradScaler('cpu', enabled=False)
    step = training.make_step(opt, PLACE, f, params, teacher, optimizer, scaler)
    counts = []
    with NoWaiting() as counter:
        for x, y, n, n_global in data.train_batches(0):
            step(x, y, n, n_global, torch.tensor(1.0))
            counts.append(counter.count)
        assert counts == [0, 0, 0]
        training.train_epoch(step, data, opt, PLACE, training.Progress(1), lambda: None)
    assert counter.count == 0  # tolist() is no operation of its own, and comes once an epoch


def test_evaluation_makes_no_graph(cifar, work):
    opt, (f, params) = argparse_of('--dataroot', 'images'), wide_resnet(10, 0.25, 3)
    seen = []

    def spy(x, params, training):
        logits, groups = f(x, params, training)
        seen.append((training, logits.requires_grad))
        return logits, groups
    training.evaluate(spy, params, script.load_data(opt, PLACE), opt, PLACE)
    assert seen == [(False, False)]


@pytest.mark.parametrize('dtype', ['bfloat16', 'half'])
def test_dtypes(cifar, work, dtype):
    """Autocast trains much as float32 does; half's first steps overflow and are left out by the loss scaling."""
    teach(cifar)
    argv = ['--teacher_id', 't', '--beta', '1000', '--alpha', '0.9', '--epochs', '10', '--lr', '0.02']
    cifar('--save', 'float', *argv)
    cifar('--save', 'lower', *argv, '--dtype', dtype)
    state = load('lower/model.pt7')
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in state['params'].values())
    assert ('scaler' in state) == (dtype == 'half')
    a, b = ([r['train_loss'] for r in read_log(Path(run, 'log.txt'))] for run in ('float', 'lower'))
    assert a != b and a[-1] < a[0] / 2 and b[-1] == pytest.approx(a[-1], rel=0.3)


def test_half_precision_survives_an_overflow_in_its_first_step():
    params = {'w': torch.nn.Parameter(torch.ones(3))}
    optimizer = training.make_optimizer(argparse_of(), params)
    scaler = torch.amp.GradScaler('cpu')
    for factor in (float('inf'), 1.0):
        scaler.scale((params['w'] * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    torch.testing.assert_close(params['w'].detach(), torch.full((3,), 1 - 0.1 * (1 + 5e-4)))  # as if it had not been


def test_compiled_step_is_the_same_step(cifar, work):
    if not shutil.which('g++'):
        pytest.skip('needs a C++ compiler')
    teach(cifar)
    argv = ['--teacher_id', 't', '--beta', '1000', '--alpha', '0.9', '--batch_size', '15', '--epochs', '1']
    cifar('--save', 'a', *argv)
    cifar('--save', 'b', *argv, '--compile')
    a, b = (read_log(Path(r, 'log.txt'))[0] for r in 'ab')
    assert a['train_loss'] == pytest.approx(b['train_loss'], rel=1e-3)


def test_compile_without_a_compiler(cifar, work, refused, monkeypatch):
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    refused(lambda a: cifar(*a), ['--compile'], 'no C++ compiler')


@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGINT])
def test_stopped_in_an_epoch_and_resumed(cifar, work, monkeypatch, signum):
    """A signal in the middle of an epoch: its step is finished and saved, and nothing is repeated or skipped."""
    cifar('--save', 'whole', '--epochs', '3')
    stop_at_step(monkeypatch, 5, signum)  # the second of three steps of the second epoch
    with pytest.raises(SystemExit) as e:
        cifar('--save', 'parts', '--epochs', '3')
    assert e.value.code == 128 + signum
    state = load('parts/model.pt7')
    assert (state['epoch'], state['step'], state['sums'][0]) == (1, 2, 32)
    monkeypatch.undo()
    monkeypatch.chdir(work)
    script.main(['--resume', 'parts'])
    assert same(load('whole/model.pt7'), load('parts/model.pt7')) and 'step' not in load('parts/model.pt7')
    whole, parts = (read_log(Path(run, 'log.txt')) for run in ('whole', 'parts'))
    assert [r['train_loss'] for r in whole] == [r['train_loss'] for r in parts]


def stop_at_step(monkeypatch, number, signum):
    """Sends the process a signal in its step of this number."""
    real, steps = training.make_step, []

    def make_step(*args):
        step = real(*args)

        def counted(*args):
            steps.append(1)
            if len(steps) == number:
                os.kill(os.getpid(), signum)
            return step(*args)
        return counted
    monkeypatch.setattr(training, 'make_step', make_step)


def test_save_every(cifar, work, monkeypatch):
    cifar('--save', 'whole')
    saved, real = [], training.write_whole

    def write_whole(files):
        real(files)
        state = load('parts/model.pt7')
        saved.append((state['epoch'], state.get('step', 0)))
        shutil.copytree('parts', f'at{len(saved)}')
    monkeypatch.setattr(training, 'write_whole', write_whole)
    cifar('--save', 'parts', '--save_every', '2')
    assert saved == [(0, 2), (1, 0), (1, 2), (2, 0)]
    monkeypatch.setattr(training, 'write_whole', real)
    script.main(['--resume', 'at1'])
    script.main(['--resume', 'at3'])
    assert same(load('whole/model.pt7'), load('at1/model.pt7')) and same(load('whole/model.pt7'), load('at3/model.pt7'))


def test_evaluate(cifar, work, capsys):
    cifar('--save', 'a')
    record, before = read_log(Path('a/log.txt'))[-1], files(work)
    capsys.readouterr()
    script.main(['--evaluate', 'a'])
    assert f'test error {100 - record["test_acc"]:.2f}% on 21 images' in capsys.readouterr().out
    shutil.copy('a/model.pt7', 'c.pt7')
    script.main(['--evaluate', 'c.pt7'])
    assert f'test error {100 - record["test_acc"]:.2f}% on 21 images' in capsys.readouterr().out
    os.remove('c.pt7')
    assert files(work) == before


def test_tensorboard(cifar, work):
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    teach(cifar)
    argv = ['--save', 's', '--teacher_id', 't', '--beta', '1e3', '--at_groups', '0,2', '--tensorboard', '--epochs', '3']
    with stopped_after(2):
        cifar(*argv)
    script.main(['--resume', 's', '--tensorboard'])
    events = accumulator.EventAccumulator('s').Reload()
    records = read_log(Path('s/log.txt'))
    assert [e.step for e in events.Scalars('test_loss')] == [1, 2, 3]
    for tag, values in (('train_loss', [r['train_loss'] for r in records]), ('lr', [0.1] * 3),
                        ('test_acc', [r['test_acc'] for r in records]),
                        ('at_losses/2', [r['at_losses'][1] for r in records])):
        assert [e.value for e in events.Scalars(tag)] == pytest.approx(values)
    cifar(*argv[:-1], '1', '--overwrite')  # another run's figures do not stay
    assert [e.step for e in accumulator.EventAccumulator('s').Reload().Scalars('lr')] == [1]


def test_tensorboard_that_is_not_installed(cifar, work, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    refused(lambda a: cifar(*a), ['--tensorboard'], '--tensorboard: the package is not installed')
    assert not Path('logs').exists()
