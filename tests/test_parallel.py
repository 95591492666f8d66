"""Real processes (gloo on the CPU) against one process that runs the same shards."""
import socket
import subprocess
import sys

import parallel
import pytest
import torch
from helpers import CPU, ROOT, SMALL, load, teach

import cifar as script
from training import distributed
from training.log import read_log


def shards_in_one_process(n_global, world, method):
    """Sums and gradients of a batch cut into shards, each with batch statistics of its own."""
    x, y = parallel.batch(n_global)
    sums, gradients = None, None
    for index in torch.arange(n_global).tensor_split(world):
        s, g = parallel.one_step(CPU, method, x[index], y[index], len(index), n_global)
        s = {name: torch.tensor(v, dtype=torch.double) for name, v in s.items()}
        sums = s if sums is None else {name: sums[name] + v for name, v in s.items()}
        gradients = g if gradients is None else [a + b for a, b in zip(gradients, g, strict=True)]
    return sums, gradients


def equal(a, b):
    """Asserts that sums and gradients are near each other."""
    (sums, gradients), (expected_sums, expected) = a, b
    assert sums.keys() == expected_sums.keys()
    for name, value in sums.items():
        value = torch.as_tensor(value, dtype=torch.double)
        torch.testing.assert_close(value, expected_sums[name], rtol=1e-5, atol=1e-5)
    for g, e in zip(gradients, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-3, atol=1e-4)  # of up to 20


def check_ranks(folder, world, cases):
    """What each of `world` processes wrote, against one process that runs the shards."""
    for n_global, method in cases:
        one = shards_in_one_process(n_global, min(world, n_global), method)
        assert any(g.abs().max() > 0.01 for g in one[1])
        for r in range(world):
            equal(load(folder / f'{n_global}-{method}-{r}.pt'), one)


def test_losses_on_gradients_do_not_depend_on_shards(tmp_path):
    """Without batch norm, shards of one process and the whole batch give the same."""
    equal(*(shards_in_one_process(7, world, 'gradients') for world in (1, 3)))


def start_ranks(monkeypatch, n, *argv):
    """As the script parallel.py does on a machine of n devices."""
    monkeypatch.setattr(distributed, 'choose_devices', lambda opt: [CPU.device] * n)
    monkeypatch.setattr(sys, 'argv', [str(ROOT / 'tests' / 'parallel.py'), *map(str, argv)])
    monkeypatch.setenv('PYTHONPATH', f'{ROOT}:{ROOT / "tests"}')
    monkeypatch.delenv('LOCAL_RANK', raising=False)
    parallel.main(sys.argv[1:])


def test_processes_that_the_script_starts_equal_one_that_runs_their_shards(tmp_path, monkeypatch):
    """Equal shards, unequal ones, and a rank without samples."""
    cases = [(8, 'at_kd'), (7, 'at_kd'), (7, 'gradients'), (1, 'at_kd')]
    start_ranks(monkeypatch, 2, tmp_path, *sum(cases, ()))
    check_ranks(tmp_path, 2, cases)


def test_bad_input_on_one_rank_ends_all_with_status_2(monkeypatch, capfd):
    with pytest.raises(SystemExit) as e:
        start_ranks(monkeypatch, 2, 'fails')
    assert capfd.readouterr().err == 'error: rank 1 has no data\n'  # and nothing of the other's
    assert e.value.code == 2


@pytest.mark.slow
def test_ranks_wait_for_a_download_longer_than_for_a_message(monkeypatch):
    start_ranks(monkeypatch, 2, 'waits')


@pytest.mark.slow
@pytest.mark.parametrize('what, line', [
    ('dies', 'error: rank 1 was killed by signal 9: the others were ended\n'),
    ('stops', 'error: rank 0: another rank does not answer\n')])
def test_a_lost_rank_ends_all(monkeypatch, capfd, what, line):
    with pytest.raises(SystemExit, match='1'):
        start_ranks(monkeypatch, 2, what)
    assert capfd.readouterr().err == line


def test_a_port_that_is_taken_is_named(cifar, work, monkeypatch, capsys):
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = str(taken.getsockname()[1])
        for name, value in {'RANK': '0', 'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1',
                            'MASTER_PORT': port}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit, match='1'):
            cifar('--save', 'a')
    err = capsys.readouterr().err
    assert port in err and 'in use' in err and err.count('\n') == 1


def test_cifar_under_torchrun(cifar, work, capsys):
    """The second epoch learns from a teacher, by convolutions that the first has no use for."""
    teach(cifar)
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node',
               '2', str(ROOT / 'cifar.py'), *SMALL, '--dataroot', 'images', '--save', 'logs/two',
               '--batch_size', '7', '--teacher_id', 't', '--factt', '10', '--at_epochs', '1,2']
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    records = read_log(work / 'logs' / 'two' / 'log.txt')
    assert ['act_losses' in r for r in records] == [False, True]  # one process writes
    assert records[-1]['device'].startswith('2 × CPU')
    assert all(t.isfinite().all() for t in load('logs/two/model.pt7')['params'].values())
    script.main(['--evaluate', 'logs/two'])
    error = f'test error {100 - records[-1]["test_acc"]:.2f}% on 21 images'  # each of them once
    assert error in capsys.readouterr().out
