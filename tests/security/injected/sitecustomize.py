"""Python runs this in every process that has this folder on its path: a server of gRPC then records what it is sent.

``TANDEM_TEST_RECORD`` is the file; metadata and messages are appended as they come, before anything is made of them.
"""

import os

import grpc
import grpc.aio

RECORD = os.environ.get("TANDEM_TEST_RECORD", "")


def record(data):
    handle = os.open(RECORD, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(handle, data + b"\n")
    os.close(handle)


class Recorder(grpc.aio.ServerInterceptor):
    async def intercept_service(self, continuation, details):
        record(repr((details.method, details.invocation_metadata)).encode())
        return await continuation(details)


def recording(make):
    def handler(behaviour, request_deserializer=None, response_serializer=None):
        def read(data):
            record(data)
            return request_deserializer(data)

        return make(behaviour, read, response_serializer)

    return handler


if RECORD:
    for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
        name = f"{kind}_rpc_method_handler"
        setattr(grpc, name, recording(getattr(grpc, name)))
    server = grpc.aio.server

    def recording_server(*arguments, interceptors=None, **options):
        return server(*arguments, interceptors=[Recorder(), *(interceptors or ())], **options)

    grpc.aio.server = recording_server
