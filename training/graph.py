"""Launching a training step as one CUDA graph."""
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3  # plain steps of a size before it is recorded: for compiling and choosing algorithms
Step = Callable[[Tensor, Tensor, int, int, Tensor], None]


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
                           + str(first).strip().partition('\n')[0])
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
