"""Kills runs by SIGKILL at random moments, goes on with them, and compares with runs left alone.

    python tests/stress.py --kills 100 --seed 0        # what `make stress` does

cifar.py, imagenet.py and tables.py are each killed while they start, while they train and while
they write a checkpoint. What a run leaves at its end must be what the one left alone has: the same
parameters, bit for bit, and a log of one valid line an epoch, without any other file. Each moment
is printed; a seed gives the same moments again. Takes Linux.

Processes of cifar.py and imagenet.py are forked from this one, which has imported all that they do,
so that their starts take no time. Those of tables.py, and what it starts, are new ones.
"""
import os

if __name__ == '__main__':  # before torch is imported
    os.environ |= {'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path

import cv2
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
from helpers import photo  # noqa: E402

import cifar  # noqa: E402
import imagenet  # noqa: E402
from training.options import number  # noqa: E402

SMALL = '--dataset folder --dataroot images'
# A command of each script, and the part of the kills that it gets.
COMMANDS = {
    'cifar.py': (0.5, '--dataset Digits --train_fraction 0.05 --depth 10 --width 0.25 --epochs 12 '
                      '--epoch_step [4,8] --batch_size 16 --save_every 2 --test_every 4'),
    'imagenet.py': (0.4, f'{SMALL} --width 0.0625 --image_size 64 --epochs 10 --epoch_step [5] '
                         '--batch_size 8 --nthread 2 --save_every 2 --test_every 5'),
    'tables.py': (0.1, f'1 --row WRN-16-1:WRN-16-2 --method AT --seeds 1 {SMALL} --image_size 16 '
                       '--epochs 6 --epoch_step [4] --batch_size 16 --save_every 2')}
# Seconds up to the kill, at most, from the start, or from the first new checkpoint or file for one.
LATEST = {'start': {'tables.py': 10, None: 0.5}, 'training': {None: 1}, 'writing': {None: 0.03}}


def make_images(folder: Path) -> None:
    for i in range(3 * 24):
        part = folder / ('train' if i < 48 else 'test') / str(i % 3)
        part.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(part / f'{i:02}.png'), photo(72, 80, seed=i))


def start(script: str, folder: Path) -> BaseProcess:
    """A process that trains in a folder, or goes on there."""
    how = '--resume' if (folder / 'model.pt7').exists() else '--save'
    argv = [*COMMANDS[script][1].split(), '--folder' if script == 'tables.py' else how, str(folder)]
    process = multiprocessing.get_context('fork').Process(target=run, args=(script, argv, folder))
    process.start()
    return process


def run(script: str, argv: list[str], folder: Path) -> None:
    """The script, in this process; what it prints goes to a file beside its folder."""
    out = os.open(f'{folder}.out', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if script == 'tables.py':
        os.execv(sys.executable, [sys.executable, str(ROOT / script), *argv])
    {'cifar.py': cifar, 'imagenet.py': imagenet}[script].main(argv)


def children(process: BaseProcess) -> list[int]:
    tasks = Path(f'/proc/{process.pid}/task').glob('*/children')
    return [int(pid) for task in tasks for pid in task.read_text().split()]


def written(folder: Path, kind: str) -> set[tuple[Path, int]]:
    """The checkpoints, or files that become one, with the inodes that a new one has new."""
    pattern = {'start': '', 'training': 'model.pt7', 'writing': '*.tmp'}[kind]
    found = set()
    for path in folder.rglob(pattern) if pattern else ():
        try:
            found.add((path, path.stat().st_ino))
        except FileNotFoundError:
            continue
    return found


def kill_once(script: str, folder: Path, kind: str, delay: float, orphans: bool) -> bool:
    """Trains on, and kills that; whether it was not finished before. With `orphans` of tables.py
    only the driver is killed, and the run goes on."""
    before = written(folder, kind)
    process = start(script, folder)
    while process.is_alive() and kind != 'start' and written(folder, kind) <= before:
        time.sleep(0.002)
    time.sleep(delay)
    pids = [process.pid, *([] if orphans else children(process))]
    killed = process.is_alive()
    for pid in pids if killed else ():
        os.kill(pid, 9)
    process.join()
    assert killed or process.exitcode == 0, Path(f'{folder}.out').read_text()[-2000:]
    return killed


def finish(script: str, folder: Path) -> dict[str, tuple[dict, list[dict]]]:
    """Trains to the end; parameters and log of each run by its folder."""
    process = start(script, folder)
    process.join()
    assert process.exitcode == 0, Path(f'{folder}.out').read_text()[-2000:]
    runs = {}
    for path in folder.rglob('model.pt7'):
        lines = (path.parent / 'log.txt').read_text().splitlines()
        records = [json.loads(line.removeprefix('json_stats: ')) for line in lines]
        assert [r['epoch'] for r in records] == list(range(1, records[0]['epochs'] + 1))
        assert not list(path.parent.glob('*.tmp')), f'{path.parent}: temporary files are left'
        params = torch.load(path, weights_only=True)['params']
        runs[str(path.parent.relative_to(folder))] = params, records
    return runs


def same(runs: dict, others: dict) -> bool:
    def figures(records: list[dict]) -> list[dict]:
        places = ('save', 'resume', 'train_time', 'test_time', 'teacher_id')
        return [{k: v for k, v in r.items() if k not in places} for r in records]
    return runs.keys() == others.keys() and all(
        params.keys() == others[name][0].keys() and figures(records) == figures(others[name][1])
        and all(torch.equal(t, others[name][0][key]) for key, t in params.items())
        for name, (params, records) in runs.items())


def stress(script: str, kills: int, rng: random.Random) -> Counter:
    """Kills runs of a script this many times; how often while what."""
    undisturbed, counts, rounds = finish(script, Path('alone', script)), Counter(), 0
    while counts.total() < kills:
        rounds += 1
        folder, going = Path(f'killed-{rounds}', script), True
        folder.parent.mkdir(exist_ok=True)
        while going and counts.total() < kills:
            kind = rng.choice([*LATEST])
            latest = LATEST[kind].get(script, LATEST[kind][None])
            delay, orphans = rng.uniform(0, latest), rng.random() < 0.5
            going = kill_once(script, folder, kind, delay, orphans)
            counts[kind] += going
            print(f'{script}, run {rounds}: {"killed" if going else "finished"}, {kind} + '
                  f'{delay:.3f} s', flush=True)
        if not same(finish(script, folder), undisturbed):
            raise SystemExit(f'{folder} is not as the run left alone')
    print(f'{script}: {counts.total()} kills ({dict(counts)}), {rounds} runs as the one left alone',
          flush=True)
    return counts


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--kills', type=number(5, whole=True), default=100, help='in all')
    parser.add_argument('--seed', type=int, default=0, help='of the moments')
    opt, here = parser.parse_args(argv), Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            Path('alone').mkdir()
            cv2.setNumThreads(0)  # a forked process would wait for its threads
            make_images(Path('images'))
            for script, (part, _) in COMMANDS.items():
                rng = random.Random(f'{script} {opt.seed}')
                stress(script, max(1, round(part * opt.kills)), rng)
        finally:
            os.chdir(here)


if __name__ == '__main__':
    main()
