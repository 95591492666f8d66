"""Random damage to good files: what reads them gives a result, or refuses them with one line.

    python tests/fuzz.py --seconds 600 --seed 0
"""
import argparse
import io
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers import ROOT
from hostile import READERS, Outcome, encoded, line, outcome, weights

from training import bounded
from weights import InputError, load_model

BATCH = 50  # files for one child


def good_files():
    buffer = io.BytesIO()
    torch.save({'params': weights(), 'epoch': 1, 'options': {'lr': 0.1}}, buffer)
    return {'.pt7': buffer.getvalue(),
            '.hkl': (ROOT / 'tests/hkl/tiny-resnet18-hickle5.hkl').read_bytes(),
            '.txt': line(at_losses=[1.5, 2], network='WRN-16-1') * 3,
            '.jpg': encoded(), '.png': encoded('.png')}


def damaged(content, rng):
    """A file cut, or with bytes changed, taken out, put in or repeated, mostly near its ends."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        size = len(content)
        near = rng.choice((size, size, min(size, 1000)))
        place = rng.choice((rng.randrange(near + 1), size - rng.randrange(near + 1)))
        length = rng.choice((1, 1, 4, 8, 50))
        new = rng.choice((rng.randbytes(length), bytes(length), b'\xff' * length,
                          bytes(content[place:place + length]) * 2))
        content[place:place + rng.choice((0, length, length, length))] = new
    return bytes(content[:rng.randrange(len(content) + 1)] if rng.random() < 0.1 else content)


def read_all(paths):
    """Reads files without the child of `read_bounded`, as this is in one already."""
    bounded.why_unreadable = lambda read, path: ''
    for path in paths:
        try:
            READERS[path.suffix](path)
        except InputError as e:
            assert Outcome('InputError', str(e), 0, 0).finding() is None


def fuzz(seconds, seed, folder):
    """Reads damaged files for that long; prints what should not have come of one, and keeps it."""
    good, n, found, path = good_files(), 0, 0, folder / 'good.pt7'
    path.write_bytes(good['.pt7'])
    load_model(path)  # which imports what each child would else import
    end = time.time() + seconds
    while time.time() < end:
        paths = []
        for i in range(n, n + BATCH):
            rng = random.Random(f'{seed} {i}')
            suffix = rng.choice([*good])
            paths.append(folder / f'{seed}-{i}{suffix}')
            paths[-1].write_bytes(damaged(good[suffix], rng))
        together = outcome(read_all, paths)
        for path in paths:
            alone = outcome(READERS[path.suffix], path) if together.kind != 'result' else None
            if alone and alone.finding():
                print(f'{path}: {alone.finding()}', flush=True)
                found += 1
            else:
                path.unlink()
        n += BATCH
    print(f'seed {seed}: {n} files in {seconds} s, {found} findings')
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seconds', type=float, default=600)
    parser.add_argument('--seed', type=int, default=0)
    opt = parser.parse_args()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    raise SystemExit(fuzz(opt.seconds, opt.seed, Path(tempfile.mkdtemp(prefix='fuzz'))) > 0)


if __name__ == '__main__':
    main()
