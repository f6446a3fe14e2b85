"""Runs a function in several processes at once, as a launcher would start them. What they import is imported
once, in a server from which they fork.
"""

import multiprocessing
import os
import socket
import time

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["accelerate", "sklearn.datasets", "uvc.app.pipeline", "uvc.training.compress"]
)


def gang(count, work, *arguments, seconds=240):
    """What `work(*arguments)` returned in each of `count` processes, by rank: its value, or the exception;
    None of a process that was killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    inboxes, members = [], []
    for rank in range(count):
        inbox, outbox = CONTEXT.Pipe(duplex=False)
        member = CONTEXT.Process(target=_member, args=(rank, count, port, work, arguments, outbox))
        member.start()
        outbox.close()
        inboxes.append(inbox)
        members.append(member)
    end, found = time.monotonic() + seconds, []
    for inbox, member in zip(inboxes, members, strict=True):
        try:
            there = inbox.poll(max(end - time.monotonic(), 0))
            found.append(inbox.recv() if there else TimeoutError(f"no answer in {seconds} s"))
        except EOFError:
            found.append(None)
        member.join(5)
        member.kill()
    return found


def _member(rank, count, port, work, arguments, outbox):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "UVC_MEASURE": "0"}
    import torch

    torch.set_num_threads(1)
    try:
        answer = work(*arguments)
    except Exception as error:
        answer = error
    outbox.send(answer)
    outbox.close()
