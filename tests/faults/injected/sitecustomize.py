"""Python runs this in every process that has this folder on its path: in a node's worker it makes the faults happen.

``TANDEM_TEST_FAULTS`` is a list of objects: ``do``; ``step``, or ``"at": "fuse"``; and, for those that take time,
``seconds``. Each happens once in the life of the folder ``TANDEM_TEST_FAULTS_DONE``, however many workers come after
the first. ``{"at": "model", "do": "bend"}`` changes a byte of a model file that arrives in the node's daemon.
Some are no faults: ``{"do": "pace", "overhead": …, "per_position": …}`` has every share take that long, and
``{"do": "device", "seconds": …}`` as long whatever its rows, as on a device that leaves the processor free, and whose
backward pass, half of a micro-batch's time, knows each gradient in its turn. ``{"do": "one run"}`` adds gradients up at
once, after all of them are computed.
"""

import importlib.abc
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

FAULTS = json.loads(os.environ.get("TANDEM_TEST_FAULTS", "[]"))
DONE = os.environ.get("TANDEM_TEST_FAULTS_DONE", "")
TRAINER, RING, REDUCER = "node.worker.trainer", "node.worker.ring", "node.worker.reducer"
EXPORT, STORE = "node.worker.export", "node.store"


PACE = next((fault for fault in FAULTS if fault["do"] in ("device", "pace")), {})
AT_ONCE = any(fault["do"] == "one run" for fault in FAULTS)
COMPUTING = {"until": 0.0, "last": 0.0}


def sleep_until(at):
    time.sleep(max(0.0, at - time.perf_counter()))


def paced(share):
    """Seconds that a share is to take, and its last micro-batch."""
    positions = [len(rows.lengths) * rows.padded_length for rows in share.micro_batches]
    if "seconds" in PACE:
        return PACE["seconds"], PACE["seconds"]
    if not PACE or not positions:
        return 0.0, 0.0
    seconds = PACE["overhead"] + sum(positions) * PACE["per_position"]
    return seconds, seconds * positions[-1] / sum(positions)


def first_time(number):
    try:
        os.close(os.open(os.path.join(DONE, str(number)), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def freeze(pids, seconds):
    if seconds:
        names = " ".join(map(str, pids))
        subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {names}"], start_new_session=True)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)


def happen(fault):
    me, daemon = os.getpid(), os.getppid()
    seconds = fault.get("seconds", 0)
    match fault["do"]:
        case "kill worker":
            os.kill(me, signal.SIGKILL)
        case "kill daemon":
            os.kill(daemon, signal.SIGKILL)
        case "kill host":
            os.kill(daemon, signal.SIGKILL)
            os.kill(me, signal.SIGKILL)
        case "freeze worker":
            freeze([me], seconds)
        case "freeze host":
            freeze([daemon, me], seconds)
        case "hang":
            time.sleep(3600)
        case "hang copies":
            sys.modules["node.worker.state"].save_arrays = lambda *_: time.sleep(3600)
        case "memory":
            raise RuntimeError("[metal::malloc] Attempting to allocate 99999999999 bytes which is greater than allowed")
        case "leave":
            os.kill(daemon, signal.SIGINT)
        case "slow" | "mark":
            pass
        case other:
            raise AssertionError(other)


def wrap_export(export):
    plain = export.fuse

    def fuse(*arguments, **options):
        written = plain(*arguments, **options)
        for number, fault in enumerate(FAULTS):
            if fault.get("at") == "fuse" and first_time(number):
                happen(fault)
        return written

    export.fuse = fuse


def wrap_trainer(trainer):
    from node.runs import run_count

    plain, local = trainer.Trainer.run, trainer.Trainer.run_local
    accumulate = trainer.Trainer._accumulate

    def begin(share):
        for number, fault in enumerate(FAULTS):
            if fault.get("step") == share.step and fault.get("at", "compute") == "compute" and first_time(number):
                happen(fault)

    def run(self, share):
        begin(share)
        return plain(self, share)

    def run_local(self, share):
        begin(share)
        return local(self, share)

    def slowed(self, share, **options):
        began = time.perf_counter()
        seconds, COMPUTING["last"] = paced(share)
        COMPUTING["until"] = began + seconds
        result = accumulate(self, share, **options)
        trainer.mx.eval(*result[:2])
        for number, fault in enumerate(FAULTS):
            if fault["do"] == "slow" and fault["step"] <= share.step < fault["step"] + fault["steps"]:
                time.sleep(9 * (time.perf_counter() - began))
            if fault.get("step") == share.step and fault.get("at") == "sum" and first_time(number):
                happen(fault)
        # A probe adds nothing up, nor does a machine alone.
        nothing_travels = bool(options) or self.reduce is trainer.alone
        if AT_ONCE or nothing_travels or run_count(sum(gradient.size for gradient in result[0].values())) == 1:
            sleep_until(COMPUTING["until"])
        return result

    trainer.Trainer.run, trainer.Trainer.run_local = run, run_local
    trainer.Trainer._accumulate = slowed


def wrap_store(store):
    plain = store.Arriving.write

    def write(self, data):
        for number, fault in enumerate(FAULTS):
            if fault.get("at") == "model" and first_time(number):
                data = bytes([data[0] ^ 1]) + bytes(data[1:])
        return plain(self, data)

    store.Arriving.write = write


def wrap_ring(ring):
    if AT_ONCE:
        ring.run_count = lambda numbers: 1


def wrap_reducer(reducer):
    plain = reducer.ReducerAdder.begin

    def begin(self, first, count, step, rounding=None):
        # The second half of a micro-batch is the way back, which knows one gradient after the other.
        left = 1 - (first + count) / len(self.numbers)
        sleep_until(COMPUTING["until"] - COMPUTING["last"] * left / 2)
        plain(self, first, count, step, rounding)

    reducer.ReducerAdder.begin = begin


WRAPPED = {TRAINER: wrap_trainer, RING: wrap_ring, REDUCER: wrap_reducer, EXPORT: wrap_export, STORE: wrap_store}


class Loader(importlib.abc.Loader):
    def __init__(self, plain):
        self.plain = plain

    def create_module(self, spec):
        return self.plain.create_module(spec)

    def exec_module(self, module):
        self.plain.exec_module(module)
        WRAPPED[module.__name__](module)


class Finder(importlib.abc.MetaPathFinder):
    def __init__(self):
        self.found = set()

    def find_spec(self, name, path, target=None):
        if name not in WRAPPED or name in self.found:
            return None
        self.found.add(name)
        spec = importlib.util.find_spec(name)
        spec.loader = Loader(spec.loader)
        return spec


if FAULTS:
    sys.meta_path.insert(0, Finder())
