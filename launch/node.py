"""Run one cluster node's share of the ranks under torchrun, and exit with the run's own exit code.

`python launch/node.py --config …` takes launch/train.py's arguments. torchrun reads the numbers of nodes and processes
and the address of rank 0 from PET_NNODES, PET_NPROC_PER_NODE, PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT, as
Kubeflow Trainer sets them. It can be a container's first process.
"""

from __future__ import annotations

import sys

from launch.arguments import parse_training
from warm_dist import errors
from warm_dist.config.run import load_config
from warm_dist.kubernetes.node import run_node


def main() -> int:
    args = parse_training(__doc__)
    return run_node(load_config(args.config, args.set), sys.argv[1:])


if __name__ == "__main__":
    errors.run(main)
