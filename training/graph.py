"""Compiling a training step, and launching it as one CUDA graph; or neither, where that fails."""
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from training.errors import first_line

WARM_UP = 3  # plain steps of a size before it is recorded: for compiling and choosing algorithms
Step = Callable[[Tensor, Tensor, int, int, Tensor], None]


def if_it_works(fast: Callable, plain: Callable, kept: list[Tensor],
                print_line: Callable[[str], None]) -> Callable:
    """`fast`, or `plain` if the first call of `fast` fails, and then a line says why.

    The failure is taken to be the compiler's. Tensors that the call may have changed, `kept`, are
    put back.
    """
    chosen = None

    def run(*args: Any) -> Any:
        nonlocal chosen
        if chosen:
            return chosen(*args)
        before = [t.clone() for t in kept]
        try:
            result = fast(*args)
            chosen = fast
        except Exception as e:  # of any kind: what is no fault of the compiler's fails again
            for t, value in zip(kept, before, strict=True):
                t.copy_(value)
            cause = getattr(e, 'inner_exception', e)
            print_line('the step is not compiled, and is slower for it: '
                       f'{type(cause).__name__}: {first_line(cause)}')
            chosen = plain
            result = plain(*args)
        return result
    return run


def recorded(step: Step, print_line: Callable[[str], None]) -> Step:
    """`step`, recorded as a CUDA graph for each size of batch and replayed from then on.

    The step may change only tensors that stay where they are: parameters, momenta, totals. Its
    learning rate must be a tensor. If recording fails, a line says why, and steps run as they are.
    """
    seen, graphs, pool, works = Counter(), {}, torch.cuda.graph_pool_handle(), True

    def run(x: Tensor, y: Tensor, n: int, n_global: int, decay: Tensor) -> None:
        nonlocal works
        key = (x.shape, n, n_global)
        if key in graphs:
            graph, inputs = graphs[key]
            for to, source in zip(inputs, (x, y, decay), strict=True):
                to.detach().copy_(source)
            graph.replay()
            return
        step(x, y, n, n_global, decay)
        seen[key] += 1
        if works and seen[key] == WARM_UP:
            try:
                graphs[key] = record(step, x, y, n, n_global, decay, pool)
            except RuntimeError as e:
                first = e.__context__ if isinstance(e.__context__, RuntimeError) else e
                works = False
                print_line('the step is not launched as one CUDA graph, and is slower for it: '
                           + first_line(first))
    return run


def record(step: Step, x: Tensor, y: Tensor, n: int, n_global: int, decay: Tensor, pool: object
           ) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of the step, which does not run here, and the tensors that hold its inputs."""
    device = torch.cuda.current_device()
    memory = torch.cuda.get_device_properties(device).total_memory
    if 2 * torch.cuda.max_memory_allocated(device) > memory:
        raise RuntimeError('it would need more than the memory of the GPU')
    inputs = [t.detach().clone() for t in (x, y, decay)]
    stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    try:
        # thread_local: another thread may pin the next batch's memory meanwhile
        with torch.cuda.graph(graph, pool=pool, capture_error_mode='thread_local'):
            step(*inputs[:2], n, n_global, inputs[2])
    finally:
        torch.cuda.set_stream(stream)  # older torch stays on the recording's if that fails
    return graph, inputs
