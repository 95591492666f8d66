"""The fast step is the plain step: layout, folding, fused SGD, recording change only rounding."""
import contextlib
import ctypes
import inspect
import platform
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import common
import numpy as np
import pytest
import torch
from functorch.compile import make_boxed_func
from helpers import CPU, ROOT, random_images
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import cifar as script
from paper import METHODS
from training import graph
from training.distributed import Rank, choose_devices, keep_freed_memory, to_device
from training.loop import wants_capture
from training.options import learning_rate
from utils import (
    NETWORKS,
    InputError,
    Model,
    fold_batch_norm,
    losses_needing,
    make_adapters,
    objective,
    wide_resnet,
)

STEPS = 20


def options(*argv):
    opt = script.make_parser().parse_args(['--dataset', 'Digits', '--batch_size', '16', *argv])
    script.fill_defaults(opt)
    opt.at_groups = opt.at_groups or [0, 1, 2]
    return opt


def model(width, seed, num_classes=10, frozen=False):
    f, params = wide_resnet(10, width, num_classes, seed=seed)
    if frozen:
        for _ in range(3):  # running statistics that are not those of a new network
            f(torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)) + 1, params,
              True)
        params = {k: p.detach() for k, p in params.items()}
    return Model(f, params, 'WRN-10', num_classes, NETWORKS['wrn'])


@pytest.fixture(scope='module')
def teacher():
    return model(1, 1, frozen=True)


def batches(n=4, size=16):
    x = torch.randn(n, size, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    y = torch.randint(0, 10, (n, size), generator=torch.Generator().manual_seed(1))
    return list(zip(x, y, strict=True)) * (STEPS // n)


def with_adapters(student, teacher, opt):
    adapters = make_adapters(student, teacher, opt.at_groups, 0) \
        if losses_needing(opt, 'adapters') else {}
    return replace(student, params=student.params | adapters)


def our_losses_and_params(student, teacher, opt, rank=CPU):
    """The losses of STEPS steps of this code, and the parameters after them."""
    step, run = common.our_step(student, teacher, opt, rank)
    one, sums = torch.tensor(1.0, device=rank.device), [0]
    for x, y in batches():
        x = x.to(rank.device).to(memory_format=torch.channels_last)
        step(x, y.to(rank.device), 16, 16, one)
        sums.append(run.totals.flat[0].item())
    return np.diff(sums) / 16, run.params


def our_losses(*args):
    return our_losses_and_params(*args)[0]


def double(model):
    params = {k: t.detach().double().requires_grad_(t.requires_grad)
              for k, t in model.params.items()}
    return replace(model, params=params)


def plain_losses(student, teacher, opt):
    """The losses of STEPS plain steps, in float64."""
    step = common.plain_step(student.f, double(student).params, double(teacher), opt)
    return np.array([step(x.double(), y)[1] for x, y in batches()])


def setting(method, teacher, *argv):
    """Options and student. β is small, as training would amplify rounding a thousandfold."""
    weaker = ['--beta', '30'] if 'AT' in method.split('+') else []
    opt = options('--lr', '0.005', *METHODS[method].split(), *weaker, *argv)
    return opt, with_adapters(model(0.5, 0), teacher, opt)


@pytest.mark.parametrize('method', METHODS)
def test_fast_and_plain_step_agree_to_rounding_over_20_steps(teacher, method):
    opt, student = setting(method, teacher, '--dtype', 'double')
    plain = plain_losses(student, teacher, opt)
    assert plain[16] < 0.98 * plain[0]  # the same images: it did train
    np.testing.assert_allclose(our_losses(student, double(teacher), opt), plain, 1e-11)
    opt.dtype = 'float'
    fast = our_losses(student, teacher, opt)
    np.testing.assert_allclose(fast, plain, 1e-3)
    assert fast[0] == pytest.approx(plain[0], rel=5e-6)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('g++'), reason='needs a C++ compiler')
def test_compiled_and_plain_step_agree_to_rounding_over_20_steps(teacher):
    torch.compiler.reset()
    opt, student = setting('AT+KD', teacher, '--compile')
    plain = plain_losses(student, teacher, opt)
    np.testing.assert_allclose(our_losses(student, teacher, opt), plain, 1e-3)


def fails_backward(graph, inputs, options):
    """A backend that runs forward as it is, and cannot compile backward."""
    return aot_autograd(fw_compiler=lambda g, _: make_boxed_func(g), bw_compiler=fails)(
        graph, inputs)


def fails(graph, inputs, options=None):
    raise OSError('Python.h is missing\nand more')


@pytest.mark.parametrize('backend', [fails, fails_backward])
def test_a_step_that_cannot_be_compiled_is_run_as_it_is(teacher, monkeypatch, capsys, backend):
    """And its batch counts once: in the losses, and in the statistics of batch norm."""
    opt, student = setting('AT+KD', teacher, '--compile')
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend=backend))
    losses, params = our_losses_and_params(student, teacher, opt)
    out = capsys.readouterr().out
    assert out == ('the training step could not be compiled, and is slower: '
                   'OSError: Python.h is missing\n')
    opt.compile = False
    plain, expected = our_losses_and_params(student, teacher, opt)
    assert (losses == plain).all() and all(torch.equal(params[k], expected[k]) for k in params)


def test_only_whole_batches_are_compiled(teacher, monkeypatch):
    """Not the last one, nor those from which damaged images were left out."""
    compiled = []

    def backend(graph, inputs, options):
        compiled.append(graph)
        return graph.forward
    torch.compiler.reset()
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend=backend))
    opt, student = setting('AT', teacher, '--compile')
    step, _ = common.our_step(student, teacher, opt, CPU)
    x, y = batches()[0]
    for n, n_global in ((16, 16), (15, 16), (16, 16), (14, 16), (9, 9)):
        step(x[:n], y[:n], n, n_global, torch.tensor(1.0))
    assert len(compiled) == 1


# ---------------------------------------------------------------------------- on a GPU

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU; pytest -m gpu')
@pytest.mark.parametrize(('dtype', 'tolerance'), [('float', 1e-4), ('bfloat16', 2e-2),
                                                  ('half', 2e-2)])
@pytest.mark.parametrize('compiled', ['--no-compile', '--compile'])
def test_20_recorded_steps_equal_20_plain_ones(teacher, compiled, dtype, tolerance, monkeypatch,
                                               capsys):
    """β is small: cuDNN may sum in another order, and training would amplify that."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    torch.compiler.reset()
    opt = options('--lr', '0.005', '--beta', '30', '--alpha', '0.9', '--dtype', dtype, compiled)
    rank = Rank(choose_devices(opt)[0])
    recorded = our_losses(model(0.5, 0), teacher, opt, rank)
    assert capsys.readouterr().out == ''  # it would say so if it were not recorded
    opt.capture = False
    np.testing.assert_allclose(recorded, our_losses(model(0.5, 0), teacher, opt, rank), tolerance)


# ---------------------------------------------------------------------------- recording

class Replayed:
    """In place of a CUDA graph: a replay computes the step again, from the same tensors."""

    def __init__(self, step, inputs, counts):
        self.replay = lambda: step(*inputs[:2], *counts, inputs[2])


def record_on_the_cpu(step, x, y, n, n_global, decay, pool):
    """In place of graph.record. It runs nothing."""
    inputs = [t.detach().clone() for t in (x, y, decay)]
    return Replayed(step, inputs, (n, n_global)), inputs


def cannot_record(step, *inputs_and_pool):
    """A recording that fails after backward, leaving gradients behind, and then as it is ended."""
    def fail(self):
        raise RuntimeError('operation not permitted\nwhen capturing')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, 'step', fail)
        try:
            fail(None)
        finally:
            raise RuntimeError('the recording failed due to a previous error')


def trained(monkeypatch, record):
    """Sums of each step and the parameters after six epochs, and the lines that were printed.

    The last batch is smaller, the learning rate drops, β decays.
    """
    opt = options('--dataset', 'folder', '--dataroot', 'images', '--beta', '1e3',
                  '--epoch_step', '[2]')
    data = script.load_data(opt, CPU)
    step, run = common.our_step(model(0.25, 0, 3), model(0.5, 2, 3, frozen=True), opt, CPU)
    sums, lines = [], []
    if record:
        monkeypatch.setattr(torch.cuda, 'graph_pool_handle', object)
        monkeypatch.setattr(graph, 'record', record)
        step = graph.recorded(step, lines.append)
    for epoch in range(6):
        run.optimizer.param_groups[0]['lr'].fill_(learning_rate(opt, epoch))
        for x, y, n, n_global in data.train_batches(epoch):
            step(x, y, n, n_global, torch.tensor(1 - epoch / 10))
            sums.append(run.totals.flat.tolist())
    return sums, run.params, lines


def test_recorded_steps_are_the_steps(work, monkeypatch):
    sizes = []

    def record(step, x, *rest):
        sizes.append(len(x))
        return record_on_the_cpu(step, x, *rest)
    a, p, _ = trained(monkeypatch, None)
    b, q, lines = trained(monkeypatch, record)
    assert a == b and all(torch.equal(p[k], q[k]) for k in p)
    assert sizes == [16, 13] and lines == []  # each once, whatever the learning rate


def test_steps_that_cannot_be_recorded_are_run(work, monkeypatch):
    a, p, _ = trained(monkeypatch, None)
    b, q, lines = trained(monkeypatch, cannot_record)
    assert a == b and all(torch.equal(p[k], q[k]) for k in p)
    assert lines == ['the training step could not be recorded as a CUDA graph, and is slower: '
                     'operation not permitted']


@pytest.fixture
def pretended_gpu(monkeypatch):
    """torch.cuda's functions for recording, without a GPU; what they were called with."""
    calls, signature = [], inspect.signature(torch.cuda.graph)

    @contextlib.contextmanager
    def pretended_graph(*args, **kwargs):
        calls.append(signature.bind(*args, **kwargs).arguments['pool'])
        yield
    memory = SimpleNamespace(total_memory=100)
    for name, function in {'current_device': lambda: 0, 'current_stream': lambda: 'the stream',
                           'set_stream': calls.append, 'graph': pretended_graph,
                           'CUDAGraph': lambda: 'the graph',
                           'max_memory_allocated': lambda device: 50,
                           'get_device_properties': lambda device: memory}.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, function)
    return calls


def record_a_step(step):
    x, y, one = torch.zeros(2, 3), torch.zeros(2), torch.tensor(1.0)
    return graph.record(step, x, y, 2, 2, one, 'the pool')


def test_recording_gives_the_graph_and_inputs_of_its_own(pretended_gpu):
    seen = []
    recorded, inputs = record_a_step(lambda x, y, n, n_global, decay: seen.extend((x, y, decay)))
    assert recorded == 'the graph' and all(a is b for a, b in zip(inputs, seen, strict=True))
    assert pretended_gpu == ['the pool', 'the stream']


def test_failed_recording_leaves_the_stream(pretended_gpu):
    def fail(*args):
        raise RuntimeError('no')
    with pytest.raises(RuntimeError, match='no'):
        record_a_step(fail)
    assert pretended_gpu[1:] == ['the stream']


def test_steps_too_large_to_have_twice_are_not_recorded(pretended_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'max_memory_allocated', lambda device: 51)
    with pytest.raises(RuntimeError, match='more than the memory'):
        record_a_step(lambda *args: None)
    assert pretended_gpu == []


@pytest.mark.parametrize(('argv', 'device', 'world', 'expected'), [
    ([], 'cuda:0', 1, True), (['--no-capture'], 'cuda:0', 1, False), ([], 'cpu', 1, False),
    ([], 'cuda:0', 2, False), (['--dtype', 'half'], 'cuda:0', 1, True),
    (['--capture', '--dtype', 'bfloat16'], 'cuda:0', 1, True),
    (['--grad_at', '1'], 'cuda:0', 1, True), (['--capture'], 'cpu', 1, 'needs a GPU'),
    (['--capture'], 'cuda:0', 2, 'works on one GPU')])
def test_steps_are_recorded_where_they_can_be(argv, device, world, expected):
    opt, rank = options(*argv), Rank(torch.device(device), world=world)
    if expected in (True, False):
        assert wants_capture(opt, rank) is expected
    else:
        with pytest.raises(InputError, match=f'^--capture: {expected}'):
            wants_capture(opt, rank)


# ---------------------------------------------------------------------------- nothing waits

@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason='this torch has no CUDA to pretend')
@pytest.mark.parametrize('method', METHODS)
def test_batches_and_losses_stay_on_the_gpu(method):
    """Tensors without data, of a pretended GPU, refuse to be read, or to mix with the CPU's."""
    opt, rank = options(*METHODS[method].split()), Rank(torch.device('cuda:0'))
    teacher = model(2, 1, frozen=True)
    student = with_adapters(model(1, 0), teacher, opt)
    teacher = fold_batch_norm(teacher)
    images, labels = random_images(64, 32), np.arange(64) % 10
    decay = torch.tensor(1.0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        data = script.DeviceData(opt, rank, (images, labels, images, labels))
        params, t_params = (to_device(m.params, rank.device) for m in (student, teacher))
        t = (teacher.f, t_params) if METHODS[method] else None
        decay = decay.to(rank.device)
        for x, y, n, _ in data.train_batches(0):
            loss, figures = objective(student.f, params, t, x, y, opt, decay)
            assert {v.device for v in (x, y, loss, *figures.values())} == {rank.device}
            assert loss.requires_grad and n == 16
            assert x.is_contiguous(memory_format=torch.channels_last)
            with pytest.raises(DataDependentOutputException):
                loss.item()
        with pytest.raises(RuntimeError, match=r'same device|different devices'):
            objective(student.f, params, t, x, y.cpu(), opt, decay)


# ---------------------------------------------------------------------------- memory

@pytest.mark.parametrize(('largest', 'expected'), [
    (2 ** 31, [(-3, 2 ** 30), (-1, 2 ** 30)]),
    (2 ** 25, [(-3, 2 ** 30), (-3, 2 ** 25), (-1, 2 ** 30)]),
    (0, [(-3, 2 ** 30), (-3, 2 ** 25)])])
def test_no_memory_threshold_is_set_without_the_other(monkeypatch, largest, expected):
    """Older C libraries refuse a large one."""
    calls = []

    def mallopt(name, value):
        calls.append((name, value))
        return int(name != -3 or value <= largest)
    monkeypatch.setattr(ctypes, 'CDLL', lambda name: SimpleNamespace(mallopt=mallopt))
    keep_freed_memory()
    assert calls == expected
    monkeypatch.setattr(ctypes, 'CDLL', lambda name: SimpleNamespace())
    keep_freed_memory()  # where there is none


FAULTS = """
import resource, sys, torch
from training.distributed import keep_freed_memory
from utils import wide_resnet
if sys.argv[1] == 'keep':
    keep_freed_memory()
f, params = wide_resnet(10, 1, 10)
faults = []
for _ in range(12):
    f(torch.zeros(128, 3, 32, 32), params, True)[0].sum().backward()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[11] - faults[5])
"""


@pytest.mark.slow
@pytest.mark.skipif('glibc' not in platform.libc_ver()[0],
                    reason='other C libraries keep memory in other ways')
def test_freed_memory_is_kept():
    """Steps after the first few cost hardly any page faults, as they do by default."""
    kept, given_back = (int(subprocess.run([sys.executable, '-c', FAULTS, how], cwd=ROOT,
                                           check=True, capture_output=True).stdout)
                        for how in ('keep', 'not'))
    assert kept < given_back / 4 + 1000  # huge pages, where there are any, make few of them
