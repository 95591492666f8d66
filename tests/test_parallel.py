"""Real processes (gloo on the CPU) against one process that runs the same shards."""
import os
import subprocess
import sys

import parallel
import pytest
import torch
from conftest import ROOT, SMALL

import training
from training import Place

CPU = torch.device('cpu')


def torchrun(*argv, n=2, **kwargs):
    environment = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': f'{ROOT}:{ROOT / "tests"}'}
    return subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(n),
                           *map(str, argv)], env=environment, capture_output=True, text=True, timeout=300, **kwargs)


def shards_in_one_process(n_global, world, method):
    """Sums and gradients of a batch cut into shards with batch statistics of their own, as one mean over the batch."""
    x, y = parallel.batch(n_global)
    sums, gradients = 0, None
    for index in torch.arange(n_global).tensor_split(world):
        s, g = parallel.one_step(Place(CPU), method, x[index], y[index], len(index), n_global)
        sums = sums + s
        gradients = g if gradients is None else [a + b for a, b in zip(gradients, g, strict=True)]
    return sums, gradients


def check_ranks(folder, n_global, world, shards, method='at_kd'):
    """What each of `world` processes wrote to the folder, against one process that runs the shards."""
    sums, gradients = shards_in_one_process(n_global, shards, method)
    assert any(g.abs().max() > 0.01 for g in gradients)
    for r in range(world):
        rank = torch.load(folder / f'{r}.pt')
        torch.testing.assert_close(rank['sums'], sums, rtol=1e-5, atol=1e-5)
        for a, b in zip(rank['gradients'], gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('n_global, world, method', [(8, 2, 'at_kd'), (7, 2, 'at_kd'), (10, 4, 'at_kd'),
                                                     (7, 2, 'gradients')])
def test_processes_equal_one_that_runs_their_shards(tmp_path, n_global, world, method):
    done = torchrun(ROOT / 'tests' / 'parallel.py', tmp_path, n_global, method, n=world)
    assert done.returncode == 0, done.stderr
    check_ranks(tmp_path, n_global, world, world, method)


def test_losses_on_gradients_do_not_depend_on_shards(tmp_path):
    """Without batch norm, shards of one process and the whole batch give the same."""
    (a, ga), (b, gb) = (shards_in_one_process(7, world, 'gradients') for world in (1, 3))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for x, y in zip(ga, gb, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def three_cpus(monkeypatch, n=2):
    monkeypatch.setattr(training, 'choose_devices', lambda opt: [CPU] * n)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    monkeypatch.delenv('LOCAL_RANK', raising=False)


def test_processes_that_the_script_starts_and_a_rank_without_samples(tmp_path, monkeypatch):
    three_cpus(monkeypatch, 3)
    training.launch(parallel.worker, parallel.options(), str(tmp_path), 2)
    check_ranks(tmp_path, 2, 3, shards=2)


def test_bad_input_on_one_rank_ends_all_with_status_2(monkeypatch, capfd):
    three_cpus(monkeypatch)
    with pytest.raises(SystemExit) as e:
        training.launch(parallel.failing_worker, parallel.options())
    assert e.value.code == 2
    assert 'error: rank 1 has no data' in capfd.readouterr().err


def test_a_killed_rank_ends_all(monkeypatch):
    three_cpus(monkeypatch)
    with pytest.raises(SystemExit, match='rank 1 was killed'):
        training.launch(parallel.dying_worker, parallel.options())


def test_cifar_under_torchrun(work):
    argv = [ROOT / 'cifar.py', *SMALL, '--dataroot', 'images', '--save', 'logs/two', '--batch_size', '7']
    done = torchrun(*argv, cwd=work)
    assert done.returncode == 0, done.stderr
    records = training.read_log(work / 'logs' / 'two' / 'log.txt')
    assert [r['epoch'] for r in records] == [1, 2]  # one process writes
    assert records[-1]['device'].startswith('2 × CPU')
    params = torch.load('logs/two/model.pt7', weights_only=True)['params']
    assert all(torch.isfinite(t).all() for t in params.values())
    alone = subprocess.run([sys.executable, str(ROOT / 'cifar.py'), '--evaluate', 'logs/two'], capture_output=True,
                           text=True, cwd=work)
    assert f'test error {100 - records[-1]["test_acc"]:.2f}%' in alone.stdout  # all 21 images, once
