"""`python -m warm_dist.distributed.torchrun …`: torchrun, whose stores are not open to every network.

torchrun's own stores listen on every address of the machine, and whoever reaches them can read and change what they
hold (https://pytorch.org/docs/stable/notes/security: "use them within a trusted network"). Here they listen on loopback
if there is one machine, else on the address that the others are told. The arguments are torchrun's.
"""

from __future__ import annotations

import signal
import sys
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend, static_tcp_rendezvous

from warm_dist.distributed.world import listen
from warm_dist.supervisor import REQUESTS

LOOPBACK = "127.0.0.1"


def bound_store(
    host_name: str, port: int, world_size: int | None = None, is_master: bool = False, *args: Any, **kwargs: Any
) -> TCPStore:
    """A TCPStore which, where it serves, listens on the address of `host_name` only. The arguments are TCPStore's."""
    if is_master:
        try:
            listener = listen(host_name, port)
        except OSError:
            pass  # in use, or an address that is not this machine's own, as behind a NAT: torch decides
        else:
            port = listener.getsockname()[1]
            kwargs["master_listen_fd"] = listener.detach()
    return TCPStore(host_name, port, world_size, is_master, *args, **kwargs)


@record
def main() -> None:
    args = run.parse_args(sys.argv[1:])
    if run.parse_min_max_nnodes(args.nnodes) == (1, 1):
        args.local_addr = args.local_addr or LOOPBACK
    if not any(word.startswith("--signals") for word in sys.argv):  # passed on to the ranks
        args.signals_to_handle = ",".join(
            signal.Signals(number).name for number in (*REQUESTS, signal.SIGINT, signal.SIGQUIT)
        )
    for module in (static_tcp_rendezvous, c10d_rendezvous_backend, dist):  # torch has no setting for it
        module.TCPStore = bound_store  # type: ignore[attr-defined]
    run.run(args)


if __name__ == "__main__":
    main()
