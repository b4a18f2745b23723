"""What one node of a cluster runs: torchrun with the node's share of the ranks, and then the run's own exit code.

`python launch/node.py --config …` takes launch/train.py's arguments. How many nodes and processes there are, and where
rank 0 is, torchrun reads from PET_NNODES, PET_NPROC_PER_NODE, PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT, as
Kubeflow Trainer sets them. It can be a container's first process.
"""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path

from launch.train import parse
from warm_dist import errors
from warm_dist.config.load import load_config
from warm_dist.kubernetes.node import _PR_SET_CHILD_SUBREAPER, FINISHED_S, STOPPED_S, torchrun, wait_for_orphans
from warm_dist.runs.folder import end_since


def main() -> int:
    args = parse()
    config = load_config(args.config, args.set)
    run = Path(config.output)
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans come to us, as they do to a first process
    began = time.time()
    code = torchrun(sys.argv[1:])
    end = end_since(run, began)
    wait_for_orphans(STOPPED_S if code else FINISHED_S, config.parallel.preemption_file)
    if code and end and end["code"]:  # torchrun's own says only that a rank has failed
        print(f"node: {end['reason']}", file=sys.stderr, flush=True)
        return int(end["code"])
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    errors.run(main)
