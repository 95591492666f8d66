"""What several test files share."""
import json
from pathlib import Path

import cv2
import numpy as np
import torch

import engine

ROOT = Path(__file__).resolve().parents[1]
# A small network and the images of the fixture `work`, for cifar.py.
SMALL = ['--dataset', 'folder', '--dataroot', 'images', '--depth', '10', '--width', '0.25',
         '--batch_size', '16', '--epochs', '2']
# What may differ between the records of equal runs.
OWN = engine.FREE | {'epochs', 'train_time', 'test_time', 'commit'}


def load(run):
    """The checkpoint in a run's folder."""
    return torch.load(Path(run, 'model.pt7'), weights_only=True)


def log_of(run):
    """The records in a run's log."""
    lines = Path(run, 'log.txt').read_text().splitlines()
    return [json.loads(line.removeprefix('json_stats: ')) for line in lines]


def files(folder):
    """Every file under a folder with its content."""
    return {p.relative_to(folder): p.read_bytes() for p in Path(folder).rglob('*') if p.is_file()}


def same_run(a, b):
    """Asserts that two runs have the same parameters, momenta and log values, bit for bit."""
    one, two = load(a), load(b)
    assert one.get('scaler') == two.get('scaler')
    for part in ('params', 'adapters'):
        first, second = one.get(part, {}), two.get(part, {})
        assert first.keys() == second.keys()
        assert all(torch.equal(p, second[name]) for name, p in first.items()), part
    momenta = [[s['momentum_buffer'] for s in c['optimizer']['state'].values()] for c in (one, two)]
    assert len(momenta[0]) == len(momenta[1]) > 0
    assert all(map(torch.equal, *momenta))
    for r, s in zip(log_of(a), log_of(b), strict=True):
        assert {k: v for k, v in r.items() if k not in OWN} \
            == {k: v for k, v in s.items() if k not in OWN}


def place(rank=0, world=1):
    return engine.Place(torch.device('cpu'), rank, world, [])


def random_images(n, size=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def photo(height, width, seed=0):
    """A smooth colourful image, as photographs are, and not noise."""
    noise = random_images(1, 64, seed)[0, :height // 8 + 2, :width // 8 + 2]
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


def write_image(path, image):
    """Writes an RGB image, and the folders above it."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image[..., ::-1])


def draw(*shape, seed=0, dtype=torch.double):
    """Random numbers, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.double).to(dtype)


def fake_log(folder, errors, epochs=None, **more):
    """A log with these test errors, an epoch each; None: that epoch is not tested."""
    Path(folder).mkdir(parents=True)
    records = [{'epoch': e, 'epochs': epochs or len(errors), 'dataset': 'CIFAR10', 'dataroot': '.',
                'train_acc': 90., 'train_time': 3., 'network': 'WRN-16-1', 'ce_loss': 1., **more,
                **({} if error is None else {'test_acc': 100 - error})}
               for e, error in enumerate(errors, 1)]
    lines = [f'json_stats: {json.dumps(record)}\n' for record in records]
    Path(folder, 'log.txt').write_text(''.join(lines))


def shaken(network):
    """(f, params) with batch norm and biases that are not those of the start."""
    for i, p in enumerate(network[1].values()):
        if p.dim() == 1:
            p.data.copy_(draw(len(p), seed=i).abs() + 0.3)
    return network


def close(ours, expected):
    """Asserts that two networks returned the same logits and groups."""
    for a, b in zip((ours[0], *ours[1]), (expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * b.abs().max().item())
