"""imagenet.py: reading images, and training from end to end, on tiny images and networks."""
import contextlib
import errno
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms.functional as TF
from helpers import CPU, ROOT, load, photo, random_images, same, stop_at_step
from PIL import Image

import imagenet as script
from resnet import imagenet_resnet
from training import workers
from training.distributed import Rank
from training.errors import RunError, status_and_message
from training.images import read_image
from training.log import read_log

DATA = ['--imagenetpath', 'data', '--image_size', '64', '--batch_size', '8', '--nthread', '0']
SMALL = [*DATA, '--width', '0.0625', '--epochs', '2']


@pytest.fixture
def data(tmp_path, monkeypatch):
    """27 training and 13 validation JPEGs of two classes, of several sizes, in the folder data/."""
    script.listings.cache_clear()  # of another test's data/
    for part, n in (('train', 27), ('val', 13)):
        for c in range(2):
            (tmp_path / 'data' / part / f'n{c}').mkdir(parents=True)
        for i in range(n):
            path = tmp_path / 'data' / part / f'n{i % 2}' / f'{i:03}.JPEG'
            cv2.imwrite(str(path), photo(40 + 3 * i, 50, i))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def main(*argv):
    script.main([*SMALL, *map(str, argv)])


def loaded(*argv, rank=CPU):
    opt = script.make_parser().parse_args([*SMALL, *argv])
    script.fill_defaults(opt)
    return script.ImageLoader(opt, rank)


# ---------------------------------------------------------------------------- images

@pytest.mark.parametrize('size', [(300, 400), (500, 375), (224, 224), (260, 900), (90, 120)])
def test_validation_pixels_are_torchvisions(size):
    image = photo(*size)
    expected = TF.center_crop(TF.resize(Image.fromarray(image), 256, antialias=True), 224)
    difference = np.abs(script.centre(image, 224).astype(int) - np.asarray(expected))
    assert difference.shape == (224, 224, 3) and difference.mean() < 0.1


def test_crop_boxes_cover_what_they_should():
    rng = np.random.default_rng(0)
    boxes = np.array([script.crop_box(rng, 300, 400) for _ in range(4000)])
    top, left, h, w = boxes.T
    area, ratio = h * w / (300 * 400), w / h
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + h <= 300).all() and (left + w <= 400).all()
    assert 0.075 < area.min() < 0.1 and 0.95 < area.max() <= 1
    assert 0.74 < ratio.min() < 0.77 and 1.3 < ratio.max() < 1.35
    assert script.crop_box(rng, 10, 400)[2] == 10  # there is no part of such a shape
    assert script.crop_box(rng, 400, 10)[3] == 10


def test_grey_cmyk_oriented_and_foreign_formats(tmp_path):
    rgb = photo(40, 60)
    Image.fromarray(rgb).convert('L').save(tmp_path / 'grey.jpg', quality=95)
    grey = read_image(tmp_path / 'grey.jpg')
    assert grey.shape == (40, 60, 3) and (grey[..., 0] == grey[..., 2]).all()
    Image.fromarray(rgb).convert('CMYK').save(tmp_path / 'cmyk.jpg', quality=95)
    with Image.open(tmp_path / 'cmyk.jpg') as image:
        expected = np.asarray(image.convert('RGB')).astype(int)
    assert np.abs(read_image(tmp_path / 'cmyk.jpg') - expected).mean() < 3
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90°
    Image.fromarray(rgb).save(tmp_path / 'turned.jpg', exif=exif)
    assert read_image(tmp_path / 'turned.jpg').shape == (40, 60, 3)
    Image.fromarray(rgb).save(tmp_path / 'png.JPEG', format='PNG')  # ImageNet has one
    np.testing.assert_array_equal(read_image(tmp_path / 'png.JPEG'), rgb)
    Image.fromarray(rgb).save(tmp_path / 'rgb.jpg', quality=95)
    with Image.open(tmp_path / 'rgb.jpg') as image:
        assert np.abs(read_image(tmp_path / 'rgb.jpg') - np.asarray(image).astype(int)).max() <= 1


def whole(number):
    return number == pytest.approx(round(number))


@pytest.mark.parametrize('content', [b'', b'no image', None], ids=['empty', 'text', 'truncated'])
def test_damaged_images_stop_the_run_or_are_skipped_and_counted(data, refused, content):
    path = data / 'data' / 'train' / 'n1' / '001.JPEG'
    path.write_bytes(path.read_bytes()[:300] if content is None else content)
    refused(script.main, [*SMALL, '--save', 'a', '--nthread', '1'],
            'data/train/n1/001.JPEG: not an image')
    main('--save', 'b', '--skip_corrupt', '--epochs', '1')
    record = read_log(Path('b/log.txt'))[0]
    assert record['train_skipped'] == 1 and 'test_skipped' not in record
    assert whole(record['train_acc'] / 100 * 26)


def test_a_batch_of_damaged_images_counts_for_nothing(data, refused):
    for path in (data / 'data' / 'train').glob('*/*'):
        path.write_bytes(b'')
    batches = list(loaded('--skip_corrupt').train_batches(0))
    counts = [(len(y), n, n_global) for _, y, n, n_global in batches]
    assert counts == [(1, 0, 8)] * 3 + [(1, 0, 3)]
    refused(script.main, [*SMALL, '--skip_corrupt'], 'none of the images could be read')


@pytest.mark.parametrize('signum, error', [
    (signal.SIGKILL, 'worker'),
    pytest.param(signal.SIGSTOP, 'have not answered for 2 s', marks=pytest.mark.slow)])
def test_a_worker_that_is_lost_ends_the_run(data, monkeypatch, signum, error):
    monkeypatch.setattr(sys, 'unraisablehook', sys.unraisablehook)
    monkeypatch.setattr(workers, 'TIMEOUT', 2)
    loader = loaded('--nthread', '2')
    with pytest.raises((RuntimeError, RunError), match=error) as e, contextlib.closing(loader):
        for epoch in range(1000):
            for _ in loader.train_batches(epoch):
                children = multiprocessing.active_children()
                os.kill(children[0].pid, signum)
    assert status_and_message(e.value)[0] == 1
    assert not any(child.is_alive() for child in children)


def test_workers_that_cannot_be_started(data, monkeypatch):
    real, started = os.fork, []

    def fork():
        started.append(1)
        if len(started) > 1:
            raise BlockingIOError(errno.EAGAIN, 'no more processes')
        return real()
    monkeypatch.setattr(os, 'fork', fork)
    monkeypatch.setattr(sys, 'unraisablehook', sys.unraisablehook)
    loader = loaded('--nthread', '2')
    with pytest.raises(RunError, match=r'does not start, or has ended: .*no more processes'), \
            contextlib.closing(loader):
        list(loader.train_batches(0))
    assert not multiprocessing.active_children()


def test_jitter_is_that_of_fb_resnet_torch(data):
    """One image at a time, one operation after the other, as the Lua code has it."""
    rng = np.random.default_rng(0)
    images = rng.random((6, 5, 4, 3))
    draws = np.stack([np.concatenate([rng.permutation(3), rng.uniform(0.6, 1.4, 3),
                                      rng.normal(0, 0.1, 3)]) for _ in range(6)])
    loader = loaded()
    ours = script.jitter(torch.from_numpy(images).float(), torch.from_numpy(draws).float(),
                         loader.grey, loader.colours)
    for x, d, y in zip(images, draws, ours.numpy(), strict=True):
        for operation in d[:3].astype(int):
            grey = x @ np.array([0.299, 0.587, 0.114])
            target = (np.zeros_like(x), np.full_like(x, grey.mean()),
                      np.repeat(grey[..., None], 3, 2))[operation]
            alpha = d[3 + operation]
            x = alpha * x + (1 - alpha) * target
        vectors = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140],
                            [-0.5836, -0.6948, 0.4203]])
        x = x + vectors @ (d[6:] * [0.2175, 0.0188, 0.0045])
        np.testing.assert_allclose(y, x, atol=1e-5)


# ---------------------------------------------------------------------------- batches

def epoch_of(data, epoch, start=0):
    """Every image that counts, with its label, in the order of its batches."""
    return [(xs[i], int(ys[i])) for xs, ys, n, _ in data.train_batches(epoch, start)
            for i in range(n)]


@pytest.mark.parametrize('augment', ['none', 'fb'])
def test_draws_follow_from_seed_epoch_and_index_alone(data, augment):
    """On one rank that reads in its own process, and on two with two workers each."""
    argv = ['--augment', augment]
    before = len(multiprocessing.active_children())
    alone = epoch_of(loaded(*argv), 1)
    assert len(alone) == 27 and len(multiprocessing.active_children()) == before
    ranks = [loaded(*argv, '--nthread', '2', rank=Rank(CPU.device, r, 2)) for r in range(2)]
    parts = [list(rank.train_batches(1)) for rank in ranks]
    assert len(multiprocessing.active_children()) == before + 4
    for rank in ranks:
        rank.close()
    together = [x for batches in zip(*parts, strict=True) for xs, _, n, _ in batches
                for x in xs[:n]]
    assert all(torch.equal(a, b) for (a, _), b in zip(alone, together, strict=True))
    for other in (epoch_of(loaded(*argv), 2), epoch_of(loaded(*argv, '--seed', '1'), 1)):
        assert not torch.equal(alone[0][0], other[0][0])


def test_an_epoch_goes_on_where_it_stopped(data):
    everything = epoch_of(loaded(), 0)
    rest = epoch_of(loaded(), 0, start=2)
    assert len(rest) == 11
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(everything[16:], rest, strict=True))


def test_normalised_channels_last(data):
    images = torch.from_numpy(random_images(2, 8))
    x, y = loaded().to_device(images, torch.tensor([0, 1]), torch.zeros(2, 9), False)
    expected = TF.normalize(images.permute(0, 3, 1, 2) / 255, script.MEAN, script.STD)
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-5)
    assert x.is_contiguous(memory_format=torch.channels_last) and y.tolist() == [0, 1]


@pytest.mark.parametrize('world', [1, 2, 3, 4, 16])
def test_validation_counts_every_image_once(data, world):
    ranks = [loaded(rank=Rank(CPU.device, r, world)) for r in range(world)]
    seen = [y for rank in ranks for _, ys in rank.test_batches() for y in ys.tolist()]
    assert sorted(seen) == [0] * 7 + [1] * 6


# ---------------------------------------------------------------------------- training

def save_teacher(path, depth=18, width=0.125, classes=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({'params': imagenet_resnet(depth, width, classes, seed=5)[1]}, path)


def test_published_flags_and_defaults():
    published = {
        'dtype': 'float', 'imagenetpath': None, 'teacher_params': None,
        'batch_size': 256, 'lr': 0.1, 'epochs': 100, 'weight_decay': 1e-4,
        'epoch_step': [30, 60, 90], 'lr_decay_ratio': 0.1, 'resume': None, 'temperature': 4,
        'alpha': 0, 'beta': 0, 'cuda': False, 'save': None, 'ngpu': 1, 'gpu_id': None,
        'at_groups': [2, 3]}
    opt = script.make_parser().parse_args([])
    script.fill_defaults(opt)
    assert vars(opt) == vars(opt) | published
    assert (opt.depth, opt.width) == (18, 1)
    assert script.make_student(opt, 10).name == 'ResNet-18'
    assert (opt.crop, opt.freeze, opt.fix_batch_norm) == ('area', 0, False)


def test_torchvision_without_a_network(data, refused, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError('no network')
    monkeypatch.setattr('urllib.request.urlopen', no_network)
    monkeypatch.setenv('TORCH_HOME', str(data / 'torch'))
    refused(script.main, [*SMALL, '--teacher_params', 'torchvision', '--beta', '1'],
            'torchvision could not download')


@pytest.mark.parametrize('method', [
    ['--beta', '1000'], ['--alpha', '0.9', '--beta', '10', '--augment', 'fb']])
def test_stopped_in_an_epoch_and_resumed_is_bit_equal(data, monkeypatch, method):
    """Read by the process itself at first, and by two workers when it goes on."""
    save_teacher(data / 'logs' / 't' / 'model.pt7')
    argv = ['--teacher_params', 't', *method, '--lr', '0.01']
    main('--save', 'whole', *argv)
    stop_at_step(monkeypatch, 6, signal.SIGTERM)  # the second of four steps of the second epoch
    with pytest.raises(SystemExit, match='143'):
        main('--save', 'parts', *argv)
    monkeypatch.undo()
    monkeypatch.chdir(data)
    assert load('parts/model.pt7')['step'] == 2
    script.main(['--resume', 'parts', '--nthread', '2', '--no-check_teacher'])
    assert same(load('whole/model.pt7'), load('parts/model.pt7'))
    record = read_log(Path('parts/log.txt'))[-1]
    assert len(record['at_losses']) == 2 and record['at_groups'] == [2, 3]
    assert 'test_acc5' not in record and ('kd_loss' in record) == ('--alpha' in method)


def test_teacher_is_tested_unless_told_otherwise(data, capsys):
    save_teacher(data / 'logs' / 't' / 'model.pt7', depth=34)
    argv = ['--teacher_params', 't', '--beta', '1', '--epochs', '1']
    main('--save', 'a', *argv)
    assert 'teacher t: ResNet-34-0.125' in capsys.readouterr().out
    main('--save', 'b', *argv, '--no-check_teacher')
    assert 'teacher' not in capsys.readouterr().out


def test_evaluate_and_export(data, capsys):
    main('--save', 'a', '--epochs', '1', '--lr', '0.001', '--export', 'first.hkl')
    record = read_log(Path('a/log.txt'))[0]
    expected = f'test error {100 - record["test_acc"]:.2f}% on 13 images, loss '
    Path('data').rename('moved')  # to convert a file takes no data
    for suffix in ('.hkl', '.pth'):
        script.main(['--evaluate', 'a', '--export', f'x{suffix}', '--export_format', 'folded'])
        assert f'x{suffix}: ResNet-18-0.0625, ' in capsys.readouterr().out
    Path('moved').rename('data')
    for argv in (['a'], ['--teacher_params', 'first.hkl'], ['x.hkl'], ['x.pth']):
        capsys.readouterr()
        script.main([*DATA, '--evaluate', *argv])
        before, found, loss = capsys.readouterr().out.partition(expected)
        assert found and float(loss) == pytest.approx(record['test_loss'], abs=2e-4), before


def test_export_for_torchvision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    f, params = imagenet_resnet(18, 1, 1000)
    torch.save({'params': params}, 'model.pt7')
    script.main(['--evaluate', 'model.pt7', '--export', 'resnet18.pth'])
    module = torchvision.models.resnet18()
    module.load_state_dict(torch.load('resnet18.pth', weights_only=True))
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(module.eval()(x), f(x, params, False)[0], rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------------------- processes

ENVIRONMENT = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': f'{ROOT}:{ROOT / "tests"}'}


def start(*argv, **kwargs):
    return subprocess.Popen([sys.executable, *map(str, argv)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
                            start_new_session=True, **kwargs)


def kill(*processes):
    """Ends processes and all that they started."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def two_nodes(port, *argv):
    """torchrun on two nodes of one process each, both on this machine."""
    return [start('-m', 'torch.distributed.run', '--nnodes', '2', '--nproc_per_node', '1',
                  '--node_rank', rank, '--master_addr', '127.0.0.1', '--master_port', port,
                  ROOT / 'imagenet.py', *SMALL, *argv) for rank in range(2)]


def snapshot_inside_an_epoch(folder, to):
    """Copies the first checkpoint that was written inside an epoch: what a machine that fails
    there leaves."""
    for _ in range(20000):
        if (folder / 'model.pt7').exists():
            state = load(folder / 'model.pt7')
            if 'step' in state:
                to.mkdir()
                torch.save(state, to / 'model.pt7')
                return state
        time.sleep(0.005)
    raise AssertionError('there was none')


@pytest.mark.slow
def test_torchrun_on_two_nodes_and_resumed_on_one(data):
    """One process trains what is left of two nodes' epoch; nothing is repeated or skipped."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    nodes = two_nodes(port, '--save', 'a', '--lr', '0.001', '--save_every', '5',
                      '--batch_size', '4')
    try:
        state = snapshot_inside_an_epoch(data / 'a', data / 'b')
        errors = [node.communicate(timeout=120)[1] for node in nodes]
    finally:
        kill(*nodes)
    assert [node.returncode for node in nodes] == [0, 0], errors
    records = read_log(Path('a/log.txt'))
    assert [r['epoch'] for r in records] == [1, 2] and records[0]['device'].startswith('2 × CPU')
    for r in records:  # 27 training and 13 validation images, each once
        assert whole(r['train_acc'] / 100 * 27) and whole(r['test_acc'] / 100 * 13)
        assert 'train_skipped' not in r and 'test_skipped' not in r
    assert (state['step'], state['sums']['count']) == (5, 20)
    script.main(['--resume', 'b'])
    records = read_log(Path('b/log.txt'))
    assert whole(records[0]['train_acc'] / 100 * 27)
    assert 'train_skipped' not in records[0] and load('b/model.pt7')['epoch'] == 2


@pytest.mark.parametrize('signum', [
    signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_signals_reach_processes_that_the_script_started(data, signum):
    code = ('import sys, torch, imagenet\n'
            'from training import distributed\n'
            'distributed.choose_devices = lambda opt: [torch.device("cpu")] * 2\n'
            'if __name__ == "__main__": imagenet.main(sys.argv[1:])\n')
    Path('two.py').write_text(code)
    process = start('two.py', *SMALL, '--save', 'a', '--epochs', '500', '--lr', '0.001')
    try:
        for _ in range(1200):
            if (data / 'a' / 'model.pt7').exists():
                break
            time.sleep(0.05)
        process.send_signal(signum)
        out, err = process.communicate(timeout=60)
    finally:
        kill(process)
    assert process.returncode == 128 + signum, err
    assert 'stopped: continue with --resume a' in out and not err
    assert load('a/model.pt7')['epoch'] == len(read_log(Path('a/log.txt'))) >= 1
