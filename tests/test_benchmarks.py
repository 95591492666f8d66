"""The benchmarks run, and measure what they say: on few images, for what they print."""
import shutil
import sys

import common
import pytest
import torch
from helpers import SMALL, random_images, rows_of

from training.log import read_log
from utils import wide_resnet


def numbers(cells):
    return [float(cell.replace(',', '')) for cell in cells]


@pytest.mark.slow
def test_step_benchmark_runs(monkeypatch, capsys):
    import step
    monkeypatch.setattr(common, 'N_IMAGES', {'cpu': (16, 8)})
    monkeypatch.setattr(common, 'N_BATCHES', {'cpu': 1})
    monkeypatch.setattr(step, 'best_rates', lambda device, dtype: (1e11, 1e10))
    monkeypatch.setattr(step, 'ROW', ['WRN-16-1', 'WRN-16-1_F-ActT_WRN-16-2'])
    monkeypatch.setattr('sys.argv', ['x', '--batch_size', '8', '--repeats', '1', '--ngpu', '0'])
    step.main()
    out = capsys.readouterr().out
    rows = rows_of(out)
    assert [row[0] for row in rows] == step.ROW and 'start-up' in out
    assert all(min(numbers(row[1:6])) > 0 for row in rows)
    assert all(':' in cell for row in rows for cell in row[6:])
    monkeypatch.setattr('sys.argv', [*sys.argv, '--run', 'WRN-16-1', '--profile'])
    step.main()
    out = capsys.readouterr().out
    assert 'aten::mkldnn_convolution' in out and 'start-up' not in out and 'F-ActT' not in out


@pytest.mark.slow
def test_images_benchmark_runs(tmp_path, monkeypatch, capsys):
    import cv2
    import images
    monkeypatch.setattr(images, 'best_rates', lambda device, dtype: (1e11, 1e10))
    folder = tmp_path / 'images' / 'n0'
    folder.mkdir(parents=True)
    for i, image in enumerate(random_images(3, 80)):
        cv2.imwrite(str(folder / f'{i}.jpg'), image)
    monkeypatch.setattr('sys.argv', [
        'x', '--images', str(tmp_path / 'images'), '--steps', '1', '--repeats', '1', '--ngpu', '0',
        '--batch_size', '2', '--width', '0.0625', '--image_size', '64'])
    threads = torch.get_num_threads()
    images.main()
    torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert 'AT from ResNet-34, batch 2' in out and 'pipeline, one worker, 3 images: ours' in out


@pytest.mark.slow
def test_seeds_benchmark_runs(monkeypatch, capsys):
    """And finds that vmap computes what single steps do: it raises otherwise."""
    import seeds
    monkeypatch.setattr('sys.argv', [
        'x', '--run', 'WRN-16-1_AT+KD_WRN-16-2', '--seeds', '2', '--batch_size', '8',
        '--repeats', '1', '--ngpu', '0'])
    seeds.main()
    rows = rows_of(capsys.readouterr().out)
    assert len(rows) == 2 and all(min(numbers(row[1:])) > 0 for row in rows)


def accuracy_pairs(work, monkeypatch, *argv):
    """Runs accuracy.py; its logs, plain and fast, seed by seed."""
    import accuracy
    torch.save({'params': wide_resnet(10, 0.5, 3, seed=2)[1]}, 'teacher.pt7')
    monkeypatch.setattr('sys.argv', ['x', '--folder', 'p', '--seeds', '2', *SMALL, '--dataroot',
                                     'images', '--teacher_id', 'teacher.pt7', '--beta', '1e3',
                                     '--lr', '0.001', '--no-check_teacher', *argv])
    accuracy.main()
    return [[read_log(work / 'p' / f'{way}_seed{seed}' / 'log.txt') for way in ('plain', 'fast')]
            for seed in (0, 1)]


def test_accuracy_benchmark_pairs_runs_from_the_same_start(work, monkeypatch, capsys):
    pairs = accuracy_pairs(work, monkeypatch)
    *_, header, _, first, _, mean, verdict = capsys.readouterr().out.splitlines()
    assert header == '| seed | plain, % | fast, % | difference |' and first.startswith('| 0 | ')
    assert 'standard error' in mean and 'two standard errors' in verdict
    for plain, fast in pairs:
        assert len(plain) == len(fast) == 2
        assert 'at_losses' in fast[0] and 'at_losses' not in plain[0]
        assert plain[0]['train_loss'] == pytest.approx(fast[0]['train_loss'], rel=1e-4)
    losses = [plain[0]['train_loss'] for plain, _ in pairs]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    assert accuracy_pairs(work, monkeypatch) == pairs  # what is there is not run again
    assert 'epoch' not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('g++'), reason='needs a C++ compiler')
def test_accuracy_benchmark_pairs_compiled_bfloat16_with_plain_float32(work, monkeypatch):
    torch.compiler.reset()
    for plain, fast in accuracy_pairs(work, monkeypatch, '--dtype', 'bfloat16', '--compile'):
        assert (plain[0]['dtype'], plain[0]['compile']) == ('float', False)
        assert (fast[0]['dtype'], fast[0]['compile']) == ('bfloat16', True)
        assert plain[0]['train_loss'] == pytest.approx(fast[0]['train_loss'], rel=2e-2)
        assert plain[0]['train_loss'] != fast[0]['train_loss']
