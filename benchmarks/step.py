"""Times the training step of a run: objective, backward and SGD, on random images.

    python benchmarks/step.py --depth 16 --width 1 --dtype bfloat16       # options of cifar.py
    python benchmarks/step.py --teacher '--depth 16 --width 2' --beta 1e+3      # with a teacher
    python benchmarks/step.py --imagenet --teacher '--depth 34' --beta 1e+3 --batch_size 32
    python benchmarks/step.py --all --dtype bfloat16             # all runs of table 1, a row each
    python benchmarks/step.py --seeds 3                          # three seeds in one process

Timed in turns with a plain step of the same run: eager, NCHW, float32 (on a GPU TF32, as ours), SGD
that is not fused, the loss read after each step; medians. Without reading and cropping of images.
"""
import argparse
import shlex
import statistics
import sys
import time
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
    add('--seeds', default=1, type=int, help='in turn, each on its own CUDA stream: ms a seed')
    add('--profile', action='store_true', help="print torch's profile of --steps of our steps")
    return parser


def build(own: argparse.Namespace, argv: list[str], teacher: str) -> tuple[bool, int, list]:
    """Whether there is a GPU, the batch size, and two functions: our step and the plain one."""
    script, name = (imagenet, 'teacher_params') if own.imagenet else (cifar, 'teacher_id')
    parser = script.make_parser()
    opt = engine.parse(parser, [*argv, *([f'--{name}', 'random'] if teacher else [])], name)
    place, opt.seed = engine.start(opt), 0
    classes, size, n = 1000 if own.imagenet else 10, opt.image_size or 32, opt.batch_size
    f, params, network = utils.new_network(opt.net, vars(opt), classes)
    t = None
    if teacher:
        of_t = vars(parser.parse_args(shlex.split(teacher)))
        t_f, t_params, _ = utils.new_network(of_t['net'], of_t, classes, seed=1)
        t = t_f, {k: p.detach() for k, p in t_params.items()}
    adapters = utils.check_networks(opt, f, params, t, (size, size))
    x = torch.randn(n, 3, size, size).to(place.device)
    y = torch.randint(classes, (n,)).to(place.device)
    batch = x.contiguous(memory_format=torch.channels_last), y, torch.ones_like(x[0, 0, 0, 0])
    run = engine.Run(opt, place, params, adapters, network, {}, {})
    step, _ = engine.make_step(run, f, t and (t[0], engine.to_device(t[1], place.device, opt)))

    def plain(params: dict) -> dict:
        return {k: p.detach().to(place.device, copy=True).requires_grad_(p.requires_grad)
                for k, p in params.items()}
    params, adapters, taught = plain(params), plain(adapters), t and (t[0], plain(t[1]))
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
    seeds = [build(own, argv, teacher) for _ in range(own.seeds)]
    gpu, n_images, (_, plain_step) = seeds[0]
    streams = [torch.cuda.Stream() if gpu else None for _ in seeds]  # on the default: no capture

    def our_steps():
        for (_, _, (step, _)), stream in zip(seeds, streams, strict=True):
            with torch.cuda.stream(stream):
                step()

    def seconds(step, n=own.steps or (100 if gpu else 3)):
        torch.cuda.synchronize() if gpu else None
        start = time.perf_counter()
        for _ in range(n):
            step()
        torch.cuda.synchronize() if gpu else None
        return (time.perf_counter() - start) / n
    both = our_steps, plain_step
    for step in both:
        seconds(step, engine.WARM_UP + 2)  # compiles, captures, chooses algorithms
    if own.profile:
        with torch.profiler.profile() as p:
            seconds(our_steps)
        return '\n' + p.key_averages().table(f'self_{["cpu", "device"][gpu]}_time_total', 50)
    times = [[seconds(step) for step in both] for _ in range(own.repeats)]
    ours, plain = map(statistics.median, zip(*times, strict=True))
    ours /= own.seeds
    return f'{ours * 1e3:,.2f} | {n_images / ours:,.0f} | {plain * 1e3:,.2f} | {plain / ours:.2f} |'


def main(argv: list[str] | None = None) -> None:
    own, rest = (parser := make_parser()).parse_known_args(argv)
    if any(arg.startswith('--teacher_') for arg in rest):
        parser.error("a teacher is random here: --teacher names its options, such as '--width 2'")
    runs = {cell.run: (cell.options, tables.NETWORKS.get(cell.teacher, ''))
            for cell in tables.TABLES['1'].cells} if own.all else \
        {f'teacher {own.teacher}' if own.teacher else 'alone': ('', own.teacher)}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'
    print(f'{device}, torch {torch.__version__}: {shlex.join(rest)}\n')
    print('| run | step, ms | images/s | plain step, ms | plain / ours |\n' + '|---' * 5 + '|')
    for run, (options, teacher) in runs.items():
        print(f'| {run} |', measure(own, [*options.split(), *rest], teacher), flush=True)


if __name__ == '__main__':
    with engine.one_line_errors():
        main()
