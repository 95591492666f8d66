"""Times the training step of a run: objective, backward and SGD, on random images.

    python benchmarks/step.py --depth 16 --width 1 --dtype bfloat16       # options of cifar.py
    python benchmarks/step.py --teacher '--depth 16 --width 2' --beta 1e+3      # with a teacher
    python benchmarks/step.py --imagenet --teacher '--depth 34' --beta 1e+3 --batch_size 32
    python benchmarks/step.py --all --dtype bfloat16              # all runs of table 1, a row each
    python benchmarks/step.py --profile                          # where the time of our steps goes

Timed in turns with a plain step of the same run: eager, NCHW, float32 (on a GPU TF32, as ours), SGD
that is not fused, the loss read after each step. Medians over the repeats. Reading and cropping of
images is not in it. With --imagenet the other options are those of imagenet.py.
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
from resnet import Params, trainable


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add('--imagenet', action='store_true', help='a step of imagenet.py')
    add('--teacher', default='', metavar='OPTIONS', help="its network, such as '--width 2'")
    add('--all', action='store_true', help='all runs of table 1')
    add('--repeats', default=5, type=int)
    add('--steps', type=int, help='of a repeat (default: 100 on a GPU, 3 on a CPU)')
    add('--profile', action='store_true', help="print torch's profile of --steps of our steps")
    return parser


def build(own: argparse.Namespace, argv: list[str], teacher: str
          ) -> tuple[bool, int, list[Callable[[], None]]]:
    """Whether there is a GPU, the batch size, and our step and the plain one."""
    script, name = (imagenet, 'teacher_params') if own.imagenet else (cifar, 'teacher_id')
    parser = script.make_parser()
    opt = engine.parse(parser, [*argv, *([f'--{name}', 'random'] if teacher else [])], name)
    place, opt.seed = engine.start(opt), 0
    classes, size, t = 1000 if own.imagenet else 10, opt.image_size or 32, None
    f, params, network = utils.new_network(opt.net, vars(opt), classes)
    if teacher:
        settings = vars(parser.parse_args(shlex.split(teacher)))
        t, t_params, _ = utils.new_network(settings['net'], settings, classes, seed=1)
        t_params = {k: p.detach() for k, p in t_params.items()}
    adapters = utils.check_networks(opt, utils.group_shapes(f, params, (size, size)),
                                    t and utils.group_shapes(t, t_params, (size, size)), params)
    x = torch.randn(opt.batch_size, 3, size, size, device=place.device)
    y = torch.randint(classes, (opt.batch_size,), device=place.device)
    x_ours, decay = x.contiguous(memory_format=torch.channels_last), torch.ones_like(x[0, 0, 0, 0])
    run = engine.Run(opt, place, params, adapters, network, {}, {})
    dtype = torch.double if opt.dtype == 'double' else torch.float
    step = engine.make_step(run, f, t and (t, engine.to_device(t_params, place.device, dtype)),
                            engine.Means())

    def plain(params: Params) -> Params:
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
    return place.device.type == 'cuda', opt.batch_size, [lambda: step(x_ours, y, decay), plain_step]


def measure(own: argparse.Namespace, argv: list[str], teacher: str) -> str:
    """The last cells of a row, or the profile."""
    torch.compiler.reset()  # it gives up on what it has compiled eight times
    gpu, batch_size, steps = build(own, argv, teacher)
    n = own.steps or (100 if gpu else 3)

    def seconds(step: Callable[[], None], n: int = n) -> float:
        start = time.perf_counter()
        for _ in range(n):
            step()
        torch.cuda.synchronize() if gpu else None
        return (time.perf_counter() - start) / n
    with torch.cuda.stream(torch.cuda.Stream() if gpu else None):  # on the default: no capture
        for step in steps:
            seconds(step, engine.WARM_UP + 2)  # compiles, captures, chooses algorithms
        if own.profile:
            with torch.profiler.profile() as profiler:
                seconds(steps[0])
            by = 'self_device_time_total' if gpu else 'self_cpu_time_total'
            return '\n' + profiler.key_averages().table(by, 50, max_name_column_width=90)
        times = [[seconds(step) for step in steps] for _ in range(own.repeats)]
    ours, plain = (statistics.median(t) for t in zip(*times, strict=True))
    ratio = statistics.median(p / o for o, p in times)
    return f'{ours * 1e3:,.2f} | {batch_size / ours:,.0f} | {plain * 1e3:,.2f} | {ratio:.2f} |'


def main(argv: list[str] | None = None) -> None:
    own, rest = make_parser().parse_known_args(argv)
    runs = {f'teacher {own.teacher}' if own.teacher else 'alone': ('', own.teacher)}
    if own.all:
        runs = {cell.run: (cell.options, tables.NETWORKS.get(cell.teacher, ''))
                for cell in tables.TABLES['1'].cells}
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f'{devices}, torch {torch.__version__}: {shlex.join(rest)}\n\n'
          '| run | step, ms | images/s | plain step, ms | plain / ours |\n' + '|---' * 5 + '|')
    for run, (options, teacher) in runs.items():
        print(f'| {run} |', measure(own, [*options.split(), *rest], teacher), flush=True)


if __name__ == '__main__':
    with engine.one_line_errors():
        main()
