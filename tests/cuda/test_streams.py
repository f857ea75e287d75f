"""What no emulator shows of the kernels: graphs, streams, threads, several cards. Part of ``make gpu``.

Ids contain "cuda", as the folder's name does, so they run with the tests of that device.
"""

import threading

import pytest
import torch
from cases import each_case

from normops._ops import BUILD_INFO

pytestmark = pytest.mark.skipif(not (BUILD_INFO["cuda"] and torch.cuda.is_available()), reason="needs a card")


def passes(sample, grad):
    output = sample.run()
    return (output, *torch.autograd.grad(output, [sample.input, *sample.parameters.values()], grad))


@each_case
def test_graph(case):
    """Both passes are captured, and a replay computes what is in the inputs by then."""
    sample = case.sample(device="cuda")
    for tensor in (sample.input, *sample.parameters.values()):
        tensor.requires_grad_()
    grad, stream = torch.randn_like(sample.input), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        passes(sample, grad)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = passes(sample, grad)
    with torch.no_grad():
        sample.input.copy_(torch.randn_like(sample.input))
    graph.replay()
    torch.cuda.synchronize()
    replayed = [result.clone() for result in results]
    assert all(torch.equal(a, b) for a, b in zip(replayed, passes(sample, grad), strict=True))


@pytest.mark.parametrize("length", [64, 16384])
def test_threads_and_streams(length):
    """Two host threads with a stream each, of which one needs much shared memory and the other little."""
    import normops.functional as F

    inputs = [torch.randn(64, size, device="cuda", requires_grad=True) for size in (length, 12288)]
    weights = [torch.randn(x.shape[1], device="cuda", requires_grad=True) for x in inputs]

    def run(x, weight):
        return torch.autograd.grad(F.layer_norm(x, weight.shape, weight).square().sum(), [x, weight])

    expected = [run(*pair) for pair in zip(inputs, weights, strict=True)]
    wrong = []

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                result = run(inputs[i], weights[i])
                torch.cuda.current_stream().synchronize()
                if not all(torch.equal(a, b) for a, b in zip(result, expected[i], strict=True)):
                    wrong.append(i)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _rank(rank, world, port, results):
    import normops

    torch.cuda.set_device(rank)
    torch.distributed.init_process_group("nccl", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    torch.manual_seed(0)
    whole = torch.randn(2 * world, 8, 5, 5, device="cuda")
    layer = normops.SyncBatchNorm(8).cuda()
    output = layer(whole[2 * rank : 2 * rank + 2])
    expected = torch.nn.functional.batch_norm(whole.double(), None, None, training=True)[2 * rank : 2 * rank + 2]
    results[rank] = (output.double() - expected).abs().max().item()
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two cards")
def test_two_cards():
    world = 2
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_rank, (world, 29555, results), nprocs=world)
        assert max(results.values()) < 1e-5
