"""``python -m tests.benchmarks.simulated``: one server that plays any number of nodes whose steps take no time.

The messages are real, and so is gRPC; only the computing is left out.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

from node import events, rpc, spec, wire
from node.home import home
from node.trust import Trust
from tandem.v1 import node_pb2

SECONDS_PER_POSITION = 1e-6
SERVICE = node_pb2.DESCRIPTOR.services_by_name["Node"].full_name


async def work(requests: Any, context: Any) -> AsyncIterator[node_pb2.WorkEvent]:
    """``Node.Work``: each call is a node of its own, which answers each request at once."""
    del context
    async for message in requests:
        match message.WhichOneof("body"):
            case "open":
                yield node_pb2.WorkEvent(opened=node_pb2.Opened(job="job"))
            case "form_ring":
                plan = message.form_ring
                yield _said(events.Joined(plan.rank, plan.size, 0.0), generation=plan.generation)
            case "requests":
                for data in message.requests.requests:
                    _, request = wire.decode_request(data)
                    if answers := _answers(request):
                        yield _said(*answers)


def _answers(request: spec.Request) -> list[events.Event]:
    if isinstance(request, spec.TrainStep):
        share = request.share
        seconds = share.positions * SECONDS_PER_POSITION
        done = events.StepDone(share.step, 1.0, 1, 1e-5, 1.0, seconds, seconds, 0.0, 1, share.positions)
        return [events.ComputeStarted(share.step), events.ReduceEntered(share.step), done]
    return [events.Digested(0, "same")] if isinstance(request, spec.Digest) else []


def _said(*said: events.Event, generation: int = 1) -> node_pb2.WorkEvent:
    data = [wire.encode_event(event, generation) for event in said]
    return node_pb2.WorkEvent(events=node_pb2.WorkerEvents(events=data))


async def main() -> None:
    """Serve until the input ends; the port is printed."""
    trust = Trust(home())
    server = rpc.new_server(trust)
    handler = grpc.stream_stream_rpc_method_handler(
        work,
        request_deserializer=node_pb2.WorkRequest.FromString,
        response_serializer=node_pb2.WorkEvent.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Work": handler}),))
    port = rpc.listen(server, "127.0.0.1:0", trust)
    await server.start()
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)


if __name__ == "__main__":
    asyncio.run(main())
