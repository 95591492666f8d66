"""How scripts end: with one line and an exit status, whatever happens to them."""
import errno
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import CPU, ROOT, SMALL

from training import memory
from training.errors import RunError, one_line, one_line_errors, shortened, time_limit
from utils import NETWORKS, InputError, Model


@pytest.mark.parametrize('error, status, line', [
    (InputError('--depth 3'), 2, 'error: --depth 3\n'),
    (InputError('a\n \x1b[31mred'), 2, 'error: a \\x1b[31mred\n'),
    (FileNotFoundError(errno.ENOENT, 'No file', 'x'), 2, "error: [Errno 2] No file: 'x'\n"),
    (OSError(errno.ENOSPC, 'No space'), 1, 'error: [Errno 28] No space\n'),
    (RunError('lost'), 1, 'error: lost\n'), (MemoryError(), 1, 'error: MemoryError\n'),
    (RuntimeError('DataLoader worker (pid 3) is killed\nmore'), 1,
     'error: DataLoader worker (pid 3) is killed\n'),
    (KeyboardInterrupt(), 130, 'interrupted\n'), (BrokenPipeError(), 141, '')])
def test_one_line_and_a_status(capsys, error, status, line):
    with pytest.raises(SystemExit) as e, one_line_errors():
        raise error
    assert e.value.code == status and capsys.readouterr().err == line


def test_a_note_of_how_to_go_on_is_in_the_line(capsys):
    error = RunError('lost')
    error.add_note('go on')
    with pytest.raises(SystemExit), one_line_errors():
        raise error
    assert capsys.readouterr().err == 'error: lost; go on\n'


def test_an_error_of_the_program_keeps_its_traceback():
    with pytest.raises(RuntimeError, match='a mistake'), one_line_errors():
        raise RuntimeError('a mistake')


def test_shown_text_is_short_and_in_one_line():
    assert shortened('a\nb\ud800\x1b\u202e') == r'a\nb\ud800\x1b\u202e'
    assert len(shortened('x' * 500)) <= 60 and shortened('ab' * 50, 5) == 'ab…ab'
    assert one_line(' a \n b ') == 'a b' and len(one_line('x' * 5000)) <= 1000


def test_what_takes_too_long_is_ended():
    with pytest.raises(RunError, match='nothing came for 1 s'), time_limit(1, 'nothing came'):
        time.sleep(30)
    with time_limit(1, 'nothing came'):
        pass
    time.sleep(1.1)  # no alarm is left


@pytest.mark.parametrize('script', ['cifar.py', 'imagenet.py', 'tables.py', 'visualize.py'])
def test_an_interrupt_during_the_imports(script):
    process = subprocess.Popen([sys.executable, str(ROOT / script)], stderr=subprocess.PIPE)
    maps = Path(f'/proc/{process.pid}/maps')
    while process.poll() is None and 'libtorch' not in maps.read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == b'' and process.returncode == -signal.SIGINT


@pytest.mark.parametrize('streams, status, lines', [
    ('> /dev/full', 1, 1), pytest.param('> /dev/full 2>&1', 1, 0, marks=pytest.mark.slow),
    pytest.param('2>&-', 0, 0, marks=pytest.mark.slow),
    pytest.param('>&-', 0, 0, marks=pytest.mark.slow)])
def test_streams_that_are_closed_or_full(work, streams, status, lines):
    command = ['sh', '-c', f'exec "$@" {streams}', 'sh', sys.executable, str(ROOT / 'cifar.py')]
    done = subprocess.run([*command, *SMALL, '--dataroot', 'images', '--save', 's'], cwd=work,
                          capture_output=True, text=True)
    assert done.returncode == status and done.stderr.count('\n') == lines, done.stderr
    assert (work / 's' / 'model.pt7').exists() == (status == 0)


def test_what_a_step_keeps_is_counted():
    def f(x, params, training):
        y = F.relu(F.conv2d(x, params['w']))  # keeps input and result, (3, h, w) and (4, h, w)
        return y.mean((2, 3)), (y,)
    model = Model(f, {'w': torch.nn.Parameter(torch.ones(4, 3, 1, 1))}, 'small', 4, NETWORKS['wrn'])
    assert memory.kept_for_backward(model, (5, 6)) == (3 + 4) * 5 * 6
    model = memory.new_student('wrn', {'depth': 10, 'width': 0.25}, 3, seed=0)
    before = {name: t.clone() for name, t in model.params.items()}
    memory.kept_for_backward(model, (16, 16))
    assert all(torch.equal(t, before[name]) for name, t in model.params.items())


def test_a_batch_that_does_not_fit_the_memory_is_refused(cifar, refused, monkeypatch):
    monkeypatch.setattr(memory, 'memory_of', lambda device: 1e6)
    refused(lambda a: cifar(*a), ['--batch_size', '2147483648'], 'a step of 45 images, WRN-10-0.25')
    assert not Path('logs').exists()


@pytest.mark.parametrize('text, expected', [('1000000\n', 1_000_000), ('max\n', None)])
def test_a_containers_memory_counts(tmp_path, monkeypatch, text, expected):
    (tmp_path / 'max').write_text(text)
    monkeypatch.setattr(memory, 'LIMITS', [])
    machine = memory.memory_of(CPU.device)
    monkeypatch.setattr(memory, 'LIMITS', [tmp_path / 'missing', tmp_path / 'max'])
    assert memory.memory_of(CPU.device) == (expected or machine)
    monkeypatch.setattr(memory.resource, 'getrlimit', lambda which: (1000, -1))
    assert memory.memory_of(CPU.device) == min(1000, expected or machine)
