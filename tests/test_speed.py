"""The fast step is the plain step: layouts, folding, fused SGD and recording change nothing but rounding."""
import contextlib
import ctypes
import inspect
import math
import platform
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import benchmark_accuracy
import benchmark_cifar
import benchmark_imagenet
import benchmark_seeds
import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, random_images
from test_training import PLACE, argparse_of, teach
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import cifar as script
import tables
import training
from resnet import wide_resnet
from training import Place, choose_devices, to_device
from utils import InputError, Trained, fold_batch_norm, load_network

STEPS = 20


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """Whole float32 on a GPU too, whatever ran before, and nothing compiled before."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    torch.compiler.reset()
    yield
    torch.set_float32_matmul_precision(precision)


@pytest.fixture
def teacher(tmp_path):
    f, params = wide_resnet(10, 1, 10, seed=1)
    for _ in range(3):
        f(batches()[0][0] + 1, params, True)
    torch.save({'params': params}, tmp_path / 'model.pt7')
    return load_network(tmp_path)


def batches(n=4, size=16):
    x = torch.randn(n, size, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    y = torch.randint(0, 10, (n, size), generator=torch.Generator().manual_seed(1))
    return list(zip(x, y, strict=True)) * (STEPS // n)


def losses_of(method, teacher, plain, noise=0, **changes):
    """The losses of STEPS steps, plainly or this code's way, from the same student, or one changed by some noise."""
    opt = argparse_of('--no-deterministic', '--lr', '0.005', *tables.METHODS[method].split())
    vars(opt).update(changes, at_groups=[0, 1, 2])
    place = replace(PLACE, device=choose_devices(opt)[0])
    f, params = wide_resnet(10, 0.5, 10)
    params |= training.adapters_of(opt, f, params, teacher)
    generator = torch.Generator().manual_seed(3)
    for p in params.values():
        p.data *= 1 + noise * torch.randn(p.shape, generator=generator)
    if plain:
        whole = replace(teacher, params=benchmark_cifar.plain(teacher.params, place))
        step = benchmark_cifar.plain_step(f, benchmark_cifar.plain(params, place), whole, opt)
        return [step(x.to(place.device), y.to(place.device))[1] for x, y in batches()]
    folded = replace(teacher, params=to_device(fold_batch_norm(teacher.params), place.device))
    step = benchmark_cifar.our_step(f, to_device(params, place.device), folded, opt, place)
    one = torch.tensor(1.0, device=place.device)
    sums = [step(x.to(place.device).to(memory_format=torch.channels_last), y.to(place.device), 16, 16, one)
            for x, y in batches()]
    return [(s[1] / s[0]).item() for s in sums]


def check(method, teacher, **changes):
    """Training amplifies rounding: the fast step may differ from the plain one as that does from itself after rounding
    of the parameters it starts from, some units in the last place."""
    plain, rounded = (losses_of(method, teacher, True, noise) for noise in (0, 1e-6))
    fast = losses_of(method, teacher, False, **changes)
    assert plain[16] < 0.98 * plain[0]  # the same images: it did train
    assert fast[0] == pytest.approx(plain[0], rel=5e-6)
    largest = [max(abs(a - b) / b for a, b in zip(losses, plain, strict=True)) for losses in (fast, rounded)]
    assert largest[0] < 10 * largest[1] + 1e-5 and largest[0] < 5e-3, largest


@pytest.mark.parametrize('method', tables.METHODS)
def test_fast_and_plain_step_agree_to_rounding_over_20_steps(teacher, method):
    check(method, teacher)


def test_compiled_and_plain_step_agree_to_rounding_over_20_steps(teacher):
    if not shutil.which('g++'):
        pytest.skip('needs a C++ compiler')
    check('AT+KD', teacher, compile=True)


def record_on_the_cpu(function, fresh):
    """As training.graph_recorder(): it runs nothing, and a replay computes from the same tensors into the same one."""
    result = torch.zeros(6, dtype=torch.float64)
    return lambda: result.copy_(function()), result


def cannot_record(function, fresh):
    """As a recording that fails after backward, so that gradients are left behind, and then again as it is ended."""
    def fail(self):
        raise RuntimeError('operation not permitted\nwhen capturing')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, 'step', fail)
        try:
            function()
        finally:
            raise RuntimeError('the recording failed due to a previous error')


def record_for_one_batch(function, fresh):
    """A recording that does nothing, as if it had kept what it saw."""
    return lambda: None, torch.zeros(6, dtype=torch.float64)


def record_wrongly(change):
    """A recording whose replay gives sums that differ in one place."""
    def record(function, fresh):
        replay, result = record_on_the_cpu(function, fresh)
        return lambda: (replay(), change(result)), result
    return record


def record_without_sgd(function, fresh):
    """A recording that gives the right sums and leaves the parameters alone."""
    def without_sgd():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.SGD, 'step', lambda self: None)
            return function()
    return record_on_the_cpu(without_sgd, fresh)


def trained(record, said=None):
    """Sums of each step and the parameters after six epochs with a smaller last batch and two learning rates."""
    opt = argparse_of('--dataroot', 'images', '--no-deterministic', '--beta', '1e3', '--epoch_step', '[2]')
    opt.at_groups = [0, 1, 2]
    data = script.load_data(opt, PLACE)
    teacher = load_network_of(3)
    teacher = replace(teacher, params=fold_batch_norm(teacher.params))
    f, params = wide_resnet(10, 0.25, 3)
    params = to_device(params, PLACE.device)
    optimizer, scaler = training.make_optimizer(opt, params), torch.amp.GradScaler('cpu', enabled=False)
    step = training.make_step(opt, PLACE, f, params, teacher, optimizer, scaler)
    if record:
        step = training.captured(step, params, optimizer, record, said)
    sums = []
    for epoch in range(6):
        optimizer.param_groups[0]['lr'] = training.learning_rate(opt, epoch)
        decay = torch.tensor(1 - epoch / 10)
        sums += [step(x, y, n, n_global, decay).tolist() for x, y, n, n_global in data.train_batches(epoch)]
    return sums, params


def test_recorded_steps_are_the_steps(work):
    recordings, said = [], []
    a, p = trained(None)
    b, q = trained(lambda f, fresh: recordings.append(fresh) or record_on_the_cpu(f, fresh), said.append)
    assert a == b and all(torch.equal(p[k], q[k]) for k in p)
    # Of 16, 16 and 13 images, at two rates: all but the small batches at the first rate come WARM_UP times or more.
    assert recordings == [True, True, False] and not said


OTHER = 'its replay gave something else, or nothing finite'


@pytest.mark.parametrize(('record', 'reason'), [
    (cannot_record, 'operation not permitted'), (record_for_one_batch, OTHER),
    (record_without_sgd, OTHER),
    (record_wrongly(lambda sums: sums[1].mul_(1.1)), OTHER),
    (record_wrongly(lambda sums: sums[1].fill_(math.nan)), OTHER),
    (lambda f, fresh: record_on_the_cpu(lambda: 0.9 * f(), fresh), OTHER)])
def test_steps_that_cannot_be_recorded_are_run(work, record, reason):
    said = []
    a, p = trained(None)
    b, q = trained(record, said.append)
    assert a == b and all(torch.equal(p[k], q[k]) for k in p)
    assert said == [f'the step is not launched as one CUDA graph, and slower for it: {reason}']


def load_network_of(classes):
    f, params = wide_resnet(10, 0.5, classes, seed=2)
    return Trained(f, {k: p.detach() for k, p in params.items()}, '', classes, 3, 0)


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason='this torch has no CUDA to pretend')
@pytest.mark.parametrize('method', tables.METHODS)
def test_batches_and_losses_stay_on_the_gpu(method):
    """On tensors without data on a pretended GPU, which refuse to mix with the CPU's, and to be read."""
    opt = argparse_of(*tables.METHODS[method].split())
    vars(opt).update(at_groups=[0, 1, 2], dataset='CIFAR10', compile=False)
    place, (f, params), (g, whole) = Place(torch.device('cuda:0')), wide_resnet(10, 1, 10), wide_resnet(10, 2, 10)
    teacher = Trained(g, fold_batch_norm(whole), '', 10, 3, 0)
    params |= training.adapters_of(opt, f, params, teacher)
    images, labels = np.zeros((64, 32, 32, 3), np.uint8), np.arange(64) % 10
    with FakeTensorMode(allow_non_fake_inputs=True):
        data = script.DeviceData(opt, place, (images, labels, images, labels))
        objective = training.make_objective(opt, place, f, to_device(params, place.device), teacher)
        decay = torch.tensor(1.0, device=place.device)
        for x, y, n, _ in data.train_batches(0):
            loss, sums = objective(x, y, decay)
            assert {t.device for t in (x, y, loss, sums)} == {place.device} and loss.requires_grad and n == 16
            assert x.is_contiguous(memory_format=torch.channels_last)
            with pytest.raises(DataDependentOutputException):
                loss.item()
        with pytest.raises(RuntimeError, match='same device'):
            objective(x, y.cpu(), decay)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """torch.cuda's functions for recording, without a GPU; what they were called with."""
    calls, signature = [], inspect.signature(torch.cuda.graph)

    @contextlib.contextmanager
    def graph(*args, **kwargs):
        calls.append(signature.bind(*args, **kwargs).arguments['pool'])
        yield
    for name, function in {'current_device': lambda: 0, 'current_stream': lambda: 'the stream',
                           'set_stream': calls.append, 'graph': graph, 'graph_pool_handle': object,
                           'CUDAGraph': lambda: SimpleNamespace(replay='replay'),
                           'max_memory_allocated': lambda device: 50,
                           'get_device_properties': lambda device: SimpleNamespace(total_memory=100)}.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, function)
    return calls


def test_graphs_share_memory_until_a_fresh_one_comes(pretended_gpu):
    record = training.graph_recorder()
    for fresh in (True, False, True):
        assert record(lambda: 'result', fresh) == ('replay', 'result')
    first, _, second, _, third, stream = pretended_gpu
    assert first is second is not third and stream == 'the stream'


def test_failed_recording_leaves_the_stream(pretended_gpu):
    def fail():
        raise RuntimeError('no')
    with pytest.raises(RuntimeError, match='no'):
        training.graph_recorder()(fail, True)
    assert pretended_gpu[1:] == ['the stream']


def test_steps_too_large_to_have_twice_are_not_recorded(pretended_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'max_memory_allocated', lambda device: 51)
    with pytest.raises(RuntimeError, match='more than the memory'):
        training.graph_recorder()(lambda: 'result', True)
    assert pretended_gpu == []


@pytest.mark.parametrize(('argv', 'device', 'world', 'expected'), [
    ([], 'cuda:0', 1, True), (['--no-capture'], 'cuda:0', 1, False), ([], 'cpu', 1, False), ([], 'cuda:0', 2, False),
    (['--dtype', 'half'], 'cuda:0', 1, False), (['--capture', '--dtype', 'bfloat16'], 'cuda:0', 1, True),
    (['--grad_at', '1'], 'cuda:0', 1, True), (['--capture'], 'cpu', 1, 'takes a GPU'),
    (['--capture'], 'cuda:0', 2, 'takes one GPU'), (['--capture', '--dtype', 'half'], 'cuda:0', 1, 'not with --dtype')])
def test_steps_are_recorded_where_they_can_be(argv, device, world, expected):
    opt, place = argparse_of(*argv), Place(torch.device(device), world=world)
    if expected in (True, False):
        assert training.wants_capture(opt, place) is expected
    else:
        with pytest.raises(InputError, match=f'^--capture: {expected}'):
            training.wants_capture(opt, place)


@pytest.mark.parametrize(('largest', 'expected'), [
    (2 ** 31, [(-3, 2 ** 30), (-1, 2 ** 30)]), (2 ** 25, [(-3, 2 ** 30), (-3, 2 ** 25), (-1, 2 ** 30)]),
    (0, [(-3, 2 ** 30), (-3, 2 ** 25)])])
def test_no_memory_threshold_is_set_without_the_other(monkeypatch, largest, expected):
    """Older C libraries refuse a large one."""
    calls = []

    def mallopt(name, value):
        calls.append((name, value))
        return int(name != -3 or value <= largest)
    monkeypatch.setattr(ctypes, 'CDLL', lambda name: SimpleNamespace(mallopt=mallopt))
    training.keep_freed_memory()
    assert calls == expected
    monkeypatch.setattr(ctypes, 'CDLL', lambda name: SimpleNamespace())
    training.keep_freed_memory()  # where there is none


FAULTS = """
import resource, sys, torch, training
if sys.argv[1] == 'keep':
    training.keep_freed_memory()
faults = []
for _ in range(8):
    torch.empty(2 ** 24).fill_(1)  # 64 MiB
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[7] - faults[3])
"""


@pytest.mark.skipif('glibc' not in platform.libc_ver()[0], reason='other C libraries keep memory in other ways')
def test_freed_memory_is_kept():
    """A tensor that is made again after it was freed costs no page faults, which it does by default."""
    kept, given_back = (int(subprocess.run([sys.executable, '-c', FAULTS, how], cwd=ROOT, check=True,
                                           capture_output=True).stdout) for how in ('keep', 'not'))
    assert kept < 100 and kept <= given_back  # huge pages, where the system gives them, make few of them


@pytest.mark.skipif(torch.cuda.is_available(), reason='for machines without a GPU')
def test_capture_takes_a_gpu(cifar, refused):
    refused(lambda a: cifar(*a), ['--capture'], '--capture: takes a GPU, and there is none')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize('method', tables.METHODS)
def test_captured_and_plain_step_agree_to_rounding_over_20_steps(teacher, method, compiled, capsys):
    check(method, teacher, compile=compiled, capture=True)
    assert capsys.readouterr().out == ''  # it would say so if it were not captured


def test_benchmarks_run(tmp_path, monkeypatch, capsys):
    """Their tables have a row for each run, with figures in it."""
    monkeypatch.setattr(benchmark_cifar, 'N_IMAGES', {'cpu': (16, 8)})
    monkeypatch.setattr(benchmark_cifar, 'N_BATCHES', {'cpu': 1})
    runs = ['WRN-16-1', 'WRN-16-1_F-ActT_WRN-16-2']
    monkeypatch.setattr(benchmark_cifar, 'ROW', runs)
    monkeypatch.setattr('sys.argv', ['benchmark_cifar.py', '--batch_size', '8', '--repeats', '1', '--ngpu', '0'])
    benchmark_cifar.main()
    out = capsys.readouterr().out
    rows = [line.split('|')[1:-1] for line in out.splitlines() if line.startswith('| ')][2:]
    assert [row[0].strip() for row in rows] == runs
    assert all(float(cell.replace(',', '')) > 0 for row in rows for cell in row[1:6])
    assert all(':' in cell for row in rows for cell in row[6:]) and 'start-up' in out
    monkeypatch.setattr(benchmark_imagenet, 'machine', lambda place, dtype: (1e11, 1e10))  # it takes seconds
    import cv2
    folder = tmp_path / 'images' / 'n0'
    folder.mkdir(parents=True)
    for i, image in enumerate(random_images(3, 80)):
        cv2.imwrite(str(folder / f'{i}.jpg'), image)
    monkeypatch.setattr('sys.argv', ['x', '--images', str(tmp_path / 'images'), '--batch_size', '2', '--steps', '1',
                                     '--repeats', '1', '--width', '0.0625', '--image_size', '64', '--ngpu', '0'])
    benchmark_imagenet.main()
    out = capsys.readouterr().out
    assert 'AT from ResNet-34, batch 2' in out and 'pipeline, one worker, 3 images: ours' in out


def test_accuracy_benchmark_pairs_runs_from_the_same_start(cifar, work, monkeypatch, capsys):
    teach(cifar)
    monkeypatch.setattr('sys.argv', ['x', '--folder', 'p', '--seeds', '2', *SMALL, '--dataroot', 'images',
                                     '--teacher_id', 't', '--beta', '1e3', '--lr', '0.001'])
    benchmark_accuracy.main()
    *_, header, _, first, _, mean, verdict = capsys.readouterr().out.splitlines()
    assert header == '| seed | plain, % | fast, % | difference |' and first.startswith('| 0 | ')
    assert 'standard error' in mean and 'two standard errors' in verdict
    logs = [[training.read_log(work / 'p' / f'{way}_seed{seed}' / 'log.txt') for seed in (0, 1)]
            for way in ('plain', 'fast')]
    for plain, fast in zip(*logs, strict=True):
        assert len(plain) == len(fast) == 2 and plain[0]['at_losses'] == [None] * 3 != fast[0]['at_losses']
        assert plain[0]['train_loss'] == pytest.approx(fast[0]['train_loss'], rel=1e-4)  # and not another start
    assert logs[0][0][0]['train_loss'] != pytest.approx(logs[0][1][0]['train_loss'], rel=1e-3)
    start = training.read_log(work / 'p' / 'fast_seed0' / 'log.txt')
    benchmark_accuracy.main()  # what is there is not run again
    assert 'epoch' not in capsys.readouterr().out and start == logs[1][0]


def test_seeds_benchmark_runs(monkeypatch, capsys):
    """And finds that vmap computes what single steps do: it raises otherwise."""
    monkeypatch.setattr('sys.argv', ['x', '--run', 'WRN-16-1_AT+KD_WRN-16-2', '--seeds', '2', '--batch_size', '8',
                                     '--repeats', '1', '--ngpu', '0'])
    benchmark_seeds.main()
    rows = [line.split('|')[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith('| ')][2:]
    assert len(rows) == 2 and all(float(cell.replace(',', '')) > 0 for row in rows for cell in row[1:])
