"""Times the training step of a run: objective, backward and SGD, on random images.

    python benchmarks/step.py --depth 16 --width 1 --dtype bfloat16       # options of cifar.py
    python benchmarks/step.py --teacher '--depth 16 --width 2' --beta 1e+3      # with a teacher
    python benchmarks/step.py --imagenet --teacher '--depth 34' --beta 1e+3 --batch_size 32
    python benchmarks/step.py --all --dtype bfloat16             # all runs of table 1, a row each

Timed in turns with a plain step of the same run: eager, NCHW, float32 (on a GPU TF32, as ours), SGD
that is not fused, the loss read after each step; medians. Reading and cropping of images is not in
it. With --imagenet the other options are those of imagenet.py.
"""
import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import cifar
import engine
import imagenet
import tables
import utils
from resnet import trainable


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('--imagenet', action='store_true')
    add('--teacher', default='', metavar='OPTIONS', help="its network, such as '--width 2'")
    add('--all', action='store_true', help='all runs of table 1')
    add('--repeats', default=5, type=int)
    add('--steps', type=int, help='of a repeat (default: 100 on a GPU, 3 on a CPU)')
    add('--profile', action='store_true', help="print torch's profile of --steps of our steps")
    return parser


def build(own: argparse.Namespace, argv: list[str], teacher: str) -> tuple[bool, int, list]:
    """Whether there is a GPU, the batch size, and two functions: our step and the plain one."""
    script, name = (imagenet, 'teacher_params') if own.imagenet else (cifar, 'teacher_id')
    parser = script.make_parser()
    opt = engine.parse(parser, [*argv, *([f'--{name}', 'random'] if teacher else [])], name)
    place, opt.seed = engine.start(opt), 0
    classes, size, n, t = 1000 if own.imagenet else 10, opt.image_size or 32, opt.batch_size, None
    f, params, network = utils.new_network(opt.net, vars(opt), classes)
    if teacher:
        of_t = vars(parser.parse_args(shlex.split(teacher)))
        t, t_params, _ = utils.new_network(of_t['net'], of_t, classes, seed=1)
        t_params = {k: p.detach() for k, p in t_params.items()}
    adapters = utils.check_networks(opt, utils.group_shapes(f, params, (size, size)),
                                    t and utils.group_shapes(t, t_params, (size, size)), params)
    x, y = (v.to(place.device) for v in (torch.randn(n, 3, size, size), torch.randint(classes, (n,))))
    batch = x.contiguous(memory_format=torch.channels_last), y, torch.ones_like(x[0, 0, 0, 0])
    run = engine.Run(opt, place, params, adapters, network, {}, {})
    on_device = t and (t, engine.to_device(t_params, place.device, run.params['fc.bias'].dtype))
    step = engine.make_step(run, f, on_device, engine.Means())

    def plain(params: dict) -> dict:
        return {k: p.detach().to(place.device, copy=True).requires_grad_(p.requires_grad)
                for k, p in params.items()}
    params, adapters, taught = plain(params), plain(adapters), t and (t, plain(t_params))
    optimizer = torch.optim.SGD([*trainable(params).values(), *adapters.values()], opt.lr,
                                momentum=0.9, weight_decay=opt.weight_decay)

    def plain_step() -> None:
        torch.backends.cudnn.benchmark = False  # torch's default
        optimizer.zero_grad()
        loss, _ = utils.objective(f, params, taught, x, y, opt, 1.0, adapters)
        loss.backward()
        optimizer.step()
        loss.item()
    return place.device.type == 'cuda', n, [lambda: step(*batch), plain_step]


def measure(own: argparse.Namespace, argv: list[str], teacher: str) -> str:
    """The last cells of a row, or the profile."""
    torch.compiler.reset()  # it gives up on what it has compiled eight times
    gpu, batch_size, steps = build(own, argv, teacher)

    def seconds(step: Callable, n: int = own.steps or (100 if gpu else 3)) -> float:
        start = time.perf_counter()
        for _ in range(n):
            step()
        torch.cuda.synchronize() if gpu else None
        return (time.perf_counter() - start) / n
    with torch.cuda.stream(torch.cuda.Stream() if gpu else None):  # on the default: no capture
        for step in steps:
            seconds(step, engine.WARM_UP + 2)  # compiles, captures, chooses algorithms
        if own.profile:
            with torch.profiler.profile() as p:
                seconds(steps[0])
            return '\n' + p.key_averages().table(f'self_{"device" if gpu else "cpu"}_time_total', 50)
        times = [[seconds(step) for step in steps] for _ in range(own.repeats)]
    ours, plain = map(statistics.median, zip(*times, strict=True))
    ratio = statistics.median(p / o for o, p in times)
    return f'{ours * 1e3:,.2f} | {batch_size / ours:,.0f} | {plain * 1e3:,.2f} | {ratio:.2f} |'


def main(argv: list[str] | None = None) -> None:
    own, rest = make_parser().parse_known_args(argv)
    runs = {f'teacher {own.teacher}' if own.teacher else 'alone': ('', own.teacher)}
    if own.all:
        runs = {cell.run: (cell.options, tables.NETWORKS.get(cell.teacher, ''))
                for cell in tables.TABLES['1'].cells}
    print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU', end=', ')
    print(f'torch {torch.__version__}: {shlex.join(rest)}\n')
    print('| run | step, ms | images/s | plain step, ms | plain / ours |\n' + '|---' * 5 + '|')
    for run, (options, teacher) in runs.items():
        print(f'| {run} |', measure(own, [*options.split(), *rest], teacher), flush=True)


if __name__ == '__main__':
    with engine.one_line_errors():
        main()
